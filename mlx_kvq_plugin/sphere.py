"""Scalar quantizers for the coordinates of a random unit vector in D dimensions.

A coordinate x of a uniformly random point of the unit sphere has the density
``Gamma(D/2) / (sqrt(pi) Gamma((D-1)/2)) (1 - x^2)^((D-3)/2)`` on [-1, 1] (TurboQuant, arXiv 2504.19874, section 3.1),
which approaches N(0, 1/D) from lighter tails. It is log-concave for D >= 3, so the Lloyd-Max quantizer is unique
(Trushkin 1982). Integrals over cells are taken in t, ``x = sin(t)``, where the density is ``cos(t)^(D-2)`` and smooth
up to the ends: Gauss-Legendre quadrature then has a relative error near float64 rounding in every cell, outer ones too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from .codebooks import Array, lloyd_max
from .errors import CodecError

MAX_BITS = 8
MIN_DIM = 4

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_REACH = 10.0  # standard deviations into the outer cell, behind which it has less than 1e-20 of its mass


@dataclass(frozen=True)
class ScalarCodebook:
    """A symmetric scalar quantizer with `2**bits` levels.

    Attributes:
        bits: rate.
        dim: of the unit vectors whose coordinates it quantizes; `None` for N(0, 1).
        levels: all levels, ascending.
        thresholds: all decision thresholds, ascending: the midpoints of neighbouring levels.
        mse: mean squared error of the whole unit vector, D times that of a coordinate; on N(0, 1) that of a number.
    """

    bits: int
    dim: int | None
    levels: tuple[float, ...]
    thresholds: tuple[float, ...]
    mse: float


def check_codebook(bits: int, dim: int) -> None:
    """Raise `CodecError` for rates and dimensions without a codebook on the sphere."""
    if not 1 <= bits <= MAX_BITS:
        raise CodecError(f"a codebook must have 1 to {MAX_BITS} bits, got {bits}; choose one of these")
    if dim < MIN_DIM:
        raise CodecError(f"a codebook on the sphere must have a dimension of at least {MIN_DIM}, got {dim}")


def _constant(dim: int) -> float:
    return math.exp(math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2)) / math.sqrt(math.pi)


def coordinate_density(x: Array, dim: int) -> Array:
    """Density of one coordinate of a random unit vector in `dim` dimensions at `x` in [-1, 1]."""
    density: Array = _constant(dim) * ((1.0 - x) * (1.0 + x)) ** ((dim - 3) / 2)
    return density


def _nodes(edges: Array, dim: int) -> tuple[Array, Array]:
    """Points in each cell of ascending `edges` in [0, 1] and their masses, both `(cells, 64)`: a quadrature."""
    angles = np.arcsin(edges)
    angles[-1] = min(angles[-1], angles[-2] + _REACH / math.sqrt(dim - 2))
    half = 0.5 * np.diff(angles)[:, None]
    t = angles[:-1, None] + half * (1.0 + _NODES)
    return np.sin(t), _constant(dim) * half * _WEIGHTS * np.cos(t) ** (dim - 2)


def _cells(edges: Array, dim: int) -> tuple[Array, Array]:
    """Probability and first moment of a coordinate in each cell of ascending `edges` in [0, 1]."""
    x, mass = _nodes(edges, dim)
    return np.sum(mass, axis=1), np.sum(mass * x, axis=1)


def _edges(levels: Array) -> Array:
    """Nearest-level cells of ascending positive `levels` on [0, 1]; levels above 1 get empty cells."""
    return np.concatenate([[0.0], np.minimum(0.5 * (levels[1:] + levels[:-1]), 1.0), [1.0]])


def _half_mse(levels: Array, dim: int) -> float:
    probability, moment = _cells(_edges(levels), dim)
    return float(1.0 + 2.0 * dim * np.sum(probability * levels**2 - 2.0 * moment * levels))


def sphere_mse(levels: tuple[float, ...], dim: int) -> float:
    """Mean squared error of random unit vectors in `dim` dimensions, each coordinate moved to the nearest level.

    Args:
        levels: all of them, ascending, an even number, symmetric about 0.
    """
    return _half_mse(np.array(levels[len(levels) // 2 :]), dim)


def _spread(term: Array, x: Array, mass: Array, dim: int) -> float:
    """Variance of the mean of a term over the coordinates x of a random unit vector, times D.

    That of independent terms, less what they share with the squared norm, which does not vary.
    """
    norm = x**2 - 1.0 / dim
    term = term - np.sum(mass * term)
    return float(np.sum(mass * term**2) - np.sum(mass * term * norm) ** 2 / np.sum(mass * norm**2))


def scaled_error(levels: tuple[float, ...], dim: int) -> tuple[float, float]:
    """Squared error of random unit vectors, coordinates moved to the nearest level, each vector then scaled best.

    A vector x goes to s l, with l the levels nearest to its coordinates and s = <x, l> / <l, l> its own: the error is
    1 - <x, l>^2 / <l, l>. With r the ratio of the means of <x, l> and <l, l> its mean to second order is
    1 - E<x, l>^2 / E<l, l> - Var<x - r l, l> / E<l, l>, and its variance to first that of <2 r x - r^2 l, l>. What the
    mean leaves out is of order D^-2: below 4 D^-2 of the result. The variance is good to 5% at 1 and 2 bits, where it
    matters, and tells the magnitude at more, where few vectors with a large coordinate make it.

    Args:
        levels: as for `sphere_mse`.

    Returns:
        Mean and variance over vectors.
    """
    half = np.array(levels[len(levels) // 2 :])
    x, mass = _nodes(_edges(half), dim)
    mass = 2.0 * mass  # both signs
    level = half[:, None]
    product, energy = float(np.sum(mass * x * level)), float(np.sum(mass * level**2))
    r = product / energy
    mean = 1.0 - dim * product**2 / energy - _spread(level * (x - r * level), x, mass, dim) / energy
    return mean, dim * _spread(level * (2.0 * r * x - r**2 * level), x, mass, dim)


def _start(bits: int, dim: int) -> Array:
    """Levels of the companding quantizer (density to the power 1/3)."""
    count = 2 ** (bits - 1)
    grid = np.linspace(0.0, min(1.0, 12.0 / math.sqrt(dim)), 20001)
    mass = np.cumsum(((1.0 - grid) * (1.0 + grid)) ** ((dim - 3) / 6))
    mass = (mass - mass[0]) / (mass[-1] - mass[0])
    levels: Array = np.interp((np.arange(count) + 0.5) / count, mass, grid)
    return levels


def _newton_step(levels: Array, dim: int) -> tuple[Array, Array]:
    """Distance of the levels from the centroids of their cells, and the step that makes it zero to first order."""
    edges = _edges(levels)
    probability, moment = _cells(edges, dim)
    centroids = moment / probability
    density = coordinate_density(edges, dim)
    lower = 0.5 * density[:-1] * (centroids - edges[:-1]) / probability  # of centroid i by level i - 1
    upper = 0.5 * density[1:] * (edges[1:] - centroids) / probability  # of centroid i by level i + 1
    lower[0] = upper[-1] = 0.0  # the outer edges do not move
    jacobian = np.diag(1.0 - lower - upper) - np.diag(lower[1:], -1) - np.diag(upper[:-1], 1)
    residual = levels - centroids
    return residual, -np.asarray(np.linalg.solve(jacobian, residual), dtype=np.float64)


@cache
def sphere_codebook(bits: int, dim: int) -> ScalarCodebook:
    """The Lloyd-Max quantizer of a coordinate of random unit vectors, 1 to 8 bits, `dim` at least 4.

    Solved by Newton's method in float64 (Lloyd's own iteration needs thousands of steps at high rates) until levels
    are the centroids of their cells to 1e-12 of the coordinates' size. Raises `CodecError` for other arguments.
    """
    check_codebook(bits, dim)
    levels = _start(bits, dim)
    tolerance = 1e-12 / math.sqrt(dim)
    for _ in range(50):  # five suffice for any dimension
        residual, step = _newton_step(levels, dim)
        if np.max(np.abs(residual)) <= tolerance:
            break
        while levels[0] + step[0] <= 0.0 or levels[-1] + step[-1] >= 1.0 or np.any(np.diff(levels + step) <= 0.0):
            step = 0.5 * step
        levels = levels + step
    return _codebook(bits, dim, levels, _half_mse(levels, dim))


@cache
def gaussian_codebook(bits: int) -> ScalarCodebook:
    """The Lloyd-Max quantizer of N(0, 1), 1 to 8 bits; divide its levels by sqrt(D) to use it on unit vectors."""
    check_codebook(bits, MIN_DIM)
    levels, mse = lloyd_max(bits)
    return _codebook(bits, None, np.array(levels), mse)


def _codebook(bits: int, dim: int | None, positive: Array, mse: float) -> ScalarCodebook:
    levels = np.concatenate([-positive[::-1], positive])
    thresholds = 0.5 * (levels[1:] + levels[:-1])
    return ScalarCodebook(bits, dim, tuple(levels.tolist()), tuple(thresholds.tolist()), mse)
