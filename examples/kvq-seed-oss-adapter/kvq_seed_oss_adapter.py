"""A complete plugin in one module: a model adapter for Seed-OSS and a codec.

Install it with `pip install ./examples/kvq-seed-oss-adapter`; `kvq inspect` and `kvq schemes` then know both.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry
from mlx_kvq_plugin.codecs import Codec, Plane, Planes, Statistics


def geometry(model: Any) -> list[LayerGeometry]:
    """Seed-OSS attends fully in every layer, and its attention has llama's attribute names."""
    return [attention_geometry(layer.self_attn) for layer in model.layers]


ADAPTER = Adapter(name="seed_oss", geometry=geometry)


@dataclass(frozen=True)
class Half(Codec):
    """`half`: every number rounded to bfloat16. Not much of a codec, but all of the contract."""

    family: ClassVar[str] = "half"

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        return (Plane("rounded", "bfloat16", dim),)

    def _encode(self, x: mx.array, statistics: Statistics) -> dict[str, mx.array]:
        return {"rounded": x.astype(mx.bfloat16)}

    def _decode(self, planes: Planes, dim: int, dtype: mx.Dtype, statistics: Statistics) -> mx.array:
        return planes["rounded"].astype(dtype)
