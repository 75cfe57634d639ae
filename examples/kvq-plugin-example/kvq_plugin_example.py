"""A complete plugin in one module: a codec, a named scheme and a model adapter.

Install it with `pip install ./examples/kvq-plugin-example`; `kvq plugins`, `kvq schemes` and `kvq inspect` then know
all three. Its own tests are those of `mlx_kvq_plugin.testing`: `pytest examples/kvq-plugin-example/tests`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry
from mlx_kvq_plugin.codecs import Codec, Plane, Planes, Statistics
from mlx_kvq_plugin.packing import pack, packed_width, unpack

# ---- a codec: `absmax4`, `absmax6` -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AbsMax(Codec):
    """`bits` bits a channel in equal steps from the largest of a token's numbers to its negative, one scale a token.

    Codes are odd: with 2^bits levels there is none at 0, and a token of zeros has the scale 0.
    """

    family: ClassVar[str] = "absmax"
    suffixes: ClassVar[tuple[str, ...]] = ("4", "6")

    bits: int = 4

    @classmethod
    def _build(cls, suffix: str, seed: int) -> Codec:
        return cls(seed=seed, bits=int(suffix))

    @property
    def name(self) -> str:
        return f"absmax{self.bits}"

    @property
    def _levels(self) -> int:
        return int(2**self.bits)

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        return Plane("codes", "uint8", packed_width(dim, self.bits)), Plane("scale", "bfloat16", 1)

    def _encode(self, x: mx.array, statistics: Statistics) -> dict[str, mx.array]:
        x = x.astype(mx.float32)
        scale = (mx.max(mx.abs(x), axis=-1, keepdims=True) / (self._levels - 1)).astype(mx.bfloat16)
        steps = x / mx.maximum(scale.astype(mx.float32), 1e-38)  # of two scales; levels lie at odd numbers
        codes = mx.clip(mx.floor((steps + self._levels) / 2), 0, self._levels - 1)
        return {"codes": pack(codes.astype(mx.uint8), self.bits), "scale": scale}

    def _decode(self, planes: Planes, dim: int, dtype: mx.Dtype, statistics: Statistics) -> mx.array:
        levels = 2 * unpack(planes["codes"], dim, self.bits).astype(mx.float32) - (self._levels - 1)
        return (levels * planes["scale"].astype(mx.float32)).astype(dtype)

    def expected_mse(self, dim: int) -> tuple[float, float]:
        """The definition, simulated in float64; the band leaves room for the stored scale, which has 8 bits."""
        x = np.random.default_rng(0).normal(size=(4096, dim))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        scale = np.abs(x).max(axis=1, keepdims=True) / (self._levels - 1)
        codes = np.clip(np.floor((x / scale + self._levels) / 2), 0, self._levels - 1)
        mse = float(np.mean(np.sum((x - (2 * codes - self._levels + 1) * scale) ** 2, axis=1)))
        return 0.98 * mse, 1.02 * mse


# ---- a named scheme: keys with more bits than values -----------------------------------------------------------------

SCHEMES = {"absmax64": "k=absmax6,v=absmax4"}

# ---- an adapter: Seed-OSS, which attends fully in every layer, with llama's attribute names --------------------------


def geometry(model: Any) -> list[LayerGeometry]:
    """One entry a layer, in the order of the model's caches."""
    return [attention_geometry(layer.self_attn) for layer in model.layers]


ADAPTER = Adapter(name="seed_oss", geometry=geometry)
