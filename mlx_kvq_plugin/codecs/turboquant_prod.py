"""`tqprod{2,3,4}`: TurboQuant-prod (arXiv 2504.19874, section 3.2): unbiased inner products. Keys only.

b - 1 bits a channel as in `tq`, then one bit: the signs of a sketch of the residual r, with its norm ||r||. The
estimate `<q, k^> + c ||r|| <S q, sign(S r)>` is unbiased, for more squared error than `tq` at the same rate.
Differences from the paper: those of `tq` and of `qjl` (a rotation in place of the Gaussian sketch, its exact
constant c).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..packing import pack, packed_width, unpack
from ..rotation import check_dim, rotate, unrotate
from . import NO_STATISTICS, Codec, Plane, Planes, Published, Statistics
from .qjl import excess, mean_coordinate, sign_scores, signs_of, sketch_rotation
from .scalar import SCALE_DTYPE, dequantize, packed_scores, quantize, scaled_band
from .turboquant import PAPER

_REPORTED = {1: 1.57, 2: 0.56, 3: 0.18, 4: 0.047}  # theorem 2, by bits, times 1 / D


@dataclass(frozen=True)
class TurboQuantProd(Codec):
    """`bits` bits a channel, one of them a sketch of the residual, plus two 16-bit numbers a token."""

    family: ClassVar[str] = "tqprod"
    suffixes: ClassVar[tuple[str, ...]] = ("2", "3", "4")
    values: ClassVar[bool] = False
    unbiased: ClassVar[bool] = True

    bits: int = 3

    @classmethod
    def _build(cls, suffix: str, seed: int) -> Codec:
        return cls(seed=seed, bits=int(suffix))

    @property
    def name(self) -> str:
        return f"tqprod{self.bits}"

    @property
    def partner(self) -> str:
        return f"tq{self.bits}"

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        check_dim(dim, self.rotation)
        return (
            Plane("codes", "uint8", packed_width(dim, self.bits - 1)),
            Plane("scale", SCALE_DTYPE, 1),
            Plane("signs", "uint8", packed_width(dim, 1)),
            Plane("norm", SCALE_DTYPE, 1),
        )

    def expected_mse(self, dim: int) -> tuple[float, float] | None:
        low, high = scaled_band(self.bits - 1, dim)
        return low * excess(dim), high * excess(dim)

    def published(self, dim: int) -> Published | None:
        bound = math.sqrt(3) * math.pi**2 * 4.0**-self.bits
        return Published(f"{PAPER}, theorem 2", product_bound=bound, product=_REPORTED[self.bits])

    def _encode(self, x: mx.array, statistics: Statistics) -> dict[str, mx.array]:
        y = rotate(x.astype(mx.float32), self.seed, self.rotation)
        codes, scale = quantize(y, self.bits - 1)
        residual = y - dequantize(codes, scale, self.bits - 1, mx.float32)
        norm = mx.linalg.norm(residual, axis=-1, keepdims=True)
        return {
            "codes": pack(codes, self.bits - 1),
            "scale": scale,
            "signs": pack((self._sketch(residual) >= 0).astype(mx.uint8), 1),
            "norm": norm.astype(getattr(mx, SCALE_DTYPE)),
        }

    def _sketch(self, y: mx.array) -> mx.array:
        return rotate(y, self.seed, sketch_rotation(self.rotation), " residual")

    def _decode(self, planes: Planes, dim: int, dtype: mx.Dtype, statistics: Statistics) -> mx.array:
        y = dequantize(unpack(planes["codes"], dim, self.bits - 1), planes["scale"], self.bits - 1, mx.float32)
        signs = unrotate(signs_of(planes["signs"], dim), self.seed, sketch_rotation(self.rotation), " residual")
        y = y + signs * planes["norm"].astype(mx.float32) * (1.0 / (dim * mean_coordinate(dim)))
        return unrotate(y, self.seed, self.rotation).astype(dtype)

    def transform_queries(self, queries: mx.array, statistics: Statistics = NO_STATISTICS) -> mx.array:
        """`(B, Hkv, R, 2 D)`: the rotated queries and their sketch."""
        y = rotate(queries, self.seed, self.rotation)
        return mx.concatenate([y, self._sketch(y)], axis=-1)

    def scores(self, queries: mx.array, planes: Planes, statistics: Statistics = NO_STATISTICS) -> mx.array:
        dim = queries.shape[-1] // 2
        scale, norm = (planes[name].astype(mx.float32).swapaxes(-1, -2) for name in ("scale", "norm"))
        scores = packed_scores(queries[..., :dim], [planes["codes"]], (self.bits - 1,)).astype(mx.float32) * scale
        return scores + sign_scores(queries[..., dim:], planes["signs"]) * (norm * (1.0 / (dim * mean_coordinate(dim))))
