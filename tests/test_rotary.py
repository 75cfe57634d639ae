"""Rotations read off rope modules, and turning by them, against the modules and against float64."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.rope_utils import (
    DynamicNTKScalingRoPE,
    Llama3RoPE,
    ProportionalRoPE,
    SuScaledRoPE,
    YarnRoPE,
)

from mlx_kvq_plugin.rotary import (
    BLOCK,
    Rotary,
    block_tables,
    no_rotation,
    read_rotary,
    tables_nbytes,
    turn,
    turned_scores,
)

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def su(dims: int) -> SuScaledRoPE:
    return SuScaledRoPE(dims, long_factor=[1.0 + 0.1 * i for i in range(dims // 2)])


# name: module, head size, layout, pairs, magnitude
ROPES: dict[str, tuple[Callable[[], Any], int, str, int, float]] = {
    "default": (lambda: nn.RoPE(64), 64, "half", 32, 1.0),
    "large base": (lambda: nn.RoPE(128, base=1e6), 128, "half", 64, 1.0),
    "traditional": (lambda: nn.RoPE(64, traditional=True), 64, "interleaved", 32, 1.0),
    "partial": (lambda: nn.RoPE(32), 80, "half", 16, 1.0),
    "partial traditional": (lambda: nn.RoPE(32, traditional=True), 80, "interleaved", 16, 1.0),
    "linear": (lambda: nn.RoPE(64, scale=0.25), 64, "half", 32, 1.0),
    "llama3": (lambda: Llama3RoPE(128, base=500_000.0, scaling_config=LLAMA3), 128, "half", 64, 1.0),
    "yarn": (lambda: YarnRoPE(64, scaling_factor=4.0), 64, "half", 32, 1.138629436),
    "yarn traditional": (
        lambda: YarnRoPE(64, traditional=True, scaling_factor=40.0, mscale=0.707),
        64,
        "interleaved",
        32,
        1.260803823,
    ),
    "yarn partial": (lambda: YarnRoPE(48, scaling_factor=4.0), 64, "half", 24, 1.138629436),
    "longrope": (lambda: su(96), 96, "half", 48, 1.190238071),
    "longrope partial": (lambda: su(96), 128, "half", 48, 1.190238071),
    "proportional": (lambda: ProportionalRoPE(64, 32), 64, "half", 32, 1.0),
    "proportional traditional": (lambda: ProportionalRoPE(64, 32, traditional=True), 64, "interleaved", 16, 1.0),
}
every_rope = pytest.mark.parametrize("name", ROPES)


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@cache
def read(name: str) -> tuple[Any, int, Rotary]:
    make, dim, *_ = ROPES[name]
    rope = make()
    rotary, reason = read_rotary(rope, dim)
    assert rotary is not None, reason
    return rope, dim, rotary


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def turned_exactly(rotary: Rotary, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """R_n x in float64 by complex numbers: `x` `(..., n, D)` or `(..., 1, D)`."""
    x = np.array(x, dtype=np.float64)
    x = np.broadcast_to(x, (*x.shape[:-2], len(positions), x.shape[-1])).copy()
    pair = np.arange(rotary.pairs)
    first, second = (pair, pair + rotary.pairs) if rotary.layout == "half" else (2 * pair, 2 * pair + 1)
    spun = (x[..., first] + 1j * x[..., second]) * np.exp(1j * positions[:, None] * np.array(rotary.angles))
    x[..., first], x[..., second] = rotary.magnitude * spun.real, rotary.magnitude * spun.imag
    return x


@every_rope
def test_layout_pairs_and_magnitude_are_read_off_the_module(name: str) -> None:
    _, _, layout, pairs, magnitude = ROPES[name]
    rotary = read(name)[2]
    assert (rotary.layout, rotary.pairs) == (layout, pairs)
    assert rotary.magnitude == pytest.approx(magnitude, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "dims", "base", "scale"),
    [("default", 64, 1e4, 1.0), ("large base", 128, 1e6, 1.0), ("partial", 32, 1e4, 1.0), ("linear", 64, 1e4, 0.25)],
)
def test_angles_are_the_powers_of_the_base(name: str, dims: int, base: float, scale: float) -> None:
    expected = scale * base ** (-2 * np.arange(dims // 2) / dims)
    # Sines and cosines of one position, computed in float32.
    np.testing.assert_allclose(read(name)[2].angles, expected, rtol=2e-7, atol=1e-7)


@every_rope
@pytest.mark.parametrize(("start", "length"), [(0, 201), (1000, 90), (1021, 7), (30_000, 100)])
def test_turning_is_what_the_module_does(name: str, start: int, length: int) -> None:
    rope, dim, rotary = read(name)
    x = normal(1, 2, length, dim)
    error = np.max(np.abs(np.array(turn(rotary, x, start, length) - rope(x, offset=start))), axis=(0, 1, 3))
    # Float32 angles are off by at most 1.2e-7 a position, times the largest channel.
    largest = float(mx.max(mx.abs(x))) * rotary.magnitude
    assert np.all(error < largest * (5e-7 + 1.2e-7 * np.arange(start, start + length)))


@every_rope
@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 64), (63, 2), (64, 64), (100, 129), (29_999, 70)])
def test_turning_is_exact_to_float32(name: str, start: int, length: int) -> None:
    _, dim, rotary = read(name)
    x = normal(2, 3, length, dim)
    exact = turned_exactly(rotary, np.array(x), np.arange(start, start + length))
    # Cosines and sines are products of two float32 tables each: 4 roundings of numbers up to 4.
    np.testing.assert_allclose(np.array(turn(rotary, x, start, length)), exact, rtol=0, atol=2e-6)
    one = turn(rotary, x[..., :1, :], start, length)
    exact = turned_exactly(rotary, np.array(x[..., :1, :]), np.arange(start, start + length))
    np.testing.assert_allclose(np.array(one), exact, rtol=0, atol=2e-6)


@every_rope
@pytest.mark.parametrize("start", [0, 37, 64, 5000])
def test_turning_back_is_the_inverse(name: str, start: int) -> None:
    _, dim, rotary = read(name)
    x = normal(1, 2, 100, dim)
    there = turn(rotary, x, start, 100)
    np.testing.assert_allclose(np.array(turn(rotary, there, start, 100, inverse=True)), np.array(x), rtol=0, atol=3e-6)
    if rotary.angles[0] > 0.05:  # a position off by one is another rotation
        assert np.max(np.abs(np.array(turn(rotary, there, start + 1, 100, inverse=True) - x))) > 0.05


@every_rope
@pytest.mark.parametrize(
    ("start", "length"), [(0, 1), (0, 64), (1, 63), (1, 64), (63, 65), (64, 128), (17, 200), (20_003, 127)]
)
def test_turned_scores_are_the_explicit_inner_products(name: str, start: int, length: int) -> None:
    _, dim, rotary = read(name)
    queries, vector = normal(2, 2, 3, dim), normal(2, 2, 1, dim, seed=1)
    turned = turned_exactly(rotary, np.array(vector), np.arange(start, start + length))
    exact = np.array(queries, dtype=np.float64) @ turned.swapaxes(-1, -2)
    found = np.array(turned_scores(rotary, queries, vector, start, length))
    # Sums of up to 128 products with float32 cosines; typical scores are sqrt(D), about 10.
    np.testing.assert_allclose(found, exact, rtol=0, atol=3e-5)


@pytest.mark.parametrize(("start", "length"), [(0, 5), (100, 1), (63, 66)])
def test_without_rotation_nothing_turns(start: int, length: int) -> None:
    rotary, reason = read_rotary(None, 64)
    assert rotary == no_rotation() and reason == ""
    x, queries, vector = normal(2, 1, length, 64), normal(2, 1, 3, 64, seed=1), normal(2, 1, 1, 64, seed=2)
    for inverse in (False, True):
        np.testing.assert_array_equal(np.array(turn(rotary, x, start, length, inverse)), np.array(x))
    found = np.array(turned_scores(rotary, queries, vector, start, length))
    exact = np.array(queries, dtype=np.float64) @ np.array(vector, dtype=np.float64).swapaxes(-1, -2)
    np.testing.assert_allclose(found, np.broadcast_to(exact, found.shape), rtol=0, atol=1e-5)
    assert found.shape == (2, 1, 3, length)


def test_a_rope_that_leaves_everything_alone_is_no_rotation() -> None:
    assert read_rotary(lambda x, offset: x, 64) == (no_rotation(), "")


@pytest.mark.parametrize("length", [2048, 1_048_576])
def test_dynamic_ntk_is_refused_with_the_position(length: int) -> None:
    rope = DynamicNTKScalingRoPE(64, length, False, 10_000.0, 4.0)
    rotary, reason = read_rotary(rope, 64)
    assert rotary is None
    assert reason.startswith("its rope is not one rotation for all positions (position ")


def shear(x: mx.array, offset: int) -> mx.array:
    """Not a rotation: every channel leaks into the next one."""
    return x + offset * mx.roll(x, 1, axis=-1)


def drift(x: mx.array, offset: int) -> mx.array:
    """A rope whose magnitude grows with the position."""
    return nn.RoPE(64)(x, offset=offset) * (1 + 1e-3 * offset)


def decay(x: mx.array, offset: int) -> mx.array:
    """No pair turns, but channels shrink with the position."""
    return x / (1 + offset)


@pytest.mark.parametrize("rope", [shear, drift, decay])
def test_what_is_not_one_rotation_of_pairs_is_refused(rope: Callable[..., mx.array]) -> None:
    rotary, reason = read_rotary(rope, 64)
    assert rotary is None
    assert reason.startswith("its rope ")


@every_rope
def test_json_keeps_every_bit(name: str) -> None:
    rotary = read(name)[2]
    again = Rotary.from_dict(json.loads(json.dumps(rotary.to_dict())))
    assert again == rotary
    assert hash(again) == hash(rotary)
    assert [a.hex() for a in again.angles] == [a.hex() for a in rotary.angles]


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_split_names_the_channels_of_each_pair_and_join_puts_them_back(layout: str) -> None:
    rotary = Rotary(layout, (1.0, 0.1, 0.01))
    x = mx.arange(10)[None]
    first, second, rest = rotary.split(x)
    pairs = list(zip(first[0].tolist(), second[0].tolist(), strict=True))
    assert pairs == ([(0, 3), (1, 4), (2, 5)] if layout == "half" else [(0, 1), (2, 3), (4, 5)])
    assert rest[0].tolist() == [6, 7, 8, 9]
    np.testing.assert_array_equal(np.array(rotary.join(first, second, rest)), np.array(x))


def test_block_tables_grow_without_changing_what_was_there() -> None:
    rotary = Rotary("half", (0.9182, 0.0377, 0.0))  # a rotation of this test alone
    before = tables_nbytes()
    cos, sin, inner = (np.array(table) for table in block_tables(rotary, 3))
    assert cos.shape == sin.shape == (3, 3)
    small = tables_nbytes() - before
    assert small >= 4 * (2 * 3 * 3 + BLOCK * 6)
    more_cos, more_sin, more_inner = (np.array(table) for table in block_tables(rotary, 700))
    assert tables_nbytes() - before > small
    np.testing.assert_array_equal(more_cos[:3], cos)
    np.testing.assert_array_equal(more_sin[:3], sin)
    np.testing.assert_array_equal(more_inner, inner)
    angles = np.arange(700)[:, None] * BLOCK * np.array(rotary.angles)
    np.testing.assert_allclose(more_cos, np.cos(angles), rtol=0, atol=6.1e-8)  # one rounding to float32
    np.testing.assert_allclose(more_sin, np.sin(angles), rtol=0, atol=6.1e-8)
    angles = np.arange(BLOCK)[:, None] * np.array(rotary.angles)
    np.testing.assert_allclose(inner, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), rtol=0, atol=6.1e-8)
    block_tables(rotary, 5)  # fewer blocks again: the large tables stay
    assert np.array(block_tables(rotary, 700)[0]).tobytes() == more_cos.tobytes()
