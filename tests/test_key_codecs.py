"""qjl and tqprod: inner products without bias from one sketch of signs, for keys only."""

import math

import mlx.core as mx
import numpy as np
import pytest
from reference_codecs import float64, matrix_of, mean_coordinate, rotation_matrix, sketch_matrix, unpack_slowly

from mlx_kvq_plugin.codecs import get_codec, qjl
from mlx_kvq_plugin.config import KVQConfig
from mlx_kvq_plugin.errors import SchemeError
from mlx_kvq_plugin.rotation import ROTATIONS
from mlx_kvq_plugin.schemes import parse_scheme

NAMES = ("qjl1", "qjl2", "qjl4", "tqprod2", "tqprod3", "tqprod4")
DIMS = (64, 80)

each_codec = pytest.mark.parametrize("name", NAMES)
each_dim = pytest.mark.parametrize("dim", DIMS)


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def directions(dim: int, count: int, seed: int = 1) -> mx.array:
    """Random unit vectors `(1, 1, count, dim)`."""
    x = np.random.default_rng(seed).normal(size=(1, 1, count, dim))
    return mx.array((x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32))


def decoded(name: str, x: mx.array, seed: int = 0, rotation: str = "hadamard") -> np.ndarray:
    codec = get_codec(name, seed, rotation)
    return float64(codec.decode(codec.encode(x), x.shape[-1]))[0, 0]


# ---- the constant ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [8, 40, 64, 80, 128, 256])
def test_the_mean_coordinate_is_the_integral_over_the_sphere(dim: int) -> None:
    assert qjl.mean_coordinate(dim) == pytest.approx(mean_coordinate(dim), rel=1e-8)
    draws = float64(directions(dim, 4000))
    assert qjl.mean_coordinate(dim) == pytest.approx(np.mean(np.abs(draws)), rel=0.02)


def test_the_constant_of_a_gaussian_sketch_is_the_limit_of_large_heads() -> None:
    """The paper's c is sqrt(pi / 2) / m for rows of m Gaussian vectors, whose norms are sqrt(D)."""
    limits = [qjl.mean_coordinate(dim) * math.sqrt(dim) / math.sqrt(2 / math.pi) for dim in (64, 4096)]
    assert 1.003 < limits[0] < 1.005 and limits[1] == pytest.approx(1, abs=1e-4)
    assert qjl.excess(4096) == pytest.approx(math.pi / 2 - 1, rel=1e-3)


# ---- no bias ---------------------------------------------------------------------------------------------------


@each_codec
@each_dim
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_every_seed_is_unbiased_on_average_over_directions(name: str, dim: int, seed: int) -> None:
    """D E[x^ x^T] is the identity for random directions x: no scale, and no channel that leaks into another."""
    x = directions(dim, 6000, seed=seed + 10)
    found = decoded(name, x, seed)
    moments = dim * found.T @ float64(x)[0, 0] / 6000
    slope = np.trace(moments) / dim
    assert slope == pytest.approx(1, abs=0.006)  # the noise of one key is 0.1 at most
    error = np.sqrt(np.mean((moments - np.eye(dim)) ** 2))
    # An entry is a mean of 6000 products of variance 1 (off the diagonal) times the size of the error.
    assert error < 1.3 * math.sqrt((1 + np.mean(np.sum((found - float64(x)[0, 0]) ** 2, -1))) / 6000)


@pytest.mark.parametrize("name", ["tq1", "tq2", "tq3"])
def test_rounding_to_the_nearest_level_alone_is_biased(name: str) -> None:
    """What the sketch of tqprod is for: the same measure sees the bias of its first stage."""
    x = directions(64, 6000)
    slope = np.mean(np.sum(decoded(name, x) * float64(x)[0, 0], axis=-1))
    assert slope == pytest.approx(1 - get_codec(name).expected_mse(64)[1], abs=0.03)
    assert slope < {"tq1": 0.7, "tq2": 0.91, "tq3": 0.975}[name]


@pytest.mark.parametrize("name", ["qjl1", "tqprod2"])
@each_dim
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_sparse_vectors_are_not_biased(name: str, dim: int, channels: int) -> None:
    """One round of signs would be 25% too much for one channel and 11% too little for two."""
    slopes = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = np.zeros((1, 1, 8, dim), np.float32)
        for token in range(8):
            x[0, 0, token, rng.permutation(dim)[:channels]] = rng.choice([-1, 1], channels) / math.sqrt(channels)
        slopes.append(np.mean(np.sum(decoded(name, mx.array(x), seed) * x[0, 0], axis=-1)))
    assert np.mean(slopes) == pytest.approx(1, abs=0.045)
    if name == "qjl1":
        flat = [np.abs(rotation_matrix(dim, seed, 1)[:channels].sum(axis=0)).sum() for seed in range(60)]
        one_round = np.mean(flat) / math.sqrt(channels) / (dim * mean_coordinate(dim))
        assert abs(one_round - 1) > (0.09 if channels < 3 else 0.04)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_no_choice_of_rotation_brings_a_bias(rotation: str) -> None:
    x = directions(64, 4000)
    for name in ("qjl1", "tqprod2"):
        slope = np.mean(np.sum(decoded(name, x, 3, rotation) * float64(x)[0, 0], axis=-1))
        assert slope == pytest.approx(1, abs=0.006)


@each_codec
@each_dim
def test_the_error_is_that_of_the_theory(name: str, dim: int) -> None:
    x = directions(dim, 2000)
    low, high = get_codec(name).expected_mse(dim)
    error = np.mean(np.sum((decoded(name, x) - float64(x)[0, 0]) ** 2, axis=-1))
    assert 0.985 * low < error < 1.015 * high  # of one seed and 2000 keys
    assert high / low < 1.12


def test_b_blocks_are_b_independent_sketches() -> None:
    x = directions(64, 2000)
    errors = [np.mean(np.sum((decoded(f"qjl{b}", x) - float64(x)[0, 0]) ** 2, axis=-1)) for b in (1, 2, 3, 4)]
    np.testing.assert_allclose(errors, errors[0] / np.array([1, 2, 3, 4]), rtol=0.03)


# ---- what is stored --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ["hadamard", "hadamard3", "dense"])
@each_dim
def test_qjl_stores_the_signs_of_the_sketch_and_the_norm(dim: int, rotation: str) -> None:
    codec, x = get_codec("qjl2", 5, rotation), directions(dim, 40) * 7
    planes = codec.encode(x)
    sketch = np.concatenate([float64(x) @ sketch_matrix(dim, 5, rotation, f" sketch {i}") for i in (0, 1)], axis=-1)
    signs = 2 * unpack_slowly(planes["signs"], 2 * dim, 1) - 1
    clear = np.abs(sketch) > 1e-5
    assert np.mean(clear) > 0.999
    assert np.all((signs == np.sign(sketch))[clear])
    np.testing.assert_allclose(float64(planes["norm"]), 7, rtol=2**-8)


@pytest.mark.parametrize("rotation", ["hadamard", "dense"])
@each_dim
def test_tqprod_stores_tq_and_the_sketch_and_norm_of_what_it_leaves(dim: int, rotation: str) -> None:
    codec, x = get_codec("tqprod3", 5, rotation), directions(dim, 40) * 7
    planes, first = codec.encode(x), get_codec("tq2", 5, rotation).encode(x)
    for name in ("codes", "scale"):
        np.testing.assert_array_equal(float64(planes[name]), float64(first[name]))
    residual = float64(x) - float64(get_codec("tq2", 5, rotation).decode(first, dim))
    sketch = residual @ matrix_of(dim, 5, rotation) @ sketch_matrix(dim, 5, rotation, " residual")
    signs = 2 * unpack_slowly(planes["signs"], dim, 1) - 1
    clear = np.abs(sketch) > 1e-5
    assert np.mean(clear) > 0.999
    assert np.all((signs == np.sign(sketch))[clear])
    np.testing.assert_allclose(float64(planes["norm"])[..., 0], np.linalg.norm(residual, axis=-1), rtol=2**-8)


@each_codec
@each_dim
def test_scores_use_the_stored_norms(name: str, dim: int) -> None:
    codec, keys, queries = get_codec(name), directions(dim, 9), directions(dim, 3, seed=2)
    planes, turned = codec.encode(keys), codec.transform_queries(queries)
    scores = float64(codec.scores(turned, planes))
    factors = mx.array([0.0, 1.0, 2.0, 4.0, 0.5, 8.0, 1.0, 1.0, 16.0])[None, None, :, None]
    changed = {**planes, "norm": (planes["norm"] * factors).astype(mx.bfloat16)}
    without = float64(codec.scores(turned, {**planes, "norm": mx.zeros_like(planes["norm"])}))
    wanted = without + (scores - without) * float64(factors).swapaxes(-1, -2)
    np.testing.assert_allclose(float64(codec.scores(turned, changed)), wanted, rtol=0, atol=1e-5)
    if name.startswith("qjl"):
        assert np.all(without == 0)
    else:
        first = get_codec(f"tq{codec.bits - 1}")
        own = {part: planes[part] for part in ("codes", "scale")}
        np.testing.assert_allclose(without, float64(first.scores(first.transform_queries(queries), own)), atol=1e-5)
    np.testing.assert_allclose(scores[0, 0], float64(queries)[0, 0] @ decoded(name, keys).T, rtol=0, atol=1e-5)


@each_codec
def test_keys_at_the_limits_of_float16_have_finite_scores(name: str) -> None:
    codec = get_codec(name)
    x = mx.array(np.sign(np.random.default_rng(0).normal(size=(1, 1, 6, 64))) * 65504).astype(mx.float16)
    x[0, 0, 3] = 0
    planes = codec.encode(x)
    queries = (directions(64, 2, seed=2)).astype(mx.float16)
    scores = float64(codec.scores(codec.transform_queries(queries), planes))
    assert np.all(np.isfinite(scores)) and np.all(scores[..., 3] == 0) and np.max(np.abs(scores)) > 1e5


# ---- keys only -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "partner"),
    [
        *((f"qjl{b}", "tq4") for b in (1, 2, 3, 4)),
        *((f"tqprod{b}", f"tq{b}") for b in (2, 3, 4)),
        ("kivi2", "affine2g32"),
    ],
)
def test_they_cannot_store_values_and_name_who_does(name: str, partner: str) -> None:
    codec = get_codec(name)
    assert not codec.values and codec.partner == partner and get_codec(partner).values
    for attempt in (lambda: KVQConfig("tq4", name), lambda: parse_scheme(f"k={name},v={name}")):
        with pytest.raises(SchemeError) as caught:
            attempt()
        assert str(caught.value) == (
            f"values must be stored by a codec that can do them, got {name}, which is for keys only; "
            f'write for example "k={name},v={partner}"'
        )
    assert parse_scheme(name) == KVQConfig(name, partner)


@each_codec
def test_they_say_that_they_are_unbiased_and_for_keys(name: str) -> None:
    codec = get_codec(name)
    assert codec.unbiased and not codec.values and not codec.fitted and codec.group == 1
    assert not get_codec("tq4").unbiased
