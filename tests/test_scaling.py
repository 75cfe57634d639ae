"""What the scales of tq and rvq make right: the error, the norm, or the inner product with the token itself."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from reference_codecs import float64

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.codecs import LEAST_SQUARES, NORM, SCALINGS, UNBIASED, Codec, get_codec
from mlx_kvq_plugin.config import LayerSpec
from mlx_kvq_plugin.errors import CodecError

NAMES = ("tq1", "tq2", "tq4", "rvq1", "tq2.5")
ROUNDING = 2.0**-8  # of a bfloat16 scale


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def decoded(name: str, scaling: str, x: mx.array) -> np.ndarray:
    codec = get_codec(name, 0, "hadamard", scaling)
    statistics = codec.fit(x)
    return float64(codec.decode(codec.encode(x, statistics), x.shape[-1], mx.float32, statistics))


def tokens(dim: int, seed: int = 0) -> mx.array:
    return mx.random.normal((1, 2, 50, dim), key=mx.random.key(seed)) * 3.0


@pytest.mark.parametrize("name", ["tq1", "tq2", "tq4", "rvq1"])
@pytest.mark.parametrize("dim", [64, 80])
def test_each_scaling_makes_its_own_thing_right_for_every_token(name: str, dim: int) -> None:
    x = tokens(dim)
    true = float64(x)
    size = np.sum(true * true, axis=-1)
    least, norm, unbiased = (decoded(name, scaling, x) for scaling in SCALINGS)
    np.testing.assert_allclose(np.sum(norm * norm, axis=-1), size, rtol=2 * ROUNDING)
    np.testing.assert_allclose(np.sum(true * unbiased, axis=-1), size, rtol=ROUNDING)
    error = np.sum((true - least) ** 2, axis=-1)
    assert np.all(np.sum((true - norm) ** 2, axis=-1) >= error * (1 - ROUNDING))
    assert np.all(np.sum((true - unbiased) ** 2, axis=-1) >= np.sum((true - norm) ** 2, axis=-1) * (1 - ROUNDING))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_scales_differ(name: str) -> None:
    x = tokens(64)
    stored = []
    for scaling in SCALINGS:
        codec = get_codec(name, 0, "hadamard", scaling)
        stored.append(codec.encode(x, codec.fit(x)))
    for plane in stored[0]:
        same = [mx.array_equal(stored[0][plane], other[plane]).item() for other in stored[1:]]
        assert same == ([False, False] if plane.endswith("scale") else [True, True])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_stated_shrinkage_is_the_slope(name: str, scaling: str) -> None:
    """Over many directions the slope of <y, x^> over <y, x> is that of <x, x^> over <x, x>."""
    x = mx.random.normal((1, 2, 4000, 64), key=mx.random.key(1))
    x = x / mx.linalg.norm(x, axis=-1, keepdims=True)
    codec = get_codec(name, 0, "hadamard", scaling)
    true, found = float64(x), decoded(name, scaling, x)
    mse = np.mean(np.sum((true - found) ** 2, axis=-1))
    assert codec.shrinkage is not None
    assert np.mean(np.sum(true * found, axis=-1)) == pytest.approx(1 - codec.shrinkage * mse, abs=ROUNDING)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_and_decoding_does_not_depend_on_the_scaling(name: str, scaling: str) -> None:
    assert not np.any(decoded(name, scaling, mx.zeros((1, 1, 3, 64))))
    x = tokens(64)
    codec = get_codec(name, 0, "hadamard", scaling)
    planes, statistics = codec.encode(x, codec.fit(x)), codec.fit(x)
    plain = get_codec(name).decode(planes, 64, mx.float32, statistics)
    np.testing.assert_array_equal(float64(plain), float64(codec.decode(planes, 64, mx.float32, statistics)))


def test_names_json_and_mistakes() -> None:
    codec = get_codec("tq3+rvq1", 2, "dense", UNBIASED)
    assert Codec.from_json(codec.to_json()) == codec
    assert '"scaling"' not in get_codec("tq3").to_json()
    assert get_codec("tq3", 0, "hadamard", NORM) != get_codec("tq3")
    with pytest.raises(CodecError, match=r"^a scaling must be one of least_squares, norm, unbiased, got 'best'"):
        get_codec("tq3", 0, "hadamard", "best")


def test_caches_keep_the_norms_of_keys_and_leave_values_unbiased() -> None:
    spec = LayerSpec("tq2", "tq2+tq3")
    assert (spec.key_codec.scaling, spec.value_codec.scaling) == (NORM, UNBIASED)
    least = spec.with_(scaling=LEAST_SQUARES)
    assert (least.key_codec.scaling, least.value_codec.scaling) == (LEAST_SQUARES, LEAST_SQUARES)
    found = {}
    for scheme in ("tq2", "tq2,scaling=least_squares"):
        cache = kvq.CompressedKV(scheme + ",frame=off,sinks=0,recent=0")
        x = tokens(64)[:, :1]
        cache.append(x, x)
        cache.attend(x)
        assert cache.packed_tokens > 0 and cache._cache is not None
        found[scheme] = [float64(side) for side in cache._cache.decode_all()]
    true = float64(tokens(64)[:, :1])
    count = 48  # packed tokens; the rest is dense
    for scheme, (key_power, value_power) in {"tq2": (0.5, 0.0), "tq2,scaling=least_squares": (1.0, 1.0)}.items():
        for side, power in zip(found[scheme], (key_power, value_power), strict=True):
            error = np.mean(np.sum((true - side)[:, :, :count] ** 2, -1) / np.sum(true[:, :, :count] ** 2, -1))
            slope = np.mean(np.sum((true * side)[:, :, :count], -1) / np.sum(true[:, :, :count] ** 2, -1))
            assert slope == pytest.approx(1 - power * error, abs=4e-3)
