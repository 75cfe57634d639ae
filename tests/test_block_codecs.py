"""polar, grouped and kivi: what is stored for a block of channels or of tokens, against each method's definition."""

import math

import mlx.core as mx
import numpy as np
import pytest
from reference_codecs import float64, levels_of, rotation_matrix, unpack_slowly

from mlx_kvq_plugin.codebooks import odd_codebook
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.codecs.polar import angle_codebook
from mlx_kvq_plugin.errors import CodecError
from mlx_kvq_plugin.planes import expanded, shared_planes

BFLOAT16 = 2.0**-8  # half the distance of neighbours at 1
FLOAT16 = 2.0**-11

polar_bits = pytest.mark.parametrize("bits", [3, 4])
grouped_bits = pytest.mark.parametrize("bits", [2, 3, 4])
kivi_bits = pytest.mark.parametrize("bits", [2, 4])


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def tokens(dim: int, length: int, seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(2, 2, length, dim)).astype(np.float32))


def unrotated(y: np.ndarray) -> mx.array:
    """Tokens that the rotation of seed 0 turns into `y`, to float32."""
    return mx.array((y @ rotation_matrix(y.shape[-1], 0).T).astype(np.float32))


def rotated(x: mx.array) -> np.ndarray:
    return float64(x) @ rotation_matrix(x.shape[-1], 0)


# ---- polar -----------------------------------------------------------------------------------------------------


def polar_transform(y: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Angles of levels 1 to 4 and radii of blocks of 16, exactly: the definition."""
    angles, radii = [], y
    for _ in range(4):
        first, second = radii[..., 0::2], radii[..., 1::2]
        angles.append(np.arctan2(second, first))
        radii = np.hypot(first, second)
    angles[0] = angles[0] % (2 * math.pi)
    return angles, radii


def from_polar(angles: list[np.ndarray], radii: np.ndarray) -> np.ndarray:
    for angle in reversed(angles):
        radii = np.stack([radii * np.cos(angle), radii * np.sin(angle)], axis=-1).reshape(*angle.shape[:-1], -1)
    return radii


def stored_angles(codec, planes: dict[str, mx.array], dim: int) -> list[np.ndarray]:
    """Codes of the angles of levels 1 to 4."""
    uppers = unpack_slowly(planes["uppers"], planes["uppers"].shape[-1] * 4, 2)
    assert np.all(uppers[..., 7 * dim // 16 :] == 0)  # what fills the last byte
    cuts = np.cumsum([dim // 4, dim // 8, dim // 16])
    return [unpack_slowly(planes["angles"], dim // 2, codec.bits), *np.split(uppers, cuts, axis=-1)[:3]]


def polar_levels(bits: int) -> list[np.ndarray]:
    """Reproduced angles of levels 1 to 4."""
    first = (np.arange(2**bits) + 0.5) * 2 * math.pi / 2**bits
    return [first, *(np.array(angle_codebook(level)[0]) for level in (2, 3, 4))]


def test_the_recursive_transform_is_inverted_by_exact_angles() -> None:
    y = rotated(tokens(80, 9))
    angles, radii = polar_transform(y)
    assert [angle.shape[-1] for angle in angles] == [40, 20, 10, 5] and radii.shape[-1] == 5
    np.testing.assert_allclose(from_polar(angles, radii), y, rtol=0, atol=1e-13)
    np.testing.assert_allclose(radii, np.linalg.norm(y.reshape(2, 2, 9, 5, 16), axis=-1), rtol=1e-13)


@polar_bits
@pytest.mark.parametrize("dim", [64, 80, 192])
def test_what_the_codec_can_say_exactly_it_says_exactly(bits: int, dim: int) -> None:
    """Tokens made of reproduced angles only are fixed points: the same codes, the same radii, nothing lost."""
    codec, rng = get_codec(f"polar{bits}"), np.random.default_rng(2)
    choices = [
        rng.integers(0, len(levels), (1, 2, 7, dim >> i)) for i, levels in enumerate(polar_levels(bits), start=1)
    ]
    radii = float64(mx.array(rng.uniform(1, 9, (1, 2, 7, dim // 16))).astype(mx.bfloat16))
    angles = [levels[codes] for levels, codes in zip(polar_levels(bits), choices, strict=True)]
    x = unrotated(from_polar(angles, radii))
    planes = codec.encode(x)
    for found, wanted in zip(stored_angles(codec, planes, dim), choices, strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(float64(planes["radii"]), radii)
    np.testing.assert_allclose(float64(codec.decode(planes, dim)), float64(x), rtol=0, atol=1e-5)


@polar_bits
@pytest.mark.parametrize("dim", [64, 80])
def test_angles_go_to_the_nearest_reproduced_ones(bits: int, dim: int) -> None:
    codec, x = get_codec(f"polar{bits}"), tokens(dim, 40)
    exact = polar_transform(rotated(x))[0]
    for level, (angle, codes, levels) in enumerate(
        zip(exact, stored_angles(codec, codec.encode(x), dim), polar_levels(bits), strict=True), start=1
    ):
        distance = np.abs(angle[..., None] - levels)
        distance = np.minimum(distance, 2 * math.pi - distance) if level == 1 else distance
        chosen = np.take_along_axis(distance, codes[..., None], axis=-1)[..., 0]
        assert np.max(chosen - distance.min(axis=-1)) < 1e-4  # small radii have float32 angles of few digits
        assert np.mean(chosen - distance.min(axis=-1) > 1e-6) < 1e-3


@pytest.mark.parametrize("level", [2, 3, 4])
def test_angle_codebooks_meet_the_lloyd_max_conditions_of_their_density(level: int) -> None:
    """Centroids between midpoints of sin(2 psi)^(2^(level - 1) - 1), each cell integrated by Gauss-Legendre."""
    levels, cosine = np.array(angle_codebook(level)[0]), angle_codebook(level)[1]
    edges = np.concatenate([[0], 0.5 * (levels[1:] + levels[:-1]), [math.pi / 2]])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    half = 0.5 * np.diff(edges)[:, None]
    psi = edges[:-1, None] + half * (nodes + 1)
    mass = half * weights * np.sin(2 * psi) ** (2 ** (level - 1) - 1)
    np.testing.assert_allclose(np.sum(mass * psi, axis=1) / np.sum(mass, axis=1), levels, rtol=0, atol=2e-5)
    assert cosine == pytest.approx(float(np.sum(mass * np.cos(psi - levels[:, None])) / np.sum(mass)), rel=1e-6)
    np.testing.assert_allclose(levels + levels[::-1], math.pi / 2, rtol=0, atol=2e-5)
    worse = [np.sum(mass * np.cos(psi - moved[:, None])) for moved in (levels + 0.01, levels * 0.99)]
    assert max(worse) / np.sum(mass) < cosine


@polar_bits
def test_stored_angles_have_the_density_of_their_level(bits: int) -> None:
    """Shares of codes of random tokens against the mass of each cell, within 4.5 standard errors."""
    codec, x = get_codec(f"polar{bits}"), tokens(128, 400)
    for level, codes in enumerate(stored_angles(codec, codec.encode(x), 128), start=1):
        levels = polar_levels(bits)[level - 1]
        if level == 1:
            wanted = np.full(2**bits, 0.5**bits)
        else:
            psi = (np.arange(100_000) + 0.5) * math.pi / 200_000
            mass = np.sin(2 * psi) ** (2 ** (level - 1) - 1)
            wanted = np.bincount(np.searchsorted(0.5 * (levels[1:] + levels[:-1]), psi), mass) / mass.sum()
        found = np.bincount(codes.reshape(-1), minlength=len(levels)) / codes.size
        assert np.max(np.abs(found - wanted) / np.sqrt(wanted * (1 - wanted) / codes.size)) < 4.5


@polar_bits
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_the_radius_of_every_block_is_preserved_to_bfloat16(bits: int, dim: int) -> None:
    codec, x = get_codec(f"polar{bits}"), tokens(dim, 20)
    before, after = rotated(x), rotated(codec.decode(codec.encode(x), dim))
    norms = [np.linalg.norm(y.reshape(2, 2, 20, -1, 16), axis=-1) for y in (before, after)]
    assert np.max(np.abs(norms[1] / norms[0] - 1)) < 1.001 * BFLOAT16


@polar_bits
@pytest.mark.parametrize("dim", [64, 80])
def test_polar_has_the_error_of_its_theory(bits: int, dim: int) -> None:
    codec, x = get_codec(f"polar{bits}"), tokens(dim, 300)
    error = np.sum((float64(codec.decode(codec.encode(x), dim)) - float64(x)) ** 2) / np.sum(float64(x) ** 2)
    low, high = codec.expected_mse(dim)
    assert 0.985 * low < error < 1.015 * high
    assert high / low < 1.05


@pytest.mark.parametrize(("dim", "rotation"), [(40, "hadamard"), (56, "hadamard"), (72, "dense"), (24, "hadamard")])
def test_heads_of_no_multiple_of_sixteen_are_refused_by_polar(dim: int, rotation: str) -> None:
    with pytest.raises(CodecError) as caught:
        get_codec("polar4", 0, rotation).planes(dim, "float16")
    assert str(caught.value) == f"polar4 must have heads of a multiple of 16 channels, got {dim}; use tq"


# ---- grouped ---------------------------------------------------------------------------------------------------

DIMS_WITH_TAILS = (24, 40, 56, 64, 80)  # last groups of 8 channels in the first three


def in_groups(y: np.ndarray) -> np.ndarray:
    """`(..., groups, 16)`, a short last group filled with zeros."""
    padded = np.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, -y.shape[-1] % 16)])
    return padded.reshape(*y.shape[:-1], -1, 16)


def group_scales(planes: dict[str, mx.array]) -> np.ndarray:
    return float64(planes["groups"]) / 255 * float64(planes["scale"])


@grouped_bits
@pytest.mark.parametrize("dim", DIMS_WITH_TAILS)
def test_the_largest_entry_of_a_group_meets_the_outermost_level(bits: int, dim: int) -> None:
    codec, x = get_codec(f"grouped{bits}"), tokens(dim, 20)
    y = rotated(x)
    codes = unpack_slowly(codec.encode(x)["codes"], dim, bits)
    levels = levels_of(codes, bits)
    groups, decoded = in_groups(y), in_groups(levels)
    largest = np.argmax(np.abs(groups), axis=-1)[..., None]
    found = np.take_along_axis(decoded, largest, axis=-1)
    signs = np.sign(np.take_along_axis(groups, largest, axis=-1))
    np.testing.assert_array_equal(found, signs * odd_codebook(bits).levels[-1])
    top = np.max(np.abs(groups), axis=-1, keepdims=True)
    z = (groups * odd_codebook(bits).levels[-1] / top).reshape(*y.shape[:-1], -1)[..., :dim]
    distance = np.abs(z[..., None] - np.array(odd_codebook(bits).levels))
    chosen = np.take_along_axis(distance, codes[..., None], axis=-1)[..., 0]
    assert np.max(chosen - distance.min(axis=-1)) < 1e-5  # all others: the nearest level at that scale


@grouped_bits
@pytest.mark.parametrize("dim", DIMS_WITH_TAILS)
def test_every_decoded_group_has_the_norm_of_the_original_one(bits: int, dim: int) -> None:
    """Within the rounding of its byte, half a step of 1 / 255 of the token's scale, and of that scale."""
    codec, x = get_codec(f"grouped{bits}"), tokens(dim, 40) * mx.array(np.geomspace(3, 0.3, dim).astype(np.float32))
    planes = codec.encode(x)
    levels = np.linalg.norm(in_groups(levels_of(unpack_slowly(planes["codes"], dim, bits), bits)), axis=-1)
    before = np.linalg.norm(in_groups(rotated(x)), axis=-1)
    after = np.linalg.norm(in_groups(rotated(codec.decode(planes, dim))), axis=-1)
    scale = float64(planes["scale"])
    exact = before / levels
    np.testing.assert_allclose(scale, exact.max(axis=-1, keepdims=True), rtol=1.001 * BFLOAT16)
    clipped = np.maximum(exact - scale, 0)  # where bfloat16 rounded the largest scale down
    assert np.all(np.abs(after - before) <= (0.501 / 255 * scale + clipped) * levels + 1e-5)
    np.testing.assert_allclose(after, group_scales(planes) * levels, rtol=1e-5, atol=1e-5)


@grouped_bits
@pytest.mark.parametrize("dim", [24, 40, 56])
def test_a_short_last_group_is_scaled_by_its_own_channels(bits: int, dim: int) -> None:
    codec, rng = get_codec(f"grouped{bits}"), np.random.default_rng(4)
    y = rng.normal(size=(1, 1, 30, dim))
    y[..., -8:] *= 0.5
    planes = codec.encode(unrotated(y))
    assert planes["groups"].shape[-1] == -(-dim // 16)
    levels = levels_of(unpack_slowly(planes["codes"], dim, bits), bits)[..., -8:]
    matched = np.linalg.norm(y[..., -8:], axis=-1) / np.linalg.norm(levels, axis=-1)
    np.testing.assert_allclose(group_scales(planes)[..., -1], matched, rtol=0, atol=0.004 * np.max(matched) * 3)
    error = np.mean((rotated(codec.decode(planes, dim)) - y)[..., -8:] ** 2) / 0.25
    assert error < {2: 0.2, 3: 0.06, 4: 0.02}[bits]


@grouped_bits
def test_groups_of_zeros_stay_zeros(bits: int) -> None:
    codec = get_codec(f"grouped{bits}")
    y = np.random.default_rng(5).normal(size=(1, 1, 6, 80))
    y[..., 16:32] = y[..., 64:] = 0
    planes = codec.encode(unrotated(y))
    assert np.all(np.array(planes["groups"])[..., [1, 4]] == 0)
    assert np.all(np.array(planes["groups"])[..., [0, 2, 3]] > 50)


@grouped_bits
@pytest.mark.parametrize("dim", [64, 128])
def test_grouped_has_the_error_of_its_definition(bits: int, dim: int) -> None:
    """Computed here in float64 with exact scales: the bytes cost a few percent of a small error at most."""
    codec, x = get_codec(f"grouped{bits}"), tokens(dim, 300)
    y, book = in_groups(rotated(x)), odd_codebook(bits)
    levels = np.array(book.levels)
    z = y * levels[-1] / np.max(np.abs(y), axis=-1, keepdims=True)
    chosen = levels[np.searchsorted(0.5 * (levels[1:] + levels[:-1]), z)]
    chosen = chosen * (np.linalg.norm(y, axis=-1, keepdims=True) / np.linalg.norm(chosen, axis=-1, keepdims=True))
    exact = np.sum((chosen - y) ** 2) / np.sum(y * y)
    error = np.sum((float64(codec.decode(codec.encode(x), dim)) - float64(x)) ** 2) / np.sum(y * y)
    assert 0.999 * exact < error < 1.01 * exact
    low, high = codec.expected_mse(dim)
    assert 0.985 * low < error < 1.015 * high


# ---- kivi ------------------------------------------------------------------------------------------------------


def half(x: mx.array) -> mx.array:
    return x.astype(mx.float16).astype(mx.float32)  # extremes can then be stored exactly


@kivi_bits
@pytest.mark.parametrize(("dim", "length"), [(64, 32), (80, 70), (72, 5)])
def test_extremes_of_each_channel_are_exact_to_float16(bits: int, dim: int, length: int) -> None:
    codec, x = get_codec(f"kivi{bits}"), half(tokens(dim, length) * 5)
    planes = codec.encode(x)
    decoded = float64(codec.decode(planes, dim))
    for row, start in enumerate(range(0, length, 32)):
        before, after = float64(x)[:, :, start : start + 32], decoded[:, :, start : start + 32]
        np.testing.assert_array_equal(float64(planes["least"])[:, :, row], before.min(axis=2))
        np.testing.assert_array_equal(after.min(axis=2), before.min(axis=2))
        span = np.ptp(before, axis=2)
        np.testing.assert_allclose(float64(planes["step"])[:, :, row], span / (2**bits - 1), rtol=1.001 * FLOAT16)
        assert np.all(np.abs(after.max(axis=2) - before.max(axis=2)) <= 1.001 * FLOAT16 * span)
        assert np.all(np.abs(after - before) <= (0.5 / (2**bits - 1) + 1.001 * FLOAT16) * span[:, :, None])


@kivi_bits
def test_codes_are_the_nearest_steps(bits: int) -> None:
    codec, x = get_codec(f"kivi{bits}"), half(tokens(64, 64))
    planes = codec.encode(x)
    rows = np.arange(64) // 32
    steps = (float64(x) - float64(planes["least"])[:, :, rows]) / float64(planes["step"])[:, :, rows]
    codes = unpack_slowly(planes["codes"], 64, bits)
    assert np.all(np.abs(codes - np.clip(steps, 0, 2**bits - 1)) <= 0.5 + 1e-4)
    assert set(np.unique(codes)) == set(range(2**bits))


@kivi_bits
def test_a_group_knows_nothing_of_other_groups(bits: int) -> None:
    codec, x = get_codec(f"kivi{bits}"), tokens(64, 70)
    planes = codec.encode(x)
    x[:, :, 40] = 1000.0
    changed = codec.encode(x)
    for name, rows in (("codes", 32), ("step", 1), ("least", 1)):
        before, after = float64(planes[name]), float64(changed[name])
        np.testing.assert_array_equal(before[:, :, :rows], after[:, :, :rows])
        np.testing.assert_array_equal(before[:, :, 2 * rows :], after[:, :, 2 * rows :])
        assert np.any(before[:, :, rows : 2 * rows] != after[:, :, rows : 2 * rows])
    short = codec.encode(x[:, :, 64:])  # six tokens: a group of their own
    np.testing.assert_array_equal(float64(short["step"]), float64(changed["step"])[:, :, 2:])


@kivi_bits
def test_constant_channels_come_back_to_float16(bits: int) -> None:
    values = np.concatenate([[0.0, -0.0, 1.0, -300.0, 65504.0, -65504.0, 1e-7, 1 / 3], np.linspace(-9, 9, 56)])
    x = mx.broadcast_to(mx.array(values.astype(np.float32)), (1, 2, 40, 64))
    codec = get_codec(f"kivi{bits}")
    decoded = float64(codec.decode(codec.encode(x), 64))
    # The step may code what rounding the least value lost, so it is this good or better.
    assert np.all(np.abs(decoded - values) <= 1.001 * np.abs(values.astype(np.float16) - values))
    np.testing.assert_array_equal(float64(codec.decode(codec.encode(half(x)), 64)), float64(half(x)))


@kivi_bits
def test_one_channel_of_outliers_costs_the_others_nothing(bits: int) -> None:
    """What keys per channel are for: by token the whole group of channels would lose its steps to the outlier."""
    codec, x = get_codec(f"kivi{bits}"), tokens(64, 64)
    plain = float64(codec.decode(codec.encode(x), 64))
    x[..., 7] = x[..., 7] * 1000 + 5000
    decoded = float64(codec.decode(codec.encode(x), 64))
    others = np.arange(64) != 7
    np.testing.assert_array_equal(decoded[..., others], plain[..., others])
    assert np.max(np.abs(decoded - float64(x))[..., 7]) < 0.51 * np.ptp(float64(x)[..., 7]) / (2**bits - 1)


@kivi_bits
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_beyond_float16_are_limited_to_its_range(bits: int, dtype: str) -> None:
    codec, kind = get_codec(f"kivi{bits}"), getattr(mx, dtype)
    x = tokens(64, 40).astype(kind)
    plain = float64(codec.decode(codec.encode(x), 64))
    limits = [mx.finfo(kind).max, -mx.finfo(kind).max, math.inf, -math.inf]
    for token, limit in enumerate(limits):
        x[0, 0, token, 3] = limit
    x[0, 0, 5, 4], x[0, 0, 6, 5] = limits[2], limits[3]
    for out in (mx.float32, mx.float16):
        decoded = float64(codec.decode(codec.encode(x), 64, out))
        assert np.all(np.isfinite(decoded))
        np.testing.assert_allclose(decoded[0, 0, :4, 3], [65504, -65504, 65504, -65504], rtol=2 * FLOAT16)
        np.testing.assert_allclose([decoded[0, 0, 5, 4], decoded[0, 0, 6, 5]], [65504, -65504], rtol=2 * FLOAT16)
    decoded = float64(codec.decode(codec.encode(x), 64))
    np.testing.assert_array_equal(decoded[..., 6:], plain[..., 6:])
    np.testing.assert_array_equal(decoded[0, 0, 32:], plain[0, 0, 32:])


@kivi_bits
def test_rows_for_every_token_decode_like_rows_for_groups(bits: int) -> None:
    """As a cache that has trimmed into groups hands them over."""
    codec, x = get_codec(f"kivi{bits}"), tokens(64, 96)
    planes = codec.encode(x)
    whole = float64(codec.decode(planes, 64))
    assert shared_planes(codec, 64) == {"step": 32, "least": 32}
    keep = np.r_[20:32, 32:64, 64:70]
    cut = {name: plane[:, :, mx.array(keep)] if name == "codes" else plane for name, plane in planes.items()}
    rows = expanded(cut, shared_planes(codec, 64), {32: (12, 32, 6)})
    np.testing.assert_array_equal(float64(codec.decode(rows, 64)), whole[:, :, keep])


@kivi_bits
def test_kivi_has_the_error_of_equal_steps(bits: int) -> None:
    codec, x = get_codec(f"kivi{bits}"), tokens(64, 320)
    groups = float64(x).reshape(2, 2, 10, 32, 64)
    step = np.ptp(groups, axis=3, keepdims=True) / (2**bits - 1)
    least = groups.min(axis=3, keepdims=True)
    exact = np.mean((least + np.round((groups - least) / step) * step - groups) ** 2)
    error = np.mean((float64(codec.decode(codec.encode(x), 64)) - float64(x)) ** 2)
    assert error == pytest.approx(exact, rel=0.003)
    low, high = codec.expected_mse(64)
    assert 0.985 * low < error < 1.015 * high


@pytest.mark.parametrize("name", ["polar4", "grouped2", "kivi2", "affine2g32"])
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("length", [0, 1])
def test_none_and_one_token_at_every_head_size(name: str, dim: int, length: int) -> None:
    codec, x = get_codec(name), (tokens(dim, length) * 3000).astype(mx.float16)
    decoded = codec.decode(codec.encode(x), dim, mx.float16)
    assert decoded.shape == x.shape and decoded.dtype == mx.float16
    assert np.all(np.isfinite(float64(decoded)))
    if length:
        assert np.sum((float64(decoded) - float64(x)) ** 2) < 0.25 * np.sum(float64(x) ** 2)
    queries = tokens(dim, 2)
    assert codec.scores(codec.transform_queries(queries), codec.encode(x)).shape == (2, 2, 2, length)
