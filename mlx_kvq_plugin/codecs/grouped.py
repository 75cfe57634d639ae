"""`grouped{2,3,4}`: a Hadamard rotation, then groups of 16 channels with a scale of their own.

Each group is scaled so that its largest entry meets the outermost level of the N(0, 1) codebook, and the stored scale
is the one with which the decoded group has the norm of the original one. The schemes `turbo{K}v{V}` (K = 0: keys left
in the model's dtype, 8: `affine8`) are the names that Apple's mlx-swift-lm gives such pairs. Difference: a group's
scale is stored as one byte, linear in the largest scale of the token, which is bfloat16; so 0.5 + 16 / D bits, not 1,
come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import mlx.core as mx
import numpy as np

from ..codebooks import odd_codebook
from ..packing import pack, packed_width, unpack
from ..rotation import check_dim, rotate
from . import Codec, Plane, Planes, Statistics
from .rotated import Rotated
from .scalar import SCALE_DTYPE, nearest_codes, sphere_rows, unpacked_levels

GROUP = 16

_KEYS = {"0": "identity", "8": "affine8", "4": "grouped4", "3": "grouped3", "2": "grouped2"}
SCHEMES = {f"turbo{k}v{v}": f"k={codec},v=grouped{v}" for k, codec in _KEYS.items() for v in "432"}


@cache
def _simulated(bits: int, size: int) -> float:
    """Relative error of random directions of a group of `size` channels; its norm plays no part."""
    levels = np.array(odd_codebook(bits).levels)
    x = sphere_rows(size, size)
    z = x * (levels[-1] / np.abs(x).max(axis=1, keepdims=True))
    chosen = levels[np.searchsorted(0.5 * (levels[1:] + levels[:-1]), z)]
    scale = np.linalg.norm(x, axis=1, keepdims=True) / np.linalg.norm(chosen, axis=1, keepdims=True)
    return float(np.mean((chosen * scale - x) ** 2))


@dataclass(frozen=True)
class Grouped(Rotated):
    """`bits` bits a channel, one byte a group of 16 and one 16-bit scale a token."""

    family: ClassVar[str] = "grouped"
    suffixes: ClassVar[tuple[str, ...]] = ("2", "3", "4")
    shrinkage: ClassVar[float | None] = 0.5  # norms are kept

    bits: int = 4

    @classmethod
    def _build(cls, suffix: str, seed: int) -> Codec:
        return cls(seed=seed, bits=int(suffix))

    @property
    def name(self) -> str:
        return f"grouped{self.bits}"

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        check_dim(dim, self.rotation)
        return (
            Plane("codes", "uint8", packed_width(dim, self.bits)),
            Plane("groups", "uint8", -(-dim // GROUP)),
            Plane("scale", SCALE_DTYPE, 1),
        )

    def expected_mse(self, dim: int) -> tuple[float, float] | None:
        """The definition, simulated in float64 with exact scales."""
        tail = dim % GROUP
        mse = (dim - tail) * _simulated(self.bits, GROUP) + (tail * _simulated(self.bits, tail) if tail else 0.0)
        return 0.99 * mse / dim, 1.01 * mse / dim

    def _encode(self, x: mx.array, statistics: Statistics) -> dict[str, mx.array]:
        y = rotate(x.astype(mx.float32), self.seed, self.rotation)
        rows, dim = y.shape[:-1], y.shape[-1]
        count = -(-dim // GROUP)
        groups = mx.pad(y, [(0, 0)] * 3 + [(0, -dim % GROUP)]).reshape(*rows, count, GROUP)
        largest = mx.max(mx.abs(groups), axis=-1, keepdims=True)
        top = odd_codebook(self.bits).levels[-1]
        codes = nearest_codes(groups * (top / mx.maximum(largest, 1e-37)), self.bits)
        levels = unpacked_levels(codes, self.bits)
        levels = levels.reshape(*rows, count * GROUP)[..., :dim]  # a padded tail has no energy
        levels = mx.pad(levels, [(0, 0)] * 3 + [(0, -dim % GROUP)]).reshape(*rows, count, GROUP)
        matched = mx.sqrt(mx.sum(groups * groups, axis=-1) / mx.sum(levels * levels, axis=-1))
        scale = mx.max(matched, axis=-1, keepdims=True).astype(getattr(mx, SCALE_DTYPE))
        share = matched * (255.0 / mx.maximum(scale.astype(mx.float32), 1e-37))
        return {
            "codes": pack(codes.reshape(*rows, count * GROUP)[..., :dim], self.bits),
            "groups": mx.clip(mx.round(share), 0, 255).astype(mx.uint8),
            "scale": scale,
        }

    def _rotated(self, planes: Planes, dim: int) -> mx.array:
        """Decoded tokens `(B, Hkv, S, D)` float32 in the rotated domain."""
        scale = planes["groups"].astype(mx.float32) * (planes["scale"].astype(mx.float32) * (1.0 / 255.0))
        return (
            unpacked_levels(unpack(planes["codes"], dim, self.bits), self.bits)
            * mx.repeat(scale, GROUP, axis=-1)[..., :dim]
        )
