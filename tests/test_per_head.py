"""A codec for each KV head: what is stored and computed is what the single codecs store and compute."""

import json

import mlx.core as mx
import numpy as np
import pytest
from reference_codecs import float64

from mlx_kvq_plugin.codecs import Codec, get_codec
from mlx_kvq_plugin.config import KVQConfig
from mlx_kvq_plugin.errors import CodecError, SchemeError
from mlx_kvq_plugin.schemes import parse_scheme

NAMES = (
    "tq3+tq2",
    "tq3+tq2+tq3",
    "tq4+tq4",
    "rvq1+tq2+affine4+identity",
    "tq2.5+tq2+tq2.5",  # the name of one codec and a dot begin the name of another
    "tq2o16+tq2o16x3",  # two names of one codec
    "polar4+grouped3",
    "kivi2+tq4+kivi4",
    "qjl1+tqprod3+tq4",
    "+".join(f"tq{1 + i % 3}" for i in range(12)),
)
KEY_ONLY = ("kivi2+tq4+kivi4", "qjl1+tqprod3+tq4")
LENGTH = 37

each_name = pytest.mark.parametrize("name", NAMES)
each_case = pytest.mark.parametrize(("name", "dim"), [(n, d) for n in NAMES for d in (64, 80)])


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def tokens(name: str, dim: int, length: int = LENGTH, seed: int = 1) -> mx.array:
    """Of two rows, with uneven channels."""
    x = np.random.default_rng(seed).normal(size=(2, name.count("+") + 1, length, dim))
    return mx.array((x * np.geomspace(3, 0.3, dim)).astype(np.float32))


def singles(name: str, seed: int = 0, rotation: str = "hadamard") -> list[Codec]:
    return [get_codec(part, seed, rotation) for part in name.split("+")]


def own_of(name: str, head: int, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """The arrays of a head, by the text: `head{first}_` and the heads with the same codec in order."""
    parts = name.split("+")
    prefix = f"head{parts.index(parts[head])}_"
    place = parts[:head].count(parts[head])
    return {
        key.removeprefix(prefix): array[:, place : place + 1] for key, array in arrays.items() if key.startswith(prefix)
    }


def assert_equal(found: dict[str, mx.array], wanted: dict[str, mx.array]) -> None:
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert found[key].dtype == wanted[key].dtype and found[key].shape == wanted[key].shape, key
        np.testing.assert_array_equal(*(np.array(mx.contiguous(a[key]).view(mx.uint8)) for a in (found, wanted)))


@each_case
def test_heads_have_the_bytes_of_their_codecs(name: str, dim: int) -> None:
    codec, x = get_codec(name), tokens(name, dim)
    statistics = codec.fit(x)
    planes = codec.encode(x, statistics)
    decoded = codec.decode(planes, dim, mx.float32, statistics)
    count = 0
    for head, single in enumerate(singles(name)):
        part = x[:, head : head + 1]
        own = single.fit(part)
        assert_equal(own_of(name, head, statistics), own)
        wanted = single.encode(part, own)
        assert_equal(own_of(name, head, planes), wanted)
        count += sum(array.nbytes for array in wanted.values())
        alone = float64(single.decode(wanted, dim, mx.float32, own))
        np.testing.assert_allclose(float64(decoded)[:, head : head + 1], alone, rtol=0, atol=2e-5)
    assert sum(array.nbytes for array in planes.values()) == count


@each_case
def test_scores_and_sums_are_those_of_the_single_codecs(name: str, dim: int) -> None:
    codec, x = get_codec(name), tokens(name, dim)
    queries, weights = tokens(name, dim, 3, seed=2), tokens(name, LENGTH, 3, seed=3)
    weights = mx.softmax(weights, axis=-1)
    statistics = codec.fit(x)
    planes = codec.encode(x, statistics)
    scores = codec.scores(codec.transform_queries(queries, statistics), planes, statistics)
    output = codec.untransform_output(codec.weighted_sum(weights, planes, dim, statistics), statistics)
    assert scores.shape == (2, len(singles(name)), 3, LENGTH) and output.shape == queries.shape
    for head, single in enumerate(singles(name)):
        cut = np.s_[:, head : head + 1]
        own, part = own_of(name, head, statistics), own_of(name, head, planes)
        wanted = single.scores(single.transform_queries(queries[cut], own), part, own)
        np.testing.assert_allclose(float64(scores)[cut], float64(wanted), rtol=0, atol=1e-4)
        wanted = single.untransform_output(single.weighted_sum(weights[cut], part, dim, own), own)
        np.testing.assert_allclose(float64(output)[cut], float64(wanted), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_comes_back_in_half_precision(dtype: str) -> None:
    kind = getattr(mx, dtype)
    for name in ("tq3+tq2+tq3", "qjl1+tqprod3+tq4", "identity+tq4"):
        codec, x = get_codec(name), tokens(name, 64).astype(kind)
        planes = codec.encode(x)
        assert codec.decode(planes, 64, kind).dtype == kind
        assert codec.scores(codec.transform_queries(x[:, :, :2]), planes).dtype == mx.float32
        assert codec.weighted_sum(mx.ones((2, x.shape[1], 1, LENGTH), kind), planes, 64).dtype == kind


@each_name
def test_planes_are_declared_with_their_share_of_the_heads(name: str) -> None:
    codec, x = get_codec(name), tokens(name, 64)
    planes, declared = codec.encode(x, codec.fit(x)), codec.planes(64, "float32")
    assert len({plane.name for plane in declared}) == len(declared) == len(planes)
    for plane in declared:
        assert "." not in plane.name and "+" not in plane.name
        heads = planes[plane.name].shape[1]
        assert plane.share == heads / (name.count("+") + 1)
        assert planes[plane.name].shape == (2, heads, -(-LENGTH // plane.tokens), plane.width)
    bits = [single.bits_per_element(64, "float32") for single in singles(name)]
    assert codec.bits_per_element(64, "float32") == pytest.approx(np.mean(bits), rel=1e-12)


def test_equal_codecs_are_one_part() -> None:
    codec, single, x = get_codec("tq3+tq3"), get_codec("tq3"), tokens("tq3+tq3", 64)
    assert_equal(own := codec.encode(x), {f"head0_{key}": array for key, array in single.encode(x).items()})
    assert float(mx.max(mx.abs(codec.decode(own, 64) - single.decode(single.encode(x), 64)))) == 0


def test_statistics_are_of_the_heads_that_have_them() -> None:
    name = "tq2.5+tq4+tq2.5"
    codec, x = get_codec(name), tokens(name, 64)
    assert codec.fitted and not get_codec("tq3+tq4").fitted
    statistics = codec.fit(x)
    assert {key: array.shape for key, array in statistics.items()} == {"head0_order": (2, 2, 1, 64)}
    assert round(3 * codec.statistics_nbytes(64)) == 2 * 128  # a mean over the heads
    swapped = {"head0_order": statistics["head0_order"][:, ::-1]}
    assert np.any(np.array(swapped["head0_order"]) != np.array(statistics["head0_order"]))
    first, second = codec.encode(x, statistics), codec.encode(x, swapped)
    assert np.any(np.array(first["head0_codes"]) != np.array(second["head0_codes"]))
    assert_equal(own_of(name, 1, first), own_of(name, 1, second))
    with pytest.raises(CodecError, match=r"^codec tq2.5\+tq4\+tq2.5 must be given statistics, got none; call fit"):
        codec.encode(x)


@pytest.mark.parametrize(("name", "group"), [("kivi2+tq4+kivi4", 32), ("tq3+tq2", 1), ("tq4+kivi2", 32)])
def test_a_part_in_groups_makes_all_heads_wait_for_whole_groups(name: str, group: int) -> None:
    codec, x = get_codec(name), tokens(name, 64, 96)
    assert codec.group == group
    whole = codec.encode(x)
    pieces = [codec.encode(x[:, :, :32]), codec.encode(x[:, :, 32:])]
    assert_equal({key: mx.concatenate([piece[key] for piece in pieces], axis=2) for key in whole}, whole)


def test_facts_are_those_of_all_parts() -> None:
    assert get_codec("identity+identity").exact and not get_codec("identity+tq4").exact
    assert get_codec("tq3+tq2").values and not get_codec("tq3+qjl1").values
    assert get_codec("qjl1+kivi2+tq3+tqprod2").partner == "tq4+affine2g32+tq3+tq2"
    assert get_codec("tq3+rvq1").partner == "tq3+rvq1"


@pytest.mark.parametrize("heads", [1, 3])
def test_another_number_of_heads_is_refused(heads: int) -> None:
    codec, right = get_codec("tq3+tq2"), tokens("tq3+tq2", 64)
    planes = codec.encode(right)
    x = mx.zeros((2, heads, 4, 64))
    for attempt in (
        lambda: codec.encode(x),
        lambda: codec.fit(x),
        lambda: codec.scores(x, planes),
        lambda: codec.weighted_sum(mx.zeros((2, heads, 1, LENGTH)), planes, 64),
        lambda: get_codec("tq3+tq3").encode(x),
    ):
        with pytest.raises(CodecError) as caught:
            attempt()
        assert str(caught.value).startswith(
            "a codec for each KV head must be given for all of them, got 2 codecs (tq3+tq"
        )
        assert str(caught.value).endswith(f") for {heads} heads; calibrate this model")


@each_name
def test_names_and_json_give_the_codec_back(name: str) -> None:
    for seed, rotation in ((0, "hadamard"), (3, "hadamard2")):
        codec = get_codec(name, seed, rotation)
        assert codec.name == name and codec.seed == seed and codec.rotation == rotation
        again = Codec.from_json(codec.to_json())
        assert again == codec and hash(again) == hash(codec)
        versions = json.loads(codec.to_json())["version"]
        assert versions == [get_codec(part).version for part in dict.fromkeys(name.split("+"))]


def test_data_of_another_version_of_one_part_is_refused() -> None:
    for version in ([1, 2], [2, 1], [1], 1, [1, 1, 1]):
        text = json.dumps({"name": "tq3+tq2", "seed": 0, "version": version})
        with pytest.raises(CodecError) as caught:
            Codec.from_json(text)
        start = f"codec tq3+tq2 must have byte version {version} to read this data, got [1, 1]; "
        assert str(caught.value) == start + "install the matching release"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tq3+", "a codec name must start with one of "),
        ("+tq3", "a codec name must start with one of "),
        ("tq3++tq2", "a codec name must start with one of "),
        ("tq3+ tq2", "a codec name must start with one of "),
        ("tq3+tq9", "codec tq9 does not exist; choose one of tq1, "),
        ("fp16+tq3", "a codec name must start with one of "),
    ],
)
def test_names_with_unknown_parts_are_refused_at_once(name: str, message: str) -> None:
    with pytest.raises(CodecError) as caught:
        get_codec(name)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_head_sizes_that_one_part_cannot_do_are_refused() -> None:
    with pytest.raises(CodecError, match=r"^polar4 must have heads of a multiple of 16 channels, got 40; use tq$"):
        get_codec("tq4+polar4").planes(40, "float16")


@pytest.mark.parametrize(("name", "partner"), [("tq3+qjl1", "tq3+tq4"), ("kivi2+tqprod3", "affine2g32+tq3")])
def test_a_key_only_part_keeps_all_from_storing_values(name: str, partner: str) -> None:
    assert parse_scheme(name) == KVQConfig(name, partner)
    with pytest.raises(SchemeError) as caught:
        KVQConfig("tq4", name)
    assert str(caught.value) == (
        f"values must be stored by a codec that can do them, got {name}, which is for keys only; "
        f'write for example "k={name},v={partner}"'
    )


def test_seed_and_rotation_reach_every_part() -> None:
    x = tokens("tq3+rvq1", 64)
    for seed, rotation in ((5, "hadamard"), (0, "dense")):
        planes = get_codec("tq3+rvq1", seed, rotation).encode(x)
        for head, single in enumerate(singles("tq3+rvq1", seed, rotation)):
            assert_equal(own_of("tq3+rvq1", head, planes), single.encode(x[:, head : head + 1]))
        plain = get_codec("tq3+rvq1").encode(x)
        assert all(np.any(np.array(plain[key]) != np.array(planes[key])) for key in planes if "scale" not in key)


def test_plain_arrays_need_a_head_axis() -> None:
    codec, x = get_codec("tq3+tq2"), np.array(tokens("tq3+tq2", 64))[0]
    planes = codec.encode(x)
    assert planes["head0_codes"].shape == (1, LENGTH, 24) and planes["head1_codes"].shape == (1, LENGTH, 16)
    assert np.sum((codec.decode(planes) - x) ** 2) < 0.13 * np.sum(x * x)
    with pytest.raises(CodecError, match=r"for 1 heads; calibrate this model$"):
        codec.encode(x[0])


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("name", [*KEY_ONLY, "tq2.5+tq2+tq2.5", "polar4+grouped3"])
def test_none_and_one_token(name: str, length: int) -> None:
    codec, x = get_codec(name), tokens(name, 80, length)
    statistics = codec.fit(tokens(name, 80))
    decoded = codec.decode(codec.encode(x, statistics), 80, mx.float16, statistics)
    assert decoded.shape == x.shape and decoded.dtype == mx.float16
