"""Automatic allocation: grammar, targets that are met or refused, and one choice for equal input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.allocation import SIDES, Component, DistortionCurve, least_bits, plain_curve, total_distortion
from mlx_kvq_plugin.auto import choose, even_choice
from mlx_kvq_plugin.calibration import Calibration
from mlx_kvq_plugin.cli.evaluate import split_schemes
from mlx_kvq_plugin.errors import AllocationError, CalibrationError, SchemeError
from mlx_kvq_plugin.self_calibration import drawn_texts

BITS = (1, 2, 3, 4, 5, 6)
CURVE = DistortionCurve(BITS, tuple(4.0**-b for b in BITS), 1.0, 4.0)
TRELLIS = DistortionCurve(BITS[:4], tuple(0.8 * 4.0**-b for b in BITS[:4]), 0.8, 4.0)


def calibration(loud: Mapping[tuple[str, int], float] | None = None) -> Calibration:
    """Of 10 layers with 2 KV heads of 64, keys four times as sensitive as values, later layers less.

    Args:
        loud: factors of the sensitivities of some sides and layers.
    """
    weights = {
        side: {i: (0.02 / (i + 1) / (1 + 3 * n), 0.01 / (i + 1) / (1 + 3 * n)) for i in range(10)}
        for n, side in enumerate(SIDES)
    }
    for (side, layer), factor in (loud or {}).items():
        first, second = weights[side][layer]
        weights[side][layer] = (factor * first, factor * second)
    dims = {side: dict.fromkeys(range(10), 64) for side in SIDES}
    curves = {("tq", side): CURVE for side in SIDES} | {("tcq", side): TRELLIS for side in SIDES}
    kinds = {"gradient": weights, "activation": weights}
    return Calibration("", "m", kinds, dims, tuple(range(10)), curves, 4, 16, 1, 256, "")


@pytest.mark.parametrize(
    "scheme", ["auto@3.25", "auto:kl<=0.02", "auto:kl<=0.02,family=rvq,per=head", "auto@2,edges=1"]
)
def test_schemes_are_read_and_written(scheme: str) -> None:
    config = kvq.parse_scheme(scheme)
    assert config.target is not None and config.allocated
    assert kvq.format_scheme(config) == scheme
    assert kvq.KVQConfig.from_json(config.to_json()) == config


def test_a_list_of_schemes_is_cut_between_them() -> None:
    assert split_schemes(["tq4,auto:kl<=0.02,family=rvq,auto@3"]) == ["tq4", "auto:kl<=0.02,family=rvq", "auto@3"]


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("auto", "automatic bits must be written like"),
        ("auto@0", "automatic bits must be written like"),
        ("auto:kl<=x", "automatic bits must be written like"),
        ("k=auto@3,v=tq4", "auto must be the scheme of keys and values together"),
        ("tq4,per=head", "family and per must go with auto"),
        ("auto@3,per=token", "per must be one of layer, head"),
        ("auto@3,family=identity", "a family to choose from must have two or more whole rates"),
        ("auto@3,sensitivity=activation", "auto must go by gradients"),
    ],
)
def test_wrong_schemes_have_their_sentence(scheme: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        kvq.parse_scheme(scheme)


@pytest.mark.parametrize("bits", [1.25, 2.3, 3.25, 4.1, 6.25])
@pytest.mark.parametrize("per", ["layer", "head"])
def test_stored_bits_are_met_within_one_step(bits: float, per: str) -> None:
    config = kvq.parse_scheme(f"auto@{bits},per={per}")
    allocation, choice = choose(calibration(), config, range(10), {}, "tests")
    assert bits - 1 / (20 if per == "layer" else 40) < choice.bits <= bits + 1e-9
    stored = [config.layer_spec(layer.key, layer.value).bits_per_element(64, 64) for layer in choice.layers]
    assert sum(map(sum, stored)) / 20 == pytest.approx(choice.bits)
    assert choice.kl <= choice.even_kl * (1 + 1e-9)
    assert [layer.key for layer in choice.layers] == [allocation.codec("key", i) for i in range(10)]


@pytest.mark.parametrize("kl", [0.005, 0.001, 0.0002])
def test_a_bound_is_kept_by_few_bits(kl: float) -> None:
    _, choice = choose(calibration(), kvq.parse_scheme(f"auto:kl<={kl}"), range(10), {}, "tests")
    _, fewer = choose(calibration(), kvq.parse_scheme(f"auto@{choice.bits - 0.05 - 1e-6:.6f}"), range(10), {}, "tests")
    assert choice.kl <= kl < fewer.kl


def test_targets_out_of_reach_are_refused() -> None:
    for scheme, message in (
        ("auto@16.5", "must be in 1.25 to 16"),
        ("auto@7,per=head", "must be in 1.25 to 6.25"),
        ("auto:kl<=0.000001,per=head", "a KL divergence must be at .* what tq6 is predicted to cost"),
    ):
        with pytest.raises(AllocationError, match=message):
            choose(calibration(), kvq.parse_scheme(scheme), range(10), {}, "tests")


def test_what_needs_it_has_sixteen_bits_wherever_it_stands() -> None:
    own = calibration({("key", 6): 1e4, ("key", 4): 1e5, ("value", 4): 1e5})
    allocation, choice = choose(own, kvq.parse_scheme("auto@4.25"), range(10), {}, "tests")
    exact = {(side, i) for side in SIDES for i in range(10) if allocation.codec(side, i) == "identity"}
    assert exact == {("key", 6), ("key", 4), ("value", 4)}
    assert choice.bits <= 4.25 and choice.layers[4].key_kl == choice.layers[6].key_kl == 0.0
    assert [line.split()[:3] for line in choice.lines() if "fp16" in line] == [
        ["4", "fp16", "fp16"],
        ["6", "fp16", choice.layers[6].value],
    ]
    heads, _ = choose(own, kvq.parse_scheme("auto@4.25,per=head"), range(10), {}, "tests")
    assert all("identity" not in heads.codec(side, i) for side in SIDES for i in range(10))


@pytest.mark.parametrize("bits", [6.25, 8.0, 12.0, 15.9, 16.0])
def test_bits_beyond_the_codecs_are_a_share_of_exact_sides(bits: float) -> None:
    allocation, choice = choose(calibration(), kvq.parse_scheme(f"auto@{bits}"), range(10), {}, "tests")
    assert bits - 10 / 20 < choice.bits <= bits
    assert {allocation.codec(side, i) for side in SIDES for i in range(10)} <= {f"tq{b}" for b in BITS} | {"identity"}
    assert (choice.kl == 0.0) == (choice.even_kl == 0.0) == (bits == 16.0)
    needs = [need for layer in choice.layers for need in (layer.key_need, layer.value_need)]
    _, usual = choose(calibration(), kvq.parse_scheme("auto@3"), range(10), {}, "tests")
    assert needs == pytest.approx([need for layer in usual.layers for need in (layer.key_need, layer.value_need)])


def test_a_small_bound_is_met_by_exact_sides() -> None:
    _, choice = choose(calibration(), kvq.parse_scheme("auto:kl<=0.000001"), range(10), {}, "tests")
    assert 0.0 < choice.kl <= 1e-6 and 6.25 < choice.bits < 16.0


@pytest.mark.parametrize("per", ["layer", "head"])
def test_a_family_goes_on_in_another_one(per: str) -> None:
    config = kvq.parse_scheme(f"auto@4.25,family=tcq,per={per}")
    allocation, choice = choose(calibration(), config, range(10), {}, "tests")
    names = {name for side in SIDES for i in range(10) for name in allocation.codec(side, i).split("+")}
    assert {"tcq4", "tq5"} <= names <= {*(f"tcq{b}" for b in BITS[:4]), "tq5", "tq6"} and choice.bits <= 4.25
    kinds = {"tcq": CURVE, "tq": replace(CURVE, bits=BITS[:4], mse=CURVE.mse[:4])}
    for families in (["tcq"], ["tcq", "tq"]):  # the other one is missing, or its upper rates
        curves = {(family, side): kinds[family] for family in families for side in SIDES}
        with pytest.raises(AllocationError, match="must have the distortion of tq for key and value, got none"):
            choose(replace(calibration(), curves=curves), config, range(10), {}, "tests")


def test_distortion_falls_to_nothing_at_an_exact_codec() -> None:
    curve = plain_curve((*BITS, 16), 16)
    fitted = [curve.between(bits) for bits in (5.5, 6, 8.5, 11, 13.5, 16)]
    assert fitted == pytest.approx([4.0**-b for b in (5.5, 6)] + [share * 4.0**-6 for share in (0.75, 0.5, 0.25, 0)])
    assert curve.lossy == 6 and curve.measured(16) == 0.0


@pytest.mark.parametrize("family", ["tq", "tcq"])
def test_without_a_calibration_bits_are_spread_evenly(family: str) -> None:
    own = [Component(i, 0, side, 1.0, 64) for i in range(10) for side in SIDES]
    for bits, exact in ((3.25, 0), (6.25, 0), (8.2, 4)):
        allocation = even_choice(kvq.parse_scheme(f"auto@{bits},family={family}"), own, {})
        names = [allocation.codec(side, i) for i in range(10) for side in SIDES]
        assert names.count("identity") == exact and set(names) - {"identity"} == {f"{family}3" if bits < 4 else "tq6"}


def test_least_bits_stop_where_the_distortion_is_small_enough() -> None:
    own = [Component(i, 0, "key", w, 64) for i, w in enumerate((1.0, 0.5, 0.1))]
    curves = {"key": CURVE}
    found = least_bits(own, 0.1, BITS, curves)
    assert total_distortion(own, found, curves) <= 0.1 < total_distortion(own, [1, 1, 1], curves)


def test_texts_that_only_repeat_are_refused() -> None:
    def stuck(tokens: mx.array, cache: Any) -> mx.array:
        return mx.where(mx.arange(8) == 3, 100.0, 0.0) * mx.ones((*tokens.shape, 8))

    stuck.layers = []  # type: ignore[attr-defined]
    with pytest.raises(CalibrationError, match="must not only repeat"):
        drawn_texts(stuck, 1, 2, 32)
