"""`identity`: tokens stored as they are. The oracle of every other path, and the scheme side called `fp16`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from . import Codec, Plane, Planes, Statistics


@dataclass(frozen=True)
class Identity(Codec):
    """Lossless: one plane `dense` of the input's dtype, D elements a token."""

    family: ClassVar[str] = "identity"
    exact: ClassVar[bool] = True

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        return (Plane("dense", dtype, dim),)

    def _encode(self, x: mx.array, statistics: Statistics) -> dict[str, mx.array]:
        return {"dense": x}

    def _decode(self, planes: Planes, dim: int, dtype: mx.Dtype, statistics: Statistics) -> mx.array:
        return planes["dense"].astype(dtype)
