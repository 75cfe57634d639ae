"""Every rotation against its definition: orthogonal, undone exactly, independent by label, and what two rounds gain."""

import hashlib
import json
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from reference_codecs import decode_slowly, float64, rotation_matrix

from mlx_kvq_plugin.codecs import Codec, get_codec
from mlx_kvq_plugin.errors import CodecError
from mlx_kvq_plugin.rotation import ROTATIONS, check_dim, has_hadamard, rotate, signs, unrotate

HADAMARDS = {"hadamard": 1, "hadamard2": 2, "hadamard3": 3}  # rounds
DIMS = (64, 80, 96, 112, 128, 192, 256)
LABELS = ("", " residual", " sketch 0", " sketch 1")

each_rotation = pytest.mark.parametrize("rotation", ROTATIONS)
each_dim = pytest.mark.parametrize("dim", DIMS)
rotation_and_dim = pytest.mark.parametrize(
    ("rotation", "dim"), [*((r, d) for r in HADAMARDS for d in DIMS), *(("dense", d) for d in (64, 72, 80))]
)


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def matrix(dim: int, rotation: str, seed: int = 0, label: str = "") -> np.ndarray:
    """`x @ matrix` is what `rotate` does, to float32."""
    return float64(rotate(mx.eye(dim), seed, rotation, label))


def tokens(dim: int, length: int = 5) -> mx.array:
    return mx.array(np.random.default_rng(1).normal(size=(1, 2, length, dim)).astype(np.float32))


def fourth_moment(x: np.ndarray) -> float:
    """Of unit vectors `(n, D)`, times D: 3 - 6 / (D + 2) for random directions, 1 for entries of equal size."""
    dim = x.shape[-1]
    return float(np.mean(np.sum(x**4, axis=-1)) * dim)


def test_the_choices_are_those_of_the_documentation() -> None:
    assert ROTATIONS == ("hadamard", "hadamard2", "hadamard3", "dense")


@rotation_and_dim
def test_rotations_are_orthogonal(rotation: str, dim: int) -> None:
    for label in LABELS:
        m = matrix(dim, rotation, 3, label)
        np.testing.assert_allclose(m @ m.T, np.eye(dim), rtol=0, atol=3e-6)


@rotation_and_dim
def test_unrotating_is_the_inverse(rotation: str, dim: int) -> None:
    x = tokens(dim)
    for label in LABELS[:2]:
        turned = rotate(x, 5, rotation, label)
        assert np.max(np.abs(float64(turned) - float64(x))) > 1
        np.testing.assert_allclose(float64(unrotate(turned, 5, rotation, label)), float64(x), rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            float64(unrotate(x, 5, rotation, label)), float64(x) @ matrix(dim, rotation, 5, label).T, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("rotation", HADAMARDS)
@each_dim
def test_rounds_are_signs_then_hadamard_with_signs_of_their_own(rotation: str, dim: int) -> None:
    for label in ("", " residual"):
        wanted = rotation_matrix(dim, 2, HADAMARDS[rotation], label)
        np.testing.assert_allclose(matrix(dim, rotation, 2, label), wanted, rtol=0, atol=2e-6)
    texts = [" residual", " residual round 1", " residual round 2"]
    rounds = [np.array(signs(dim, 2, text)) for text in texts]
    assert all(0.25 < np.mean(a != b) < 0.75 for a, b in pairwise(rounds))


@rotation_and_dim
def test_labels_and_seeds_give_independent_rotations(rotation: str, dim: int) -> None:
    """The part that two rotations have in common is the trace of one times the inverse of the other, over D."""
    makes = [(0, label) for label in LABELS] + [(1, ""), (10, "")]
    matrices = [matrix(dim, rotation, seed, label) for seed, label in makes]
    for i, a in enumerate(matrices):
        for b in matrices[:i]:
            assert abs(np.trace(a @ b.T)) / dim < 5 / np.sqrt(dim)
            x = float64(tokens(dim, 64)).reshape(-1, dim)
            together = np.sum((x @ a) * (x @ b), axis=-1) / np.sum(x * x, axis=-1)
            assert abs(np.mean(together)) < 5 / np.sqrt(dim)


def test_signs_are_the_same_on_every_platform_for_ever() -> None:
    text = "".join("+" if s > 0 else "-" for s in np.array(signs(80, 7, " sketch 1")))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "c70491d2a1b33420"
    assert set(np.array(signs(80, 7)).tolist()) == {1.0, -1.0}


def test_dense_matrices_are_the_same_on_every_platform_to_float32() -> None:
    found = matrix(72, "dense", 7, " residual")
    np.testing.assert_allclose(found[[0, 35, 71], [0, 71, 3]], [0.0532026, 0.0041913, 0.0467837], rtol=0, atol=1e-6)


def test_dense_matrices_are_uniformly_distributed() -> None:
    """Over the orthogonal group E[tr M] = 0 and E[(tr M)^2] = 1 (Diaconis and Shahshahani 1994); QR without the signs
    of its diagonal has another mean."""
    traces = np.array([np.trace(matrix(16, "dense", seed)) for seed in range(400)])
    assert abs(np.mean(traces)) < 4 / np.sqrt(400)
    assert np.mean(traces**2) == pytest.approx(1, abs=4 * np.sqrt(2 / 400))
    diagonals = np.array([np.diagonal(matrix(16, "dense", seed)) for seed in range(400)])
    assert np.mean(diagonals**2) == pytest.approx(1 / 16, rel=0.1)


@each_rotation
@pytest.mark.parametrize("dim", [64, 128])
def test_a_single_channel_becomes_gaussian_in_two_rounds_and_not_in_one(rotation: str, dim: int) -> None:
    """Many seeds: where D is a power of two, two rounds give all one-hot vectors the same entries in other places."""
    m = np.concatenate([matrix(dim, rotation, seed) for seed in range(12)])
    if rotation == "hadamard":
        np.testing.assert_allclose(np.abs(m), 1 / np.sqrt(dim), rtol=1e-5)
        assert fourth_moment(m) == pytest.approx(1, rel=1e-4)
    else:
        assert fourth_moment(m) == pytest.approx(3 - 6 / (dim + 2), abs=0.2)
        # The share of entries beyond 1.875 standard deviations (two rounds give them in steps of 2 / sqrt(D)).
        assert np.mean(np.abs(m) * np.sqrt(dim) > 1.875) == pytest.approx(0.0608, abs=0.012)


@each_rotation
def test_random_directions_stay_random(rotation: str) -> None:
    x = float64(tokens(128, 400)).reshape(-1, 128)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    assert fourth_moment(x @ matrix(128, rotation)) == pytest.approx(3 - 6 / 130, abs=0.05)


def test_two_rounds_give_sparse_tokens_the_error_of_all_others() -> None:
    """One round makes a token with one channel exactly two levels: too good at 1 bit, and twice as bad at 4."""
    x = mx.eye(128)[None, None]
    errors = {}
    for rotation in ROTATIONS:
        codec = get_codec("tq2", 0, rotation)
        errors[rotation] = float(np.mean(np.sum((float64(codec.decode(codec.encode(x), 128)) - np.eye(128)) ** 2, -1)))
    assert errors["hadamard"] < 1e-4
    for rotation in ("hadamard2", "hadamard3", "dense"):
        assert errors[rotation] == pytest.approx(0.1175, rel=0.07)


@each_rotation
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rotating_keeps_the_dtype_and_empty_arrays(rotation: str, dtype: str) -> None:
    kind = getattr(mx, dtype)
    for turn in (rotate, unrotate):
        assert turn(tokens(80).astype(kind), 0, rotation).dtype == kind
        empty = turn(mx.zeros((2, 3, 0, 80), kind), 0, rotation)
        assert empty.shape == (2, 3, 0, 80) and empty.dtype == kind


@pytest.mark.parametrize("dim", [36, 72, 100, 144, 200])
def test_only_dense_rotates_sizes_without_a_hadamard_matrix(dim: int) -> None:
    assert not has_hadamard(dim)
    check_dim(dim, "dense")
    for rotation in HADAMARDS:
        with pytest.raises(CodecError, match=rf"^the head size must be m \* 2\^k .* got {dim}; use rotation=dense, or"):
            check_dim(dim, rotation)


@pytest.mark.parametrize("name", ["tq3", "rvq1", "tqprod3", "qjl1", "grouped3", "tq2.5", "tq3+tq2"])
@pytest.mark.parametrize(("dim", "rotation"), [(64, "hadamard2"), (80, "hadamard3"), (64, "dense"), (72, "dense")])
def test_codecs_rotate_as_they_are_asked(name: str, dim: int, rotation: str) -> None:
    if (name, dim) == ("tq2.5", 72):
        dim = 144  # halves of 36 do not pack
    codec, x = get_codec(name, 4, rotation), tokens(dim, 40)
    statistics = codec.fit(x)
    planes = codec.encode(x, statistics)
    slow = decode_slowly(name, planes, dim, 4, rotation, statistics)
    decoded = float64(codec.decode(planes, dim, mx.float32, statistics))
    np.testing.assert_allclose(decoded, slow, rtol=0, atol=2e-5)
    queries = tokens(dim, 3)
    scores = codec.scores(codec.transform_queries(queries, statistics), planes, statistics)
    np.testing.assert_allclose(float64(scores), float64(queries) @ slow.swapaxes(-1, -2), rtol=0, atol=3e-4)
    if dim != 72 and dim != 144 and (name, rotation) != ("qjl1", "hadamard2"):  # sketches have two rounds anyway
        assert np.max(np.abs(float64(get_codec(name, 4).decode(planes, dim, mx.float32, statistics)) - slow)) > 0.1


@pytest.mark.parametrize("bits", [2, 4])
def test_dense_rotation_at_72_channels_has_the_error_of_its_codebook(bits: int) -> None:
    codec, x = get_codec(f"tq{bits}", 0, "dense"), tokens(72, 1000)
    error = np.sum((float64(codec.decode(codec.encode(x), 72)) - float64(x)) ** 2) / np.sum(float64(x) ** 2)
    low, high = codec.expected_mse(72)
    assert 0.985 * low < error < 1.015 * high  # of 2000 tokens


@each_rotation
def test_json_carries_the_rotation(rotation: str) -> None:
    codec = get_codec("tq3", 2, rotation)
    assert Codec.from_json(codec.to_json()) == codec
    assert json.loads(codec.to_json()).get("rotation", "hadamard") == rotation
    assert ("rotation" in json.loads(codec.to_json())) == (rotation != "hadamard")  # as files written before it have it


def test_unknown_rotations_are_refused_by_a_list_of_all() -> None:
    for name in ("tq4", "identity", "tq3+tq2"):
        with pytest.raises(CodecError) as caught:
            get_codec(name, 0, "spin")
        assert str(caught.value) == (
            "a rotation must be one of hadamard, hadamard2, hadamard3, dense, got 'spin'; choose one of these"
        )
