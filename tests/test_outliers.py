"""tq with outlier channels: which channels are chosen, how they are split off, and what that is worth."""

import mlx.core as mx
import numpy as np
import pytest
from reference_codecs import float64

from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.codecs.outliers import OutlierTurboQuant
from mlx_kvq_plugin.codecs.turboquant import TurboQuant
from mlx_kvq_plugin.errors import CodecError

# Name, outlier channels at 64 and at 128, their bits, bits of the others.
SPLITS = [
    ("tq2.5", 32, 64, 3, 2),
    ("tq3.5", 32, 64, 4, 3),
    ("tq2o16", 16, 16, 3, 2),
    ("tq2o16x6", 16, 16, 6, 2),
    ("tq6o32", 32, 32, 6, 6),
]
LARGE = np.array([3, 9, 20, 31, 40, 41, 50, 63])  # outlier channels of `uneven`

each_split = pytest.mark.parametrize(("name", "at64", "at128", "high", "low"), SPLITS)


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def tokens(dim: int, length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 3, length, dim)).astype(np.float32)


def uneven(length: int, size: float = 8.0, seed: int = 1) -> mx.array:
    """64 channels, eight of which are larger."""
    x = tokens(64, length, seed)
    x[..., LARGE] *= size
    return mx.array(x)


def relative_error(x: mx.array, decoded: mx.array) -> float:
    return float(np.sum((float64(x) - float64(decoded)) ** 2) / np.sum(float64(x) ** 2))


def error_of(name: str, x: mx.array, first: int = 64) -> float:
    """With the statistics of the first tokens, on the others."""
    codec = get_codec(name)
    statistics = codec.fit(x[:, :, :first])
    x = x[:, :, first:]
    return relative_error(x, codec.decode(codec.encode(x, statistics), x.shape[-1], mx.float32, statistics))


# ---- the choice ------------------------------------------------------------------------------------------------


@each_split
def test_the_channels_of_most_energy_are_chosen(name: str, at64: int, at128: int, high: int, low: int) -> None:
    codec, x = get_codec(name), tokens(64, 9) * np.random.default_rng(7).uniform(0.5, 2, (2, 3, 1, 64))
    order = codec.fit(mx.array(x.astype(np.float32)))["order"]
    assert order.shape == (2, 3, 1, 64) and order.dtype == mx.uint16
    energy = np.sum(x.astype(np.float64) ** 2, axis=2)
    for b, h in np.ndindex(2, 3):
        found = np.array(order)[b, h, 0].tolist()
        chosen, others = found[:at64], found[at64:]
        assert set(chosen) == set(np.argsort(-energy[b, h])[:at64].tolist())
        assert chosen == sorted(chosen) and others == sorted(others)
        assert sorted(found) == list(range(64))


def test_equal_channels_keep_their_order() -> None:
    """The first ones are the outliers, so that equal input gives equal bytes."""
    for value in (0.0, 3.0):
        order = np.array(get_codec("tq2o16").fit(mx.full((1, 2, 5, 64), value))["order"])
        np.testing.assert_array_equal(order, np.broadcast_to(np.arange(64), (1, 2, 1, 64)))
    x = np.ones((1, 1, 4, 64), np.float32)
    x[..., 60] = 2
    order = np.array(get_codec("tq2o8").fit(mx.array(x))["order"])[0, 0, 0]
    assert order[:8].tolist() == [*range(7), 60]


def test_large_numbers_of_float16_do_not_overflow_the_energy() -> None:
    """Squares and sums are float32: in float16 a number above 256 and its square would look like the largest."""
    x = np.sign(tokens(64, 200)) * np.linspace(300, 12_000, 64, dtype=np.float32)
    order = np.array(get_codec("tq2o8").fit(mx.array(x).astype(mx.float16))["order"])
    np.testing.assert_array_equal(order[0, 0, 0], np.r_[56:64, :56])
    x = tokens(64, 200)
    x[..., 17], x[..., 18] = 60_000, -65_504
    codec = get_codec("tq2o8x6")
    statistics = codec.fit(mx.array(x).astype(mx.float16))
    decoded = codec.decode(codec.encode(mx.array(x), statistics), 64, mx.float32, statistics)
    assert relative_error(mx.array(x), decoded) < 0.01


def test_statistics_belong_to_a_row_and_a_head() -> None:
    x, codec = tokens(64, 30), get_codec("tq2o8")
    wanted = {}
    for b, h in np.ndindex(2, 3):
        wanted[b, h] = np.sort(np.random.default_rng(10 * b + h).permutation(64)[:8])
        x[b, h][:, wanted[b, h]] *= 9
    statistics = codec.fit(mx.array(x))
    for (b, h), channels in wanted.items():
        np.testing.assert_array_equal(np.array(statistics["order"])[b, h, 0, :8], channels)
    decoded = codec.decode(codec.encode(mx.array(x), statistics), 64, mx.float32, statistics)
    swapped = {"order": statistics["order"][::-1]}
    worse = codec.decode(codec.encode(mx.array(x), swapped), 64, mx.float32, swapped)
    assert relative_error(mx.array(x), worse) > 1.5 * relative_error(mx.array(x), decoded)


def test_statistics_have_the_stated_size_and_are_needed() -> None:
    codec, x = get_codec("tq2.5"), mx.array(tokens(80, 4))
    assert codec.fitted and codec.statistics_nbytes(80) == 160
    assert codec.fit(x)["order"].nbytes == 6 * 160
    planes = codec.encode(x, codec.fit(x))
    for attempt in (lambda: codec.encode(x), lambda: codec.decode(planes, 80)):
        with pytest.raises(CodecError) as caught:
            attempt()
        assert str(caught.value) == "codec tq2.5 must be given statistics, got none; call fit(x) on the first tokens"


# ---- the split -------------------------------------------------------------------------------------------------


@each_split
@pytest.mark.parametrize("dim", [64, 128])
def test_each_part_is_plain_turboquant_of_its_channels(
    name: str, at64: int, at128: int, high: int, low: int, dim: int
) -> None:
    """Bit for bit, with signs of its own for each part, which may have one size."""
    count = at64 if dim == 64 else at128
    codec, x = get_codec(name, 5), mx.array(tokens(dim, 9))
    statistics = codec.fit(x)
    planes = codec.encode(x, statistics)
    order = np.array(statistics["order"]).astype(np.int64)
    ordered = np.take_along_axis(np.array(x), np.broadcast_to(order, x.shape), axis=-1)
    parts = {"outlier_": (high, 6, ordered[..., :count]), "": (low, 5, ordered[..., count:])}
    assert set(planes) == {prefix + plane for prefix in parts for plane in ("codes", "scale")}
    decoded = np.zeros(x.shape)
    for prefix, (bits, seed, part) in parts.items():
        single = TurboQuant(seed=seed, bits=bits)
        wanted = single.encode(mx.array(part))
        for plane in ("codes", "scale"):
            np.testing.assert_array_equal(float64(planes[prefix + plane]), float64(wanted[plane]))
        place = order[..., :count] if prefix else order[..., count:]
        own = float64(single.decode(wanted, part.shape[-1]))
        np.put_along_axis(decoded, np.broadcast_to(place, own.shape), own, axis=-1)
    found = float64(codec.decode(planes, dim, mx.float32, statistics))
    np.testing.assert_allclose(found, decoded, rtol=0, atol=1e-5)


@each_split
def test_bits_are_those_of_the_split(name: str, at64: int, at128: int, high: int, low: int) -> None:
    for dim, count in ((64, at64), (128, at128)):
        bits = (count * high + (dim - count) * low) / dim
        assert get_codec(name).bits_per_element(dim) == bits + 2 * 16 / dim
        if name.endswith(".5"):
            assert bits == low + 0.5


@pytest.mark.parametrize(
    ("name", "canonical", "parts"),
    [
        ("tq2o16x3", "tq2o16", (2, 16, 3)),
        ("tq2o16x4", "tq2o16x4", (2, 16, 4)),
        ("tq6o16x6", "tq6o16", (6, 16, 6)),
        ("tq5o16", "tq5o16", (5, 16, 6)),
        ("tq3.5", "tq3.5", (3, 0, 4)),
        ("tq5.5", "tq5.5", (5, 0, 6)),
        ("tq4o8x2", "tq4o8x2", (4, 8, 2)),
    ],
)
def test_names_tell_the_split(name: str, canonical: str, parts: tuple[int, int, int]) -> None:
    codec = get_codec(name)
    assert isinstance(codec, OutlierTurboQuant)
    assert (codec.bits, codec.count, codec.outlier_bits) == parts
    assert codec.name == canonical and get_codec(canonical) == codec
    assert codec.partner == canonical


@pytest.mark.parametrize(
    ("name", "dim", "got", "valid"),
    [
        ("tq2.5", 40, "20 and 20", "8, 16, 24, 32"),
        ("tq2.5", 72, "36 and 36", "8, 16, 24, 32, 40, 48, 56, 64"),
        ("tq3.5", 24, "12 and 12", "8, 16"),
        ("tq2o16", 192, "16 and 176", "32, 64, 80, 96, 112, 128, 160"),
        ("tq2o12", 64, "12 and 52", "8, 16, 24, 32, 40, 48, 56"),
        ("tq2o64", 64, "64 and 0", "8, 16, 24, 32, 40, 48, 56"),
        ("tq2o80x4", 64, "80 and -16", "8, 16, 24, 32, 40, 48, 56"),
        ("tq2.5", 8, "4 and 4", "none"),
    ],
)
def test_sizes_that_do_not_split_are_refused_with_those_that_do(name: str, dim: int, got: str, valid: str) -> None:
    codec = get_codec(name)
    for attempt in (
        lambda: codec.planes(dim, "float16"),
        lambda: codec.fit(mx.zeros((1, 1, 4, dim))),
        lambda: codec.bits_per_element(dim),
    ):
        with pytest.raises(CodecError) as caught:
            attempt()
        assert str(caught.value) == (
            f"{codec.name} must split a head of {dim} channels into two parts that pack and rotate, got {got}; "
            f"outlier channels can be {valid}"
        )
    for count in valid.split(", ") if valid != "none" else []:
        codec = get_codec(f"tq2o{count}")
        x = mx.array(tokens(dim, 3))
        assert codec.decode(codec.encode(x, codec.fit(x)), dim, mx.float32, codec.fit(x)).shape == x.shape


def test_dense_rotations_split_every_size_that_packs() -> None:
    for name, dim in (("tq2o16", 192), ("tq2.5", 144), ("tq2o16", 72)):
        codec, x = get_codec(name, 0, "dense"), mx.array(tokens(dim, 40))
        statistics = codec.fit(x)
        error = relative_error(x, codec.decode(codec.encode(x, statistics), dim, mx.float32, statistics))
        assert error < 1.05 * codec.expected_mse(dim)[1]
    with pytest.raises(CodecError, match=r"got 12 and 60; outlier channels can be 8, 16, 24, 32, 40, 48, 56, 64$"):
        get_codec("tq2o12", 0, "dense").planes(72, "float16")


# ---- what it is worth ------------------------------------------------------------------------------------------


def plain_error(bits: float, x: mx.array) -> float:
    """Of `tq` at that all-in rate: between two whole ones ln error is linear in bits."""
    rates = [get_codec(f"tq{b}").bits_per_element(64) for b in range(1, 7)]
    errors = [error_of(f"tq{b}", x) for b in range(1, 7)]
    return float(np.exp(np.interp(bits, rates, np.log(errors))))


@pytest.mark.parametrize("name", ["tq2.5", "tq3.5", "tq2o8x6", "tq3o8x6"])
def test_outlier_channels_are_worth_their_bits(name: str) -> None:
    """Against plain tq at the same all-in rate, on later tokens than those that the channels were chosen by."""
    x = uneven(200)
    plain = plain_error(get_codec(name).bits_per_element(64), x)
    assert error_of(name, x) < (0.95 if name.endswith(".5") else 0.6) * plain
    even = mx.array(tokens(64, 200))
    assert error_of(name, even) > plain_error(get_codec(name).bits_per_element(64), even)  # nothing to gain there


@each_split
def test_random_directions_have_the_error_of_the_theory(name: str, at64: int, at128: int, high: int, low: int) -> None:
    x = mx.array(tokens(128, 400))
    first, last = get_codec(name).expected_mse(128)
    assert 0.985 * first < error_of(name, x, 100) < 1.015 * last


def test_channels_that_grow_later_are_not_seen() -> None:
    """Statistics are frozen: who is large only after the first tokens is coded with the others."""
    x = np.array(tokens(64, 128))
    late = x.copy()
    late[:, :, 64:][..., LARGE] *= 8
    early = x.copy()
    early[..., LARGE] *= 8
    assert error_of("tq2o8x6", mx.array(late)) > 3 * error_of("tq2o8x6", mx.array(early))
