"""`qjl{1..4}`: QJL (arXiv 2406.03482, section 3): keys as the signs of a random sketch, and their norm. Keys only.

The sketch has b D numbers for `qjl{b}`. With sketch S the estimate of `<q, k>` is
`c ||k|| <S q, sign(S k)>`, the query not quantized. Differences from the paper: S is b blocks of seeded random
rotations (two rounds of signs and Hadamard) instead of a Gaussian matrix, so its rows have equal norms and
c = 1 / (b D E|u|), with u a coordinate of a random unit vector, makes the estimate unbiased for every seed, not only on
average over seeds; and outlier channels are not sketched apart: the rotary frame removes what they are made of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..codebooks import odd_codebook
from ..packing import pack, packed_width, unpack
from ..rotation import HADAMARD, check_dim, rotate, unrotate
from . import NO_STATISTICS, Codec, Plane, Planes, Published, Statistics
from .scalar import SCALE_DTYPE, packed_scores
from .turboquant import PAPER


def mean_coordinate(dim: int) -> float:
    """E|u| for a coordinate u of a uniformly random unit vector in `dim` dimensions."""
    return math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)


def excess(dim: int) -> float:
    """Mean squared error of the sketch of D signs for a unit vector: about pi / 2 - 1."""
    return 1.0 / (dim * mean_coordinate(dim) ** 2) - 1.0


def sketch_rotation(rotation: str) -> str:
    """The rotation of a sketch: one round of signs would make sparse vectors biased."""
    return "hadamard2" if rotation == HADAMARD else rotation


def sign_scores(queries: mx.array, packed: mx.array) -> mx.array:
    """`(B, Hkv, R, m)` sketched queries times the signs of S packed sketches `(B, Hkv, S, m / 8)`: `(B, Hkv, R, S)`."""
    scores = packed_scores(queries, [packed], (1,)).astype(mx.float32)  # with plus and minus the 1-bit level
    return scores * (1.0 / odd_codebook(1).levels[1])


def signs_of(packed: mx.array, dim: int) -> mx.array:
    """Packed signs `(..., dim / 8)` as float32 +1 and -1."""
    return 2.0 * unpack(packed, dim, 1).astype(mx.float32) - 1.0


@dataclass(frozen=True)
class QJL(Codec):
    """`blocks` signs a channel plus one 16-bit norm a token."""

    family: ClassVar[str] = "qjl"
    suffixes: ClassVar[tuple[str, ...]] = ("1", "2", "3", "4")
    values: ClassVar[bool] = False
    unbiased: ClassVar[bool] = True

    blocks: int = 1

    @classmethod
    def _build(cls, suffix: str, seed: int) -> Codec:
        return cls(seed=seed, blocks=int(suffix))

    @property
    def name(self) -> str:
        return f"qjl{self.blocks}"

    @property
    def partner(self) -> str:
        """The paper stores values with 4 bits."""
        return "tq4"

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        check_dim(dim, self.rotation)
        return Plane("signs", "uint8", packed_width(dim, 1) * self.blocks), Plane("norm", SCALE_DTYPE, 1)

    def expected_mse(self, dim: int) -> tuple[float, float] | None:
        mse = excess(dim) / self.blocks
        return 0.997 * mse, 1.003 * mse

    def published(self, dim: int) -> Published | None:
        bound = math.pi / 2 / self.blocks
        return Published(f"{PAPER}, lemma 4", product_bound=bound, product=1.57 if self.blocks == 1 else None)

    def _factor(self, dim: int) -> float:
        return 1.0 / (self.blocks * dim * mean_coordinate(dim))

    def _sketch(self, x: mx.array) -> mx.array:
        rotation = sketch_rotation(self.rotation)
        blocks = [rotate(x, self.seed, rotation, f" sketch {i}") for i in range(self.blocks)]
        return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=-1)

    def _encode(self, x: mx.array, statistics: Statistics) -> dict[str, mx.array]:
        x = x.astype(mx.float32)
        signs = pack((self._sketch(x) >= 0).astype(mx.uint8), 1)
        norm = mx.linalg.norm(x, axis=-1, keepdims=True)
        return {"signs": signs, "norm": norm.astype(getattr(mx, SCALE_DTYPE))}

    def _decode(self, planes: Planes, dim: int, dtype: mx.Dtype, statistics: Statistics) -> mx.array:
        blocks = mx.split(signs_of(planes["signs"], self.blocks * dim), self.blocks, axis=-1)
        rotation = sketch_rotation(self.rotation)
        x = unrotate(blocks[0], self.seed, rotation, " sketch 0")
        for i, block in enumerate(blocks[1:], start=1):
            x = x + unrotate(block, self.seed, rotation, f" sketch {i}")
        return (x * planes["norm"].astype(mx.float32) * self._factor(dim)).astype(dtype)

    def transform_queries(self, queries: mx.array, statistics: Statistics = NO_STATISTICS) -> mx.array:
        return self._sketch(queries)

    def scores(self, queries: mx.array, planes: Planes, statistics: Statistics = NO_STATISTICS) -> mx.array:
        norm = planes["norm"].astype(mx.float32).swapaxes(-1, -2)
        return sign_scores(queries, planes["signs"]) * (norm * self._factor(queries.shape[-1] // self.blocks))
