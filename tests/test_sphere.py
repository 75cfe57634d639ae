"""Codebooks of the sphere against their defining conditions, by integration on a plain grid, and published values."""

import math

import numpy as np
import pytest

from mlx_kvq_plugin.codebooks import odd_codebook
from mlx_kvq_plugin.errors import CodecError
from mlx_kvq_plugin.sphere import (
    coordinate_density,
    gaussian_codebook,
    scaled_error,
    sphere_codebook,
    sphere_mse,
)

# Max 1960, table I: positive levels and mean squared error for N(0, 1).
PUBLISHED = {
    1: ((0.7979,), 0.3634),
    2: ((0.4528, 1.5104), 0.1175),
    3: ((0.2451, 0.7560, 1.3439, 2.1519), 0.03455),
    4: ((0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326), 0.00950),
}
PAPER = {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}  # TurboQuant, theorem 1

each_bits = pytest.mark.parametrize("bits", range(1, 9))
each_dim = pytest.mark.parametrize("dim", [4, 5, 64, 128, 4096])


def grid(dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints and masses of a coordinate, from the density's formula alone; the norm is the sum."""
    reach = min(1.0, 12 / math.sqrt(dim))
    x = reach * ((np.arange(2**19) + 0.5) / 2**18 - 1)
    mass = np.exp((dim - 3) / 2 * np.log1p(-x * x))
    return x, mass / mass.sum()


def nearest(levels: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.searchsorted(0.5 * (levels[1:] + levels[:-1]), x)


def random_directions(count: int, dim: int) -> np.ndarray:
    x = np.random.default_rng(dim).standard_normal((count, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@each_dim
def test_density_is_that_of_a_coordinate_of_random_unit_vectors(dim: int) -> None:
    x, mass = grid(dim)
    np.testing.assert_allclose(coordinate_density(x, dim) * (x[1] - x[0]), mass, rtol=1e-6, atol=1e-18)
    assert mass @ x**2 == pytest.approx(1 / dim, rel=1e-6)
    assert mass @ x**4 == pytest.approx(3 / (dim * (dim + 2)), rel=1e-6)


@each_bits
@each_dim
def test_levels_are_the_centroids_of_their_nearest_neighbour_cells(bits: int, dim: int) -> None:
    book = sphere_codebook(bits, dim)
    x, mass = grid(dim)
    levels = np.array(book.levels)
    cell = nearest(levels, x)
    centroids = np.bincount(cell, mass * x, 2**bits) / np.bincount(cell, mass, 2**bits)
    # A grid step is 5e-5 standard deviations; the innermost level at 8 bits is at 7e-3.
    np.testing.assert_allclose(centroids, levels, rtol=0, atol=5e-5 / math.sqrt(dim))
    assert book.mse == pytest.approx(dim * float(mass @ (x - levels[cell]) ** 2), rel=2e-5)


@each_bits
@each_dim
def test_codebooks_are_symmetric_ascending_and_decide_halfway(bits: int, dim: int) -> None:
    for book in (sphere_codebook(bits, dim), gaussian_codebook(bits)):
        levels = np.array(book.levels)
        assert levels.shape == (2**bits,)
        assert np.all(np.diff(levels) > 0)
        assert np.array_equal(levels, -levels[::-1])
        assert book.thresholds == tuple(0.5 * (levels[1:] + levels[:-1]))
    assert book.dim is None
    assert (sphere_codebook(bits, dim).bits, sphere_codebook(bits, dim).dim) == (bits, dim)
    assert np.max(sphere_codebook(bits, dim).levels) < 1
    if bits > 1:
        assert sphere_codebook(bits, dim).mse < 0.4 * sphere_codebook(bits - 1, dim).mse


@each_dim
def test_one_bit_has_its_closed_form(dim: int) -> None:
    mean = math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)  # of |x|
    book = sphere_codebook(1, dim)
    assert book.levels[1] == pytest.approx(mean, rel=1e-10)
    assert book.mse == pytest.approx(1 - dim * mean**2, rel=1e-9)


@pytest.mark.parametrize("bits", PUBLISHED)
def test_normal_codebooks_are_the_published_ones_and_the_limit_of_large_dimensions(bits: int) -> None:
    levels, mse = PUBLISHED[bits]
    half = 2 ** (bits - 1)
    assert gaussian_codebook(bits).levels[half:] == pytest.approx(levels, abs=5.1e-5)  # half a printed digit
    assert gaussian_codebook(bits).mse == pytest.approx(mse, abs=5.1e-5 if bits < 3 else 5.1e-6)
    errors = []
    for dim in (1000, 1_000_000):
        limit = np.array(sphere_codebook(bits, dim).levels) * math.sqrt(dim)
        errors.append(np.max(np.abs(limit / gaussian_codebook(bits).levels - 1)))
        assert errors[-1] < 3 / dim
        assert abs(sphere_codebook(bits, dim).mse / gaussian_codebook(bits).mse - 1) < 8 / dim
    assert 500 * errors[1] < errors[0]


@pytest.mark.parametrize("bits", PAPER)
def test_the_error_is_what_the_paper_reports(bits: int) -> None:
    digits = len(f"{PAPER[bits]}") - 2
    assert round(sphere_codebook(bits, 1536).mse, digits) == PAPER[bits]
    assert 4.0**-bits < sphere_codebook(bits, 1536).mse < math.sqrt(3) * math.pi / 2 * 4.0**-bits


@each_bits
def test_no_normal_codebook_is_as_good_on_the_sphere(bits: int) -> None:
    for dim in (8, 64):
        normal = tuple(level / math.sqrt(dim) for level in gaussian_codebook(bits).levels)
        assert sphere_codebook(bits, dim).mse < sphere_mse(normal, dim)
        wider = tuple(1.01 * level for level in sphere_codebook(bits, dim).levels)
        assert sphere_codebook(bits, dim).mse < sphere_mse(wider, dim)
        assert sphere_mse(sphere_codebook(bits, dim).levels, dim) == pytest.approx(
            sphere_codebook(bits, dim).mse, rel=1e-12
        )


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_sphere_mse_is_the_error_of_any_levels(bits: int) -> None:
    dim = 32
    levels = np.array(odd_codebook(bits).levels) * 1.3 / math.sqrt(dim)
    x, mass = grid(dim)
    exact = dim * float(mass @ (x - levels[nearest(levels, x)]) ** 2)
    assert sphere_mse(tuple(levels), dim) == pytest.approx(exact, rel=1e-5)
    v = random_directions(20_000, dim)
    measured = np.sum((v - levels[nearest(levels, v)]) ** 2, axis=1)
    assert abs(measured.mean() - exact) < 4 * measured.std() / math.sqrt(len(v))


def test_levels_beyond_the_sphere_have_empty_cells() -> None:
    near = sphere_codebook(1, 4).levels
    assert sphere_mse((-9.0, *near, 9.0), 4) == pytest.approx(sphere_codebook(1, 4).mse, rel=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
@pytest.mark.parametrize("dim", [32, 64])
def test_scaled_error_is_that_with_the_best_scale_of_each_vector(bits: int, dim: int) -> None:
    levels = np.array(odd_codebook(bits).levels) / math.sqrt(dim)
    x = random_directions(20_000, dim)
    chosen = levels[nearest(levels, x)]
    error = 1 - np.sum(x * chosen, axis=1) ** 2 / np.sum(chosen**2, axis=1)
    mean, variance = scaled_error(tuple(levels), dim)
    assert abs(error.mean() - mean) < 4 * error.std() / math.sqrt(len(x)) + 4 / dim**2 * mean
    assert mean < sphere_mse(tuple(levels), dim)
    if bits < 3:
        assert np.var(error) == pytest.approx(variance, rel=0.06)


@pytest.mark.parametrize("dim", [16, 64, 256])
def test_scaled_error_at_one_bit_has_its_closed_form(dim: int) -> None:
    mean, variance = scaled_error((-1.0, 1.0), dim)
    assert mean == pytest.approx((1 - 2 / math.pi) * (1 - 1 / dim), rel=0.3 / dim**2)
    assert variance == pytest.approx(8 / math.pi * (1 - 3 / math.pi) / dim, rel=4 / dim)


@pytest.mark.parametrize(
    ("bits", "dim", "said"),
    [
        (0, 64, "a codebook must have 1 to 8 bits, got 0"),
        (9, 64, "a codebook must have 1 to 8 bits, got 9"),
        (2, 3, "a dimension of at least 4, got 3"),
    ],
)
def test_rates_and_dimensions_without_a_codebook_are_refused(bits: int, dim: int, said: str) -> None:
    with pytest.raises(CodecError, match=said):
        sphere_codebook(bits, dim)
    if dim > 3:
        with pytest.raises(CodecError, match=said):
            gaussian_codebook(bits)
