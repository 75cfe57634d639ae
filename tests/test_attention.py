"""Attention on a compressed cache against softmax in float64 over the tokens that the cache decodes to.

Queries are scaled so that softmax is peaked. Every comparison also checks that the same attention with keys perturbed
by 1% would have failed its tolerance.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlx_kvq_plugin import attention, packed_attention
from mlx_kvq_plugin.attention import (
    PACKED_QUERIES,
    AttendArgs,
    attend,
    attend_decoded,
    attend_packed,
)
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.config import LayerSpec
from mlx_kvq_plugin.errors import AttentionError
from mlx_kvq_plugin.growth import BLOCK
from mlx_kvq_plugin.rotary import Rotary
from mlx_kvq_plugin.routing import RoutedAttention
from mlx_kvq_plugin.sliding import SlidingKVQCache

Float = npt.NDArray[np.float64]

PATHS = pytest.mark.parametrize("path", [attend_packed, attend_decoded], ids=["packed", "decoded"])
SPREAD = 6.0  # standard deviation of the scores: a softmax over hundreds of tokens keeps a few

# RMS error over RMS output. Half types: MLX rounds scores, and the oracle's decoded keys are rounded, too.
TOLERANCE = {mx.float32: 2e-5, mx.float16: 5e-3, mx.bfloat16: 2.5e-2}

ROTARIES = {
    "none": None,
    "half": Rotary("half", tuple(10000.0 ** (-j / 32) for j in range(32))),
    "interleaved": Rotary("interleaved", tuple(5000.0 ** (-j / 32) for j in range(32))),
    "partial": Rotary("half", tuple(1000.0 ** (-j / 12) for j in range(12))),
    "magnitude": Rotary("half", tuple(10000.0 ** (-j / 32) for j in range(32)), 1.19),
}


def as_float64(x: mx.array) -> Float:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def normal(seed: int, *shape: int) -> Float:
    return np.random.default_rng(seed).standard_normal(shape)


def filled(
    past: int,
    new: int,
    *,
    spec: LayerSpec | None = None,
    rotary: Rotary | None = ROTARIES["half"],
    batch: int = 1,
    kv_heads: int = 2,
    heads: int = 4,
    dims: tuple[int, int] = (64, 64),
    dtype: mx.Dtype = mx.float32,
) -> tuple[KVQCache, mx.array]:
    """A cache with `past` settled tokens and `new` just appended ones, and queries for the new ones."""
    cache = KVQCache(spec or LayerSpec("tq4", "tq4"), rotary)
    total, (Dk, Dv) = past + new, dims
    keys = normal(1, batch, kv_heads, total, Dk) + 2.0 * normal(2, 1, kv_heads, 1, Dk)
    values = normal(3, batch, kv_heads, total, Dv) * (1 + 3 * np.random.default_rng(4).random((1, 1, total, 1)))
    queries = normal(5, batch, heads, new, Dk) * SPREAD / np.sqrt(Dk) / np.sqrt(5)
    k, v, q = (mx.array(x.astype(np.float32)).astype(dtype) for x in (keys, values, queries))
    if past:
        cache.update_and_fetch(k[:, :, :past], v[:, :, :past])
        cache.observe_queries(mx.broadcast_to(q[:, :, :1], (batch, heads, past, Dk)))
        cache.compact()
    cache.update_and_fetch(k[:, :, past:], v[:, :, past:])
    return cache, q


def softmax_attention(
    queries: Float, keys: Float, values: Float, scale: float, mask: object, logits: Float | None
) -> Float:
    """The definition, one query head at a time."""
    B, Hq, L, _ = queries.shape
    T, group = keys.shape[2], Hq // keys.shape[1]
    output = np.empty((B, Hq, L, values.shape[-1]))
    if isinstance(mask, str):
        mask = np.arange(T - L, T)[:, None] >= np.arange(T)[None]
    if mask is not None:
        mask = np.broadcast_to(mask, (B, Hq, L, T))
    for b in range(B):
        for h in range(Hq):
            scores = scale * queries[b, h] @ keys[b, h // group].T
            if mask is not None:
                scores = np.where(mask[b, h], scores, -np.inf) if mask.dtype == bool else scores + mask[b, h]
            top = scores.max(axis=-1, keepdims=True)
            top = top if logits is None else np.maximum(top, logits[h])
            weights = np.exp(scores - top)
            total = weights.sum(axis=-1, keepdims=True)
            total = total if logits is None else total + np.exp(logits[h] - top)
            output[b, h] = weights / total @ values[b, h // group]
    return output


def distance(found: Float, expected: Float) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def check(
    path: object,
    cache: KVQCache,
    queries: mx.array,
    mask: object = None,
    logits: Float | None = None,
    scale: float = 1.0,
) -> None:
    """`path` must agree with the definition on the decoded tokens, and 1% of noise on the keys must not pass."""
    keys, values = (as_float64(x) for x in cache.decode_all())
    as_mask = mask
    if isinstance(mask, np.ndarray):
        as_mask = mx.array(mask) if mask.dtype == bool else mx.array(mask.astype(np.float32)).astype(queries.dtype)
        mask = mask if mask.dtype == bool else as_float64(as_mask)
    sinks = None if logits is None else mx.array(logits.astype(np.float32)).astype(queries.dtype)
    logits = None if sinks is None else as_float64(sinks)
    args = AttendArgs(queries, cache, scale, as_mask, sinks, queries.dtype, queries.dtype)
    output = path(args)
    q = as_float64(queries)
    expected = softmax_attention(q, keys, values, scale, mask, logits)
    noisy = softmax_attention(q, keys * (1 + 0.01 * normal(9, *keys.shape)), values, scale, mask, logits)
    tolerance = TOLERANCE[queries.dtype]
    assert distance(noisy, expected) > 1.5 * tolerance, "the tolerance must notice 1% of noise on the keys"
    assert output.dtype == queries.dtype and output.shape == expected.shape
    assert distance(as_float64(output), expected) < tolerance


def a_mask(kind: str, B: int, Hq: int, L: int, T: int) -> object:
    """Masks that let each query see about two thirds of the tokens, the newest L by causality."""
    rng = np.random.default_rng(11)
    causal = np.arange(T - L, T)[:, None] >= np.arange(T)[None]

    def random(*shape: int) -> npt.NDArray[np.bool_]:
        return (rng.random((*shape, T)) < 0.67) | (np.arange(T) == 1)  # one token stays visible to all

    return {
        "none": None,
        "causal": "causal",
        "bool (T,)": random(),
        "bool (L, T)": random(L) & causal,
        "bool (B, 1, L, T)": random(B, 1, L) & causal,
        "bool (B, Hq, L, T)": random(B, Hq, L) & causal,
        "float (L, T)": np.where(causal, rng.standard_normal((L, T)), -1e4),
        "float (B, Hq, L, T)": np.where(causal, rng.standard_normal((B, Hq, L, T)), -1e4),
    }[kind]


MASKS = [
    "none",
    "causal",
    "bool (T,)",
    "bool (L, T)",
    "bool (B, 1, L, T)",
    "bool (B, Hq, L, T)",
    "float (L, T)",
    "float (B, Hq, L, T)",
]


@PATHS
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("new", [1, 2, 5, 16])
@pytest.mark.parametrize("heads_per_group", [1, 2, 3, 8])
def test_equals_softmax_for_every_mask_and_head_ratio(path, mask, new, heads_per_group):
    heads = 2 * heads_per_group
    cache, queries = filled(150, new, heads=heads, batch=2)
    assert cache.packed_tokens and cache.sink_tokens
    check(path, cache, queries, a_mask(mask, 2, heads, new, cache.held))


@PATHS
@pytest.mark.parametrize("logits", [False, True], ids=["", "sink logits"])
@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("mask", ["causal", "bool (L, T)", "float (B, Hq, L, T)"])
def test_sink_logits_join_the_softmax_of_their_head_and_cache_sinks_keep_their_columns(path, mask, sinks, logits):
    cache, queries = filled(120, 3, heads=6, spec=LayerSpec("tq4", "tq3", sinks=sinks, recent=20))
    assert cache.packed_tokens == 120 - 20 - sinks
    extra = np.linspace(3.0, 14.0, 6) if logits else None  # of the size of the largest scores, different per head
    check(path, cache, queries, a_mask(mask, 1, 6, 3, cache.held), extra)


@PATHS
@pytest.mark.parametrize("recent", [0, 32])
@pytest.mark.parametrize("packed", [BLOCK, BLOCK + 1, 4 * BLOCK - 1, 4 * BLOCK, 4 * BLOCK + 1])
def test_equals_softmax_around_block_borders(path, packed, recent):
    spec = LayerSpec("tq4", "tq4", recent=recent)
    cache, queries = filled(64 + 4 + packed + recent, 1, spec=spec)
    cache.trim(1)
    cache.trim(64)
    assert cache.packed_tokens == (packed if recent == 0 else packed + recent)  # trimming took the recent ones
    tail = mx.array(normal(21, 1, 2, 1, 64).astype(np.float32))
    cache.update_and_fetch(tail, tail)
    assert cache.held == 4 + packed + recent + 1
    check(path, cache, queries)


@PATHS
def test_rows_that_trimming_left_in_the_planes_are_not_attended_to(path):
    cache, queries = filled(200, 1)
    cache.trim(40)
    rows = next(iter(cache.key_planes.values())).shape[2]
    if rows == cache.packed_tokens:  # trimming gave the rows back: put junk there
        for planes in (cache.key_planes, cache.value_planes):
            for name, plane in planes.items():
                planes[name] = mx.concatenate([plane, plane[..., :16, :]], axis=2)
    tail = mx.array(normal(22, 1, 2, 1, 64).astype(np.float32))
    cache.update_and_fetch(tail, tail)
    assert next(iter(cache.key_planes.values())).shape[2] > cache.packed_tokens
    check(path, cache, queries)


@PATHS
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("frame", [True, False], ids=["frame", "no frame"])
@pytest.mark.parametrize("rotary", list(ROTARIES))
def test_equals_softmax_for_every_rotation_and_dtype(path, rotary, frame, dtype):
    spec = LayerSpec("tq4", "tq4", frame=frame)
    cache, queries = filled(190, 2, spec=spec, rotary=ROTARIES[rotary], batch=2, dtype=dtype)
    assert (cache.frame is not None) == frame
    check(path, cache, queries, "causal")


@PATHS
@pytest.mark.parametrize("dims", [(64, 64), (64, 32), (32, 64)])
@pytest.mark.parametrize(
    ("key", "value"),
    [("tq4", "tq2"), ("tq3", "affine8"), ("affine4", "rvq2"), ("rvq1", "identity"), ("identity", "tq4")],
)
def test_equals_softmax_for_mixed_codecs_and_head_sizes(path, key, value, dims):
    angles = tuple(10000.0 ** (-j / 16) for j in range(dims[0] // 2))
    cache, queries = filled(130, 2, spec=LayerSpec(key, value), rotary=Rotary("half", angles), dims=dims)
    assert cache.packed_tokens == 130 - 20
    check(path, cache, queries, "causal", scale=0.9)


@PATHS
@pytest.mark.parametrize("new", [1, 3])
def test_equals_softmax_on_a_sliding_window_whose_oldest_tokens_are_gone(path, new):
    cache = SlidingKVQCache(LayerSpec("tq4", "tq4"), 144, ROTARIES["half"])
    keys, values = (mx.array(normal(i, 1, 2, 230, 64).astype(np.float32)) for i in (31, 32))
    queries = mx.array((normal(33, 1, 4, new, 64) * 0.75).astype(np.float32))
    for start in range(0, 230 - new, 16):
        piece = slice(start, min(start + 16, 230 - new))
        cache.update_and_fetch(keys[:, :, piece], values[:, :, piece])
        cache.compact()
    mask = cache.make_mask(new, window_size=144)
    cache.update_and_fetch(keys[:, :, -new:], values[:, :, -new:])
    assert cache.packed_tokens and cache.held == 143 + new
    check(path, cache, queries, mask if mask is None else np.array(mask))


def unpacking(*tokens: int):
    """`filled` with a newest step in which nothing would be packed between its tokens."""
    cache, queries = filled(*tokens)
    cache.step_parts = lambda L: []
    return cache, queries


def test_few_queries_are_scored_packed_and_many_on_decoded_tokens_with_equal_results():
    outputs = []
    for new in (PACKED_QUERIES, PACKED_QUERIES + 1):
        check(attend, *unpacking(150, new), "causal")
        cache, queries = unpacking(150, new)
        args = AttendArgs(queries, cache, 1.0, "causal", None, mx.float32, mx.float32)
        outputs.append((attend_packed(args), attend_decoded(args), attend(args)))
    few, many = outputs
    assert mx.array_equal(few[2], few[0]) and not mx.array_equal(few[2], few[1])
    assert mx.array_equal(many[2], many[1]) and not mx.array_equal(many[2], many[0])


@pytest.mark.parametrize("codecs", [("tq4", "tq4"), ("tq3", "rvq1"), ("tqprod3", "affine4"), ("qjl2", "grouped4")])
@pytest.mark.parametrize("tokens", [7, 64, 100])
def test_pieces_of_tokens_give_what_all_give_at_once(codecs: tuple[str, str], tokens: int, monkeypatch):
    cache, queries = filled(300, 3, spec=LayerSpec(*codecs))
    args = AttendArgs(queries, cache, 1.0, "causal", None, mx.float32, mx.float32)
    expected = attend_packed(args)
    nbytes = 4 * cache.dense_keys.shape[1] * 64
    monkeypatch.setattr(packed_attention, "LEVELS_NBYTES", tokens * nbytes)
    pieces = packed_attention.token_pieces(cache.packed_tokens, nbytes)
    assert len(pieces) == -(-cache.packed_tokens // tokens) and pieces[-1][1] == cache.packed_tokens
    error = as_float64(attend_packed(args) - expected)
    assert np.sqrt(np.mean(error**2)) < 1e-5 * np.sqrt(np.mean(as_float64(expected) ** 2))


@pytest.mark.parametrize(
    ("device", "least", "new", "waits"), [("", 0, 40, 0), ("gpu", 0, 40, 3), ("gpu", 2**40, 40, 0), ("gpu", 0, 3, 0)]
)
def test_few_layers_with_a_large_past_are_queued_in_prefill_chunks_on_gpus(device, least, new, waits, monkeypatch):
    monkeypatch.setattr(attention, "backend", lambda: device)
    monkeypatch.setattr(attention, "LARGE_NBYTES", least)
    monkeypatch.setattr(attention, "_queue", attention._Queue())
    started, waited, evaluate = [], [], mx.eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: started.append(arrays))
    monkeypatch.setattr(mx, "eval", lambda *arrays: (waited.append(arrays), evaluate(*arrays)))
    for layer in range(5):
        cache, queries = filled(300, new, spec=LayerSpec("affine4", "affine4"))  # no kernels
        output = attend(AttendArgs(queries, cache, 1.0, "causal", None, mx.float32, mx.float32))
        if waits:
            done, *planes = started[layer]
            assert done.size == 1 and mx.array_equal(done, output[:1, :1, :1, :1])
            assert planes == [cache.key_planes, cache.value_planes]
    assert len(started) == (5 if waits else 0) and len(waited) == waits
    assert all(found == (own[0],) for found, own in zip(waited, started, strict=False))  # the oldest first


def test_attention_packs_what_overflows_only_after_the_newest_tokens_were_seen_exactly():
    spec = LayerSpec("tq2", "tq2", recent=8)
    cache, queries = filled(0, 150, spec=spec)
    assert cache.packed_tokens == 0
    check(attend, cache, queries, "causal")
    assert cache.packed_tokens == 150 - 4 - 8


@pytest.mark.parametrize(
    "queries",
    [(1, 4, 64), (2, 4, 1, 64), (1, 3, 1, 64), (1, 4, 1, 32)],
    ids=["three dimensions", "another batch", "heads that are no multiple", "another head size"],
)
def test_queries_that_do_not_fit_are_refused_with_every_shape(queries):
    cache, _ = filled(150, 1)
    args = AttendArgs(mx.zeros(queries), cache, 1.0, None, None, mx.float32, mx.float32)
    before = cache.held, cache.packed_tokens, cache.frame
    with pytest.raises(AttentionError) as caught:
        attend(args)
    assert str(queries) in str(caught.value) and "KVQCache tq4 with 151 tokens (130 packed)" in str(caught.value)
    assert (cache.held, cache.packed_tokens, cache.frame) == before


@pytest.mark.parametrize("heads", [3, 4])
def test_refused_queries_leave_the_statistics_of_an_unfrozen_cache_as_they_were(heads):
    cache, queries = filled(40, 1)
    cache.observe_queries(queries)
    energy = np.array(cache._query_energy)
    with pytest.raises(AttentionError):
        attend(AttendArgs(mx.ones((1, heads, 1, 32)), cache, 1.0, None, None, mx.float32, mx.float32))
    np.testing.assert_array_equal(np.array(cache._query_energy), energy)


def test_an_unknown_mask_name_is_refused_by_name():
    cache, queries = filled(150, 2)
    with pytest.raises(AttentionError, match="must be \"causal\", got 'diagonal'"):
        attend(AttendArgs(queries, cache, 1.0, "diagonal", None, mx.float32, mx.float32))


def test_an_empty_cache_is_refused():
    args = AttendArgs(
        mx.zeros((1, 4, 1, 64)), KVQCache(LayerSpec("tq4", "tq4")), 1.0, None, None, mx.float32, mx.float32
    )
    with pytest.raises(AttentionError, match=r"with 0 tokens \(0 packed\)"):
        attend(args)


class Recorder:
    """Stands for mlx-lm's function: keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def __call__(self, *positional: object, **named: object) -> str:
        self.calls.append((positional, named))
        return "the original's result"


@pytest.mark.parametrize("by_position", [False, True], ids=["named", "by position"])
@pytest.mark.parametrize("sinks", [None, mx.array([0.5, 1.0])], ids=["no sinks", "sinks"])
def test_keys_that_are_arrays_go_to_the_original_untouched(by_position, sinks):
    original = Recorder()
    routed = RoutedAttention(original)
    q, k, v, mask = mx.zeros((1, 2, 1, 8)), mx.ones((1, 2, 3, 8)), mx.ones((1, 2, 3, 8)), mx.ones((1, 3))
    cache = KVQCache(LayerSpec("tq4", "tq4"))  # the decision must not depend on the cache
    if by_position:
        result = routed(q, k, v, cache, 0.5, mask, sinks)
    else:
        result = routed(q, k, v, cache=cache, scale=0.5, mask=mask, sinks=sinks)
    assert result == "the original's result"
    [(positional, named)] = original.calls
    assert all(got is sent for got, sent in zip(positional, (q, k, v), strict=True))
    assert named.pop("sinks", None) is sinks
    assert named.pop("cache") is cache and named.pop("mask") is mask and named == {"scale": 0.5}
    assert cache.empty()


@pytest.mark.parametrize("with_cache", [True, False], ids=["cache", "cache=None"])
def test_handles_never_reach_the_original_and_need_no_cache_argument(with_cache):
    original = Recorder()
    cache, queries = filled(150, 1)
    keys, values = cache.keys_and_values()
    found = RoutedAttention(original)(queries, keys, values, cache=cache if with_cache else None, scale=1.0, mask=None)
    cache, _ = filled(150, 1)
    expected = attend_packed(AttendArgs(queries, cache, 1.0, None, None, mx.float32, mx.float32))
    assert not original.calls and mx.array_equal(found, expected)
