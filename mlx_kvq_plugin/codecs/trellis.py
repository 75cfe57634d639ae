"""`tcq{1..4}`: tq with a trellis code instead of a scalar one (trellis.py): the same bits, less error.

Of unit-variance coordinates the mean squared error is 0.278, 0.0745, 0.0198, 0.0058 at 1, 2, 3, 4 bits; a scalar
quantizer has 0.363, 0.1175, 0.0345, 0.0095, and no code can have less than 0.25, 0.0625, 0.0156, 0.0039. Rotation and
scales are those of `tq`; encoding takes 256 times as many comparisons, decoding a few operations more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..codebooks import Codebook
from ..packing import pack, packed_width, unpack
from ..rotation import check_dim, rotate
from ..trellis import Trellis, coded_planes, encode, trellis
from . import LEAST_SQUARES, NORM, UNBIASED, Codec, Plane, Planes, Published, Statistics
from .scalar import SCALE_DTYPE, levels_of, token_scale, unit_variance
from .turboquant import TurboQuant

_MSE = {1: 0.2799, 2: 0.0741, 3: 0.0197, 4: 0.00571}


@dataclass(frozen=True)
class TrellisCoded(TurboQuant):
    """`bits` bits a channel and a scale a token.

    A row of codes is `bits` rows of single bits (packing.py): the trellis bits, then the stored bits of the index, the
    highest first.
    """

    family: ClassVar[str] = "tcq"
    suffixes: ClassVar[tuple[str, ...]] = ("1", "2", "3", "4")
    continued_by: ClassVar[str] = "tq"

    bits: int = 3

    @classmethod
    def _build(cls, suffix: str, seed: int) -> Codec:
        return cls(seed=seed, bits=int(suffix))

    @property
    def code(self) -> Trellis:
        """Parities and levels."""
        return trellis(self.bits)

    @property
    def stages(self) -> tuple[int, ...]:
        """Of the index, bit by bit: what `_packed` gives."""
        return (1,) * self.book.bits

    @property
    def book(self) -> Codebook:
        return self.code.book

    def expected_mse(self, dim: int) -> tuple[float, float] | None:
        """Around what `benchmarks/trellis.py` measures at 128 channels, as there is no formula."""
        least = _MSE[self.bits]
        mse = {LEAST_SQUARES: least, NORM: 2 - 2 * (1 - least) ** 0.5, UNBIASED: 1 / (1 - least) - 1}[self.scaling]
        return 0.982 * mse, 1.018 * mse

    def published(self, dim: int) -> Published | None:
        return None

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        check_dim(dim, self.rotation)
        return Plane("codes", "uint8", self.bits * packed_width(dim, 1)), Plane("scale", SCALE_DTYPE, 1)

    def _encode(self, x: mx.array, statistics: Statistics) -> dict[str, mx.array]:
        y = rotate(x.astype(mx.float32), self.seed, self.rotation)
        z, energy = unit_variance(y)
        bits, index = encode(z, self.code)
        stored = range(self.book.bits - 1, self.code.coded - 1, -1)
        rows = [pack(bits, 1), *(pack(index >> place & 1, 1) for place in stored)]
        scale = token_scale(y, energy, levels_of(index, self.book), self.scaling)
        return {"codes": mx.concatenate(rows, axis=-1), "scale": scale}

    def _packed(self, planes: Planes) -> list[mx.array]:
        """Rows of single bits of the index, the highest first."""
        bits, *stored = mx.split(planes["codes"], self.bits, axis=-1)
        return [*stored, *coded_planes(bits, self.code)]

    def codes(self, planes: Planes, dim: int) -> mx.array:
        index = None
        for row in self._packed(planes):
            bit = unpack(row, dim, 1)
            index = bit if index is None else index << 1 | bit
        assert index is not None
        return index
