"""Random histories: the same operations on our caches with lossless codecs and on mlx-lm's, equal after each.

With lossy codecs there is nothing of mlx-lm's to compare with: there, tokens and attention are watched
(watched_caches.py).

`KVQ_HISTORIES` is the number of histories per machine; the default is a small part, the same on every run.
`KVQ_HISTORIES=2000 pytest tests/test_cache_histories.py` is the full check.
"""

from __future__ import annotations

import copy
import os
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mlx.utils import tree_map
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache
from watched_caches import Watched, attend_together, layer_spec
from watched_caches import restored as restored_bits

from mlx_kvq_plugin.cache import STEP_TOKENS, KVQCache
from mlx_kvq_plugin.config import LayerSpec
from mlx_kvq_plugin.rotary import no_rotation
from mlx_kvq_plugin.routing import RoutedAttention
from mlx_kvq_plugin.sliding import SlidingKVQCache

HISTORIES = int(os.environ.get("KVQ_HISTORIES", "12"))
SETTINGS = settings(
    max_examples=HISTORIES,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, *((Phase.shrink,) if "KVQ_HISTORIES" in os.environ else ())),
)
HEADS, KV_HEADS, D, WINDOW, SCALE = 4, 2, 8, 24, 1.0
ROUTED = RoutedAttention(scaled_dot_product_attention)


def normal(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32))


def queries_keys_values(rng: np.random.Generator, B: int, L: int) -> list[mx.array]:
    return [normal(rng, B, heads, L, D) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def mask_of(cache: Any, N: int, **arguments: Any) -> Any:
    """The mask that a model asks the cache for."""
    return create_attention_mask(mx.zeros((1, N, 1)), cache, **arguments)


def same_mask(found: Any, expected: Any) -> bool:
    if isinstance(expected, mx.array):
        return isinstance(found, mx.array) and mx.array_equal(found, expected)
    return found is expected or found == expected


def restored(cache: Any) -> Any:
    """The cache as a save and a load give it back: through copies of the arrays."""

    def copied(leaf: Any) -> Any:
        return mx.array(np.array(leaf)) if isinstance(leaf, mx.array) and leaf.size else leaf

    return type(cache).from_state(tree_map(copied, cache.state))


class Kind:
    """What full and sliding layers differ in."""

    def __init__(self, sliding: bool, sinks: int, recent: int, narrower: int = 0):
        self.window = WINDOW - narrower if sliding else None  # that the model's masks ask for
        self.spec = LayerSpec("identity", "identity", sinks=sinks, recent=recent)

    def ours(self) -> Any:
        return SlidingKVQCache(self.spec, WINDOW, no_rotation()) if self.window else KVQCache(self.spec, no_rotation())

    def stock(self) -> Any:
        return RotatingKVCache(max_size=WINDOW) if self.window else KVCache()

    def live(self, stock: Any) -> tuple[mx.array, mx.array] | None:
        """The tokens in order that a cache must hold, of mlx-lm's cache; more than a window is not needed."""
        if stock.keys is None:
            return None
        if self.window:
            keys, values = (stock._temporal_order(x) for x in (stock.keys, stock.values))
            return keys[..., -WINDOW:, :], values[..., -WINDOW:, :]
        return stock.keys[..., : stock.offset, :], stock.values[..., : stock.offset, :]


def attend_ours(cache: Any, qkv: list[mx.array], mask: Any) -> mx.array:
    q, k, v = qkv
    return ROUTED(q, *cache.update_and_fetch(k, v), cache=cache, scale=SCALE, mask=mask)


def attend_stock(cache: Any, qkv: list[mx.array], mask: Any) -> mx.array:
    q, k, v = qkv
    return scaled_dot_product_attention(q, *cache.update_and_fetch(k, v), cache=cache, scale=SCALE, mask=mask)


class History(RuleBasedStateMachine):
    """One sequence."""

    SLIDING: ClassVar[bool] = False

    @initialize(seed=st.integers(0, 2**16), sinks=st.sampled_from([0, 1, 4]), recent=st.sampled_from([0, 7, 16]))
    def start(self, seed: int, sinks: int, recent: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.kept: list[tuple[Any, mx.array, mx.array]] = []
        self.kind = Kind(self.SLIDING, sinks, recent)
        self.cache, self.stock = self.kind.ours(), self.kind.stock()

    def attend_both(self, L: int) -> None:
        qkv = queries_keys_values(self.rng, 1, L)
        mask, stock_mask = (mask_of(c, L, window_size=self.kind.window) for c in (self.cache, self.stock))
        assert same_mask(mask, stock_mask)
        assert mx.array_equal(attend_ours(self.cache, qkv, mask), attend_stock(self.stock, qkv, stock_mask))
        self.newest = L

    @rule(count=st.integers(1, 30))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.attend_both(1)

    @rule(L=st.integers(2, 20))
    def chunk(self, L: int) -> None:
        self.attend_both(L)

    @rule(L=st.sampled_from([30, 50, 64]))
    def long_chunk(self, L: int) -> None:
        self.attend_both(L)

    @rule(L=st.integers(3, STEP_TOKENS), part=st.floats(0, 1))
    def verify(self, L: int, part: float) -> None:
        """Speculative decoding: L tokens in one step, the last of them rejected; mlx-lm's cache never sees those."""
        rejected = int(part * (L - 2))
        q, k, v = queries_keys_values(self.rng, 1, L)
        found = attend_ours(self.cache, [q, k, v], mask_of(self.cache, L, window_size=self.kind.window))
        assert self.cache.is_trimmable() and self.cache.trim(rejected) == rejected
        accepted = [x[:, :, : L - rejected] for x in (q, k, v)]
        mask = mask_of(self.stock, L - rejected, window_size=self.kind.window)
        expected = attend_stock(self.stock, accepted, mask)
        np.testing.assert_allclose(found[:, :, : L - rejected], expected, atol=2e-5)
        self.newest = L

    @precondition(lambda self: self.stock.is_trimmable())
    @rule(n=st.integers(0, 40))
    def trim(self, n: int) -> None:
        assert self.cache.is_trimmable()
        assert self.cache.trim(n) == self.stock.trim(n)

    @precondition(lambda self: self.stock.is_trimmable())
    @rule(part=st.floats(0, 1.1))
    def trim_a_part(self, part: float) -> None:
        n = int(part * self.stock.offset)
        assert self.cache.trim(n) == self.stock.trim(n)

    @rule()
    def copy_and_go_on(self) -> None:
        if not self.cache.empty():
            self.kept.append((self.cache, *(mx.array(np.array(x)) for x in self.cache.decode_all())))
        self.cache = copy.deepcopy(self.cache)

    @rule()
    def save_and_restore(self) -> None:
        self.cache = restored(self.cache)

    @rule()
    def batch_of_one_and_back(self) -> None:
        if not self.cache.empty():
            self.cache = self.cache.merge([self.cache]).extract(0)

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "cache") or self.cache.empty():
            return
        expected = self.kind.live(self.stock)
        assert expected is not None
        count = expected[0].shape[2]
        assert self.cache.held == count or self.cache.held - WINDOW < self.newest <= STEP_TOKENS
        for found, tokens in zip(self.cache.decode_all(), expected, strict=True):
            assert mx.array_equal(found[..., found.shape[2] - count :, :], tokens)
        assert self.cache.offset == self.stock.offset and self.cache.size() == self.stock.size()
        windows = (WINDOW - 7, WINDOW) if self.kind.window else (None, 9, 500)
        for N in (1, 2, 5):
            for arguments in ({}, {"return_array": True}, *({"window_size": w} for w in windows)):
                assert same_mask(mask_of(self.cache, N, **arguments), mask_of(self.stock, N, **arguments))

    def teardown(self) -> None:
        for cache, keys, values in getattr(self, "kept", []):
            found = cache.decode_all()
            assert mx.array_equal(found[0], keys) and mx.array_equal(found[1], values), "a copy changed its source"


class SlidingHistory(History):
    SLIDING: ClassVar[bool] = True


class BatchHistory(RuleBasedStateMachine):
    """Several sequences: mlx-lm's batch cache for masks and positions, its single caches for tokens and outputs."""

    SLIDING: ClassVar[bool] = False

    @initialize(
        seed=st.integers(0, 2**16),
        sinks=st.sampled_from([0, 4]),
        recent=st.sampled_from([0, 7]),
        narrower=st.sampled_from([0, 5]),
    )
    def start(self, seed: int, sinks: int, recent: int, narrower: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.kept: list[tuple[Any, mx.array, mx.array]] = []
        self.kind = Kind(self.SLIDING, sinks, recent, narrower)
        self.batch: Any = None
        self.stock: Any = None
        self.singles: list[Any] = []

    @property
    def running(self) -> bool:
        return self.batch is not None

    def attend_all(self, B: int, L: int, lengths: list[int]) -> None:
        """L columns for every row, of which the first `lengths` are real."""
        qkv = queries_keys_values(self.rng, B, L)
        if self.SLIDING and L > 1 and self.stock.keys is not None:
            self.stock._temporal_order()  # by itself mlx-lm loses the oldest token of a padded row in a full ring
        mask, stock_mask = (mask_of(c, L, window_size=self.kind.window) for c in (self.batch, self.stock))
        assert same_mask(mask, stock_mask)
        found, padded = attend_ours(self.batch, qkv, mask), attend_stock(self.stock, qkv, stock_mask)
        for i, (single, real) in enumerate(zip(self.singles, lengths, strict=True)):
            assert not mx.any(found[i, :, real:]), "padding must give zeros"
            if real:
                own = [x[i : i + 1, :, :real] for x in qkv]
                expected = attend_stock(single, own, mask_of(single, real, window_size=self.kind.window))
                assert mx.allclose(found[i : i + 1, :, :real], expected, rtol=0, atol=2e-6)
                assert mx.allclose(found[i : i + 1, :, :real], padded[i : i + 1, :, :real], rtol=0, atol=2e-5)

    def joined(self, ours: list[Any], stock: list[Any]) -> None:
        batch, stock_batch = ours[0].merge(ours), stock[0].merge(stock)
        self.kept += [(cache, *map(mx.array, map(np.array, cache.decode_all()))) for cache in ours if not cache.empty()]
        if self.running:
            self.batch.extend(batch)
            self.stock.extend(stock_batch)
        else:
            self.batch, self.stock = batch, stock_batch
        self.singles += [copy.deepcopy(single) for single in stock]

    @precondition(lambda self: len(self.singles) < 6)
    @rule(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=3), steps=st.integers(0, 12))
    def join(self, lengths: list[int], steps: int) -> None:
        """Sequences with histories of their own."""
        ours, stock = [], []
        for length in lengths:
            cache, reference = self.kind.ours(), self.kind.stock()
            for L in [length] * (length > 0) + [1] * steps * (length > 0):
                qkv = queries_keys_values(self.rng, 1, L)
                attend_ours(cache, qkv, mask_of(cache, L, window_size=self.kind.window))
                attend_stock(reference, qkv, mask_of(reference, L, window_size=self.kind.window))
            ours.append(cache)
            stock.append(reference)
        self.joined(ours, stock)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), chunk=st.sampled_from([5, 16, 100]))
    def prompts(self, data: st.DataObject, chunk: int) -> None:
        """Prompts of several lengths, padded on the right, in chunks."""
        B = len(self.singles)
        lengths = data.draw(st.lists(st.integers(1, 40), min_size=B, max_size=B))
        longest = max(lengths)
        if min(lengths) < longest:
            for cache in (self.batch, self.stock):
                cache.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
        if self.SLIDING and longest % chunk == 1:
            chunk = 100  # mlx-lm's ring refuses a last chunk of one token; tests/test_batch.py has ours take it
        for start in range(0, longest, chunk):
            L = min(chunk, longest - start)
            self.attend_all(B, L, [max(0, min(n - start, L)) for n in lengths])
        if min(lengths) < longest:
            for cache in (self.batch, self.stock):
                cache.finalize()

    @precondition(lambda self: self.running)
    @rule(count=st.integers(1, 30))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.attend_all(len(self.singles), 1, [1] * len(self.singles))

    @precondition(lambda self: len(self.singles) > 1)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        keep = data.draw(st.sets(st.integers(0, len(self.singles) - 1), min_size=1))
        for cache in (self.batch, self.stock):
            cache.filter(sorted(keep))
        self.singles = [self.singles[i] for i in sorted(keep)]

    @precondition(lambda self: len(self.singles) > 1)
    @rule(data=st.data())
    def leave_and_join_again(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.singles) - 1))
        ours, stock = self.batch.extract(i), self.singles[i]
        keep = [j for j in range(len(self.singles)) if j != i]
        for cache in (self.batch, self.stock):
            cache.filter(keep)
        del self.singles[i]
        if not ours.empty():
            qkv = queries_keys_values(self.rng, 1, 1)
            found = attend_ours(ours, qkv, mask_of(ours, 1, window_size=self.kind.window))
            expected = attend_stock(stock, qkv, mask_of(stock, 1, window_size=self.kind.window))
            assert mx.allclose(found, expected, rtol=0, atol=2e-6)
        self.joined([ours], [stock])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 12))
    def go_on_apart(self, data: st.DataObject, count: int) -> None:
        """A row that is extracted and used does not touch the batch."""
        row = self.batch.extract(data.draw(st.integers(0, len(self.singles) - 1)))
        for _ in range(count):
            attend_ours(row, queries_keys_values(self.rng, 1, 1), mask_of(row, 1, window_size=self.kind.window))

    @precondition(lambda self: self.running and self.stock.is_trimmable())
    @rule(part=st.floats(0, 1))
    def trim(self, part: float) -> None:
        n = int(part * min(single.offset for single in self.singles))
        if all(single.is_trimmable() for single in self.singles) and n:
            assert self.batch.trim(n) == self.stock.trim(n) == n
            assert {single.trim(n) for single in self.singles} == {n}

    @precondition(lambda self: self.running)
    @rule()
    def copy_and_go_on(self) -> None:
        source, self.batch = self.batch, copy.deepcopy(self.batch)
        source.filter([0])

    @precondition(lambda self: self.running)
    @rule()
    def save_and_restore(self) -> None:
        self.batch = restored(self.batch)

    @invariant()
    def equal(self) -> None:
        if not getattr(self, "singles", []):
            return
        assert mx.array_equal(self.batch.offset, self.stock.offset) and self.batch.size() == self.stock.size()
        for row, single in zip(self.batch.rows, self.singles, strict=True):
            expected = self.kind.live(single)
            assert row.offset == single.offset and row.empty() == (expected is None)
            for found, tokens in zip(row.decode_all(), expected, strict=True) if expected else ():
                assert mx.array_equal(found[..., found.shape[2] - tokens.shape[2] :, :], tokens)

    def teardown(self) -> None:
        for cache, keys, values in getattr(self, "kept", []):
            found = cache.decode_all()
            assert mx.array_equal(found[0], keys) and mx.array_equal(found[1], values), "a batch changed its source"


class SlidingBatchHistory(BatchHistory):
    SLIDING: ClassVar[bool] = True


class WatchedHistory(RuleBasedStateMachine):
    """Lossy codecs of every kind: groups of tokens, statistics, one codec a head, keys only, groups of channels."""

    @initialize(
        seed=st.integers(0, 2**16),
        scheme=st.sampled_from(["kivi2", "kivi4", "tq2.5", "tq3+tq2", "kivi2+tq4o16", "qjl1", "tqprod3", "turbo0v4"]),
        frame=st.booleans(),
        sinks=st.sampled_from([0, 4]),
        recent=st.sampled_from([0, 16]),
        compress_after=st.sampled_from(["chunk", "chunk", "prefill"]),
        window=st.sampled_from([None, None, 144]),
        shared=st.booleans(),
    )
    def start(self, seed: int, scheme: str, window: int | None, shared: bool, **changes: Any) -> None:
        self.watched = Watched(layer_spec(scheme).with_(**changes), window, seed)
        self.watched.cache.shared = shared
        self.kept: list[Watched] = []

    @property
    def trimmable(self) -> bool:
        return self.watched.cache.held == self.watched.cache.offset

    @rule(count=st.integers(1, 40))
    def steps(self, count: int) -> None:
        self.watched.steps(count)

    @rule(L=st.sampled_from([17, 32, 60, 150]))
    def chunk(self, L: int) -> None:
        self.watched.append(L)

    @rule(L=st.integers(2, STEP_TOKENS), part=st.sampled_from([0.0, 0.5, 1.0]))
    def verify(self, L: int, part: float) -> None:
        self.watched.verify(L, int(part * (L - 1)))

    @precondition(lambda self: self.trimmable)
    @rule(n=st.integers(0, 100))
    def trim(self, n: int) -> None:
        self.watched.trim(n)

    @precondition(lambda self: self.trimmable)
    @rule(part=st.floats(0, 1))
    def trim_a_part(self, part: float) -> None:
        self.watched.trim(int(part * self.watched.total))

    @rule()
    def copy_and_go_on(self) -> None:
        self.kept.append(self.watched)
        self.watched = self.watched.copied()

    @rule()
    def save_and_restore(self) -> None:
        self.watched.cache = restored_bits(self.watched.cache)

    @precondition(lambda self: self.watched.total)
    @rule(length=st.integers(1, 100), count=st.integers(1, 20))
    def in_a_batch(self, length: int, count: int) -> None:
        """With another sequence, which leaves earlier."""
        self.kept.append(self.watched)
        self.watched, other = self.watched.copied(), Watched(self.watched.cache.spec, self.watched.window, length)
        other.append(length)
        members = [other, self.watched]
        batch = other.cache.merge([member.cache for member in members])
        attend_together(batch, members, count)
        other.cache = batch.extract(0)
        other.check()
        batch.filter([1])
        attend_together(batch, members[1:], 1 + count // 2)
        self.watched.cache = batch.extract(0)

    @invariant()
    def tokens_are_what_they_were(self) -> None:
        if hasattr(self, "watched"):
            self.watched.check()

    def teardown(self) -> None:
        for watched in getattr(self, "kept", []):
            watched.check()


TestWatchedHistory = WatchedHistory.TestCase
TestHistory = History.TestCase
TestSlidingHistory = SlidingHistory.TestCase
TestBatchHistory = BatchHistory.TestCase
TestSlidingBatchHistory = SlidingBatchHistory.TestCase
for _case in (TestWatchedHistory, TestHistory, TestSlidingHistory, TestBatchHistory, TestSlidingBatchHistory):
    _case.settings = SETTINGS
del _case  # or pytest collects it once more
