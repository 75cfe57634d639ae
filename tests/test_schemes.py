"""Scheme strings and configs: what parses, what comes back, and one sentence for everything that does not."""

import json
from dataclasses import FrozenInstanceError, replace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvq_plugin.allocation import Budget
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.config import KVQConfig
from mlx_kvq_plugin.errors import SchemeError
from mlx_kvq_plugin.schemes import format_scheme, list_schemes, parse_scheme

LISTED = (
    "identity",
    *(f"affine{bits}" for bits in (2, 3, 4, 5, 6, 8)),
    *(f"tq{bits}" for bits in (1, 2, 3, 4, 5, 6, 2.5, 3.5)),
    *(f"rvq{bits}" for bits in (1, 2, 3)),
    *(f"polar{bits}" for bits in (3, 4)),
    *(f"grouped{bits}" for bits in (2, 3, 4)),
)
BUILT_IN = (*LISTED, "affine2g32", "tq2o16", "tq3o8x6", "tq3+tq2", "tq@2.5", "rvq@1.5", "affine@4")
KEY_ONLY = {
    **{f"qjl{blocks}": "tq4" for blocks in (1, 2, 3, 4)},
    **{f"tqprod{bits}": f"tq{bits}" for bits in (2, 3, 4)},
    **{f"kivi{bits}": f"affine{bits}g32" for bits in (2, 4)},
}
TURBO_KEYS = {"0": "identity", "8": "affine8", "4": "grouped4", "3": "grouped3", "2": "grouped2"}
TURBO = {f"turbo{k}v{v}": (codec, f"grouped{v}") for k, codec in TURBO_KEYS.items() for v in "234"}
EXAMPLE = 'write for example "tq4", "rvq1,edges=2,recent=64" or "k=tq4,v=tq2"'

configs = st.builds(
    KVQConfig,
    key=st.sampled_from(["fp16", *BUILT_IN, *KEY_ONLY, "tq3+qjl1", "qjl@2.5"]),
    value=st.sampled_from(["fp16", *BUILT_IN]),
    frame=st.booleans(),
    edges=st.integers(0, 100),
    sinks=st.integers(0, 10**6),
    recent=st.integers(0, 10**6),
    compress_after=st.sampled_from(["chunk", "prefill"]),
    seed=st.integers(0, 2**63),
    rotation=st.sampled_from(["hadamard", "hadamard2", "hadamard3", "dense"]),
    calibration=st.one_of(
        st.just(""),
        st.sampled_from(["kvq.safetensors", "/data/a=b/run 3.safetensors", "ö/x@2.5"]),
        st.text(st.characters(exclude_characters=","), max_size=12).map(str.strip),
    ),
    sensitivity=st.sampled_from(["gradient", "activation"]),
    scaling=st.sampled_from(["matched", "least_squares"]),
)


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize(
    ("scheme", "config"),
    [
        *((name, KVQConfig(key=name, value=name)) for name in (*BUILT_IN, "fp16")),
        ("k=tq4,v=tq2", KVQConfig(key="tq4", value="tq2")),
        ("v=tq2,k=tq4", KVQConfig(key="tq4", value="tq2")),
        ("k=fp16,v=rvq1", KVQConfig(key="fp16", value="rvq1")),
        ("tq4,frame=off", KVQConfig(frame=False)),
        ("tq4,frame=on", KVQConfig(frame=True)),
        ("tq4,edges=2", KVQConfig(edges=2)),
        ("tq4,sinks=0", KVQConfig(sinks=0)),
        ("tq4,recent=128", KVQConfig(recent=128)),
        ("tq4,compress_after=prefill", KVQConfig(compress_after="prefill")),
        ("tq4,compress_after=chunk", KVQConfig(compress_after="chunk")),
        ("tq4,seed=7", KVQConfig(seed=7)),
        ("recent=64,edges=1,rvq1", KVQConfig(key="rvq1", value="rvq1", recent=64, edges=1)),
        (" tq4 , edges = 2 ", KVQConfig(edges=2)),
        ("\tk = tq4,\nv =tq2, seed= 3", KVQConfig(key="tq4", value="tq2", seed=3)),
        (
            "k=affine8,v=affine3,frame=off,edges=1,sinks=2,recent=3,compress_after=prefill,seed=4",
            KVQConfig("affine8", "affine3", False, 1, 2, 3, "prefill", 4),
        ),
        *((key, KVQConfig(key, value)) for key, value in KEY_ONLY.items()),
        ("k=qjl1,v=tq2", KVQConfig("qjl1", "tq2")),
        ("k=tqprod3,v=fp16", KVQConfig("tqprod3", "fp16")),
        ("k=kivi4,v=tq@2.5,recent=128", KVQConfig("kivi4", "tq@2.5", recent=128)),
        ("tqprod2,edges=1", KVQConfig("tqprod2", "tq2", edges=1)),
        ("qjl1+tq3", KVQConfig("qjl1+tq3", "tq4+tq3")),
        *((name, KVQConfig(key, value)) for name, (key, value) in TURBO.items()),
        ("turbo4v2,frame=off,sinks=8", KVQConfig("grouped4", "grouped2", frame=False, sinks=8)),
        ("recent=0, turbo0v4", KVQConfig("identity", "grouped4", recent=0)),
        ("turbo4v2,v=tq3", KVQConfig("grouped4", "tq3")),
        ("turbo4v2,k=fp16", KVQConfig("fp16", "grouped2")),
        ("k=tq@2,v=tq@3.25", KVQConfig("tq@2", "tq@3.25")),
        ("tq@2.5,sensitivity=activation", KVQConfig("tq@2.5", "tq@2.5", sensitivity="activation")),
        ("tq@2.5,sensitivity=gradient", KVQConfig("tq@2.5", "tq@2.5")),
        ("tq4,scaling=least_squares", KVQConfig(scaling="least_squares")),
        ("tq4,scaling=matched", KVQConfig()),
        (
            "k=tq@2.5,v=tq4,calibration=/data/a=b/run 3.safetensors",
            KVQConfig("tq@2.5", "tq4", calibration="/data/a=b/run 3.safetensors"),
        ),
        ("tq4,outliers=16", KVQConfig("tq4o16", "tq4o16")),
        ("k=tq2,outliers=8,v=tq3", KVQConfig("tq2o8", "tq3o8")),
        ("tq4,outliers=0", KVQConfig("tq4", "tq4")),
        ("tq2o16x4", KVQConfig("tq2o16x4", "tq2o16x4")),
        *((f"tq4,rotation={name}", KVQConfig(rotation=name)) for name in ("hadamard", "hadamard2", "dense")),
    ],
)
def test_scheme_strings_mean_what_the_grammar_says(scheme: str, config: KVQConfig) -> None:
    assert parse_scheme(scheme) == config


def test_a_config_passes_through() -> None:
    config = KVQConfig(key="tq3", edges=1)
    assert parse_scheme(config) is config


def test_defaults_are_those_of_the_documentation() -> None:
    assert KVQConfig() == KVQConfig("tq4", "tq4", True, 0, 4, 16, "chunk", 0, "hadamard", "", "gradient")


@settings(deadline=None)
@given(config=configs)
def test_formatting_is_the_inverse_of_parsing(config: KVQConfig) -> None:
    assert parse_scheme(format_scheme(config)) == config


@pytest.mark.parametrize(
    "scheme",
    [
        "tq4",
        "fp16",
        "k=tq4,v=tq2",
        "rvq1,edges=2,recent=64",
        "tq3,frame=off,sinks=0,compress_after=prefill,seed=5",
        *KEY_ONLY,
        "k=qjl1,v=tq2",
        "k=qjl1,v=fp16",
        "qjl1+tq3",
        "k=identity,v=grouped4",
        "tq@2.5,calibration=a b.safetensors,sensitivity=activation",
        "tq4o16,rotation=dense",
        "k=kivi2,v=tq@2.5,seed=1,rotation=hadamard3",
    ],
)
def test_formatting_writes_only_what_differs_from_the_defaults(scheme: str) -> None:
    assert format_scheme(parse_scheme(scheme)) == scheme


@pytest.mark.parametrize(
    ("scheme", "shortest"),
    [
        ("k=tq4,v=tq4", "tq4"),
        ("k=kivi2,v=affine2g32", "kivi2"),
        ("turbo8v3,edges=0", "k=affine8,v=grouped3"),
        ("tq4,outliers=16", "tq4o16"),
        ("tq4,rotation=hadamard,sensitivity=gradient,frame=on", "tq4"),
    ],
)
def test_formatting_gives_the_shortest_string(scheme: str, shortest: str) -> None:
    assert format_scheme(parse_scheme(scheme)) == shortest


def assert_one_sentence(message: str) -> None:
    assert "\n" not in message and ". " not in message and not message.endswith("."), message


ONE_FORM = "a scheme must name one codec, or k= and v= both, got "
INTEGER = "in a scheme must be a non-negative integer, got "
VALUE = "every part of a scheme must have a value, got "
PARTS = (
    "parts of a scheme must be a codec or one of ('k', 'v', 'outliers', 'frame', 'compress_after', 'rotation', "
    "'calibration', 'sensitivity', 'scaling', 'family', 'per', 'edges', 'sinks', 'recent', 'seed', "
    "'context'), got "
)
VALUES_BY = "values must be stored by a codec that can do them, got "
OUTLIERS = "outliers must be asked for with tq1 to tq6, got "
FAMILY = "a codec family must be one of affine, grouped, identity, kivi, polar, qjl, rvq, tcq, tq, tqprod"
WRONG_SCHEMES: list[tuple[Any, str]] = [
    (None, "kv_scheme must be a scheme string or a KVQConfig, got None"),
    (4, "kv_scheme must be a scheme string or a KVQConfig, got 4"),
    (["tq4"], "kv_scheme must be a scheme string or a KVQConfig, got ['tq4']"),
    ("", "kv_scheme must be a scheme string or a KVQConfig, got ''"),
    ("  ", "kv_scheme must be a scheme string or a KVQConfig, got '  '"),
    ("nope", "a codec name must start with one of "),
    ("k=tq4,v=nope", "a codec name must start with one of "),
    ("tq9", "codec tq9 does not exist; choose one of tq1, tq2, tq3, tq4, tq5, tq6"),
    ("k=rvq4,v=tq4", "codec rvq4 does not exist; choose one of rvq1, rvq2, rvq3"),
    ("TQ4", "a codec name must start with one of "),
    ("tq4,window=3", PARTS + "'window'"),
    ("tq4,=3", PARTS + "''"),
    ("key=tq4,value=tq4", PARTS + "'key'"),
    ("both=tq4", PARTS + "'both'"),
    ("codec=tq4", PARTS + "'codec'"),
    ("tq4,edges=1,edges=2", "every part of a scheme must be given once, got edges twice in "),
    ("k=tq4,k=tq2,v=tq4", "every part of a scheme must be given once, got k twice in "),
    ("tq4,tq2", "every part of a scheme must be given once, got "),
    ("tq4,", VALUE + "''"),
    (",tq4", VALUE + "''"),
    ("tq4,edges=", VALUE + "'edges='"),
    ("k=,v=tq4", VALUE + "'k='"),
    ("tq4,edges=-1", "edges " + INTEGER + "'-1'"),
    ("tq4,sinks=1.5", "sinks " + INTEGER + "'1.5'"),
    ("tq4,recent=many", "recent " + INTEGER + "'many'"),
    ("tq4,seed=0x10", "seed " + INTEGER + "'0x10'"),
    ("tq4,edges=1=2", "edges " + INTEGER + "'1=2'"),
    ("tq4,edges=²", "edges " + INTEGER + "'²'"),
    ("k=tq4", ONE_FORM + "'k=tq4'"),
    ("v=tq4,edges=2", ONE_FORM + "'v=tq4,edges=2'"),
    ("tq4,k=tq4,v=tq2", ONE_FORM),
    ("tq4,v=tq2", ONE_FORM),
    ("edges=2", ONE_FORM + "'edges=2'"),
    ("tq4,frame=maybe", "frame must be on or off, got 'maybe'"),
    ("tq4,frame=True", "frame must be on or off, got 'True'"),
    ("tq4,compress_after=later", "compress_after must be one of ('chunk', 'prefill'), got 'later'"),
    ("tq4,rotation=spin", "rotation must be one of hadamard, hadamard2, hadamard3, dense, got 'spin'"),
    ("tq4,rotation=", VALUE + "'rotation='"),
    ("tq4,rotation=dense,rotation=dense", "every part of a scheme must be given once, got rotation twice in "),
    ("tq@2.5,sensitivity=weights", "sensitivity must be one of gradient, activation, got 'weights'"),
    ("tq4,scaling=norm", "scaling must be one of matched, least_squares, got 'norm'"),
    ("tq@2.5,calibration=", VALUE + "'calibration='"),
    ("tq@9", "average bits of tq must be in 1 to 6, got 9"),
    ("tq@0.9", "average bits of tq must be in 1 to 6, got 0.9"),
    ("k=tq4,v=rvq@3.5", "average bits of rvq must be in 1 to 3, got 3.5"),
    ("identity@2", "average bits of identity must be in none: it has one codec, got 2"),
    ("nope@2", FAMILY),
    ("tq@2.5@3", FAMILY + ", got 'tq@2.5'"),
    *((name, 'average bits must be written like "tq@2.5", got ') for name in ("tq@", "tq@x", "@2", "tq@-1")),
    ("tq@2.5+tq4", 'average bits must be written like "tq@2.5", got '),
    *((f"k=tq4,v={name}", f"{VALUES_BY}{name}, which is for keys only; write") for name in KEY_ONLY),
    ("k=tq4,v=qjl@2.5", VALUES_BY + 'qjl@2.5, which is for keys only; write for example "k=qjl@2.5,v=tq4"'),
    ("tqprod@2.5", VALUES_BY + 'tqprod@2.5, which is for keys only; write for example "k=tqprod@2.5,v=tq2"'),
    ("kivi3", "codec kivi3 does not exist; choose one of kivi2, kivi4"),
    ("tq2.4", "codec tq2.4 does not exist; choose one of tq1, tq2, tq3, tq4, tq5, tq6, tq2.5, tq3.5"),
    ("tq4,outliers=-1", "outliers " + INTEGER + "'-1'"),
    ("tq4,outliers=many", "outliers " + INTEGER + "'many'"),
    ("tq4,outliers=8,outliers=8", "every part of a scheme must be given once, got outliers twice in "),
    *(
        (f"{name},outliers=8", f"{OUTLIERS}{name}; ")
        for name in ("affine4", "tq2.5", "tq2o8", "tq@2.5", "fp16", "qjl1")
    ),
    ("k=tq4,v=rvq1,outliers=8", OUTLIERS + "rvq1; drop outliers= or use tq"),
    ("turbo4v2,outliers=8", OUTLIERS + "grouped4; drop outliers= or use tq"),
    *((name, "a codec name must start with one of ") for name in ("turbo", "turbo4", "turbo5v4", "turbo4v8")),
    ("turbo4v2,turbo4v3", "every part of a scheme must be given once, got codec= twice in "),
    ("k=turbo4v2,v=tq4", "a codec name must start with one of "),
]


@pytest.mark.parametrize(("scheme", "message"), WRONG_SCHEMES, ids=[repr(scheme) for scheme, _ in WRONG_SCHEMES])
def test_every_wrong_scheme_has_its_sentence(scheme: Any, message: str) -> None:
    with pytest.raises(SchemeError) as caught:
        parse_scheme(scheme)
    assert str(caught.value).startswith(message)
    assert_one_sentence(str(caught.value))


@pytest.mark.parametrize("scheme", [None, "tq4,edges=-1", "k=tq4", "tq4,edges=", "tq4,window=3"])
def test_mistakes_in_the_grammar_are_answered_with_an_example(scheme: Any) -> None:
    with pytest.raises(SchemeError) as caught:
        parse_scheme(scheme)
    assert str(caught.value).endswith("; " + EXAMPLE)


WRONG_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"key": 4}, "key must be a codec name, got 4"),
    ({"value": None}, "value must be a codec name, got None"),
    ({"key": ["tq4"]}, "key must be a codec name, got ['tq4']"),
    ({"value": "tq7"}, "codec tq7 does not exist; choose one of tq1"),
    ({"key": ""}, "a codec name must start with one of "),
    ({"frame": 1}, "frame must be True or False, got 1"),
    ({"frame": "on"}, "frame must be True or False, got 'on'"),
    *(
        ({name: value}, f"{name} must be an integer of at least 0, got {value!r}")
        for name in ("edges", "sinks", "recent", "seed")
        for value in (-1, 1.0, "2", True, None)
    ),
    ({"compress_after": "never"}, "compress_after must be one of ('chunk', 'prefill'), got 'never'"),
    ({"compress_after": None}, "compress_after must be one of ('chunk', 'prefill'), got None"),
    *(
        ({"rotation": value}, f"rotation must be one of hadamard, hadamard2, hadamard3, dense, got {value!r}")
        for value in ("", "Dense", None, 2)
    ),
    *(
        ({"sensitivity": value}, f"sensitivity must be one of gradient, activation, got {value!r}")
        for value in ("", None, True)
    ),
    *(
        ({"calibration": value}, f"calibration must be empty or a path without commas and outer spaces, got {value!r}")
        for value in (None, 3, "a,b.safetensors", " a", "a\n")
    ),
    ({"value": "kivi2"}, "values must be stored by a codec that can do them, got kivi2, which is for keys only; write"),
    ({"key": "tq@7"}, "average bits of tq must be in 1 to 6, got 7"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_FIELDS, ids=[repr(wrong) for wrong, _ in WRONG_FIELDS])
def test_every_wrong_field_has_its_sentence(wrong: dict[str, Any], message: str) -> None:
    for attempt in (
        lambda: KVQConfig(**wrong),
        lambda: replace(KVQConfig(), **wrong),
        lambda: KVQConfig.from_json(json.dumps(wrong)),
    ):
        with pytest.raises(SchemeError) as caught:
            attempt()
        assert str(caught.value).startswith(message)
        assert_one_sentence(str(caught.value))


@settings(deadline=None)
@given(config=configs)
def test_json_gives_the_config_back(config: KVQConfig) -> None:
    again = KVQConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == config.to_json()


def test_json_has_every_field_and_missing_ones_are_defaults() -> None:
    config = KVQConfig("tq3", "rvq1", False, 1, 2, 3, "prefill", 5, "dense", "c", "activation", "least_squares")
    assert json.loads(config.to_json()) == {
        "key": "tq3",
        "value": "rvq1",
        "frame": False,
        "edges": 1,
        "sinks": 2,
        "recent": 3,
        "compress_after": "prefill",
        "seed": 5,
        "rotation": "dense",
        "calibration": "c",
        "sensitivity": "activation",
        "scaling": "least_squares",
        "family": "tq",
        "per": "layer",
        "context": 0,
    }
    assert KVQConfig.from_json('{"edges": 2}') == KVQConfig(edges=2)
    assert KVQConfig.from_json(json.dumps({"key": "tq3", "value": "tq3", "seed": 1})) == KVQConfig("tq3", "tq3", seed=1)


@pytest.mark.parametrize("text", ['{"window": 3}', "[]", "3", "null", '"tq4"', "{", "", "tq4"])
def test_json_of_anything_else_is_refused(text: str) -> None:
    with pytest.raises(SchemeError, match=r"^a config must be a JSON object") as caught:
        KVQConfig.from_json(text)
    assert "\n" not in str(caught.value)


def test_configs_cannot_change() -> None:
    config = KVQConfig()
    with pytest.raises(FrozenInstanceError):
        config.edges = 3  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        config.layer_spec().key = "tq2"  # type: ignore[misc]


def test_fp16_on_one_side_is_identity_and_on_both_leaves_layers_alone() -> None:
    assert not KVQConfig("fp16", "fp16").compresses
    for key, value in (("fp16", "tq4"), ("tq4", "fp16"), ("identity", "identity")):
        config = KVQConfig(key, value)
        assert config.compresses
        spec = config.layer_spec()
        assert (spec.key, spec.value) == (key.replace("fp16", "identity"), value.replace("fp16", "identity"))


def test_layer_specs_carry_every_setting_of_a_layer() -> None:
    config = KVQConfig("tq3", "rvq1", False, 1, 2, 3, "prefill", 5, "dense", "c", "activation", "least_squares")
    spec = config.layer_spec()
    assert spec.to_dict() == {
        "key": "tq3",
        "value": "rvq1",
        "frame": False,
        "sinks": 2,
        "recent": 3,
        "compress_after": "prefill",
        "seed": 5,
        "rotation": "dense",
        "scaling": "least_squares",
    }
    assert config.layer_spec("tq2+tq4", "tq1").label == "k=tq2+tq4,v=tq1"
    assert spec.label == "k=tq3,v=rvq1"
    assert spec.with_(value="tq3").label == "tq3"


def test_budgets_are_those_of_the_sides() -> None:
    config = parse_scheme("k=tq@2.5,v=affine@4")
    assert config.budgets == (Budget("tq", 2.5), Budget("affine", 4.0))
    assert config.budgets[0].choices() == (1, 2, 3, 4, 5, 6) and config.budgets[1].choices() == (2, 3, 4, 5, 6, 8)
    assert parse_scheme("k=tq@2.5,v=tq4").budgets == (Budget("tq", 2.5), None)
    assert parse_scheme("tq2.5").budgets == (None, None)


def stored_bits(name: str, dim: int, dtype: str) -> float:
    """Bits per element of what a codec stores of one whole group, or of three tokens."""
    codec = get_codec(name)
    length = max(3, codec.group)
    x = mx.random.normal((2, 1, length, dim), key=mx.random.key(0)).astype(getattr(mx, dtype))
    return 8 * sum(plane.nbytes for plane in codec.encode(x, codec.fit(x)).values()) / (2 * length * dim)


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_listed_bits_are_the_bytes_of_encoded_tokens(dim: int, dtype: str) -> None:
    rows = {row.name: row for row in list_schemes(dim, dtype)}
    sides = {**{name: (name, name) for name in LISTED}, **{k: (k, v) for k, v in KEY_ONLY.items()}, **TURBO}
    assert set(rows) >= {"fp16", *sides}
    for name, (key, value) in sides.items():
        key_dtype = dtype if key == "identity" else "float32"  # out of the rotary frame
        wanted = (stored_bits(key, dim, key_dtype) + stored_bits(value, dim, dtype)) / 2
        bits, ratio = rows[name].bits, rows[name].ratio
        assert bits is not None and ratio is not None
        assert bits == pytest.approx(wanted, rel=1e-12)
        assert ratio == pytest.approx(16 / wanted, rel=1e-12)
        assert rows[name].note == ("" if key == value else f"keys {key}, values {value}")
    assert rows["fp16"].bits == 16 and rows["fp16"].ratio == 1


def test_every_listed_name_is_a_scheme_and_listed_once() -> None:
    names = [row.name for row in list_schemes(128)]
    assert len(names) == len(set(names))
    for name in names:
        assert format_scheme(parse_scheme(name))
    assert names[0] == "fp16" and set(TURBO) <= set(names)


def test_head_sizes_that_a_codec_cannot_do_are_listed_with_the_reason() -> None:
    rows = {row.name: row for row in list_schemes(72)}
    for name in (*LISTED, *KEY_ONLY, *TURBO):
        if name.startswith(("identity", "affine", "kivi")):
            assert rows[name].bits is not None
            assert rows[name].note == (f"keys {name}, values {KEY_ONLY[name]}" if name in KEY_ONLY else "")
            continue
        assert rows[name].bits is None and rows[name].ratio is None
        reason = (
            "got 36 and 36; outlier channels can be" if name.endswith(".5") else "got 72; use rotation=dense, or affine"
        )
        assert reason in rows[name].note
