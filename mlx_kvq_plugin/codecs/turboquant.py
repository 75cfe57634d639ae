"""`tq{1..6}`: TurboQuant-mse (arXiv 2504.19874, section 3.1), packed. With outlier channels: outliers.py.

Differences from the paper: the rotation is a seeded randomized Hadamard transform, not a dense orthogonal matrix;
the codebook is Lloyd-Max for N(0, 1) (its odd-polynomial form, codebooks.py), not for the exact sphere marginal; and
the stored number per token is not the norm but a scale of the reconstruction: the least-squares one, or in caches one
that keeps the norm of keys and one that leaves values unbiased (scalar.quantize).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..codebooks import Codebook, odd_codebook
from ..packing import pack, packed_width, unpack
from ..rotation import check_dim, rotate, unrotate
from . import NO_STATISTICS, Codec, Plane, Planes, Published, Statistics
from .scalar import SCALE_DTYPE, SHRINKAGE, levels_of, packed_scores, packed_sum, quantize, scaled_band

PAPER = "TurboQuant, arXiv 2504.19874"
_REPORTED = {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}  # theorem 1, by bits

_SPLIT = re.compile(r"[1-5]\.5|[1-6]o[1-9]\d*(x[1-6])?")


def mse_bound(bits: int) -> float:
    """Upper bound of the mean squared error of unit vectors (theorem 1)."""
    return math.sqrt(3) * math.pi / 2 * 4.0**-bits


def is_split(suffix: str) -> bool:
    """Whether a suffix of `tq` asks for outlier channels: `2.5`, `2o16`, `2o16x4`."""
    return _SPLIT.fullmatch(suffix) is not None


@dataclass(frozen=True)
class TurboQuant(Codec):
    """`bits` bits a channel plus one 16-bit scale a token."""

    family: ClassVar[str] = "tq"
    mixes_channels: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = ("1", "2", "3", "4", "5", "6", "2.5", "3.5")

    bits: int = 4

    @classmethod
    def accepts(cls, suffix: str) -> bool:
        return super().accepts(suffix) or (cls is TurboQuant and is_split(suffix))

    @classmethod
    def _build(cls, suffix: str, seed: int) -> Codec:
        if is_split(suffix):
            from .outliers import OutlierTurboQuant

            return OutlierTurboQuant.from_split(suffix, seed)
        return cls(seed=seed, bits=int(suffix))

    @property
    def name(self) -> str:
        return f"{self.family}{self.bits}"

    @property
    def shrinkage(self) -> float | None:  # type: ignore[override]
        return SHRINKAGE[self.scaling]

    @property
    def stages(self) -> tuple[int, ...]:
        """Bits of each code plane, highest bits first."""
        return (self.bits,)

    @property
    def book(self) -> Codebook:
        """The levels, by index."""
        return odd_codebook(sum(self.stages))

    def expected_mse(self, dim: int) -> tuple[float, float] | None:
        return scaled_band(sum(self.stages), dim, self.scaling)

    def published(self, dim: int) -> Published | None:
        bits = sum(self.stages)
        return Published(f"{PAPER}, theorem 1", mse_bound=mse_bound(bits), mse=_REPORTED.get(bits))

    def _packed(self, planes: Planes) -> list[mx.array]:
        return [planes["codes"]]

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        check_dim(dim, self.rotation)
        return Plane("codes", "uint8", packed_width(dim, self.bits)), Plane("scale", SCALE_DTYPE, 1)

    def _encode(self, x: mx.array, statistics: Statistics) -> dict[str, mx.array]:
        codes, scale = quantize(rotate(x.astype(mx.float32), self.seed, self.rotation), sum(self.stages), self.scaling)
        return {"codes": pack(codes, self.bits), "scale": scale}

    def codes(self, planes: Planes, dim: int) -> mx.array:
        """Unpacked sorted codes `(B, Hkv, S, D)` uint8."""
        return unpack(planes["codes"], dim, self.bits)

    def _decode(self, planes: Planes, dim: int, dtype: mx.Dtype, statistics: Statistics) -> mx.array:
        y = levels_of(self.codes(planes, dim), self.book) * planes["scale"].astype(mx.float32)
        return unrotate(y, self.seed, self.rotation).astype(dtype)

    def transform_queries(self, queries: mx.array, statistics: Statistics = NO_STATISTICS) -> mx.array:
        return rotate(queries, self.seed, self.rotation)

    def scores(self, queries: mx.array, planes: Planes, statistics: Statistics = NO_STATISTICS) -> mx.array:
        scale = planes["scale"].astype(mx.float32).swapaxes(-1, -2)
        scores = packed_scores(queries, self._packed(planes), self.stages, self.book)
        return scores.astype(mx.float32) * scale  # in half precision large keys overflow

    def weighted_sum(
        self, weights: mx.array, planes: Planes, dim: int, statistics: Statistics = NO_STATISTICS
    ) -> mx.array:
        scale = planes["scale"].astype(mx.float32).swapaxes(-1, -2)
        scaled = (weights.astype(mx.float32) * scale).astype(weights.dtype)
        return packed_sum(scaled, self._packed(planes), dim, self.stages, self.book)

    def untransform_output(self, output: mx.array, statistics: Statistics = NO_STATISTICS) -> mx.array:
        return unrotate(output, self.seed, self.rotation)
