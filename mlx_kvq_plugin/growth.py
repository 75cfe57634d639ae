"""How the buffers of a cache grow: tokens between two encodings, and room for more in the planes.

On GPUs, where every operation is a launch, layers that kernels serve pack more tokens at a time and grow in larger
steps, and their planes hold whole tiles, which kernels read to their end.
"""

from __future__ import annotations

from dataclasses import dataclass

from .codecs import Codec
from .kernels.build import backend
from .kernels.codes import has_kernels

BLOCK = 8  # tokens between two encodings during decoding
GPU_BLOCK = 32  # with kernels, where a packing costs as much time as a few steps' attention
GPU_STEP = 256  # tokens that planes grow by with kernels, as mlx-lm's own cache does,
GPU_STEP_PER = 16384  # and as many more for each of so many tokens: the copy takes as long as several steps
TILE = 64  # tokens that kernels go through at a time


def tile_rows(tokens: int) -> int:
    """`tokens` up to whole tiles."""
    return -(-tokens // TILE) * TILE


@dataclass(frozen=True)
class Growth:
    """The rules of one layer.

    Attributes:
        kernels: whether kernels of MLX's default device serve its codecs.
    """

    kernels: bool

    @staticmethod
    def of(*codecs: Codec) -> Growth:
        """For a layer with these codecs on the default device."""
        return Growth(backend() != "" and all(has_kernels(codec) for codec in codecs))

    @property
    def block(self) -> int:
        """Tokens between two encodings during decoding, for codecs that encode tokens one by one."""
        return GPU_BLOCK if self.kernels else BLOCK

    def capacity(self, tokens: int, step: bool = True, first: bool = False) -> int:
        """Tokens allocated for `tokens` packed ones when planes grow; without kernels at most 1/256 more.

        Args:
            step: whether tokens come in decode steps, not in prefill chunks.
            first: whether the planes had no tokens before.
        """
        if self.kernels:
            unit = GPU_STEP * (1 + tokens // GPU_STEP_PER) if step else TILE
            return -(-tokens // unit) * unit
        return tokens + (max(0, tokens // 256 // BLOCK - 1) * BLOCK if step and not first else 0)
