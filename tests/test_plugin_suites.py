"""The suites of `mlx_kvq_plugin.testing`: built-in codecs and adapters pass, and each check fails where it should."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import mlx.core as mx
import pytest
import tiny_models

from mlx_kvq_plugin.adapters import load_adapter
from mlx_kvq_plugin.codecs import Codec, Plane, get_codec
from mlx_kvq_plugin.testing import AdapterSuite, CodecSuite, tiny_llama
from mlx_kvq_plugin.testing.codecs import CHECKS, check_json
from mlx_kvq_plugin.testing.models import check_geometry


class TestTQ4(CodecSuite):
    name = "tq4"


class TestRVQ1(CodecSuite):
    name = "rvq1"
    dims = (64, 80)
    max_kl = 1.0


class TestAffine4(CodecSuite):
    name = "affine4"


class TestIdentity(CodecSuite):
    name = "identity"


class TestQJL2(CodecSuite):
    name = "qjl2"  # keys only
    max_kl = 1.0


class TestKIVI4(CodecSuite):
    name = "kivi4"  # groups of tokens


class TestPolar4(CodecSuite):
    name = "polar4"


class TestQwen3(AdapterSuite):
    def model(self) -> Any:
        return tiny_models.qwen3()


class TestGemma3(AdapterSuite):
    tokens = 200

    def model(self) -> Any:
        return tiny_models.gemma3_text()


class TestQwen35(AdapterSuite):
    refused = ("trim and continue", "verify and trim")  # recurrent states

    def model(self) -> Any:
        return tiny_models.qwen3_5()


# ---- each check fails ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Byte(Codec):
    """Eight bits a channel with a scale a token; `fault` names what is wrong with it."""

    family: ClassVar[str] = "byte"
    fault: str = ""

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        width = dim + 1 if self.fault == "width" else dim
        return Plane("codes", "uint8", width), Plane("scale", "float32", 1)

    def fit(self, x: mx.array) -> dict[str, mx.array]:
        if self.fault == "batch":
            return {"mean": mx.broadcast_to(mx.mean(x.astype(mx.float32)), (*x.shape[:2], 1, 1))}
        return {}

    def _encode(self, x: mx.array, statistics: Any) -> dict[str, mx.array]:
        x = x.astype(mx.float32) + statistics.get("mean", mx.array(0.0))
        axes = (2, 3) if self.fault == "neighbours" else 3
        scale = mx.max(mx.abs(x), axis=axes, keepdims=True) / 127
        if self.fault == "neighbours":
            scale = mx.broadcast_to(scale, (*x.shape[:3], 1)) if x.shape[2] else mx.zeros((*x.shape[:3], 1))
        noise = mx.random.uniform(shape=x.shape) if self.fault == "random" else 0.5
        scaled = x / (scale if self.fault == "zeros" else mx.maximum(scale, 1e-38))
        return {"codes": (mx.floor(scaled + noise) + 128).astype(mx.uint8), "scale": scale}

    def _decode(self, planes: Any, dim: int, dtype: mx.Dtype, statistics: Any) -> mx.array:
        x = (planes["codes"].astype(mx.float32) - 128) * planes["scale"] - statistics.get("mean", mx.array(0.0))
        if self.fault == "sign":
            x = -2 * x
        if self.fault == "zeros":
            x = x + 0 * (1 / planes["scale"])
        return x if self.fault == "dtype" else x.astype(dtype)

    def scores(self, queries: mx.array, planes: Any, statistics: Any = {}) -> mx.array:  # noqa: B006
        found = super().scores(queries, planes, statistics)
        return found * 1.1 if self.fault == "scores" else found

    def weighted_sum(self, weights: mx.array, planes: Any, dim: int, statistics: Any = {}) -> mx.array:  # noqa: B006
        found = super().weighted_sum(weights, planes, dim, statistics)
        return found + 0.1 if self.fault == "sums" else found


FAULTS = {
    "width": "declared_planes",
    "neighbours": "pieces",
    "random": "determinism",
    "batch": "rows_and_heads",
    "dtype": "lengths",
    "sign": "reconstruction",
    "zeros": "sizes",
    "scores": "products",
    "sums": "no_tokens",
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_codec_without_fault_passes(check: str) -> None:
    CHECKS[check](Byte(), 64, "float16")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_its_check(fault: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        CHECKS[FAULTS[fault]](Byte(fault=fault), 64, "float16")


def test_neighbours_and_products_notice_too() -> None:
    for fault, check in (("neighbours", "neighbours"), ("sums", "products")):
        with pytest.raises(AssertionError):
            CHECKS[check](Byte(fault=fault), 64, "float32")


def test_a_codec_that_is_not_found_by_its_name_fails() -> None:
    check_json(get_codec("tq4"))
    with pytest.raises(Exception, match="byte"):
        check_json(Byte())


GEOMETRY_FAULTS = {
    "one entry for each": lambda entries: entries[:1],
    "module of the model": lambda entries: [
        replace(entries[0], attention=tiny_llama().layers[0].self_attn),
        *entries[1:],
    ],
    "share KV heads evenly": lambda entries: [replace(entries[0], kv_heads=3), *entries[1:]],
    "have a window": lambda entries: [replace(entries[0], window=5), *entries[1:]],
    "must say why": lambda entries: [replace(entries[0], kind="odd"), *entries[1:]],
    "must have keys and values": lambda entries: [replace(own, kind="odd", note="so") for own in entries],
    "rope turns keys": lambda entries: [replace(entries[0], rope=lambda x, offset: x[..., :1]), *entries[1:]],
}


@pytest.mark.parametrize("what", GEOMETRY_FAULTS)
def test_geometry_that_is_not_true_fails(what: str) -> None:
    model = tiny_llama()
    entries = load_adapter("llama").geometry(model)
    check_geometry(model, entries)
    with pytest.raises(AssertionError, match=what):
        check_geometry(model, GEOMETRY_FAULTS[what](entries))
