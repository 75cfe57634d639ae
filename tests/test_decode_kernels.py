"""The kernel that decodes stored tokens: against `decode_all`, and against float64."""

from __future__ import annotations

from typing import Any

import kernel_cpu
import mlx.core as mx
import numpy as np
import pytest
from token_cases import (
    BACKENDS,
    KINDS,
    PRELUDES,
    TRELLIS_KINDS,
    Kind,
    Shape,
    cache_of,
    decoded,
    in_float64,
    shapes,
    turned_mean,
)

from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.errors import KernelError
from mlx_kvq_plugin.kernels.build import backend
from mlx_kvq_plugin.kernels.decode import decode_heads, why_not_decode

if not backend() and kernel_cpu.why_not():
    pytest.skip(kernel_cpu.why_not(), allow_module_level=True)
kernel_cpu.register_backends()

SHAPES = 20
ROUNDING = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


def expected(cache: KVQCache) -> tuple[Any, Any]:
    """All stored keys and values `(B, H, held, D)`, in float64, not rounded to the model's dtype."""
    assert cache.dense_keys is not None and cache.dense_values is not None
    keys, values = cache.live_planes()
    past_keys = decoded(cache.key_codec, keys, cache.dense_keys.shape[3])
    past_values = decoded(cache.value_codec, values, cache.dense_values.shape[3])
    if cache.value_scale is not None:
        past_values *= in_float64(cache.value_scale)
    if cache.frame is not None:
        past_keys /= in_float64(cache.frame.channel_scale())
        past_keys += turned_mean(cache.frame, cache.packed_position, cache.packed_tokens)
    sinks, dense = cache.sink_tokens, [in_float64(x) for x in cache.dense_tokens()]
    joined = [
        np.concatenate([x[:, :, :sinks], past, x[:, :, sinks:]], axis=2)
        for x, past in zip(dense, (past_keys, past_values), strict=True)
    ]
    return joined[0], joined[1]


def sizes(x: Any, scale: mx.array | None) -> Any:
    """Norms of tokens, channels in equal measure: what float32 loses in a channel is in proportion to them."""
    s = 1.0 if scale is None else in_float64(scale)
    return s * np.linalg.norm(x / s, axis=-1, keepdims=True)


def errors(got: mx.array, expected: Any, size: Any) -> Any:
    """How far results are off, as a share of what rounding to their dtype and float32 arithmetic may do."""
    return np.abs(in_float64(got) - expected) / (
        1.01 * ROUNDING[got.dtype] * np.abs(expected) + 16 * 2.0**-24 * size + 6e-8
    )


def check(kind: Kind, shape: Shape, on: str) -> None:
    """Some heads of a cache, against float64 and against plain operations."""
    cache = cache_of(kind, shape)
    draw = np.random.RandomState(shape.seed)
    first = draw.randint(0, shape.heads)
    count = draw.randint(1, shape.heads - first + 1)
    found = decode_heads(cache, first, count, on)
    scales = None, None if cache.value_scale is None else cache.value_scale[:, first : first + count]
    for got, plain, exact, dim, scale in zip(
        found, cache.decode_all(), expected(cache), kind.dims, scales, strict=True
    ):
        plain, exact = plain[:, first : first + count], exact[:, first : first + count]
        assert got.shape == (shape.batch, count, shape.packed + shape.dense, dim) and got.dtype == kind.dtype
        size = sizes(exact, scale)
        assert np.all(errors(got, exact, size) <= 1)
        difference = np.abs(in_float64(got) - in_float64(plain))
        assert np.all(difference <= 2.01 * ROUNDING[got.dtype] * np.abs(exact) + 32 * 2.0**-24 * size + 1.2e-7)
    sinks, recent = cache.sink_tokens, cache._dense - cache.sink_tokens
    for got, dense in zip(found, cache.dense_tokens(), strict=True):
        dense = dense[:, first : first + count]
        assert mx.array_equal(got[:, :, :sinks], dense[:, :, :sinks])
        assert mx.array_equal(got[:, :, got.shape[2] - recent :], dense[:, :, sinks:])


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("kind", [*KINDS, *TRELLIS_KINDS], ids=str)
def test_tokens_are_decoded_as_plain_operations_decode_them(kind: Kind, on: str) -> None:
    for shape in shapes(kind, SHAPES):
        check(kind, shape, on)


@pytest.mark.parametrize("on", PRELUDES)
@pytest.mark.parametrize("kind", [*KINDS[:4], TRELLIS_KINDS[0]], ids=str)
def test_tokens_on_every_prelude(kind: Kind, on: str) -> None:
    check(kind, Shape(1, 2, 140, 13, 3, 5, 6, 70, 1.0, 0), on)
    check(kind, Shape(1, 1, 3, 1, 0, 0, 0, 70, 1.0, 0), on)


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[2], KINDS[5]], ids=str)
@pytest.mark.parametrize("on", BACKENDS)
def test_one_wrong_code_fails_the_comparison(kind: Kind, on: str) -> None:
    cache = cache_of(kind, Shape(1, 2, 70, 9, 0, 3, 4, 70, 1.0, 0))
    keys, values = expected(cache)
    draw = np.random.RandomState(0)
    for side, planes, exact in (("key", cache.key_planes, keys), ("value", cache.value_planes, values)):
        for name in list(planes):
            if name == "scale":
                continue
            right = planes[name]
            head, token, byte = draw.randint(2), draw.randint(70), draw.randint(right.shape[3])
            wrong = np.array(right)
            wrong[0, head, 3 + token, byte] ^= 1 << draw.randint(8)
            planes[name] = mx.array(wrong)
            got = decode_heads(cache, 0, 2, on)[side == "value"]
            planes[name] = right
            off = errors(got, exact, sizes(exact, None))[0]
            place = cache.sink_tokens + token
            assert np.all(off[head, place].max() > 10), name
            off[head, place] = 0
            assert np.all(off <= 1), name


@pytest.mark.parametrize("on", BACKENDS)
def test_zero_scales_give_the_mean(on: str) -> None:
    kind = KINDS[1]
    cache = cache_of(kind, Shape(1, 1, 20, 6, 0, 0, 0, 33, 1.0, 0))
    for planes in (cache.key_planes, cache.value_planes):
        planes["scale"] = mx.zeros_like(planes["scale"])
    keys, values = decode_heads(cache, 0, 1, on)
    assert cache.frame is not None
    mean = turned_mean(cache.frame, cache.packed_position, 20)
    assert np.allclose(in_float64(keys)[:, :, 4:24], mean, rtol=0, atol=1e-5)
    assert not np.any(in_float64(values)[:, :, 4:24])


@pytest.mark.parametrize("on", BACKENDS)
def test_without_packed_tokens_the_dense_ones_are_given(on: str) -> None:
    cache = cache_of(KINDS[0], Shape(2, 3, 0, 9, 4, 0, 0, 0, 1.0, 0))
    for got, dense in zip(decode_heads(cache, 1, 2, on), cache.dense_tokens(), strict=True):
        assert mx.array_equal(got, dense[:, 1:3])


def test_heads_that_do_not_exist_are_refused() -> None:
    cache = cache_of(KINDS[0], Shape(1, 2, 8, 9, 4, 0, 0, 0, 1.0, 0))
    for first, count in ((-1, 1), (0, 0), (1, 2)):
        with pytest.raises(KernelError, match="must be among the cache's 2"):
            decode_heads(cache, first, count, "cpu")


def test_other_devices_have_no_kernel() -> None:
    if mx.default_device() == mx.cpu:
        assert why_not_decode(cache_of(KINDS[0], Shape(1, 1, 8, 9, 0, 0, 0, 0, 1.0, 0))) != ""
