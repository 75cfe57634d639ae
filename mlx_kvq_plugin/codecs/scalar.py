"""What the rotated scalar quantizers share: sorted Gaussian codes, their scale, and products with packed codes.

A token is rotated, divided by its root mean square and quantized coordinate by coordinate with `odd_codebook`; one
`scale` per token restores its size. Products with packed codes leave the rotation and the order of channels as they
are stored: what codes are multiplied with is brought into the order in which they unpack fastest (see packing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..codebooks import Codebook, odd_codebook
from ..packing import from_lanes, has_lanes, lane_codes, to_lanes, word_codes
from ..sphere import scaled_error
from . import LEAST_SQUARES, NORM, UNBIASED

SHRINKAGE = {LEAST_SQUARES: 1.0, NORM: 0.5, UNBIASED: 0.0}  # `Codec.shrinkage` by scaling

SCALE_DTYPE = "bfloat16"  # float32's range in two bytes; its rounding is below the distortion at every rate


def _centred(codes: mx.array, bits: int, dtype: mx.Dtype) -> mx.array:
    """Codes 0..2^b - 1 to t = (2 i + 1) / 2^b - 1."""
    step = 2.0 / 2**bits
    t: mx.array = codes.astype(dtype) * step + (0.5 * step - 1.0)
    return t


def levels_of(codes: mx.array, book: Codebook, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Levels of sorted `codes` by Horner's rule; elementwise, so it fuses under compile."""
    t = _centred(codes, book.bits, dtype)
    first, *rest = reversed(book.coefficients)
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
        return [codes, levels_of(codes, book)]

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
    z, energy = unit_variance(y)
    codes, levels = _quantizer(bits)(z)
    return codes, token_scale(y, energy, levels, scaling)


def unit_variance(y: mx.array) -> tuple[mx.array, mx.array]:
    """Tokens `(..., D)` over their root mean square, and their energies `(..., 1)`."""
    energy = mx.sum(y * y, axis=-1, keepdims=True)
    return y * (mx.rsqrt(mx.maximum(energy, 1e-37)) * y.shape[-1] ** 0.5), energy


def token_scale(y: mx.array, energy: mx.array, levels: mx.array, scaling: str) -> mx.array:
    """The factors `(..., 1)` of `SCALE_DTYPE` from `levels` to tokens `y` `(..., D)` of `energy`, as in `quantize`."""
    product, size = mx.sum(y * levels, axis=-1, keepdims=True), mx.sum(levels * levels, axis=-1, keepdims=True)
    if scaling == LEAST_SQUARES:
        scale = product / size
    elif scaling == NORM:
        scale = mx.sqrt(energy / size)
    else:
        scale = energy / mx.maximum(product, 1e-37)
    return scale.astype(getattr(mx, SCALE_DTYPE))


def nearest_codes(z: mx.array, bits: int) -> mx.array:
    """Sorted codes `(..., D)` uint8 of the levels nearest to `z` float32."""
    return _quantizer(bits)(z)[0]


def dequantize(codes: mx.array, scale: mx.array, bits: int, dtype: mx.Dtype) -> mx.array:
    """Rotated tokens `(..., D)` in `dtype` from unpacked codes and scales: the plain twin of the packed products."""
    return (levels_of(codes, odd_codebook(bits)) * scale.astype(mx.float32)).astype(dtype)


@cache
def _monic(book: Codebook) -> tuple[float, list[float]]:
    """Level i of a codebook as a factor times v^n + c v^(n - 2) + ..., v = i - (2^b - 1) / 2; the rest: c, ..."""
    step = 2.0 / 2**book.bits
    scaled = [c * step ** (2 * i + 1) for i, c in enumerate(book.coefficients)]
    return scaled[-1], [c / scaled[-1] for c in reversed(scaled[:-1])]


@cache
def _decoder(book: Codebook, dtype_name: str) -> Callable[[mx.array], mx.array]:
    """Compiled: codes to levels over `_factor`.

    Tracing for all shapes counts two operations for each that has a constant, and fuses a chain of at most eleven: the
    square is completed so that up to 4 bits take one pass.
    """
    dtype: mx.Dtype = getattr(mx, dtype_name)
    unit = dtype == mx.float32
    factor, rest = _monic(book)

    def decode(codes: mx.array) -> mx.array:
        v = codes.astype(mx.float32) - (2**book.bits - 1) / 2
        if not rest:
            total: mx.array | float = 1.0
        elif len(rest) == 1:
            total = mx.square(v) + rest[0]
        else:
            half = 0.5 * rest[0]
            total = mx.square(mx.square(v) + half) + (rest[1] - half * half)
            for coefficient in rest[2:]:
                total = total * mx.square(v) + coefficient
        levels: mx.array = total * v
        return levels if unit else (levels * factor).astype(dtype)

    return mx.compile(decode, shapeless=True)


def _factor(book: Codebook, dtype: mx.Dtype) -> float:
    """What `packed_levels` are to be multiplied with; 1 in half precision, which could not hold them without."""
    return _monic(book)[0] if dtype == mx.float32 else 1.0


def packed_levels(
    packed: Sequence[mx.array], dim: int, stages: tuple[int, ...], dtype: mx.Dtype, book: Codebook | None = None
) -> mx.array:
    """Codebook levels `(B, Hkv, S, D)` over `_factor` of packed stages `(B, Hkv, S, D * bits / 8)`.

    Channels are in the order of lanes (`packing.to_lanes`) where the rows have lanes.

    Args:
        stages: bits of each, the highest first.
        book: of that many bits in all; `odd_codebook` for `None`, as in the functions below.
    """
    lanes = len(stages) == 1 and has_lanes(stages[0])
    codes = lane_codes(packed[0], stages[0]) if lanes else word_codes(packed, dim, stages)
    return _decoder(book or odd_codebook(sum(stages)), str(dtype).removeprefix("mlx.core."))(codes)


def packed_scores(
    queries: mx.array, packed: Sequence[mx.array], stages: tuple[int, ...], book: Codebook | None = None
) -> mx.array:
    """`(B, Hkv, R, D)` queries times the levels of packed stages: `(B, Hkv, R, S)`, scales not applied."""
    levels = packed_levels(packed, queries.shape[-1], stages, queries.dtype, book)
    if len(stages) == 1 and has_lanes(stages[0]):
        queries = to_lanes(queries, stages[0])
    queries = queries * _factor(book or odd_codebook(sum(stages)), queries.dtype)
    return (levels @ queries.swapaxes(-1, -2)).swapaxes(-1, -2)


def packed_sum(
    weights: mx.array, packed: Sequence[mx.array], dim: int, stages: tuple[int, ...], book: Codebook | None = None
) -> mx.array:
    """`(B, Hkv, R, S)` weights (scales applied) times the levels of packed stages: `(B, Hkv, R, D)`."""
    total = weights @ packed_levels(packed, dim, stages, weights.dtype, book)
    total = total * _factor(book or odd_codebook(sum(stages)), weights.dtype)
    return from_lanes(total, stages[0]) if len(stages) == 1 and has_lanes(stages[0]) else total


def unpacked_levels(codes: mx.array, bits: int) -> mx.array:
    """Codebook levels `(..., D)` float32 of unpacked sorted codes."""
    return levels_of(codes, odd_codebook(bits))


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
