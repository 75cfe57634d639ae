"""What the rotated scalar quantizers share: sorted Gaussian codes, their scale, and products on packed slots.

A token is rotated, divided by its root mean square and quantized coordinate by coordinate with `odd_codebook`; one
`scale` per token restores its size. Products with packed codes never build the dense rows: codes are unpacked into
slots (see packing.py), each slot a dense run of channels, and the products of the slots are added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..codebooks import odd_codebook
from ..packing import slot_codes, slot_sources, slot_width
from ..sphere import scaled_error
from . import LEAST_SQUARES, NORM, UNBIASED

SHRINKAGE = {LEAST_SQUARES: 1.0, NORM: 0.5, UNBIASED: 0.0}  # `Codec.shrinkage` by scaling

SCALE_DTYPE = "bfloat16"  # float32's range in two bytes; its rounding is below the distortion at every rate


def _centred(codes: mx.array, bits: int, dtype: mx.Dtype) -> mx.array:
    """Codes 0..2^b - 1 to t = (2 i + 1) / 2^b - 1."""
    step = 2.0 / 2**bits
    t: mx.array = codes.astype(dtype) * step + (0.5 * step - 1.0)
    return t


def _levels(codes: mx.array, bits: int, dtype: mx.Dtype) -> mx.array:
    """Codebook levels of `codes` by Horner's rule; elementwise, so it fuses under compile."""
    t = _centred(codes, bits, dtype)
    first, *rest = reversed(odd_codebook(bits).coefficients)
    if not rest:
        return t * first
    square = t * t
    total = square * first + rest[0]
    for coefficient in rest[1:]:
        total = total * square + coefficient
    return total * t


@cache
def _quantizer(bits: int) -> Callable[[mx.array], list[mx.array]]:
    book = odd_codebook(bits)
    half = 2 ** (bits - 1)

    def quantize(z: mx.array) -> list[mx.array]:
        magnitude = mx.abs(z)
        index = mx.zeros_like(z)
        for threshold in book.thresholds:
            index = index + (magnitude > threshold)
        codes = mx.where(z < 0, half - 1 - index, half + index).astype(mx.uint8)
        return [codes, _levels(codes, bits, mx.float32)]

    return mx.compile(quantize, shapeless=True)


def quantize(y: mx.array, bits: int, scaling: str = LEAST_SQUARES) -> tuple[mx.array, mx.array]:
    """Quantize rotated tokens `(..., D)` float32.

    Args:
        scaling: what the factor from codebook levels c to y makes right. `least_squares`, <y, c> / |c|^2: the error is
            least, but shrinks what is decoded, by the mean squared error on average. `norm`, |y| / |c|: the norm is
            kept; the right size for keys, since the softmax raises what noise in the scores adds. `unbiased`,
            |y|^2 / <y, c>: <y, y^> is |y|^2, so that errors of values average out over tokens instead of adding up.

    Returns:
        Sorted codes `(..., D)` uint8 and the scale `(..., 1)` of `SCALE_DTYPE`, 0 for a zero token.
    """
    dim = y.shape[-1]
    energy = mx.sum(y * y, axis=-1, keepdims=True)
    z = y * (mx.rsqrt(mx.maximum(energy, 1e-37)) * dim**0.5)
    codes, levels = _quantizer(bits)(z)
    product, size = mx.sum(y * levels, axis=-1, keepdims=True), mx.sum(levels * levels, axis=-1, keepdims=True)
    if scaling == LEAST_SQUARES:
        scale = product / size
    elif scaling == NORM:
        scale = mx.sqrt(energy / size)
    else:
        scale = energy / mx.maximum(product, 1e-37)
    return codes, scale.astype(getattr(mx, SCALE_DTYPE))


def nearest_codes(z: mx.array, bits: int) -> mx.array:
    """Sorted codes `(..., D)` uint8 of the levels nearest to `z` float32."""
    return _quantizer(bits)(z)[0]


def dequantize(codes: mx.array, scale: mx.array, bits: int, dtype: mx.Dtype) -> mx.array:
    """Rotated tokens `(..., D)` in `dtype` from unpacked codes and scales: the plain twin of the slot products."""
    return (_levels(codes, bits, mx.float32) * scale.astype(mx.float32)).astype(dtype)


def _two_bit_levels(bits: list[tuple[mx.array, mx.array]], dtype: mx.Dtype) -> list[mx.array]:
    """Levels from the high and the low bit of every slot: a symmetric 2-bit codebook is linear in its bits."""
    inner, outer = odd_codebook(2).levels[2:]
    return [
        (high.astype(mx.float32) * (inner + outer) + (low.astype(mx.float32) * (outer - inner) - outer)).astype(dtype)
        for high, low in bits
    ]


@cache
def _slot_decoder(dim: int, stages: tuple[int, ...], dtype_name: str) -> Callable[..., list[mx.array]]:
    """Compiled: byte runs of all stages (first stage = highest bits) to codebook levels of every slot."""
    dtype = getattr(mx, dtype_name)
    total = sum(stages)
    counts = [dim * bits // 8 // slot_width(dim, bits) for bits in stages]

    def decode(*sources: mx.array) -> list[mx.array]:
        if stages == (1, 1):
            high, low = sources
            return _two_bit_levels([((high >> i) & 1, (low >> i) & 1) for i in range(8)], dtype)
        if stages == (2,):
            (both,) = sources
            return _two_bit_levels([((both >> i + 1) & 1, (both >> i) & 1) for i in range(0, 8, 2)], dtype)
        slots: list[mx.array] = []
        start, shift = 0, total
        for bits, count in zip(stages, counts, strict=True):
            shift -= bits
            part = slot_codes(list(sources[start : start + count]), dim, bits)
            part = [code << shift for code in part] if shift else part
            slots = [a | b for a, b in zip(slots, part, strict=True)] if slots else part
            start += count
        return [_levels(code, total, mx.float32).astype(dtype) for code in slots]

    return mx.compile(decode, shapeless=True)


def slot_levels(packed: Sequence[mx.array], dim: int, stages: tuple[int, ...], dtype: mx.Dtype) -> list[mx.array]:
    """Codebook levels `(slots, B, Hkv, S, D / slots)` of packed stages `(B, Hkv, S, D * bits / 8)`.

    Returned as a list of groups on the slot axis: one product per group. Up to two slots are left apart, since
    joining them costs more than a second product.
    """
    sources: list[mx.array] = []
    for plane, bits in zip(packed, stages, strict=True):
        sources += slot_sources(plane, dim, bits)
    levels = _slot_decoder(dim, stages, str(dtype).removeprefix("mlx.core."))(*sources)
    return [level[None] for level in levels] if len(levels) <= 2 else [mx.stack(levels)]


def slot_scores(queries: mx.array, levels: list[mx.array]) -> mx.array:
    """`(B, Hkv, R, D)` queries times slot levels: `(B, Hkv, R, S)`, scales not applied."""
    total = None
    start = 0
    for group in levels:
        slots, width = group.shape[0], group.shape[-1]
        part = queries[..., start : start + slots * width]
        start += slots * width
        if slots == 1:
            scores = part @ group[0].swapaxes(-1, -2)
        else:
            part = mx.moveaxis(part.reshape(*part.shape[:-1], slots, width), -2, 0)
            scores = mx.sum(part @ group.swapaxes(-1, -2), axis=0)
        total = scores if total is None else total + scores
    assert total is not None
    return total


def slot_sum(weights: mx.array, levels: list[mx.array]) -> mx.array:
    """`(B, Hkv, R, S)` weights (scales applied) times slot levels: `(B, Hkv, R, D)`."""
    parts = []
    for group in levels:
        if group.shape[0] == 1:
            parts.append(weights @ group[0])
        else:
            slots = mx.moveaxis(weights[None] @ group, 0, -2)
            parts.append(slots.reshape(*slots.shape[:-2], -1))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def unpacked_levels(codes: mx.array, bits: int) -> mx.array:
    """Codebook levels `(..., D)` float32 of unpacked sorted codes."""
    return _levels(codes, bits, mx.float32)


def scaled_band(bits: int, dim: int, scaling: str = LEAST_SQUARES) -> tuple[float, float]:
    """The band of the error of unit vectors with `odd_codebook(bits)` and a scale for each (`quantize`).

    The error with the best scale is e = 1 - cos^2, of the angle between a vector and its levels; with the other scales
    it is 2 - 2 cos and 1 / cos^2 - 1, taken to second order in e. `sphere.scaled_error` is good to 4 D^-2 of the
    result, float32 arithmetic and seeds to 0.3%; rounding the scale moves the decoded vector by at most 2^-8 of its
    norm.
    """
    least, variance = scaled_error(tuple(level / dim**0.5 for level in odd_codebook(bits).levels), dim)
    share = 1.0 - least
    mse = {
        LEAST_SQUARES: least,
        NORM: 2.0 - 2.0 * share**0.5 + 0.25 * variance / share**1.5,
        UNBIASED: 1.0 / share - 1.0 + variance / share**3,
    }[scaling]
    slack = 0.003 + 4.0 / dim**2
    return (1 - slack) * mse, (1 + slack) * mse + 2.0**-16


def sphere_rows(size: int, dim: int) -> npt.NDArray[np.float64]:
    """A million numbers `(n, size)`: coordinates of random unit vectors in `dim` dimensions, times sqrt(D)."""
    draw = np.random.RandomState(0)
    x = draw.standard_normal((1_000_000 // size, size))
    energy = np.sum(x * x, axis=1, keepdims=True)
    if dim > size:
        energy = energy + draw.chisquare(dim - size, energy.shape)
    return np.asarray(x * np.sqrt(dim / energy))
