"""Golden bytes of every codec's version: what it encodes, and stored planes that decode for ever or are refused."""

import json

import mlx.core as mx
import numpy as np
import pytest
from golden import make_codecs, margins
from reference_codecs import decode_slowly, float64
from test_codecs import NAMES

from mlx_kvq_plugin.codecs import Codec, get_codec
from mlx_kvq_plugin.errors import CodecError

BUILT_IN = NAMES[:-1]  # the last one is the suite's own
DIGESTS = json.loads(make_codecs.PATH.read_text())
FILES = json.loads(make_codecs.PLANES_PATH.read_text())
# Of decoded numbers, by the largest. GPUs multiply by the matrices of head sizes like 80 in TF32: 7e-4 on an H100.
TOLERANCE = 1e-5 if mx.default_device() == mx.cpu else 2e-3


def version_of(name: str) -> int | list[int]:
    return make_codecs.version_of(get_codec(name))


def file_name(stored: dict) -> str:
    return "-".join(map(str, [*stored["codec"].values(), stored["dim"]]))


CURRENT = [stored for stored in FILES if stored["codec"]["version"] == version_of(stored["codec"]["name"])]
every_codec = pytest.mark.parametrize("name", BUILT_IN)
every_dim = pytest.mark.parametrize("dim", make_codecs.DIMS)
every_file = pytest.mark.parametrize("stored", FILES, ids=file_name)
every_current_file = pytest.mark.parametrize("stored", CURRENT, ids=file_name)


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def opened(stored: dict) -> tuple[dict[str, mx.array], dict[str, mx.array], np.ndarray]:
    """Planes, statistics and decoded tokens of a file."""
    planes, statistics = make_codecs.read_arrays(stored["planes"]), make_codecs.read_arrays(stored["statistics"])
    return planes, statistics, float64(make_codecs.read_arrays({"": stored["decoded"]})[""])


# ---- what is encoded -------------------------------------------------------------------------------------------


@every_codec
def test_bytes_are_the_golden_ones_of_this_version(name: str) -> None:
    stored = DIGESTS[name]
    assert stored["version"] == version_of(name), "run tests/golden/make_codecs.py for the new byte version"
    for dim in make_codecs.DIMS:
        assert make_codecs.digests(name, dim) == stored["sha256"][str(dim)], f"the bytes changed at head size {dim}"


def test_golden_bytes_cover_all_built_in_codecs() -> None:
    assert set(DIGESTS) == set(BUILT_IN) == set(make_codecs.NAMES)
    for name in BUILT_IN:
        codec = get_codec(name)
        fitted = {f"statistics {key}" for key in codec.fit(mx.zeros((1, 2, 4, 64)))}
        planes = {plane.name for plane in codec.planes(64, "float32")}
        for dim in make_codecs.DIMS:
            assert set(DIGESTS[name]["sha256"][str(dim)]) == planes | fitted
        assert codec.fitted == bool(fitted)


# The decisions of trellis codes are between paths: that their bytes survive the last bits is a test further down.
@pytest.mark.parametrize("name", [name for name in BUILT_IN if not name.startswith("tcq")])
@every_dim
def test_golden_inputs_keep_clear_of_every_decision(name: str, dim: int) -> None:
    """Their bytes hold on every platform: the last bits of float32 arithmetic decide nothing."""
    x = make_codecs.input_of(name, dim)
    assert x.dtype == np.float32 and x.shape == (2, 2, make_codecs.tokens_of(name), dim)
    assert margins.is_clear(name, x.astype(np.float64))


@pytest.mark.parametrize("name", [name for name in BUILT_IN if not name.startswith(("identity", "tcq"))])
def test_margins_see_a_decision_that_is_near(name: str) -> None:
    """Among random inputs, of as many decisions each, some are not clear; and float64 zeros are on a threshold."""
    seen = [margins.is_clear(name, make_codecs.input_of(name, 64, salt).astype(np.float64)) for salt in range(60)]
    assert not all(seen)


# Of identity and affine integers are stored and compared as they are.
@pytest.mark.parametrize("name", [name for name in BUILT_IN if not name.startswith(("identity", "affine"))])
@every_dim
def test_golden_bytes_survive_the_last_bits_of_float32(name: str, dim: int) -> None:
    """Input that is off by a few units in the last place, as arithmetic of another platform may be."""
    codec, x = get_codec(name), make_codecs.input_of(name, dim)
    planes = codec.encode(mx.array(x), statistics := codec.fit(mx.array(x)))
    for seed in range(4):
        noise = np.random.default_rng(seed).uniform(-2, 2, x.shape) * 2.0**-24
        moved = codec.encode(mx.array((x * (1 + noise)).astype(np.float32)), statistics)
        for key, plane in planes.items():
            assert mx.array_equal(plane, moved[key]), key


def test_changed_bytes_under_an_old_version_are_not_written() -> None:
    make_codecs.check_unchanged(DIGESTS, DIGESTS)
    newer = {**DIGESTS, "tq4": {"version": 2, "sha256": {}}}
    make_codecs.check_unchanged(DIGESTS, newer)
    for changed in ({**DIGESTS, "tq4": {"version": 1, "sha256": {}}}, {**DIGESTS, "tq3+tq2": {"version": [1, 1]}}):
        with pytest.raises(SystemExit, match=r"^bytes must not change under one version, got new ones of \['tq"):
            make_codecs.check_unchanged(DIGESTS, changed)


# ---- what was stored -------------------------------------------------------------------------------------------


@every_file
def test_stored_planes_decode_for_ever_or_are_refused_by_name(stored: dict) -> None:
    text = json.dumps(stored["codec"])
    name, version = stored["codec"]["name"], stored["codec"]["version"]
    planes, statistics, wanted = opened(stored)
    if version_of(name) != version:
        with pytest.raises(CodecError) as caught:
            Codec.from_json(text)
        assert str(caught.value).startswith(f"codec {name} must have byte version {version} to read this data, got ")
        return
    codec = Codec.from_json(text)
    found = float64(codec.decode(planes, stored["dim"], mx.float32, statistics))
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


@every_current_file
def test_stored_planes_decode_by_the_text_of_their_codec(stored: dict) -> None:
    """The expected values are not only what some release computed: they follow from the bytes in float64."""
    config = {"rotation": "hadamard", **stored["codec"]}
    planes, statistics, wanted = opened(stored)
    slow = decode_slowly(config["name"], planes, stored["dim"], config["seed"], config["rotation"], statistics)
    np.testing.assert_allclose(slow, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_byte_that_changes_changes_what_is_decoded() -> None:
    for stored in CURRENT:
        planes, statistics, wanted = opened(stored)
        for key, plane in planes.items():
            broken = np.array(plane.view(mx.uint8)).copy()
            broken.reshape(-1)[plane.itemsize - 1] ^= 0x10  # codes, or an exponent
            changed = {**planes, key: mx.array(broken).view(plane.dtype).reshape(plane.shape)}
            found = Codec.from_json(json.dumps(stored["codec"])).decode(changed, stored["dim"], mx.float32, statistics)
            assert np.max(np.abs(float64(found) - wanted)) > 1e-5 * np.abs(wanted).max(), (stored["codec"], key)


def test_stored_planes_cover_all_built_in_codecs_seeds_and_rotations() -> None:
    assert {stored["codec"]["name"] for stored in CURRENT} == set(BUILT_IN)
    assert {stored["codec"].get("rotation", "hadamard") for stored in FILES} == {
        "hadamard",
        "hadamard2",
        "hadamard3",
        "dense",
    }
    assert {stored["codec"]["seed"] for stored in FILES} > {0, 7}
    assert {stored["dim"] for stored in FILES} == {24, 64, 72, 80}
    assert make_codecs.with_missing(FILES) == FILES
    assert make_codecs.PLANES_PATH.stat().st_size < 100_000


def test_files_of_a_later_version_are_refused_by_name() -> None:
    for stored in CURRENT:
        version = stored["codec"]["version"]
        later = [number + 1 for number in version] if isinstance(version, list) else version + 1
        with pytest.raises(CodecError) as caught:
            Codec.from_json(json.dumps({**stored["codec"], "version": later}))
        assert str(caught.value) == (
            f"codec {stored['codec']['name']} must have byte version {later} to read this data, got {version}; "
            "install the matching release"
        )
