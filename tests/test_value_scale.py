"""Scales of value channels: what they are fitted to, and what they are worth to a cache with a loud channel."""

from __future__ import annotations

import copy
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from fused_cases import Case, arguments, filled, in_float64, relative_error

from mlx_kvq_plugin.attention import AttendArgs, attend_decoded, attend_packed
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.config import LayerSpec
from mlx_kvq_plugin.sliding import SlidingKVQCache
from mlx_kvq_plugin.value_scale import LOUD, fit_value_scale

DIM, LOUDER = 64, 50.0
SCHEMES = ["tq4", "tq2", "rvq1", "tcq3", "grouped4", "polar4", "tq2o16"]


def values_like(seed: int, count: int, loud: float = 1.0, heads: int = 2) -> mx.array:
    """Channels of unequal measure, one of them `loud` times as large as it would be."""
    keys = mx.random.split(mx.random.key(seed), 3)
    spread = mx.exp(0.2 * mx.random.normal((1, heads, 1, DIM), key=mx.random.key(7)))
    sizes = mx.exp(0.5 * mx.random.normal((1, heads, count, 1), key=keys[0]))
    values = spread * sizes * mx.random.normal((1, heads, count, DIM), key=keys[1])
    return values * mx.where(mx.arange(DIM) == 7, loud, 1.0)


def packed(scheme: str, values: mx.array, frame: bool = True, **spec: int) -> KVQCache:
    cache = KVQCache(LayerSpec("tq4", scheme, frame=frame, **spec))
    keys = mx.random.normal(values.shape, key=mx.random.key(3))
    cache.update_and_fetch(keys, values)
    cache.observe_queries(keys)
    cache.settle()
    assert cache.packed_tokens > 0
    return cache


def quiet_error(cache: KVQCache, values: mx.array) -> float:
    """The mean squared error of all channels but the loud one."""
    error = np.array(cache.decode_all()[1] - values)
    return float(np.mean(np.delete(error, 7, axis=-1) ** 2))


# ---- the scales ----------------------------------------------------------------------------------------------------


def test_ordinary_channels_have_a_scale_of_one() -> None:
    assert mx.array_equal(fit_value_scale(values_like(1, 200)), mx.ones((1, 2, 1, DIM)))


def test_a_loud_channel_comes_down_to_twice_the_typical_size() -> None:
    values = values_like(1, 200, LOUDER)
    scale = np.array(fit_value_scale(values))
    rms = np.sqrt(np.mean(np.array(values) ** 2, axis=2, keepdims=True))
    typical = np.median(rms, axis=-1)
    np.testing.assert_allclose((rms / scale)[..., 7], LOUD * typical, rtol=0.05)  # the floor of typical energies
    assert np.all(np.delete(scale, 7, axis=-1) == 1)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_scales_do_not_depend_on_the_measure_of_a_head(dtype: mx.Dtype) -> None:
    values = values_like(2, 100, 20.0).astype(dtype)
    scale = fit_value_scale(values)
    assert scale.dtype == mx.float32 and scale.shape == (1, 2, 1, DIM)
    assert mx.array_equal(fit_value_scale(values * 16), scale)


def test_dead_channels_and_heads_have_finite_scales() -> None:
    assert mx.array_equal(fit_value_scale(mx.zeros((1, 2, 70, DIM))), mx.ones((1, 2, 1, DIM)))
    few = values_like(3, 70) * (mx.arange(DIM) < 5)  # most channels are dead
    scale = np.array(fit_value_scale(few))
    assert np.all(scale[..., 5:] == 1) and np.all(scale[..., :5] < (DIM / 1e-3) ** 0.5)


# ---- caches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_loud_channel_costs_the_others_little(scheme: str) -> None:
    plain, loud = values_like(4, 300), values_like(4, 300, LOUDER)
    untouched = quiet_error(packed(scheme, plain), plain)
    assert quiet_error(packed(scheme, loud), loud) < 1.25 * untouched
    if scheme != "tq2o16":  # has other codes for the loudest channels anyway
        assert quiet_error(packed(scheme, loud, frame=False), loud) > 3 * untouched


def test_codecs_that_mix_no_channels_have_no_scales() -> None:
    for scheme in ("affine4", "identity"):
        cache = packed(scheme, values_like(5, 200, LOUDER), recent=0)
        assert not cache.scales_values and cache.value_scale is None


def test_values_alone_wait_for_as_many_tokens_as_the_frame() -> None:
    cache = KVQCache(LayerSpec("identity", "tq4", recent=0))
    values = values_like(6, 80)
    for i in range(80):
        cache.update_and_fetch(values[:, :, i : i + 1], values[:, :, i : i + 1])
        cache.settle()
        assert (cache.packed_tokens > 0) == (cache.value_scale is not None)
    assert cache.packed_tokens > 0 and cache.frame is None


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("heads", [(4, 2), (6, 2)])
@pytest.mark.parametrize("scheme", ["tq4", "k=tq3,v=rvq1", "k=identity,v=tq4", "k=tq4,v=tcq2", "k=tq4,v=grouped4"])
def test_attention_is_that_on_decoded_values(scheme: str, heads: tuple[int, int], queries: int) -> None:
    case = Case(scheme, tokens=210, heads=heads, queries=queries, sinks=True, mask="causal" if queries > 1 else "")
    cache = filled(case)
    assert cache.value_scale is not None
    cache.value_scale = mx.exp(mx.random.normal(cache.value_scale.shape))  # so that every channel matters
    args = arguments(case, cache)
    expected = in_float64(args)
    for function in (attend_packed, attend_decoded):
        assert relative_error(function(args), expected) < 1e-5


def test_scales_are_saved_copied_and_merged() -> None:
    cache = packed("tq4", values_like(8, 200, LOUDER))
    scale, tokens = cache.value_scale, cache.decode_all()[1]
    assert scale is not None and mx.max(scale) > 10
    restored = KVQCache.from_state(cache.state)
    extracted = KVQCache.merge([packed("tq4", values_like(9, 100)), cache]).extract(1)
    for other in (restored, copy.deepcopy(cache), extracted):
        assert other.value_scale is not None and mx.array_equal(other.value_scale, scale)
        assert mx.array_equal(other.decode_all()[1], tokens)
        assert other.nbytes >= scale.nbytes


def test_scales_are_fitted_afresh_when_nothing_is_packed_any_more() -> None:
    cache = packed("tq4", values_like(10, 200, LOUDER))
    cache.trim(200)
    assert cache.value_scale is None
    values = values_like(11, 200)
    cache.update_and_fetch(values, values)
    cache.settle()
    assert mx.array_equal(cache.value_scale, mx.ones((1, 2, 1, DIM)))


def test_sliding_windows_have_scales() -> None:
    values = values_like(12, 500, LOUDER)
    cache = SlidingKVQCache(LayerSpec("tq4", "tq4", recent=8), 256)
    for start in range(0, 500, 100):
        cache.update_and_fetch(values[:, :, start : start + 100], values[:, :, start : start + 100])
        cache.settle()
    found, error = cache.decode_all()[1], values[:, :, 500 - cache.held :]
    assert cache.value_scale is not None and mx.max(cache.value_scale) > 10
    quiet = mx.arange(DIM) != 7
    assert mx.sum(mx.square(found - error) * quiet) < 0.02 * mx.sum(mx.square(error) * quiet)


def test_kernels_get_frame_and_scales_in_one_array() -> None:
    case = Case("tq4", tokens=200)
    cache = filled(case)
    frame, scale = cache.frame, cache.value_scale
    assert frame is not None and scale is not None
    before = cache.nbytes
    rows = cache.frame_rows()
    assert mx.array_equal(rows, mx.concatenate([frame.joined(), scale], axis=-1)) and cache.frame_rows() is rows
    assert cache.nbytes == before + rows.nbytes


def test_a_loud_channel_leaves_attention_exact_to_its_quantization() -> None:
    """Through attention: the quiet channels of the output are as good as without the loud one."""
    errors = []
    for loud in (1.0, LOUDER):
        values = values_like(13, 300, loud)
        cache = packed("tq3", values)
        args = AttendArgs(
            queries=mx.random.normal((1, 4, 1, DIM), key=mx.random.key(5)),
            cache=cache,
            scale=DIM**-0.5,
            mask=None,
            sinks=None,
            key_dtype=mx.float32,
            value_dtype=mx.float32,
        )
        exact = KVQCache(LayerSpec("tq4", "identity", recent=0))
        exact.update_and_fetch(mx.random.normal(values.shape, key=mx.random.key(3)), values)
        exact.observe_queries(mx.random.normal(values.shape, key=mx.random.key(3)))
        exact.settle()
        difference = np.array(attend_packed(args) - attend_decoded(replace(args, cache=exact)))
        errors.append(float(np.sum(np.delete(difference, 7, axis=-1) ** 2)))
    assert errors[1] < 1.5 * errors[0]
