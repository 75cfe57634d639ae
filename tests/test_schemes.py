"""Scheme strings and configs: what parses, what comes back, and one sentence for everything that does not."""

import json
from dataclasses import FrozenInstanceError, replace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.config import KVQConfig
from mlx_kvq_plugin.errors import SchemeError
from mlx_kvq_plugin.schemes import format_scheme, list_schemes, parse_scheme

BUILT_IN = (
    "identity",
    *(f"affine{bits}" for bits in (2, 3, 4, 5, 6, 8)),
    *(f"tq{bits}" for bits in (1, 2, 3, 4, 5, 6)),
    *(f"rvq{bits}" for bits in (1, 2, 3)),
)
EXAMPLE = 'write for example "tq4", "rvq1,edges=2,recent=64" or "k=tq4,v=tq2"'

sides = st.sampled_from(["fp16", *BUILT_IN])
configs = st.builds(
    KVQConfig,
    key=sides,
    value=sides,
    frame=st.booleans(),
    edges=st.integers(0, 100),
    sinks=st.integers(0, 10**6),
    recent=st.integers(0, 10**6),
    compress_after=st.sampled_from(["chunk", "prefill"]),
    seed=st.integers(0, 2**63),
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
    ],
)
def test_scheme_strings_mean_what_the_grammar_says(scheme: str, config: KVQConfig) -> None:
    assert parse_scheme(scheme) == config


def test_a_config_passes_through() -> None:
    config = KVQConfig(key="tq3", edges=1)
    assert parse_scheme(config) is config


def test_defaults_are_those_of_the_documentation() -> None:
    assert KVQConfig() == KVQConfig("tq4", "tq4", True, 0, 4, 16, "chunk", 0)


@settings(deadline=None)
@given(config=configs)
def test_formatting_is_the_inverse_of_parsing(config: KVQConfig) -> None:
    assert parse_scheme(format_scheme(config)) == config


@pytest.mark.parametrize(
    "scheme",
    ["tq4", "fp16", "k=tq4,v=tq2", "rvq1,edges=2,recent=64", "tq3,frame=off,sinks=0,compress_after=prefill,seed=5"],
)
def test_formatting_writes_only_what_differs_from_the_defaults(scheme: str) -> None:
    assert format_scheme(parse_scheme(scheme)) == scheme


def assert_one_sentence(message: str) -> None:
    assert "\n" not in message and ". " not in message and not message.endswith("."), message


ONE_FORM = "a scheme must name one codec, or k= and v= both, got "
INTEGER = "in a scheme must be a non-negative integer, got "
VALUE = "every part of a scheme must have a value, got "
PARTS = "parts of a scheme must be a codec or one of ('k', 'v', 'frame', 'compress_after', 'edges', 'sinks', "
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
    ("tq4,window=3", PARTS),
    ("tq4,=3", PARTS),
    ("key=tq4,value=tq4", PARTS),
    ("both=tq4", PARTS),
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
    assert json.loads(KVQConfig("tq3", "rvq1", False, 1, 2, 3, "prefill", 5).to_json()) == {
        "key": "tq3",
        "value": "rvq1",
        "frame": False,
        "edges": 1,
        "sinks": 2,
        "recent": 3,
        "compress_after": "prefill",
        "seed": 5,
    }
    assert KVQConfig.from_json('{"edges": 2}') == KVQConfig(edges=2)


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
    spec = KVQConfig("tq3", "rvq1", False, 1, 2, 3, "prefill", 5).layer_spec()
    assert spec.to_dict() == {
        "key": "tq3",
        "value": "rvq1",
        "frame": False,
        "sinks": 2,
        "recent": 3,
        "compress_after": "prefill",
        "seed": 5,
    }
    assert spec.label == "k=tq3,v=rvq1"
    assert spec.with_(value="tq3").label == "tq3"


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_listed_bits_are_the_bytes_of_encoded_tokens(dim: int, dtype: str) -> None:
    rows = {row.name: row for row in list_schemes(dim, dtype)}
    assert set(rows) >= {"fp16", *BUILT_IN}
    x = mx.random.normal((2, 1, 3, dim), key=mx.random.key(0)).astype(getattr(mx, dtype))
    for name in BUILT_IN:
        stored = sum(plane.nbytes for plane in get_codec(name).encode(x).values())
        bits, ratio = rows[name].bits, rows[name].ratio
        assert bits is not None and ratio is not None
        assert bits == pytest.approx(8 * stored / (2 * 3 * dim), rel=1e-12)
        assert ratio == pytest.approx(2 * 2 * 3 * dim / stored, rel=1e-12)
    assert rows["fp16"].bits == 16 and rows["fp16"].ratio == 1


def test_head_sizes_that_a_codec_cannot_do_are_listed_with_the_reason() -> None:
    rows = {row.name: row for row in list_schemes(72)}
    for name in BUILT_IN:
        if name.startswith(("tq", "rvq")):
            assert rows[name].bits is None and rows[name].ratio is None
            assert "got 72; use affine" in rows[name].note
        else:
            assert rows[name].bits is not None and rows[name].note == ""
