"""`kivi{2,4}`: the keys of KIVI (arXiv 2402.02750, section 3): per channel, in groups of 32 tokens. Keys only.

Each channel of 32 consecutive tokens is rounded to equal steps between its least and its largest value; step and least
value are float16 (limited to its range). Values go by token in groups of 32 channels: `affine{b}g32`. The tokens of a
group are encoded together, so a cache packs whole groups and keeps up to 31 more tokens dense; trimming into a group
keeps the codes of what remains. Differences from KIVI: the last tokens kept dense are those of the scheme (`recent=128`
is KIVI's setting), and keys are in the rotary frame unless `frame=off`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import mlx.core as mx
import numpy as np

from ..packing import pack, packed_width, unpack
from . import Codec, Plane, Planes, Statistics
from .scalar import sphere_rows

_LARGEST = 65504.0  # of float16


@cache
def _simulated(bits: int, tokens: int, dim: int) -> float:
    """Relative error of a channel of that many random unit vectors, which are independent of each other."""
    x = sphere_rows(1, dim)
    x = x[: len(x) // tokens * tokens].reshape(-1, tokens)
    low = x.min(axis=1, keepdims=True)
    step = (x.max(axis=1, keepdims=True) - low) / (2**bits - 1)
    return float(np.mean((low + np.round((x - low) / step) * step - x) ** 2))


def rows_of_tokens(rows: mx.array, count: int, tokens: int) -> mx.array:
    """Rows `(B, Hkv, ceil(count / tokens), W)` of groups repeated to `(B, Hkv, count, W)`; rows a token stay."""
    if rows.shape[2] == count:
        return rows
    return mx.repeat(rows, tokens, axis=2)[..., :count, :]


@dataclass(frozen=True)
class KIVI(Codec):
    """`bits` bits a channel plus two float16 numbers per channel of 32 tokens."""

    family: ClassVar[str] = "kivi"
    suffixes: ClassVar[tuple[str, ...]] = ("2", "4")
    values: ClassVar[bool] = False
    group: ClassVar[int] = 32

    bits: int = 2

    @classmethod
    def _build(cls, suffix: str, seed: int) -> Codec:
        return cls(seed=seed, bits=int(suffix))

    @property
    def name(self) -> str:
        return f"kivi{self.bits}"

    @property
    def partner(self) -> str:
        return f"affine{self.bits}g32"

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        return (
            Plane("codes", "uint8", packed_width(dim, self.bits)),
            Plane("step", "float16", dim, tokens=self.group),
            Plane("least", "float16", dim, tokens=self.group),
        )

    def expected_mse(self, dim: int) -> tuple[float, float] | None:
        """The definition, simulated in float64."""
        mse = _simulated(self.bits, self.group, dim)
        return 0.99 * mse, 1.01 * mse

    def _encode(self, x: mx.array, statistics: Statistics) -> dict[str, mx.array]:
        B, H, L, D = x.shape
        if L == 0:
            rows = mx.zeros((B, H, 0, D), mx.float16)
            return {"codes": pack(mx.zeros((B, H, 0, D), mx.uint8), self.bits), "step": rows, "least": rows}
        short = -L % self.group
        x = mx.clip(x.astype(mx.float32), -_LARGEST, _LARGEST)
        x = mx.concatenate([x, mx.broadcast_to(x[..., -1:, :], (B, H, short, D))], axis=2)  # changes no extreme
        x = x.reshape(B, H, -1, self.group, D)
        least = mx.min(x, axis=3).astype(mx.float16)
        span = mx.max(x, axis=3) - least.astype(mx.float32)
        step = mx.clip(span * (1.0 / (2**self.bits - 1)), 0, _LARGEST).astype(mx.float16)
        wide = step.astype(mx.float32)[..., None, :]
        codes = mx.round((x - least.astype(mx.float32)[..., None, :]) / mx.where(wide > 0, wide, 1.0))
        codes = mx.clip(codes, 0, 2**self.bits - 1).astype(mx.uint8).reshape(B, H, -1, D)[..., :L, :]
        return {"codes": pack(codes, self.bits), "step": step, "least": least}

    def _decode(self, planes: Planes, dim: int, dtype: mx.Dtype, statistics: Statistics) -> mx.array:
        codes = unpack(planes["codes"], dim, self.bits).astype(mx.float32)
        step, least = (
            rows_of_tokens(planes[name], codes.shape[2], self.group).astype(mx.float32) for name in ("step", "least")
        )
        return mx.clip(codes * step + least, -_LARGEST, _LARGEST).astype(dtype)  # a rounded step may reach beyond
