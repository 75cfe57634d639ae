"""Codecs on plain arrays: NumPy and MLX, with and without batch and head axes, are the tokens of `(B, Hkv, L, D)`."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvq_plugin.arrays import from_numpy, lead_axes, plain_tokens, to_numpy, with_lead_axes
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.errors import CodecError

D = 64
CODECS = ["identity", "tq3", "rvq1", "tqprod3", "qjl2", "polar4", "grouped2", "affine4", "tq2.5"]


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_bfloat16_keeps_its_bits_in_numpy():
    x = mx.array([1.0, -2.5, 1e30, 0.0]).astype(mx.bfloat16)
    bits = to_numpy(x)
    assert bits.dtype == np.uint16 and bits.tolist() == [0x3F80, 0xC020, 0x714A, 0]
    back = from_numpy(bits, "bfloat16")
    assert back.dtype == mx.bfloat16 and mx.array_equal(back, x)
    assert from_numpy(bits).dtype == mx.uint16  # codes stay codes
    assert from_numpy(np.zeros(2)).dtype == mx.float32
    assert to_numpy(mx.array([1.5])).dtype == np.float32


def test_axes_in_front_are_added():
    assert [lead_axes(n) for n in (2, 3, 4)] == [2, 1, 0]
    assert with_lead_axes(mx.zeros((5, D))).shape == (1, 1, 5, D)
    assert plain_tokens(np.zeros((3, 5, D))).shape == (1, 3, 5, D)
    assert plain_tokens([[1.0, 2.0], [3.0, 4.0]]).tolist() == [[[[1.0, 2.0], [3.0, 4.0]]]]
    for n in (0, 1, 5):
        with pytest.raises(CodecError, match=f"or \\(B, Hkv, L, D\\), got {n} axes; reshape them"):
            plain_tokens(np.zeros((1,) * n))


@pytest.mark.parametrize(
    "name", ["identity", "tq3", "rvq1", "tqprod3", "qjl2", "polar4", "grouped2", "affine4", "tq2.5"]
)
@pytest.mark.parametrize("shape", [(12, D), (3, 12, D), (2, 3, 12, D), (0, D)])
def test_plain_arrays_are_the_same_tokens(name, shape):
    codec = get_codec(name)
    x = normal(34, *shape).astype(np.float32)
    whole = mx.array(x).reshape(*(1,) * (4 - len(shape)), *shape)
    first = normal(35, *shape[:-2], 12, D).astype(np.float32)
    statistics = codec.fit(first)
    planes = codec.encode(x, statistics)
    for plane, expected in zip(planes.values(), codec.encode(whole, statistics).values(), strict=True):
        assert type(plane) is np.ndarray and plane.shape == expected.shape[4 - len(shape) :]
        bits = expected.view(mx.uint16) if expected.dtype == mx.bfloat16 else expected
        assert plane.dtype == np.array(bits).dtype
        np.testing.assert_array_equal(plane.reshape(bits.shape), np.array(bits))
    decoded = codec.decode(planes, D, statistics=statistics)
    assert type(decoded) is np.ndarray and decoded.dtype == np.float32 and decoded.shape == shape
    reference = codec.decode(codec.encode(whole, statistics), D, mx.float32, statistics)
    np.testing.assert_array_equal(decoded.reshape(reference.shape), np.array(reference))
    mlx = codec.decode(codec.encode(mx.array(x), statistics), D, mx.bfloat16, statistics)
    assert isinstance(mlx, mx.array) and mlx.dtype == mx.bfloat16 and mlx.shape == shape


def test_codecs_per_head_take_plain_arrays():
    x = normal(41, 3, 20, D)
    codec = get_codec("tq3+tq2.5+tq3")
    statistics = codec.fit(x)
    decoded = codec.decode(codec.encode(x, statistics), D, statistics=statistics)
    assert decoded.shape == x.shape and type(decoded) is np.ndarray
    alone = get_codec("tq3").encode(x[::2])
    np.testing.assert_array_equal(decoded[::2], get_codec("tq3").decode(alone, D))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_dtypes_of_numpy(dtype):
    x = normal(36, 5, D).astype(dtype)
    planes = get_codec("identity").encode(x)
    assert planes["dense"].dtype == (np.float16 if dtype == np.float16 else np.float32)
    np.testing.assert_array_equal(planes["dense"], x.astype(planes["dense"].dtype))
    norm = get_codec("qjl1").encode(x)["norm"]
    assert norm.dtype == np.uint16  # the bits of bfloat16
    as_float = (norm.astype(np.uint32) << 16).view(np.float32)[:, 0]
    np.testing.assert_allclose(as_float, np.linalg.norm(x.astype(np.float64), axis=1), rtol=2**-8)
    decoded = get_codec("tq4").decode(planes=get_codec("tq4").encode(x), dtype=mx.float16)
    assert decoded.dtype == np.float16
    assert np.sum((decoded - x.astype(np.float64)) ** 2) < 0.012 * np.sum(x.astype(np.float64) ** 2)
    assert get_codec("tq4").decode(get_codec("tq4").encode(x), dtype=mx.bfloat16).dtype == np.uint16


def test_the_head_size_is_told_by_the_planes_where_they_do():
    for dim in (64, 80, 128):
        x = normal(37, 3, dim)
        for name in ("tq4", "tqprod2", "grouped3", "identity"):
            assert get_codec(name).decode(get_codec(name).encode(x)).shape == x.shape
    planes = get_codec("affine4").encode(normal(38, 3, 80))
    with pytest.raises(CodecError, match=r"must tell the head size, got .* of each of 65 to 96; pass dim="):
        get_codec("affine4").decode(planes)
    assert get_codec("affine4").decode(planes, 80).shape == (3, 80)
    with pytest.raises(CodecError, match="of none; pass dim="):
        get_codec("tq4").decode({"codes": np.zeros((3, 5), np.uint8), "scale": np.zeros((3, 1), np.uint16)})


def test_planes_of_something_else_are_refused():
    planes = get_codec("tq4").encode(normal(39, 3, D))
    for wrong in ({}, {"codes": planes["codes"]}, get_codec("tq3").encode(normal(39, 3, D))):
        with pytest.raises(CodecError, match=r"tq4 planes of 64 channels must have the widths .*'codes': 32"):
            get_codec("tq4").decode(wrong, D)
    with pytest.raises(CodecError, match="of none; pass dim="):
        get_codec("tq4").decode({})
    with pytest.raises(CodecError, match="got 5 axes"):
        get_codec("tq4").encode(np.zeros((1, 1, 1, 3, D)))
    with pytest.raises(CodecError, match=r"codec tq2\.5 must be given statistics, got none"):
        get_codec("tq2.5").encode(normal(40, 9, D))
