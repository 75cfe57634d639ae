"""The fast forms of packed attention on CPUs against their plain twins."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from test_attention import a_mask, filled

from mlx_kvq_plugin import packed_attention
from mlx_kvq_plugin.attention import AttendArgs, attend_decoded
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.codecs.scalar import _factor, packed_levels, unpacked_levels
from mlx_kvq_plugin.config import LayerSpec
from mlx_kvq_plugin.packed_attention import attend_packed, pads_rows, softmax_parts, softmax_weights
from mlx_kvq_plugin.packing import from_lanes, has_lanes
from mlx_kvq_plugin.rotary import SPAN, Rotary, pair_products, span_scores, span_tables, tables_nbytes


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative(found: mx.array, expected: mx.array) -> float:
    return float(mx.max(mx.abs(found - expected)) / mx.max(mx.abs(expected)))


def exponential(x: np.ndarray) -> np.ndarray:
    mantissa, bits = packed_attention._exp(mx.array(x), mx.array(0.0))
    return np.array(mantissa * bits.view(mx.float32)).astype(np.float64)


def test_the_exponential_is_that_of_float64_within_its_error():
    x = np.linspace(-87, 0, 200_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(exponential(x) - exact) / exact
    assert np.max(error / (1 + np.abs(x))) < 2e-7
    assert np.max(error[np.abs(x) < 1]) < 2.5e-7


def test_the_exponential_of_masked_scores_is_zero_and_of_the_largest_is_one():
    x = np.array([-np.inf, np.finfo(np.float32).min, -1000.0, -88.1, 0.0], dtype=np.float32)
    np.testing.assert_array_equal(exponential(x), [0, 0, 0, 0, 1])


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("spread", [0.1, 5.0, 60.0])
def test_parts_of_the_softmax_are_the_weights_and_their_sum(spread, sinks):
    scores = normal(2, 3, 4, 300) * np.float32(spread)
    scores[..., 7], scores[0, 1, 2, :200] = np.finfo(np.float32).min, -np.inf
    logits = mx.array(normal(6, seed=1) * 9) if sinks else None
    weights, total = softmax_parts(mx.array(scores), logits, 3, 2)
    expected = softmax_weights(mx.array(scores), logits, 3, 2)
    assert weights.shape == expected.shape and total.shape == (2, 3, 4, 1)
    np.testing.assert_allclose(np.array(weights / total), np.array(expected), rtol=1e-4, atol=3e-7)
    assert not np.array(weights)[..., 7].any()


def test_rows_that_are_masked_altogether_weigh_all_tokens_alike():
    weights, total = softmax_parts(mx.full((1, 1, 2, 8), mx.finfo(mx.float32).min), None, 1, 1)
    np.testing.assert_array_equal(np.array(weights / total), np.full((1, 1, 2, 8), 0.125, dtype=np.float32))


@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("name", ["tq1", "tq2", "tq3", "tq4", "tq5", "tq6", "rvq1", "rvq2", "rvq3"])
def test_levels_of_packed_codes_are_those_of_unpacked_ones(name, dim):
    codec = get_codec(name, rotation="dense")
    planes, bits = codec.encode(mx.array(normal(2, 1, 9, dim))), sum(codec.stages)
    expected = np.array(unpacked_levels(codec.codes(planes, dim), bits))
    for dtype, tolerance in ((mx.float32, 1e-6), (mx.float16, 2e-3)):
        levels = packed_levels(codec._packed(planes), dim, codec.stages, dtype)
        assert levels.dtype == dtype
        levels = levels.astype(mx.float32) * _factor(codec.book, dtype)
        if len(codec.stages) == 1 and has_lanes(bits):
            levels = from_lanes(levels, bits)
        np.testing.assert_allclose(np.array(levels), expected, rtol=0, atol=tolerance)


def test_padded_rows_change_nothing(monkeypatch):
    cache, queries = filled(150, 1, heads=6)
    args = AttendArgs(queries, cache, 1.0, None, None, mx.float32, mx.float32)
    assert pads_rows(args, 3) == (mx.default_device() == mx.cpu)
    output = attend_packed(args)
    monkeypatch.setattr(packed_attention, "pads_rows", lambda *_: False)
    assert relative(attend_packed(args), output) < 1e-6
    assert relative(attend_decoded(args), output) < 1e-5


def test_rows_are_padded_only_where_no_mask_and_no_sink_logits_count_them():
    cache, queries = filled(150, 1, heads=6)
    args = AttendArgs(queries, cache, 1.0, "causal", None, mx.float32, mx.float32)
    here = mx.default_device() == mx.cpu
    assert [pads_rows(args, rows) for rows in range(1, 9)] == [here and rows in (3, 7) for rows in range(1, 9)]
    assert not pads_rows(replace(args, sinks=mx.zeros((6,))), 3)
    assert not pads_rows(replace(args, mask=mx.array(a_mask("bool (T,)", 1, 6, 1, cache.held))), 3)
    assert not pads_rows(replace(args, queries=mx.zeros((1, 2, 3, 64))), 3)


@pytest.mark.parametrize("frame", [True, False])
def test_preparations_are_those_of_their_own_layer(frame):
    """Layers of one shape share a compiled preparation, not their statistics, scale or rotation."""
    for scale in (1.0, 0.7):
        for angle in (10000.0, 500.0):
            rotary = Rotary("half", tuple(angle ** (-j / 24) for j in range(24)))  # 16 channels do not turn
            cache, queries = filled(150, 1, heads=6, rotary=rotary, spec=LayerSpec("tq4", "tq4", frame=frame))
            for factor in (1.0, 3.0):
                if cache.frame is not None:
                    cache.frame.mean, cache.frame.scale = cache.frame.mean * factor, cache.frame.scale / factor
                args = AttendArgs(queries, cache, scale, None, None, mx.float32, mx.float32)
                assert relative(attend_packed(args), attend_decoded(args)) < 2e-5


@pytest.mark.parametrize(("start", "length"), [(0, 1), (SPAN - 1, 2), (SPAN, SPAN), (700, 900), (70_001, 300)])
def test_span_scores_are_those_of_single_positions(start, length):
    rotary = Rotary("interleaved", tuple(10000.0 ** (-j / 12) for j in range(12)), 1.3)
    queries, vector = mx.array(normal(2, 2, 3, 32)), mx.array(normal(2, 2, 1, 32, seed=1))
    pairs = pair_products(rotary, queries, vector)
    found = span_scores(rotary, pairs, start, length)
    single = mx.concatenate([span_scores(rotary, pairs, start + i, 1) for i in range(0, length, 97)], axis=-1)
    np.testing.assert_allclose(np.array(found[..., ::97]), np.array(single), rtol=0, atol=1e-5)
    assert found.shape == (2, 2, 3, length)
    if length > 1:
        assert relative(found[..., 1:], found[..., :-1]) > 1e-2  # neighbours differ: a shift would be seen


def test_span_tables_are_counted_and_grow():
    rotary = Rotary("half", (0.7193, 0.0213))  # a rotation of this test alone
    before = tables_nbytes()
    cos, sin, inner = span_tables(rotary, 1)
    small = tables_nbytes() - before
    assert small == cos.nbytes + sin.nbytes + inner.nbytes and inner.shape == (4, SPAN)
    more = span_tables(rotary, 30)
    assert more[0].shape[0] >= 30 and tables_nbytes() - before > small
    np.testing.assert_array_equal(np.array(more[0][: cos.shape[0]]), np.array(cos))
    assert span_tables(rotary, 2)[0] is more[0]
