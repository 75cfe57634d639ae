"""Caches that are watched token by token.

The oracle of lossy caches: a dense token is what was fed, bit for bit; a token that is packed decodes to something
nearer to itself than to its neighbours, and from then on always to the same bits; and attention is that over the
decoded tokens, in float64.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import _BaseCache

from mlx_kvq_plugin.cache import STEP_TOKENS, KVQCache
from mlx_kvq_plugin.config import LayerSpec
from mlx_kvq_plugin.frame import KeyFrame
from mlx_kvq_plugin.rotary import Rotary, turn
from mlx_kvq_plugin.routing import RoutedAttention
from mlx_kvq_plugin.schemes import parse_scheme
from mlx_kvq_plugin.sliding import SlidingKVQCache

GROUP = 32  # of kivi
KIVI = ("kivi2", "kivi4", "kivi2+tq2.5")
SOME = ("kivi2", "kivi2+tq2.5", "tq2.5", "tq3+tq2")
SCHEMES = (*KIVI, "tq2.5", "tq4o16", "tq3+tq2", "qjl1", "tqprod3", "polar4", "grouped4", "turbo0v4")
WINDOW = 150  # no multiple of a group

HEADS, KV_HEADS, D, SCALE = 4, 2, 32, 0.3
ROTARY = Rotary("half", tuple(10000.0 ** (-j / 16) for j in range(16)))
ROUTED = RoutedAttention(scaled_dot_product_attention)
DRIFT = 24  # tokens of one level, fewer than a group
EVEN = 5.0  # the largest squared error of a packed token over the median, at most: a few would be of other tokens
CLOSE = 5e-5  # float32 attention to float64, outputs of about 1
ONE_CODE = 0.02  # what a code or two on a border change: energies of several queries are summed in another order


def layer_spec(scheme: str) -> LayerSpec:
    return parse_scheme(scheme).layer_spec()


def cache_of(spec: LayerSpec, window: int | None = None) -> Any:
    return KVQCache(spec, ROTARY) if window is None else SlidingKVQCache(spec, window, ROTARY)


def restored(cache: Any) -> Any:
    """The cache as a save and a load give it back: through copies of the arrays."""

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, mx.array) or not leaf.size:
            return leaf
        return mx.array(np.array(leaf.view(mx.uint8))).view(leaf.dtype)  # numpy has no bfloat16

    return type(cache).from_state(tree_map(copied, cache.state))


def arrays_of(value: Any) -> list[mx.array]:
    """Every array that a cache refers to, or another value."""
    if isinstance(value, mx.array):
        return [value]
    if isinstance(value, (_BaseCache, KeyFrame)):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    return [array for item in value for array in arrays_of(item)] if isinstance(value, (list, tuple)) else []


def exact_attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, window: int | None = None) -> np.ndarray:
    """Causal attention `(B, Hq, L, D)` in float64 of the newest L of T tokens `(B, Hkv, T, D)`."""
    L, T, rep = queries.shape[2], keys.shape[2], queries.shape[1] // keys.shape[1]
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (queries, keys, values))
    scores = SCALE * q @ np.repeat(k, rep, axis=1).swapaxes(-1, -2)
    age = np.arange(T - L, T)[:, None] - np.arange(T)
    scores = np.where((age >= 0) & (age < (window or T)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True) @ np.repeat(v, rep, axis=1))


class Watched:
    """A cache of one sequence with everything it was fed, and what its packed tokens decoded to."""

    def __init__(self, spec: LayerSpec, window: int | None = None, seed: int = 0):
        self.cache, self.window = cache_of(spec, window), window
        self.nearest = 0.6 if spec.key.startswith("qjl") else 0.3  # of the squared distance to a neighbour
        self.rng = np.random.default_rng(seed)
        self.mean = 2.0 * self.rng.standard_normal((1, KV_HEADS, 1, D)) * spec.frame  # one sign a channel loses it
        self.fed = [np.zeros((1, KV_HEADS, 0, D), np.float32) for _ in range(2)]
        self.seen = [x.copy() for x in self.fed]  # what tokens decoded to; NaN while they are dense

    @property
    def total(self) -> int:
        return int(self.fed[0].shape[2])

    def copied(self) -> Watched:
        return copy.deepcopy(self)

    def new_tokens(self, L: int) -> list[mx.array]:
        """Queries, keys and values of the next L tokens."""
        q, k, v = (self.rng.standard_normal((1, heads, L, D)) for heads in (HEADS, KV_HEADS, KV_HEADS))
        q, k, v = (mx.array(x.astype(np.float32)) for x in (q, self.mean + k, v))
        return [q, turn(ROTARY, k, self.total, L) + self.drift(L), v]

    def drift(self, L: int) -> mx.array | float:
        """What the next L keys have beside the others, so that no two groups of tokens have equal extremes."""
        if self.cache._group == 1:
            return 0.0
        parts = np.arange(self.total, self.total + L) // DRIFT
        levels = [np.random.default_rng((5, part)).standard_normal((1, KV_HEADS, 1, D)) for part in parts]
        return mx.array(1.5 * np.concatenate(levels, axis=2).astype(np.float32))

    def record(self, keys: mx.array, values: mx.array) -> None:
        """Note tokens that the cache was fed."""
        for i, x in enumerate((keys, values)):
            self.fed[i] = np.concatenate([self.fed[i], np.array(x)], axis=2)
            self.seen[i] = np.concatenate([self.seen[i], np.full(x.shape, np.nan, np.float32)], axis=2)

    def attend(self, qkv: list[mx.array]) -> np.ndarray:
        """The routed attention of new tokens; the cache packs what overflows."""
        q, k, v = qkv
        mask = create_attention_mask(mx.zeros((1, q.shape[2], 1)), self.cache, window_size=self.window)
        output = ROUTED(q, *self.cache.update_and_fetch(k, v), cache=self.cache, scale=SCALE, mask=mask)
        self.record(k, v)
        return np.array(output)

    def append(self, L: int, check: bool = True) -> None:
        """L new tokens in one call, their attention compared with float64."""
        qkv = self.new_tokens(L)
        expected, _, atol = self.expected(qkv) if check else (None, None, 0.0)
        found = self.attend(qkv)
        if expected is not None:
            np.testing.assert_allclose(found, expected, rtol=0, atol=atol)

    def expected(self, qkv: list[mx.array]) -> tuple[np.ndarray, Any, float]:
        """What attention must give: to the decoded tokens; in a step of several tokens, as of single steps.

        Also the cache that made it, and the tolerance.
        """
        twin, L = copy.deepcopy(self.cache), qkv[0].shape[2]
        size = 1 if L <= STEP_TOKENS else L
        parts = [[x[:, :, i : i + size] for x in qkv] for i in range(0, L, size)]
        output = np.concatenate([attention_on(twin, part, self.window) for part in parts], axis=2)
        summed = 1 < L <= STEP_TOKENS and twin.uses_frame and twin._frozen and not self.cache._frozen
        return output, twin, ONE_CODE if summed else CLOSE

    def verify(self, L: int, rejected: int) -> None:
        """Speculative decoding: a step of L tokens, the last of them trimmed: as if they had never come."""
        qkv = self.new_tokens(L)
        kept = [x[:, :, : L - rejected] for x in qkv]
        expected, twin, atol = self.expected(kept)
        found = self.attend(qkv)
        np.testing.assert_allclose(found[:, :, : L - rejected], expected, rtol=0, atol=atol)
        if rejected:
            self.trim(rejected)
        if atol == CLOSE:
            same = copy.deepcopy(self.cache)
            for cache in (same, twin):
                cache.compact()
            assert same.packed_tokens == twin.packed_tokens
            for a, b in zip(same.decode_all(), twin.decode_all(), strict=True):
                assert mx.array_equal(a, b)

    def steps(self, count: int) -> None:
        """Single tokens, the attention of the last compared."""
        for i in range(count):
            self.append(1, check=i == count - 1)

    def trim(self, n: int) -> None:
        n = min(n, self.total)
        assert self.cache.is_trimmable() and self.cache.trim(n) == n
        self.fed, self.seen = ([x[:, :, : x.shape[2] - n] for x in side] for side in (self.fed, self.seen))

    def check(self) -> None:
        """The cache holds the tokens that it should, and the packed ones have not changed."""
        cache, total = self.cache, self.total
        assert cache.offset == total
        waiting = cache._newest if cache.shared else STEP_TOKENS  # newer tokens than those that have pushed others out
        most = total if self.window is None else min(total, self.window + waiting)
        least = total if self.window is None else min(total, self.window)
        assert least <= cache.held <= most
        if cache.empty():
            return
        assert cache.nbytes == sum(array.nbytes for array in arrays_of(cache))
        first = total - cache.held
        start = first + cache.sink_tokens
        stop = start + cache.packed_tokens
        dense = np.r_[first:start, stop:total]
        for side, decoded in enumerate(cache.decode_all()):
            found = np.array(decoded)
            assert found.shape[2] == cache.held
            fed, seen = self.fed[side], self.seen[side]
            np.testing.assert_array_equal(found[:, :, dense - first], fed[:, :, dense])
            assert np.isnan(seen[:, :, dense]).all(), "a packed token became dense again"
            packed, known = found[:, :, start - first : stop - first], seen[:, :, start:stop]
            new = np.isnan(known).all(axis=(0, 1, 3))
            np.testing.assert_array_equal(packed[:, :, ~new], known[:, :, ~new])
            if new.any():
                own, other = (
                    ((packed - x[:, :, start:stop]) ** 2).sum(axis=(0, 1, 3))[new] for x in (fed, np.roll(fed, 1, 2))
                )
                assert own.max() <= EVEN * np.median(own)
                assert (own < other).all() and (own.size < 8 or own.sum() < self.nearest * other.sum())
                known[:, :, new] = packed[:, :, new]  # a view of what was seen


def watched(scheme: str, window: int | None = None, seed: int = 0, **changes: Any) -> Watched:
    return Watched(layer_spec(scheme).with_(**changes), window, seed)


def filled(scheme: str, tokens: int = 200, window: int | None = None, seed: int = 0, **changes: Any) -> Watched:
    """A prompt but for the last tokens, which come singly."""
    found = watched(scheme, window, seed, **changes)
    found.append(tokens - 20)
    found.steps(20)
    found.check()
    return found


def shared_rows(cache: KVQCache) -> set[int]:
    """Rows in the planes with a row for several tokens."""
    names = [name for names in cache._shared_planes() for name in names]
    planes = {**cache.key_planes, **cache.value_planes}
    return {planes[name].shape[2] for name in names}


def attention_on(cache: Any, qkv: list[mx.array], window: int | None) -> np.ndarray:
    """Append tokens, attend in float64 to what is stored then, and let the cache pack."""
    q, k, v = qkv
    cache.update_and_fetch(k, v)
    cache.observe_queries(q)
    output = exact_attention(np.array(q), *map(np.array, cache.decode_all()), window)
    cache.settle()
    return output


def attend_together(batch: Any, members: list[Watched], steps: int = 1) -> None:
    """Single tokens in every row of a batch, which are the caches of `members` from then on; the last are compared."""
    for member, row in zip(members, batch.rows, strict=True):
        member.cache = row
    for step in range(steps):
        tokens = [member.new_tokens(1) for member in members]
        last = step == steps - 1
        expected = [member.expected(qkv)[0] for member, qkv in zip(members, tokens, strict=True) if last]
        q, k, v = (mx.concatenate(parts) for parts in zip(*tokens, strict=True))
        mask = create_attention_mask(mx.zeros((len(members), 1, 1)), batch, window_size=members[0].window)
        found = ROUTED(q, *batch.update_and_fetch(k, v), cache=batch, scale=SCALE, mask=mask)
        if last:
            np.testing.assert_allclose(np.array(found), np.concatenate(expected), rtol=0, atol=CLOSE)
        for member, (_, keys, values) in zip(members, tokens, strict=True):
            member.record(keys, values)


def prompt_together(batch: Any, members: list[Watched], lengths: list[int]) -> None:
    """Prompts of several lengths, padded on the right, for the rows of a batch, which `members` hold."""
    longest = max(lengths)
    tokens = [member.new_tokens(length) for member, length in zip(members, lengths, strict=True)]
    expected = []
    for member, row, qkv in zip(members, batch.rows, tokens, strict=True):
        member.cache = row
        expected.append(member.expected(qkv)[0])
    pads = [longest - length for length in lengths]
    batch.prepare(lengths=lengths, right_padding=pads)
    mask = create_attention_mask(mx.zeros((len(members), longest, 1)), batch, window_size=members[0].window)
    q, k, v = (
        mx.concatenate([mx.pad(x, [(0, 0), (0, 0), (0, pad), (0, 0)]) for x, pad in zip(side, pads, strict=True)])
        for side in zip(*tokens, strict=True)
    )
    found = np.array(ROUTED(q, *batch.update_and_fetch(k, v), cache=batch, scale=SCALE, mask=mask))
    batch.finalize()
    for i, (member, (_, keys, values), length) in enumerate(zip(members, tokens, lengths, strict=True)):
        np.testing.assert_allclose(found[i : i + 1, :, :length], expected[i], rtol=0, atol=CLOSE)
        member.record(keys, values)
