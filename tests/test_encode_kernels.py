"""The kernel that encodes blocks of tokens: against the codecs' own operations, and against float64."""

from __future__ import annotations

from dataclasses import replace
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
    best_scale,
    cache_of,
    codes_of,
    in_float64,
    levels,
    rotated,
    shapes,
    turned_mean,
)

from mlx_kvq_plugin.batch import BatchKVQCache
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.codecs import UNBIASED
from mlx_kvq_plugin.codecs.trellis import TrellisCoded
from mlx_kvq_plugin.errors import KernelError
from mlx_kvq_plugin.kernels.build import backend
from mlx_kvq_plugin.kernels.encode import encode_block, why_not_encode
from mlx_kvq_plugin.kernels.sides import why_not_sides
from mlx_kvq_plugin.schemes import parse_scheme

if not backend() and kernel_cpu.why_not():
    pytest.skip(kernel_cpu.why_not(), allow_module_level=True)
kernel_cpu.register_backends()

ULP = 2.0**-24  # of float32, relative
SCALE_ULP = 2.0**-8  # of a scale, relative
SHAPES = 20

Planes = dict[str, mx.array]


def position_of(cache: KVQCache, start: int) -> int:
    return cache.offset - cache._dense + start


def encoded_plainly(cache: KVQCache, start: int, count: int) -> tuple[Planes, Planes]:
    assert cache.dense_keys is not None and cache.dense_values is not None
    keys, values = (x[..., start : start + count, :] for x in (cache.dense_keys, cache.dense_values))
    if cache.frame is not None:
        keys = cache.frame.encode(keys, position_of(cache, start))
    return cache.key_codec.encode(keys), cache.value_codec.encode(cache.scaled_values(values))


def tokens_in_float64(cache: KVQCache, start: int, count: int) -> tuple[Any, Any, Any]:
    """Keys in the frame and values, as they are encoded, and how large what was subtracted from keys was."""
    keys, values = (in_float64(x[..., start : start + count, :]) for x in (cache.dense_keys, cache.dense_values))
    if cache.value_scale is not None:
        values = values / in_float64(cache.value_scale)
    if cache.frame is None:
        return keys, values, 0.0
    scale = in_float64(cache.frame.channel_scale())
    mean = turned_mean(cache.frame, position_of(cache, start), count)
    return (keys - mean) * scale, values, np.linalg.norm(mean * scale, axis=-1, keepdims=True)


def check_codec(codec: Any, got: Planes, plain: Planes, x: Any, lost: Any) -> None:
    """Planes against plain operations, and against tokens in float64, in whose terms tolerances are.

    Args:
        lost: norms of what was subtracted from tokens, rounded in float32.
    """
    dim = x.shape[-1]
    assert list(got) == list(plain)
    for name in plain:
        assert (got[name].shape, got[name].dtype) == (plain[name].shape, plain[name].dtype)
    y = rotated(codec, x)
    norm = np.linalg.norm(y, axis=-1, keepdims=True)
    z = np.sqrt(dim) * np.divide(y, norm, out=np.zeros_like(y), where=norm > 0)
    # Of coordinates: what float32 loses in sums of D numbers, in units of the root mean square.
    slack = 16 * ULP * np.sqrt(dim) * (1 + np.divide(lost, norm, out=np.zeros_like(norm), where=norm > 0))
    codes, plain_codes = codes_of(codec, got, dim), codes_of(codec, plain, dim)
    book = levels(codec)
    if isinstance(codec, TrellisCoded):
        check_trellis(codec, got, plain, y, z, slack)
        return
    nearest = np.abs(z[..., None] - book).min(axis=-1)
    assert np.all(np.abs(z - book[codes]) <= nearest + 2 * slack)
    different = codes != plain_codes
    assert different.mean() <= 0.002 if different.size else True
    thresholds = 0.5 * (book[1:] + book[:-1])
    near = np.abs(z[different][:, None] - thresholds).min(axis=-1, initial=np.inf)
    assert np.all(near <= np.broadcast_to(slack, z.shape)[different])
    scale = in_float64(got["scale"])
    expected = best_scale(codec, y, codes)
    assert np.all(np.abs(scale - expected) <= 1.01 * SCALE_ULP * expected + 1e-37)
    same = ~different.any(axis=-1, keepdims=True)
    assert np.all((np.abs(scale - in_float64(plain["scale"])) <= 2.01 * SCALE_ULP * expected + 1e-37) | ~same)


def check_trellis(codec: TrellisCoded, got: Planes, plain: Planes, y: Any, z: Any, slack: Any) -> None:
    """Paths may differ where half precision finds two as good; what they cost may not, nor how codes follow."""
    dim, book = y.shape[-1], levels(codec)
    codes, plain_codes = codes_of(codec, got, dim), codes_of(codec, plain, dim)
    cost, plain_cost = (np.sum((z - book[c]) ** 2, axis=-1, keepdims=True) for c in (codes, plain_codes))
    assert np.all(np.abs(cost - plain_cost) <= 0.03 * plain_cost + 8 * slack * np.sqrt(dim) * np.sqrt(plain_cost + 1))
    assert np.sum(np.abs(cost - plain_cost)) <= 0.003 * np.sum(plain_cost) + 1e-9
    different = (codes != plain_codes).any(axis=-1)
    assert different.mean() <= 0.3 if different.size else True
    expected = best_scale(codec, y, codes)
    assert np.all(np.abs(in_float64(got["scale"]) - expected) <= 1.01 * SCALE_ULP * expected + 1e-37)


def check(kind: Kind, shape: Shape, on: str) -> None:
    """One block of a cache, at a place of its own, with the dense buffers without it."""
    cache = cache_of(kind, shape)
    draw = np.random.RandomState(shape.seed)
    start = draw.randint(0, min(5, shape.dense))
    count = draw.randint(1, shape.dense - start + 1)
    capacity = None if draw.rand() < 0.3 else shape.dense - count + draw.randint(0, 9)
    keys, values, new_keys, new_values = encode_block(cache, start, count, capacity, on)
    plain_keys, plain_values = encoded_plainly(cache, start, count)
    x, v, lost = tokens_in_float64(cache, start, count)
    check_codec(cache.key_codec, keys, plain_keys, x, lost)
    check_codec(cache.value_codec, values, plain_values, v, 0.0)
    for dense, new in ((cache.dense_keys, new_keys), (cache.dense_values, new_values)):
        assert dense is not None
        if capacity is None:
            assert new is None
            continue
        left = np.concatenate(
            [in_float64(dense)[..., :start, :], in_float64(dense)[..., start + count : shape.dense, :]], 2
        )
        assert new is not None and new.dtype == dense.dtype and new.shape[2] == capacity
        assert np.array_equal(in_float64(new)[..., : left.shape[2], :], left)
        assert not np.any(in_float64(new)[..., left.shape[2] :, :])


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_blocks_are_encoded_as_plain_operations_encode_them(kind: Kind, on: str) -> None:
    for shape in shapes(kind, SHAPES):
        check(kind, replace(shape, dense=max(1, shape.dense)), on)


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("kind", TRELLIS_KINDS, ids=str)
def test_blocks_are_encoded_by_trellis_codes(kind: Kind, on: str) -> None:
    for shape in shapes(kind, 3):
        check(kind, replace(shape, batch=1, dense=min(24, max(1, shape.dense))), on)


@pytest.mark.parametrize("on", PRELUDES)
@pytest.mark.parametrize("kind", [*KINDS[:4], TRELLIS_KINDS[0]], ids=str)
def test_blocks_on_every_prelude(kind: Kind, on: str) -> None:
    check(kind, Shape(1, 2, 40, 45, 3, 0, 0, 70, 1.0, 0), on)


@pytest.mark.parametrize("on", BACKENDS)
def test_a_chunk_of_many_blocks(on: str) -> None:
    check(KINDS[0], Shape(1, 1, 5, 500, 0, 0, 0, 1000, 1.0, 4), on)


@pytest.mark.parametrize("norm", [0.0, 1e-25, 1e-19, 1e-15, 1e15])
@pytest.mark.parametrize("on", BACKENDS)
def test_zeros_and_numbers_of_extreme_size(norm: float, on: str) -> None:
    kind = Kind("k=tq3,v=rvq1", (64, 64), framed=False, scaling=UNBIASED)
    cache = cache_of(kind, Shape(1, 2, 0, 12, 0, 0, 0, 0, 1.0, 0))
    assert cache.dense_keys is not None and cache.dense_values is not None
    cache.dense_keys, cache.dense_values = cache.dense_keys * norm, cache.dense_values * norm
    for got, plain in zip(encode_block(cache, 0, 12, on=on)[:2], encoded_plainly(cache, 0, 12), strict=True):
        for name in plain:
            within = 2 * SCALE_ULP if name == "scale" else 0.0
            assert np.allclose(in_float64(got[name]), in_float64(plain[name]), rtol=within, atol=0), name


@pytest.mark.parametrize("on", BACKENDS)
def test_a_block_of_no_tokens(on: str) -> None:
    cache = cache_of(KINDS[2], Shape(2, 3, 0, 9, 1, 0, 0, 0, 1.0, 0))
    keys, values, new_keys, new_values = encode_block(cache, 2, 0, 12, on)
    assert {name: plane.shape for name, plane in keys.items()} == {
        "stage1": (2, 3, 0, 16),
        "stage2": (2, 3, 0, 16),
        "scale": (2, 3, 0, 1),
    }
    assert values["stage1"].shape == (2, 3, 0, 8)
    assert new_keys is not None and new_values is not None and cache.dense_keys is not None
    assert mx.array_equal(new_keys[..., :9, :], cache.dense_keys[..., :9, :])
    assert new_keys.shape[2] == new_values.shape[2] == 12
    assert encode_block(cache, 2, 0, None, on)[2:] == (None, None)


@pytest.mark.parametrize("on", BACKENDS)
def test_all_tokens_leave_empty_buffers(on: str) -> None:
    cache = cache_of(KINDS[2], Shape(1, 1, 0, 9, 0, 0, 0, 0, 1.0, 0))
    keys, _, new_keys, new_values = encode_block(cache, 0, 9, 0, on)
    assert keys["scale"].shape == (1, 1, 9, 1)
    assert new_keys is not None and new_keys.shape == (1, 1, 0, 128)
    assert new_values is not None and new_values.shape == (1, 1, 0, 64)


@pytest.mark.parametrize("on", BACKENDS)
def test_the_frame_matters_to_the_comparison(on: str) -> None:
    # A mean or a constant that is off by three thousandths, or turning to the next position, fails it.
    shape = Shape(1, 1, 0, 30, 0, 0, 0, 500, 1.0, 1)
    for wrong in ("mean", "constant", "position"):
        cache = cache_of(KINDS[1], shape)
        assert cache.frame is not None
        right, offset = cache.frame, cache.offset
        if wrong != "position":
            cache.frame = replace(right, **{wrong: getattr(right, wrong) * 1.003})
        else:
            cache.offset += 1
        keys = encode_block(cache, 3, 20, on=on)[0]
        cache.frame, cache.offset = right, offset
        x, _, lost = tokens_in_float64(cache, 3, 20)
        with pytest.raises(AssertionError):
            check_codec(cache.key_codec, keys, encoded_plainly(cache, 3, 20)[0], x, lost)


def test_requests_that_cannot_be_served_are_refused() -> None:
    cache = cache_of(KINDS[0], Shape(1, 1, 0, 20, 4, 0, 0, 0, 1.0, 0))
    for start, count in ((-1, 4), (17, 4), (0, -1)):
        with pytest.raises(KernelError, match="must be among the 20 dense ones"):
            encode_block(cache, start, count, on="cpu")
    with pytest.raises(KernelError, match="must hold the 12 tokens that are left, got room for 11"):
        encode_block(cache, 4, 8, 11, on="cpu")


@pytest.mark.parametrize(
    ("scheme", "dims", "reason"),
    [
        ("tq4", (96, 96), "head size 96"),
        ("tq4", (128, 512), "head size 512"),
        ("k=polar4,v=tq4", (64, 64), "codec polar4"),
        ("tq2.5", (64, 64), "codec tq2.5"),
        ("tq4,rotation=hadamard2", (64, 64), "rotation hadamard2"),
        ("k=tq3,v=affine4", (64, 64), "codec affine4"),
    ],
)
def test_what_has_no_kernel(scheme: str, dims: tuple[int, int], reason: str) -> None:
    cache = KVQCache(parse_scheme(scheme).layer_spec())
    assert why_not_sides(cache) == "a cache without tokens has no kernel"
    cache.dense_keys, cache.dense_values = (mx.zeros((1, 1, 8, dim)) for dim in dims)
    assert why_not_sides(cache) == f"{reason} has no kernel"


def test_batches_and_other_devices_have_no_kernel() -> None:
    cache = cache_of(KINDS[0], Shape(1, 1, 8, 20, 4, 0, 0, 0, 1.0, 0))
    assert why_not_sides(cache) == ""
    assert why_not_sides(BatchKVQCache.of([cache, cache])) == "a batch of caches has no kernel"  # type: ignore[arg-type]
    if mx.default_device() == mx.cpu:
        assert why_not_encode(cache) == "MLX's default device is no GPU"
