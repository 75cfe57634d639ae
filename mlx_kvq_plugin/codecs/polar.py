"""`polar3`, `polar4`: PolarQuant (arXiv 2502.02617): angles of a recursive polar transform, and one radius a block.

After a random rotation each block of 16 channels becomes 8 pairs, each a radius and an angle; the 8 radii become 4
pairs, and so on: 8 angles in [0, 2 pi) at level 1, then 4 + 2 + 1 angles in [0, pi/2] at levels 2 to 4, and the radius
of the block. Level 1 is uniform and takes b bits (4 in the paper); the angle of level l has density proportional to
sin(2 psi)^(2^(l-1) - 1) and takes 2 bits with the Lloyd-Max codebook of that density. The radius is bfloat16. That is
(8 b + 14 + 16) / 16 bits an element: 3.875 for `polar4` as in the paper, 3.375 for `polar3`, before the padding of a
byte where D / 16 is odd or D = 64. Difference: the rotation is a randomized Hadamard one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import ClassVar

import mlx.core as mx
import numpy as np

from ..errors import CodecError
from ..packing import pack, packed_width, unpack
from ..rotation import check_dim, rotate
from . import Codec, Plane, Planes, Statistics
from .rotated import Rotated

BLOCK = 16
LEVELS = 4  # of the recursion: BLOCK is 2 ** LEVELS
UPPER_BITS = 2  # of the angles above level 1
_RADIUS = "bfloat16"


@cache
def angle_codebook(level: int, bits: int = UPPER_BITS) -> tuple[tuple[float, ...], float]:
    """Lloyd-Max angles in [0, pi/2] of a level above the first, and E[cos(psi - psi^)] with them."""
    grid = (np.arange(200_000) + 0.5) * (math.pi / 2 / 200_000)
    mass = np.sin(2 * grid) ** (2 ** (level - 1) - 1)
    mass = mass / mass.sum()
    levels = np.interp((np.arange(2**bits) + 0.5) / 2**bits, np.cumsum(mass), grid)
    for _ in range(2000):
        edges = np.searchsorted(grid, 0.5 * (levels[1:] + levels[:-1]))
        parts = list(zip(np.split(mass, edges), np.split(grid, edges), strict=True))
        moved = np.array([float(m @ g / m.sum()) for m, g in parts])
        done = np.max(np.abs(moved - levels)) < 1e-12
        levels = moved
        if done:
            break
    nearest = levels[np.searchsorted(0.5 * (levels[1:] + levels[:-1]), grid)]
    return tuple(levels.tolist()), float(mass @ np.cos(grid - nearest))


@cache
def _table(level: int, bits: int) -> mx.array:
    """`(2, 2**bits)` float32: cosines and sines of the reproduced angles."""
    if level == 1:
        angles = (np.arange(2**bits) + 0.5) * (2 * math.pi / 2**bits)
    else:
        angles = np.array(angle_codebook(level, bits)[0])
    table = mx.array(np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32))
    mx.eval(table)
    return table


@dataclass(frozen=True)
class Polar(Rotated):
    """`bits` bits an angle of level 1, 2 bits one of the others, one 16-bit radius a block of 16."""

    family: ClassVar[str] = "polar"
    suffixes: ClassVar[tuple[str, ...]] = ("3", "4")
    shrinkage: ClassVar[float | None] = 0.5  # norms are kept

    bits: int = 4

    @classmethod
    def _build(cls, suffix: str, seed: int) -> Codec:
        return cls(seed=seed, bits=int(suffix))

    @property
    def name(self) -> str:
        return f"polar{self.bits}"

    def _uppers(self, dim: int) -> int:
        """Angles above level 1, padded to whole bytes of the packing."""
        return -(-(BLOCK // 2 - 1) * dim // BLOCK // 8) * 8

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        check_dim(dim, self.rotation)
        if dim % BLOCK:
            raise CodecError(f"{self.name} must have heads of a multiple of {BLOCK} channels, got {dim}; use tq")
        return (
            Plane("angles", "uint8", packed_width(dim // 2, self.bits)),
            Plane("uppers", "uint8", packed_width(self._uppers(dim), UPPER_BITS)),
            Plane("radii", _RADIUS, dim // BLOCK),
        )

    def expected_mse(self, dim: int) -> tuple[float, float] | None:
        """2 (1 - c): c is the product over levels of the mean cosine of an angle's error."""
        half = math.pi / 2**self.bits
        cosine = math.sin(half) / half
        for level in range(2, LEVELS + 1):
            cosine *= angle_codebook(level)[1]
        return 0.996 * 2 * (1 - cosine), 1.004 * 2 * (1 - cosine)

    def _encode(self, x: mx.array, statistics: Statistics) -> dict[str, mx.array]:
        y = rotate(x.astype(mx.float32), self.seed, self.rotation)
        first, second = y[..., 0::2], y[..., 1::2]
        turns = mx.arctan2(second, first) * (2**self.bits / (2 * math.pi))
        angles = mx.floor(turns).astype(mx.int32) & (2**self.bits - 1)
        radii = mx.sqrt(first * first + second * second)
        uppers = []
        for level in range(2, LEVELS + 1):
            first, second = radii[..., 0::2], radii[..., 1::2]
            psi = mx.arctan2(second, first)
            levels = angle_codebook(level)[0]
            code = mx.zeros(psi.shape, mx.uint8)
            for low, high in pairwise(levels):
                code = code + (psi > 0.5 * (low + high)).astype(mx.uint8)
            uppers.append(code)
            radii = mx.sqrt(first * first + second * second)
        count = sum(code.shape[-1] for code in uppers)
        padding = mx.zeros((*y.shape[:-1], self._uppers(y.shape[-1]) - count), mx.uint8)
        return {
            "angles": pack(angles.astype(mx.uint8), self.bits),
            "uppers": pack(mx.concatenate([*uppers, padding], axis=-1), UPPER_BITS),
            "radii": radii.astype(getattr(mx, _RADIUS)),
        }

    def _rotated(self, planes: Planes, dim: int) -> mx.array:
        """Decoded tokens `(B, Hkv, S, D)` float32 in the rotated domain, from the radius down."""
        uppers = unpack(planes["uppers"], self._uppers(dim), UPPER_BITS)
        radii = planes["radii"].astype(mx.float32)
        stop = dim // 2 - dim // BLOCK
        for level in range(LEVELS, 1, -1):
            count = dim >> level
            radii = _both(radii, uppers[..., stop - count : stop], _table(level, UPPER_BITS))
            stop -= count
        return _both(radii, unpack(planes["angles"], dim // 2, self.bits), _table(1, self.bits))


def _both(radii: mx.array, codes: mx.array, table: mx.array) -> mx.array:
    """`(..., n)` radii and angle codes to the `(..., 2 n)` numbers they stand for, pairs side by side."""
    both = mx.stack([radii * mx.take(row, codes.astype(mx.int32)) for row in table], axis=-1)
    return both.reshape(*radii.shape[:-1], 2 * radii.shape[-1])
