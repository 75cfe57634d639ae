"""What does not turn in keys: found where it is, exactly nothing where it is not, right far beyond the statistics."""

import mlx.core as mx
import numpy as np
import pytest
from frame_cases import DIM, ROTARIES, float32, normal, turned

from mlx_kvq_plugin.frame import fit_frame
from mlx_kvq_plugin.rotary import Rotary, no_rotation, turn

every_rotary = pytest.mark.parametrize("name", ROTARIES)


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def as_pairs(rotary: Rotary, x: np.ndarray) -> np.ndarray:
    """Turning channels as complex numbers."""
    P = rotary.pairs
    return x[..., :P] + 1j * x[..., P : 2 * P] if rotary.layout == "half" else x[..., : 2 * P : 2] + 1j * x[..., 1::2]


def energy_left(rotary: Rotary, size: float, tokens: int, start: int) -> float:
    """Of keys at positions from `start`, over that of what differs between them; a frame from the first tokens.

    Args:
        size: of the constant, over a typical key's deviation from the mean.
    """
    mu, c = 3 * normal(1, 2, 1, DIM, seed=1), size * normal(1, 2, 1, DIM, seed=2)
    first = turned(rotary, mu + normal(1, 2, tokens, DIM, seed=3), 4) + c
    later = turned(rotary, mu + normal(1, 2, 100, DIM, seed=4), start) + c
    frame = fit_frame(rotary, float32(first), 4, None)
    left = as_pairs(rotary, np.array(frame.encode(float32(later), start)).astype(np.float64))
    return float(np.mean(np.abs(left) ** 2) / (2 * rotary.magnitude**2))


@every_rotary
@pytest.mark.parametrize("size", [1.0, 10.0, 30.0])
@pytest.mark.parametrize(("tokens", "start", "limit"), [(64, 68, 1.25), (200, 204, 1.1), (200, 2000, 5.0)])
def test_a_constant_is_gone_near_the_statistics_and_far_beyond(
    name: str, size: float, tokens: int, start: int, limit: float
) -> None:
    # It would leave size^2: up to 900.
    assert energy_left(ROTARIES[name], size, tokens, start) < limit


def drifting(tokens: int, seed: int) -> np.ndarray:
    """Deviations of texts that change slowly: half of the energy stays for some 30 tokens."""
    fresh, steps = normal(1, 2, tokens, DIM, seed=seed), normal(1, 2, tokens, DIM, seed=seed + 1)
    slow = np.zeros_like(fresh)
    for n in range(tokens):
        slow[:, :, n] = 0.97 * slow[:, :, n - 1] + np.sqrt(1 - 0.97**2) * steps[:, :, n] if n else steps[:, :, 0]
    return np.sqrt(0.5) * (fresh + slow)


@every_rotary
@pytest.mark.parametrize("tokens", [64, 200, 1000])
def test_without_a_constant_the_mean_is_the_plain_one_bit_for_bit(name: str, tokens: int) -> None:
    rotary = ROTARIES[name]
    keys = float32(turned(rotary, 20 * normal(1, 2, 1, DIM) + drifting(tokens, 3), 4))
    frame = fit_frame(rotary, keys, 4, None)
    np.testing.assert_array_equal(np.array(frame.constant), 0)
    plain = mx.mean(turn(rotary, keys, 4, tokens, inverse=True), axis=2, keepdims=True)
    np.testing.assert_array_equal(np.array(frame.mean), np.array(plain))


@every_rotary
def test_fast_pairs_are_those_of_least_squares(name: str) -> None:
    rotary, tokens = ROTARIES[name], 400
    keys = turned(rotary, 3 * normal(1, 2, 1, DIM) + normal(1, 2, tokens, DIM, seed=1), 9) + 5 * normal(1, 2, 1, DIM)
    frame = fit_frame(rotary, float32(keys), 9, None)
    turns = rotary.magnitude * np.exp(1j * (9 + np.arange(tokens))[:, None] * np.array(rotary.angles))
    found = [as_pairs(rotary, np.array(x).astype(np.float64)) for x in (frame.mean, frame.constant)]
    some = np.flatnonzero(np.array(rotary.angles) > 0.1)
    assert len(some) > 4
    for head in range(2):
        for pair in some:
            columns = np.stack([turns[:, pair], np.ones(tokens)], axis=1)
            expected = np.linalg.lstsq(columns, as_pairs(rotary, keys)[0, head, :, pair], rcond=None)[0]
            got = [x[0, head, 0, pair] for x in found]
            np.testing.assert_allclose(got, expected, rtol=0.01, atol=0.02)  # the ridge is that small


def test_a_constant_of_one_pair_leaves_the_others_alone() -> None:
    rotary = ROTARIES["half"]
    e, c = normal(1, 2, 200, DIM, seed=1), np.zeros((1, 2, 1, DIM))
    c[0, 0, 0, [3, 35]] = 8, -6
    frame = fit_frame(rotary, float32(turned(rotary, 3 + e, 4) + c), 4, None)
    found = np.array(frame.constant)
    np.testing.assert_allclose(found[0, 0, 0, [3, 35]], [8, -6], rtol=0, atol=0.4)
    found[0, 0, 0, [3, 35]] = 0
    np.testing.assert_array_equal(found, 0)


def test_slow_pairs_follow_the_fast_ones() -> None:
    """64 tokens cannot tell what a pair of one turn in 100,000 tokens has; the head's other pairs can."""
    rotary = Rotary("half", tuple(np.geomspace(1.0, 6e-5, DIM // 2).tolist()))
    mu, c = normal(1, 2, 1, DIM, seed=1), 10 * normal(1, 2, 1, DIM, seed=2)
    frame = fit_frame(rotary, float32(turned(rotary, mu + normal(1, 2, 64, DIM, seed=3), 4) + c), 4, None)
    missed = as_pairs(rotary, np.array(frame.constant) - c)[..., -4:]
    assert np.mean(np.abs(missed) ** 2) < 0.1 * np.mean(np.abs(as_pairs(rotary, c)[..., -4:]) ** 2)


def test_layers_without_rotation_have_their_mean_alone() -> None:
    keys = float32(5 + normal(1, 2, 64, DIM))
    frame = fit_frame(no_rotation(), keys, 4, None)
    np.testing.assert_array_equal(np.array(frame.constant), 0)
    np.testing.assert_allclose(np.array(frame.mean), np.array(mx.mean(keys, axis=2, keepdims=True)), rtol=1e-6)


def test_channels_that_do_not_turn_have_no_constant() -> None:
    rotary = ROTARIES["partial"]
    frame = fit_frame(rotary, float32(turned(rotary, normal(1, 2, 64, DIM), 4) + 9.0), 4, None)
    np.testing.assert_array_equal(np.array(frame.constant)[..., 32:], 0)
    assert np.all(np.abs(np.array(frame.mean)[..., 32:] - 9) < 0.6)
