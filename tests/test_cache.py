"""The caches: random histories against mlx-lm's own caches, what a lossy cache may and may not do to a token, bytes."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from mlx.utils import tree_map
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_kvq_plugin.cache import STEP_TOKENS, KVQCache
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.config import LayerSpec
from mlx_kvq_plugin.errors import CacheStateError
from mlx_kvq_plugin.frame import MIN_TOKENS, SKIP_TOKENS
from mlx_kvq_plugin.growth import BLOCK
from mlx_kvq_plugin.rotary import Rotary, turn
from mlx_kvq_plugin.routing import RoutedAttention
from mlx_kvq_plugin.sliding import SlidingKVQCache, smallest_window

D = 64
WINDOW = 144
ROTARY = Rotary("half", tuple(10000.0 ** (-j / 32) for j in range(32)))
ROUTED = RoutedAttention(scaled_dot_product_attention)
LOSSY = ["tq4", "rvq1", "affine4"]

SETTINGS = settings(
    max_examples=12,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def normal(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32))


def tokens_like_keys(seed: int, count: int, batch: int = 1, heads: int = 2, dim: int = D) -> mx.array:
    """Post-RoPE keys of positions 0.. with a mean that is larger than what differs between tokens."""
    rng = np.random.default_rng(seed)
    mean = 3.0 * normal(rng, 1, heads, 1, dim)
    return turn(ROTARY, mean + normal(rng, batch, heads, count, dim), 0, count)


def tokens_like_values(seed: int, count: int, batch: int = 1, heads: int = 2, dim: int = D) -> mx.array:
    rng = np.random.default_rng(seed + 1000)
    return normal(rng, batch, heads, count, dim) * mx.array(1 + 3 * rng.random((1, 1, count, 1)).astype(np.float32))


def feed(cache: Any, keys: mx.array, values: mx.array, chunks: Any, queries: mx.array | None = None) -> None:
    """Append all tokens in `chunks`, an int or a list of sizes, as attention would."""
    total = keys.shape[2]
    sizes = (
        [chunks] * (total // chunks) + [total % chunks] * bool(total % chunks) if isinstance(chunks, int) else chunks
    )
    assert sum(sizes) == total
    start = 0
    for size in sizes:
        piece = slice(start, start + size)
        cache.update_and_fetch(keys[:, :, piece], values[:, :, piece])
        if queries is not None:
            cache.observe_queries(queries[:, :, piece])
        cache.compact()
        start += size
        if start % 256 == 0:
            mx.eval(cache.state)


def planes_of(cache: KVQCache) -> dict[str, np.ndarray]:
    """The packed bytes, per plane, as unsigned integers."""
    found = {}
    for side, planes in zip(("key", "value"), cache.packed_planes(), strict=True):
        for name, plane in planes.items():
            found[f"{side}.{name}"] = np.array(plane.view(mx.uint8))
    return found


def assert_equal_bytes(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def first_rows(planes: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return {name: rows[:, :, :count] for name, rows in planes.items()}


def restored(cache: Any) -> Any:
    """The cache as a save and a load give it back: through copies of the arrays."""

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, mx.array):
            return leaf
        return mx.array(np.array(leaf.view(mx.uint8))).view(leaf.dtype)  # numpy has no bfloat16

    return type(cache).from_state(tree_map(copied, cache.state))


def relative_error(found: mx.array, expected: mx.array) -> np.ndarray:
    """Per token: RMS error over RMS."""
    f, e = np.array(found).astype(np.float64), np.array(expected).astype(np.float64)
    return np.sqrt(((f - e) ** 2).mean(axis=(0, 1, 3)) / (e**2).mean(axis=(0, 1, 3)))


def mask_of(cache: Any, N: int, **arguments: Any) -> Any:
    """The mask that a model asks the cache for."""
    return create_attention_mask(mx.zeros((1, N, 1)), cache, **arguments)


def same_mask(found: Any, expected: Any) -> bool:
    if isinstance(expected, mx.array):
        return isinstance(found, mx.array) and mx.array_equal(found, expected)
    return found is expected or found == expected


# ---- random histories, lossy codecs (test_cache_histories.py has the lossless ones) -------------------------------


class LossyHistory(RuleBasedStateMachine):
    """Whatever happens, packed bytes are what the frozen statistics make of the token and its position alone."""

    @initialize(
        seed=st.integers(0, 2**16),
        codecs=st.sampled_from([("tq4", "tq2"), ("rvq1", "affine4"), ("affine4", "rvq1")]),
        sinks=st.sampled_from([0, 4]),
        recent=st.sampled_from([0, 32]),
        frame=st.booleans(),
        window=st.sampled_from([None, None, WINDOW]),
    )
    def start(
        self, seed: int, codecs: tuple[str, str], sinks: int, recent: int, frame: bool, window: int | None
    ) -> None:
        spec = LayerSpec(*codecs, frame=frame, sinks=sinks, recent=recent)
        self.cache: Any = KVQCache(spec, ROTARY) if window is None else SlidingKVQCache(spec, window, ROTARY)
        self.rng = np.random.default_rng(seed)
        self.mean = 3.0 * normal(self.rng, 1, 2, 1, D)
        self.keys, self.values = mx.zeros((1, 2, 0, D)), mx.zeros((1, 2, 0, D))
        self.statistics: Any = None

    def append(self, L: int) -> None:
        position = self.keys.shape[2]
        k = turn(ROTARY, self.mean + normal(self.rng, 1, 2, L, D), position, L)
        v = normal(self.rng, 1, 2, L, D)
        mask = mask_of(self.cache, L, window_size=getattr(self.cache, "max_size", None))
        q = normal(self.rng, 1, 4, L, D)
        mx.eval(ROUTED(q, *self.cache.update_and_fetch(k, v), cache=self.cache, scale=0.1, mask=mask))
        self.keys = mx.concatenate([self.keys, k], axis=2)
        self.values = mx.concatenate([self.values, v], axis=2)

    @rule(count=st.integers(1, 40))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.append(1)

    @rule(L=st.sampled_from([2, 15, 17, 40, 150]))
    def chunk(self, L: int) -> None:
        self.append(L)

    @rule(n=st.integers(0, 70))
    def trim(self, n: int) -> None:
        if self.cache.held < self.cache.offset:
            n = min(n, self.cache._rollback)
        n = self.cache.trim(n)
        self.keys, self.values = (x[:, :, : x.shape[2] - n] for x in (self.keys, self.values))

    @rule()
    def copy_and_go_on(self) -> None:
        self.cache = copy.deepcopy(self.cache)

    @rule()
    def save_and_restore(self) -> None:
        self.cache = restored(self.cache)

    @invariant()
    def packed_bytes_follow_from_the_token(self) -> None:
        if not hasattr(self, "cache") or self.cache.empty():
            return
        cache, count = self.cache, self.cache.packed_tokens
        total = self.keys.shape[2]
        assert cache.offset == total and cache.held <= total
        frozen = None if cache.frame is None else [np.array(array) for array in cache.frame.arrays()]
        if count and self.statistics is not None:
            for now, before in zip(frozen or [], self.statistics, strict=True):
                np.testing.assert_array_equal(now, before)
        self.statistics = (frozen or []) if count else None
        first = total - cache.held + cache.sink_tokens
        if count:
            assert (cache.frame is not None) == cache.spec.frame
            keys, values = (x[:, :, first : first + count] for x in (self.keys, self.values))
            keys = keys if cache.frame is None else cache.frame.encode(keys, first)
            expected_keys = cache.key_codec.encode(keys, cache.key_statistics)
            expected_values = cache.value_codec.encode(cache.scaled_values(values), cache.value_statistics)
            found_keys, found_values = cache.packed_planes()
            for found, expected in ((found_keys, expected_keys), (found_values, expected_values)):
                assert list(found) == list(expected)
                for name in expected:
                    assert mx.array_equal(found[name].view(mx.uint8), expected[name].view(mx.uint8)), name
        dense = [*range(total - cache.held, first), *range(first + count, total)]
        for found, fed in zip(cache.dense_tokens(), (self.keys, self.values), strict=True):
            assert mx.array_equal(found, fed[:, :, mx.array(dense, mx.int32)] if dense else fed[:, :, :0])


TestLossyHistory = LossyHistory.TestCase
TestLossyHistory.settings = SETTINGS


# ---- what packing does to tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", LOSSY)
def test_packed_bytes_of_a_token_never_change(codec):
    keys, values = tokens_like_keys(1, 420), tokens_like_values(1, 420)
    cache = KVQCache(LayerSpec(codec, codec), ROTARY)
    seen: dict[str, np.ndarray] = {}
    written = 0
    for start, stop in [(0, 130), (130, 190), *((n, n + 1) for n in range(190, 400)), (400, 420)]:
        feed(cache, keys[:, :, start:stop], values[:, :, start:stop], stop - start)
        now = planes_of(cache)
        if written:
            assert_equal_bytes(first_rows(now, written), seen)
        seen, written = now, cache.packed_tokens
    assert written >= 420 - 4 - 16 - BLOCK


@pytest.mark.parametrize("codec", LOSSY)
def test_packed_bytes_do_not_depend_on_how_tokens_arrive(codec):
    keys, values = tokens_like_keys(2, 260), tokens_like_values(2, 260)
    caches = []
    for chunks in (260, 1, [100, 3, 57, 1, 1, 98], 16):
        cache = KVQCache(LayerSpec(codec, codec, frame=False), ROTARY)
        feed(cache, keys, values, chunks)
        caches.append(cache)
    assert caches[0].packed_tokens == 260 - 20
    for cache in caches[1:]:
        count = cache.packed_tokens
        assert count > 260 - 20 - BLOCK
        assert_equal_bytes(planes_of(cache), first_rows(planes_of(caches[0]), count))


@pytest.mark.parametrize("window", [None, 320])
def test_packed_bytes_in_the_frame_depend_on_the_frozen_statistics_alone(window):
    keys, values, queries = tokens_like_keys(3, 300), tokens_like_values(3, 300), tokens_like_values(4, 300, heads=4)
    caches = []
    for chunks in ([100, 200], [100] + [1] * 200, [100, 50, 17, 16, 1, 116]):
        spec = LayerSpec("tq4", "tq4", sinks=0)
        cache = KVQCache(spec, ROTARY) if window is None else SlidingKVQCache(spec, window, ROTARY)
        feed(cache, keys, values, chunks, queries)
        caches.append(cache)
    for cache in caches[1:]:
        np.testing.assert_array_equal(np.array(cache.frame.mean), np.array(caches[0].frame.mean))
        np.testing.assert_array_equal(np.array(cache.frame.scale), np.array(caches[0].frame.scale))
        assert_equal_bytes(planes_of(cache), first_rows(planes_of(caches[0]), cache.packed_tokens))


@pytest.mark.parametrize(("codec", "bound"), [("tq2", 0.5), ("tq4", 0.17), ("tq6", 0.05), ("affine4", 0.15)])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("chunks", [400, 1, [150, 50, 1, 1, 1, 197]])
def test_every_token_is_stored_close_to_what_was_fed(codec, bound, window, chunks):
    keys, values = tokens_like_keys(5, 400), tokens_like_values(5, 400)
    spec = LayerSpec(codec, codec)
    cache = KVQCache(spec, ROTARY) if window is None else SlidingKVQCache(spec, window, ROTARY)
    feed(cache, keys, values, chunks)
    held = 400 if window is None else window
    assert cache.held == held and cache.offset == 400 and cache.packed_tokens > held - 4 - 16 - BLOCK - 1
    found = cache.decode_all()
    for stored, fed in zip(found, (keys, values), strict=True):
        assert relative_error(stored, fed[:, :, 400 - held :]).max() < bound


@pytest.mark.parametrize("chunks", [300, 1, [90, 60, 1, 1, 148]])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_keys_that_are_one_turned_vector_are_restored_exactly_at_their_positions(window, chunks):
    """The frame removes the mean at the token's own position; one position off leaves a remainder of 2 bits."""
    mean = 3.0 * normal(np.random.default_rng(6), 1, 2, 1, D)
    keys = turn(ROTARY, mean, 0, 300)
    spec = LayerSpec("tq2", "tq2")
    cache = KVQCache(spec, ROTARY) if window is None else SlidingKVQCache(spec, window, ROTARY)
    feed(cache, keys, tokens_like_values(6, 300), chunks)
    assert cache.packed_tokens > 80
    np.testing.assert_allclose(np.array(cache.frame.mean), np.array(mean), atol=1e-4)
    assert relative_error(cache.decode_all()[0], keys[:, :, 300 - cache.held :]).max() < 1e-4


def test_first_tokens_and_newest_tokens_stay_exact():
    keys, values = tokens_like_keys(7, 200), tokens_like_values(7, 200)
    cache = KVQCache(LayerSpec("tq2", "tq2", sinks=3, recent=10), ROTARY)
    feed(cache, keys, values, [150] + [1] * 50)
    assert cache.packed_tokens == 137 + 48 and cache.sink_tokens == 3
    for stored, fed in zip(cache.decode_all(), (keys, values), strict=True):
        assert mx.array_equal(stored[:, :, :3], fed[:, :, :3])
        assert mx.array_equal(stored[:, :, 188:], fed[:, :, 188:])
        assert relative_error(stored, fed)[3:188].min() > 0.01


def test_tokens_stay_dense_until_there_are_enough_for_the_statistics():
    keys, values = tokens_like_keys(8, 100), tokens_like_values(8, 100)
    cache = KVQCache(LayerSpec("tq4", "tq4"), ROTARY)
    queries = tokens_like_values(9, 100, heads=4)
    for n in range(100):
        feed(cache, keys[:, :, n : n + 1], values[:, :, n : n + 1], 1, queries[:, :, n : n + 1])
        if n + 1 < MIN_TOKENS + SKIP_TOKENS:
            assert cache.packed_tokens == 0 and cache.frame is None
            assert mx.array_equal(cache.decode_all()[0], keys[:, :, : n + 1])
        else:
            assert cache.packed_tokens > 0 and cache.frame is not None


def test_statistics_are_those_of_the_first_tokens_without_the_sinks_and_never_change():
    keys, values, queries = tokens_like_keys(10, 400), tokens_like_values(10, 400), tokens_like_values(11, 400, heads=4)
    queries = queries * mx.array(np.where(np.arange(D) % 32 < 8, 5.0, 1.0).astype(np.float32))
    cache = KVQCache(LayerSpec("tq4", "tq4"), ROTARY)
    feed(cache, keys[:, :, :100], values[:, :, :100], 100, queries[:, :, :100])
    before_rope = np.array(turn(ROTARY, keys, 0, 400, inverse=True))[:, :, SKIP_TOKENS:100]
    mean, scale = np.array(cache.frame.mean), np.array(cache.frame.scale)
    np.testing.assert_allclose(mean, before_rope.mean(axis=2, keepdims=True), atol=1e-4)
    assert scale[..., :8].min() > 1.5 * scale[..., 8:].max()  # what queries look at is stored finer
    feed(cache, keys[:, :, 100:] * 5, values[:, :, 100:], [200] + [1] * 100, queries[:, :, 100:] * 5)
    np.testing.assert_array_equal(np.array(cache.frame.mean), mean)
    np.testing.assert_array_equal(np.array(cache.frame.scale), scale)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("n", [1, 16, 31, 32, 33, 48, 100])
def test_trimming_and_appending_again_equals_never_having_trimmed(codec, n):
    keys, values = tokens_like_keys(12, 260), tokens_like_values(12, 260)
    other_keys, other_values = tokens_like_keys(13, n), tokens_like_values(13, n)
    straight, detour = KVQCache(LayerSpec(codec, codec), ROTARY), KVQCache(LayerSpec(codec, codec), ROTARY)
    feed(straight, keys, values, [200] + [1] * 60)
    feed(detour, keys[:, :, :200], values[:, :, :200], 200)
    feed(detour, other_keys, other_values, 1)
    assert detour.trim(n) == n and detour.offset == 200 == detour.held
    feed(detour, keys[:, :, 200:], values[:, :, 200:], 1)
    count = min(straight.packed_tokens, detour.packed_tokens)
    assert count > 260 - 20 - BLOCK
    assert_equal_bytes(first_rows(planes_of(detour), count), first_rows(planes_of(straight), count))
    found, expected = detour.decode_all(), straight.decode_all()
    same = np.r_[0 : 4 + count, 4 + max(straight.packed_tokens, detour.packed_tokens) : 260]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.array(a)[:, :, same], np.array(b)[:, :, same])


def test_trimming_every_packed_token_away_starts_over():
    keys, values = tokens_like_keys(14, 400), tokens_like_values(14, 400)
    cache = KVQCache(LayerSpec("tq4", "tq4"), ROTARY)
    feed(cache, keys, values, 400)
    assert cache.trim(398) == 398
    assert (cache.offset, cache.held, cache.packed_tokens, cache.frame) == (2, 2, 0, None)
    assert mx.array_equal(cache.decode_all()[0], keys[:, :, :2])
    feed(cache, tokens_like_keys(15, 200)[:, :, 2:], tokens_like_values(15, 200)[:, :, 2:], 198)
    assert cache.sink_tokens == 4 and cache.packed_tokens == 200 - 20
    assert relative_error(cache.decode_all()[0][:, :, 4:], tokens_like_keys(15, 200)[:, :, 4:]).max() < 0.17


@pytest.mark.parametrize("window", [None, 400])
def test_compressing_after_the_prefill_keeps_the_prompt_dense_until_the_first_step(window):
    keys, values = tokens_like_keys(16, 302), tokens_like_values(16, 302)
    spec = LayerSpec("tq4", "tq4", sinks=0, compress_after="prefill")
    cache = KVQCache(spec, ROTARY) if window is None else SlidingKVQCache(spec, window, ROTARY)
    feed(cache, keys[:, :, :301], values[:, :, :301], [120, 100, 81])
    assert cache.packed_tokens == 0 and mx.array_equal(cache.decode_all()[0], keys[:, :, :301])
    feed(cache, keys[:, :, 301:], values[:, :, 301:], 1)
    assert cache.packed_tokens == (302 - 16) // BLOCK * BLOCK
    before_rope = np.array(turn(ROTARY, keys, 0, 302, inverse=True))[:, :, SKIP_TOKENS:]
    np.testing.assert_allclose(np.array(cache.frame.mean), before_rope.mean(axis=2, keepdims=True), atol=1e-4)


def test_compressing_after_the_prefill_also_holds_for_a_prompt_longer_than_the_window():
    keys, values = tokens_like_keys(17, 400), tokens_like_values(17, 400)
    cache = SlidingKVQCache(LayerSpec("tq4", "tq4", compress_after="prefill"), WINDOW, ROTARY)
    feed(cache, keys[:, :, :399], values[:, :, :399], [180, 219])
    assert cache.packed_tokens == 0 and mx.array_equal(cache.decode_all()[0], keys[:, :, 399 - WINDOW : 399])
    feed(cache, keys[:, :, 399:], values[:, :, 399:], 1)
    assert cache.packed_tokens == WINDOW - 16
    assert relative_error(cache.decode_all()[0], keys[:, :, 400 - WINDOW :]).max() < 0.17


@pytest.mark.parametrize("sinks", [0, 4, 20])
@pytest.mark.parametrize("recent", [0, 1, 500])
def test_any_number_of_sinks_and_recent_tokens_works(sinks, recent):
    keys, values = tokens_like_keys(18, 700), tokens_like_values(18, 700)
    cache = KVQCache(LayerSpec("tq4", "tq4", sinks=sinks, recent=recent), ROTARY)
    feed(cache, keys, values, [300] + [1] * 50 + [350])
    assert cache.packed_tokens == 700 - sinks - recent
    assert cache.dense_tokens()[0].shape[2] == sinks + recent
    for stored, fed in zip(cache.decode_all(), (keys, values), strict=True):
        assert relative_error(stored, fed).max() < 0.17
    query = normal(np.random.default_rng(1), 1, 4, 1, D)
    last = keys[:, :, :1], values[:, :, :1]
    found = ROUTED(query, *cache.update_and_fetch(*last), cache=cache, scale=0.3)
    tokens = [mx.concatenate([x, y], axis=2) for x, y in zip((keys, values), last, strict=True)]
    expected = mx.fast.scaled_dot_product_attention(query, *tokens, scale=0.3)
    assert relative_error(found, expected).max() < 0.2


@pytest.mark.parametrize("frame", [True, False])
def test_rows_of_a_batch_are_independent(frame):
    keys, values = tokens_like_keys(19, 250, batch=2), tokens_like_values(19, 250, batch=2)
    keys[1] = keys[1] * 4  # other statistics
    queries = tokens_like_values(20, 250, batch=2, heads=4)
    chunks = [120, 40] + [1] * 90
    both = KVQCache(LayerSpec("tq4", "affine4", frame=frame), ROTARY)
    feed(both, keys, values, chunks, queries)
    for row in range(2):
        alone = KVQCache(LayerSpec("tq4", "affine4", frame=frame), ROTARY)
        part = slice(row, row + 1)
        feed(alone, keys[part], values[part], chunks, queries[part])
        assert_equal_bytes({name: rows[part] for name, rows in planes_of(both).items()}, planes_of(alone))
        for a, b in zip(both.decode_all(), alone.decode_all(), strict=True):
            np.testing.assert_array_equal(np.array(a[part]), np.array(b))


# ---- the sliding window ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1] * 400, [300] + [1] * 100, [20] * 20, [143, 1, 1, 144, 17, 1, 93], [144, 256]])
def test_a_window_holds_exactly_its_last_tokens(sizes):
    keys, values = tokens_like_keys(21, 400), tokens_like_values(21, 400)
    cache = SlidingKVQCache(LayerSpec("identity", "identity"), WINDOW, ROTARY)
    feed(cache, keys, values, sizes)
    assert cache.held == cache.size() == WINDOW and cache.offset == 400 and cache.packed_tokens >= WINDOW - 16 - BLOCK
    for stored, fed in zip(cache.decode_all(), (keys, values), strict=True):
        assert mx.array_equal(stored, fed[:, :, 400 - WINDOW :])


@pytest.mark.parametrize("saved_at", [None, 100, 150, 200])
@pytest.mark.parametrize(
    "sizes", [[1] * 330, [200] + [1] * 130, [143, 1, 1, 20, 1, 1, 63, 100], [144] + [1] * 160 + [26]]
)
def test_lossless_windows_attend_like_mlx_lm_bit_for_bit_also_after_a_restore(sizes, saved_at):
    rng = np.random.default_rng(40)
    cache: Any = SlidingKVQCache(LayerSpec("identity", "identity"), WINDOW, ROTARY)
    stock = RotatingKVCache(max_size=WINDOW)
    for L in sizes:
        if saved_at is not None and cache.offset >= saved_at:
            cache, saved_at = restored(cache), None
        q, k, v = (normal(rng, 1, heads, L, D) for heads in (4, 2, 2))
        mask, stock_mask = (mask_of(c, L, window_size=WINDOW) for c in (cache, stock))
        assert same_mask(mask, stock_mask)
        found = ROUTED(q, *cache.update_and_fetch(k, v), cache=cache, scale=0.4, mask=mask)
        expected = mx.fast.scaled_dot_product_attention(q, *stock.update_and_fetch(k, v), scale=0.4, mask=stock_mask)
        assert mx.array_equal(found, expected), cache.offset


def test_a_lossy_window_attends_to_its_last_tokens_only():
    keys, values = tokens_like_keys(22, 300), tokens_like_values(22, 300)
    values[:, :, : 300 - WINDOW] = 1e4  # what has left the window would show
    cache = SlidingKVQCache(LayerSpec("tq6", "tq6"), WINDOW, ROTARY)
    feed(cache, keys[:, :, :299], values[:, :, :299], [1] * 199 + [100])
    query = normal(np.random.default_rng(2), 1, 4, 1, D)
    handles = cache.update_and_fetch(keys[:, :, 299:], values[:, :, 299:])
    found = ROUTED(query, *handles, cache=cache, scale=0.1, mask=cache.make_mask(1, window_size=WINDOW))
    window = keys[:, :, 300 - WINDOW :], values[:, :, 300 - WINDOW :]
    expected = mx.fast.scaled_dot_product_attention(query, *window, scale=0.1)
    assert relative_error(found, expected).max() < 0.1


@pytest.mark.parametrize("window", [33, WINDOW - 1])
@pytest.mark.parametrize("recent", [32, WINDOW])
def test_a_lossy_window_masks_by_age_whether_or_not_anything_is_packed(window, recent):
    keys, values = tokens_like_keys(23, 200), tokens_like_values(23, 200)
    values[:, :, : 200 - window] = 1e4  # behind the mask
    cache = SlidingKVQCache(LayerSpec("tq6", "tq6", recent=recent), WINDOW, ROTARY)
    feed(cache, keys[:, :, :199], values[:, :, :199], 1)
    assert (cache.packed_tokens > 0) == (recent < WINDOW)
    query = normal(np.random.default_rng(3), 1, 4, 1, D)
    mask = cache.make_mask(1, window_size=window)
    found = ROUTED(
        query, *cache.update_and_fetch(keys[:, :, 199:], values[:, :, 199:]), cache=cache, scale=0.1, mask=mask
    )
    expected = mx.fast.scaled_dot_product_attention(
        query, keys[:, :, 200 - window :], values[:, :, 200 - window :], scale=0.1
    )
    assert relative_error(found, expected).max() < 0.1


def test_a_window_is_trimmable_until_tokens_have_left_it():
    keys, values = tokens_like_keys(24, WINDOW + 1), tokens_like_values(24, WINDOW + 1)
    cache = SlidingKVQCache(LayerSpec("tq4", "tq4"), WINDOW, ROTARY)
    feed(cache, keys[:, :, :WINDOW], values[:, :, :WINDOW], 1)
    assert cache.is_trimmable() and cache.trim(30) == 30
    feed(cache, keys[:, :, WINDOW - 30 :], values[:, :, WINDOW - 30 :], 1)
    assert not cache.is_trimmable() and cache.trim(30) == 0
    assert cache.offset == WINDOW + 1 and cache.held == WINDOW
    assert relative_error(cache.decode_all()[0], keys[:, :, 1:]).max() < 0.17


def test_sliding_caches_have_no_sinks():
    assert SlidingKVQCache(LayerSpec("tq4", "tq4", sinks=9), WINDOW).spec.sinks == 0


def test_the_smallest_window_packs_before_it_slides():
    spec = LayerSpec("tq4", "tq4", recent=60)
    window = smallest_window(spec)
    keys, values = tokens_like_keys(25, 2 * window), tokens_like_values(25, 2 * window)
    cache = SlidingKVQCache(spec, window, ROTARY)
    feed(cache, keys[:, :, :window], values[:, :, :window], 1)
    assert cache.packed_tokens > 0
    feed(cache, keys[:, :, window:], values[:, :, window:], 1)
    assert cache.held == window and cache.packed_tokens > 0


# ---- bytes -------------------------------------------------------------------------------------------------------


def arrays_in(cache: KVQCache) -> list[mx.array]:
    """Every array reachable from the cache's attributes."""
    found: list[mx.array] = []

    def collect(value: Any) -> None:
        if isinstance(value, mx.array):
            found.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif hasattr(value, "mean") and hasattr(value, "scale"):
            collect([value.mean, value.scale, value.constant])
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)

    collect(vars(cache))
    return found


@pytest.mark.parametrize("tokens", [200, 257, 1000, 4096])
@pytest.mark.parametrize("chunks", ["one chunk", "token by token"])
def test_bytes_held_are_those_of_the_codes_and_a_few_dense_tokens(tokens, chunks):
    Dk, Dv, H = 64, 32, 1
    spec = LayerSpec("tq4", "affine4")
    keys, values = tokens_like_keys(26, tokens, heads=H), tokens_like_values(26, tokens, heads=H, dim=Dv)
    cache = KVQCache(spec, ROTARY)
    feed(cache, keys, values, tokens if chunks == "one chunk" else 1)
    mx.eval(cache.state)
    assert cache.nbytes == sum(array.nbytes for array in arrays_in(cache))
    sides = ((get_codec("tq4"), Dk), (get_codec("affine4"), Dv))
    per_token = H * sum(plane.nbytes for codec, dim in sides for plane in codec.planes(dim, "float32"))
    dense = H * (Dk + Dv) * 4
    statistics = H * (2 * Dk + Dk // 2) * 4
    packed = tokens - spec.sinks - spec.recent
    slack = 0 if chunks == "one chunk" else packed / 256 + BLOCK
    assert cache.packed_tokens > packed - BLOCK
    assert cache.nbytes <= (packed + slack) * per_token + (spec.sinks + spec.recent + BLOCK) * dense + statistics
    assert cache.nbytes >= cache.packed_tokens * per_token + (spec.sinks + spec.recent) * dense + statistics


@pytest.mark.parametrize("window", [None, 2048])
@pytest.mark.parametrize("codec", ["tq4", "affine4", "identity"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("chunks", [3000, [1000] * 2 + [1] * 100 + [900]])
def test_the_allocator_agrees_with_nbytes(heads, codec, window, chunks):
    spec = LayerSpec(codec, codec)

    def filled() -> KVQCache:
        cache = KVQCache(spec, ROTARY) if window is None else SlidingKVQCache(spec, window, ROTARY)
        feed(cache, tokens_like_keys(27, 3000, heads=heads), tokens_like_values(27, 3000, heads=heads), chunks)
        mx.eval(cache.state)
        return cache

    def active() -> int:
        gc.collect()
        mx.synchronize()
        mx.clear_cache()
        return mx.get_active_memory()

    filled()  # constants that live as long as the process
    limit = mx.set_cache_limit(0)  # a buffer from MLX's pool may be larger than was asked for
    try:
        before = active()
        cache = filled()
        held = active() - before
    finally:
        mx.set_cache_limit(limit)
    assert cache.packed_tokens > 1900
    assert abs(held - cache.nbytes) <= 0.02 * cache.nbytes


def test_trimming_gives_memory_back():
    cache = KVQCache(LayerSpec("tq4", "tq4"), ROTARY)
    feed(cache, tokens_like_keys(28, 2000), tokens_like_values(28, 2000), 2000)
    full = cache.nbytes
    cache.trim(1500)
    per_token = 2 * 2 * (D // 2 + 2)
    assert cache.nbytes < full - 1450 * per_token


def test_dense_nbytes_are_those_of_fp16():
    cache = KVQCache(LayerSpec("tq4", "tq4"), ROTARY)
    assert cache.dense_nbytes() == 0
    feed(cache, tokens_like_keys(29, 300), tokens_like_values(29, 300, dim=32), 300)
    assert cache.dense_nbytes() == 2 * 300 * (64 + 32) * 2


# ---- the protocol ------------------------------------------------------------------------------------------------


def both_kinds() -> list[KVQCache]:
    return [KVQCache(LayerSpec("tq4", "tq4"), ROTARY), SlidingKVQCache(LayerSpec("tq4", "tq4"), WINDOW, ROTARY)]


@pytest.mark.parametrize("kind", [0, 1])
def test_names_that_would_change_what_mlx_lm_does_are_never_defined(kind):
    """A length makes an empty cache false; `bits` and `to_quantized` send it to mlx-lm's own quantization."""
    cache = both_kinds()[kind]
    for name in ("__len__", "__bool__", "bits", "group_size", "to_quantized"):
        assert not hasattr(cache, name), name
    assert not isinstance(cache, (KVCache, RotatingKVCache))


@pytest.mark.parametrize("kind", [0, 1])
def test_an_empty_cache_is_true_empty_and_restorable(kind):
    cache = both_kinds()[kind]
    for one in (cache, restored(cache), copy.deepcopy(cache)):
        assert one and one.empty() and one.nbytes == 0 and one.size() == one.offset == 0
        assert one.trim(5) == 0 and one.is_trimmable()
        assert one.make_mask(1) is None and one.make_mask(7) == "causal"
        one.compact()
        with pytest.raises(CacheStateError):
            one.keys_and_values()
    feed(cache, tokens_like_keys(30, 200), tokens_like_values(30, 200), 200)
    assert not cache.empty()


@pytest.mark.parametrize("tokens", [1, 30, 100, 400])
@pytest.mark.parametrize("kind", [0, 1])
def test_a_restored_cache_goes_on_like_the_original(kind, tokens):
    keys, values = tokens_like_keys(31, 600), tokens_like_values(31, 600)
    queries = tokens_like_values(32, 600, heads=4)
    cache = both_kinds()[kind]
    feed(cache, keys[:, :, :tokens], values[:, :, :tokens], 16, queries[:, :, :tokens])
    other = restored(cache)
    assert type(other) is type(cache) and other.spec == cache.spec and other.rotary == cache.rotary
    for one in (cache, other):
        feed(one, keys[:, :, tokens:], values[:, :, tokens:], [1] * 150 + [450 - tokens], queries[:, :, tokens:])
    assert cache.packed_tokens == other.packed_tokens > 0
    assert_equal_bytes(planes_of(other), planes_of(cache))
    for a, b in zip(other.decode_all(), cache.decode_all(), strict=True):
        assert mx.array_equal(a, b)
    assert other.nbytes == cache.nbytes


def test_a_state_of_a_newer_version_is_refused():
    state = KVQCache(LayerSpec("tq4", "tq4")).state
    state["meta"] = state["meta"].replace('"version": 3}', '"version": 4}')
    assert '"version": 4}' in state["meta"]
    with pytest.raises(CacheStateError, match="version 3 or less, got 4"):
        KVQCache.from_state(state)


@pytest.mark.parametrize("kind", [0, 1])
def test_a_state_of_version_1_has_a_constant_of_zero_and_scales_of_one(kind):
    keys, values = tokens_like_keys(31, 300), tokens_like_values(31, 300)
    cache = both_kinds()[kind]
    feed(cache, keys, values, 300)
    state = cache.state
    del state["frame"]["constant"], state["value_scale"]
    state["meta"] = state["meta"].replace('"version": 3}', '"version": 1}')
    other = type(cache).from_state(state)
    assert mx.array_equal(other.value_scale, mx.ones((1, 2, 1, D)))
    assert mx.array_equal(other.frame.constant, mx.zeros((1, 2, 1, D)))
    for a, b in zip(other.decode_all(), cache.decode_all(), strict=True):
        assert mx.array_equal(a, b)


@pytest.mark.parametrize("kind", [0, 1])
def test_the_constant_is_saved_and_copied(kind):
    keys, values = tokens_like_keys(31, 300) + 4.0, tokens_like_values(31, 300)
    cache = both_kinds()[kind]
    feed(cache, keys, values, 300)
    assert mx.max(mx.abs(cache.frame.constant)) > 2
    for other in (restored(cache), copy.deepcopy(cache), KVQCache.merge([cache, cache]).extract(1)):
        assert mx.array_equal(other.frame.constant, cache.frame.constant)
        for a, b in zip(other.decode_all(), cache.decode_all(), strict=True):
            assert mx.array_equal(a, b)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("tokens", [20, 200])
def test_copies_are_independent_in_both_directions(kind, tokens):
    keys, values = tokens_like_keys(33, 400), tokens_like_values(33, 400)
    cache = both_kinds()[kind]
    feed(cache, keys[:, :, :tokens], values[:, :, :tokens], [tokens - 3, 1, 1, 1])
    other = copy.deepcopy(cache)
    before = [np.array(x) for x in cache.decode_all()], planes_of(cache), cache.nbytes
    go_on = -keys[:, :, tokens : 2 * tokens], -values[:, :, tokens : 2 * tokens]
    for changed in (other, cache):
        if changed.is_trimmable():
            changed.trim(2)
        feed(changed, *go_on, 1)
        if changed is other:
            for a, b in zip(cache.decode_all(), before[0], strict=True):
                np.testing.assert_array_equal(np.array(a), b)
            assert_equal_bytes(planes_of(cache), before[1])
            assert cache.nbytes == before[2]
            snapshot = [np.array(x) for x in other.decode_all()]
    for a, b in zip(other.decode_all(), snapshot, strict=True):
        np.testing.assert_array_equal(np.array(a), b)


def test_the_spec_and_rotation_are_shared_by_copies_not_duplicated():
    cache = KVQCache(LayerSpec("tq4", "tq4"), ROTARY)
    assert copy.deepcopy(cache).rotary is ROTARY


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("filled", [0, 30, 200])
def test_a_cache_made_in_one_thread_works_in_another(kind, filled):
    keys, values = tokens_like_keys(34, 320), tokens_like_values(34, 320)
    mx.eval(keys, values)
    cache, reference = both_kinds()[kind], both_kinds()[kind]
    chunks = [100] + [1] * 20 + [200 - filled] * (filled < 200)
    for one in (cache, reference):
        if filled:
            feed(one, keys[:, :, :filled], values[:, :, :filled], filled)
        mx.eval(one.state)
    found: list[Any] = []

    def work() -> None:
        try:
            k, v = (mx.array(np.array(x)[:, :, filled:]) for x in (keys, values))
            feed(cache, k, v, chunks)
            q = mx.ones((1, 4, 1, D)) * 0.1
            out = ROUTED(q, *cache.update_and_fetch(k[:, :, :1], v[:, :, :1]), cache=cache, scale=0.3)
            found.append(np.array(out))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    feed(reference, keys[:, :, filled:], values[:, :, filled:], chunks)
    q = mx.ones((1, 4, 1, D)) * 0.1
    last = keys[:, :, filled : filled + 1], values[:, :, filled : filled + 1]
    expected = ROUTED(q, *reference.update_and_fetch(*last), cache=reference, scale=0.3)
    assert isinstance(found[0], np.ndarray), found[0]
    np.testing.assert_array_equal(found[0], np.array(expected))


def test_a_call_of_few_tokens_counts_as_a_step():
    """Planes leave room for growth after steps, none after a prefill chunk."""
    rows = {}
    for last in (STEP_TOKENS, STEP_TOKENS + 1):
        cache = KVQCache(LayerSpec("tq4", "tq4"), ROTARY)
        feed(cache, tokens_like_keys(35, 400), tokens_like_values(35, 400), [400 - last, last])
        rows[last] = next(iter(cache.key_planes.values())).shape[2] - cache.packed_tokens
    assert rows[STEP_TOKENS] >= 0 and rows[STEP_TOKENS + 1] == 0
