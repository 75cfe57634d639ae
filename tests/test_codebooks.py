"""Codebooks against published tables, against their defining conditions, and by numerical integration."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvq_plugin.codebooks import embedded_stage, lloyd_max, odd_codebook
from mlx_kvq_plugin.codecs import get_codec

# Max 1960, table I: positive levels and mean squared error for N(0, 1).
PUBLISHED = {
    1: ((0.7979,), 0.3634),
    2: ((0.4528, 1.5104), 0.1175),
    3: ((0.2451, 0.7560, 1.3439, 2.1519), 0.03455),
    4: ((0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326), 0.00950),
}
HALF_A_DIGIT = {1: 5e-5, 2: 5e-5, 3: 5e-6, 4: 5e-6}  # of the published distortions
POOLED = {1: 0.131, 2: 0.0198}  # two stages of b bits, the second one not conditional on the first

each_bits = pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
each_stage = pytest.mark.parametrize("bits", [1, 2, 3])

# Midpoint rule for N(0, 1) on [-12, 12]: its error is below 1e-9 for every integrand of this file.
STEP = 24.0 / 2**20
GRID = -12.0 + STEP * (np.arange(2**20) + 0.5)
MASS = STEP * np.exp(-0.5 * GRID**2) / math.sqrt(2 * math.pi)


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def whole(positive: tuple[float, ...]) -> np.ndarray:
    return np.concatenate([-np.array(positive)[::-1], positive])


def cell_of(levels: np.ndarray) -> np.ndarray:
    """Index of the nearest of ascending levels at each grid point."""
    return np.searchsorted(0.5 * (levels[1:] + levels[:-1]), GRID)


def centroids(cell: np.ndarray) -> np.ndarray:
    return np.bincount(cell, MASS * GRID) / np.bincount(cell, MASS)


def distortion(levels: np.ndarray, cell: np.ndarray) -> float:
    return float(np.sum(MASS * (GRID - levels[cell]) ** 2))


@pytest.mark.parametrize("bits", PUBLISHED)
def test_lloyd_max_has_the_published_centroids_and_distortion(bits: int) -> None:
    levels, mse = PUBLISHED[bits]
    found = lloyd_max(bits)
    np.testing.assert_allclose(found[0], levels, rtol=0, atol=5.1e-5)  # half a printed digit
    assert found[1] == pytest.approx(mse, abs=1.02 * HALF_A_DIGIT[bits])


@each_bits
def test_lloyd_max_levels_are_the_centroids_of_their_nearest_neighbour_cells(bits: int) -> None:
    levels = whole(lloyd_max(bits)[0])
    # The fixed point stops at steps of 1e-9, which leaves up to 1e-6 at 6 bits; the grid has cells of 2.3e-5.
    np.testing.assert_allclose(centroids(cell_of(levels)), levels, rtol=0, atol=3e-5)


@each_bits
def test_stated_distortions_are_the_integrals(bits: int) -> None:
    levels = whole(lloyd_max(bits)[0])
    assert lloyd_max(bits)[1] == pytest.approx(distortion(levels, cell_of(levels)), rel=1e-5)
    book = odd_codebook(bits)
    odd = np.array(book.levels)
    assert book.mse == pytest.approx(distortion(odd, cell_of(odd)), rel=1e-5)


@each_bits
def test_the_odd_polynomial_costs_at_most_its_stated_excess_over_lloyd_max(bits: int) -> None:
    best = lloyd_max(bits)[1]
    assert best * (1 - 1e-9) <= odd_codebook(bits).mse <= best * (1.004 if bits > 2 else 1 + 1e-9)


@each_bits
def test_levels_are_the_polynomial_and_thresholds_their_midpoints(bits: int) -> None:
    book = odd_codebook(bits)
    t = (2.0 * np.arange(2**bits) + 1.0) / 2**bits - 1.0
    polynomial = sum(c * t ** (2 * k + 1) for k, c in enumerate(book.coefficients))
    np.testing.assert_allclose(book.levels, polynomial, rtol=0, atol=1e-12)  # float64 sums of five terms
    levels = np.array(book.levels)
    assert np.all(np.diff(levels) > 0)
    assert np.all(levels == -levels[::-1])
    midpoints = 0.5 * (levels[1:] + levels[:-1])
    np.testing.assert_allclose(book.thresholds, midpoints[2 ** (bits - 1) :], rtol=0, atol=1e-15)


@each_stage
def test_the_first_stage_alone_is_nearly_lloyd_max(bits: int) -> None:
    best = lloyd_max(bits)[1]
    assert best * (1 - 1e-9) <= embedded_stage(bits, 2 * bits)[1] <= 1.04 * best


@each_stage
def test_first_stage_levels_are_the_centroids_of_the_merged_cells(bits: int) -> None:
    levels, mse = embedded_stage(bits, 2 * bits)
    merged = cell_of(np.array(odd_codebook(2 * bits).levels)) >> bits
    np.testing.assert_allclose(levels, centroids(merged), rtol=0, atol=3e-5)  # one grid cell at each edge
    assert mse == pytest.approx(distortion(np.array(levels), merged), rel=1e-5)


@pytest.mark.parametrize(("bits", "most"), [(1, 0.120), (2, 0.0115)])
def test_two_conditional_stages_lose_nothing_to_the_staging(bits: int, most: float) -> None:
    """Stage 1, then for each of its cells an own codebook of the residual: built here from nothing but centroids."""
    first = np.array(embedded_stage(bits, 2 * bits)[0])
    fine = cell_of(np.array(odd_codebook(2 * bits).levels))
    residual_levels = centroids(fine) - first[np.arange(4**bits) >> bits]
    total = float(np.sum(MASS * (GRID - first[fine >> bits] - residual_levels[fine]) ** 2))
    assert total <= most
    # The codebook's own levels are on a polynomial, not at the centroids: at most 0.4% worse.
    assert 0.996 * odd_codebook(2 * bits).mse < total <= 1.00001 * odd_codebook(2 * bits).mse
    assert total < 0.91 * POOLED[bits]


@pytest.mark.parametrize(("bits", "most"), [(1, 0.120), (2, 0.0115)])
def test_both_stages_reach_their_distortion_on_gaussian_tokens(bits: int, most: float) -> None:
    x = np.random.default_rng(0).normal(size=(1, 4, 512, 128)).astype(np.float32)
    codec = get_codec(f"rvq{bits}")
    decoded = np.array(codec.decode(codec.encode(mx.array(x)), 128))
    measured = float(np.sum((decoded - x) ** 2) / np.sum(x**2))
    # Tokens on a sphere of 128 dimensions have slightly lighter tails than N(0, 1): up to 6% less distortion.
    assert 0.94 * odd_codebook(2 * bits).mse < measured <= most
