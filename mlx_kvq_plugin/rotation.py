"""The randomized Hadamard rotation: seeded signs, then an orthonormal Hadamard matrix.

It spreads a vector's energy evenly over its coordinates, which become nearly Gaussian whatever the input
(TurboQuant, arXiv 2504.19874, uses a dense random rotation; signs and Hadamard cost O(D log D) and store D bits).
"""

from __future__ import annotations

import hashlib
from functools import cache

import mlx.core as mx
import numpy as np

from .errors import CodecError


def has_hadamard(dim: int) -> bool:
    """Whether an orthonormal Hadamard matrix of size `dim` exists in MLX: m * 2^k with m in 1, 12, 20, 28."""
    for m in (1, 12, 20, 28):
        power, rest = divmod(dim, m)
        if rest == 0 and power > 0 and power & (power - 1) == 0:
            return True
    return False


@cache
def signs(dim: int, seed: int) -> mx.array:
    """`(D,)` float32 of +1 and -1, the same on every platform for equal arguments."""
    digest = hashlib.shake_256(f"mlx-kvq signs {dim} {seed}".encode()).digest((dim + 7) // 8)
    bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8))[:dim]
    values = mx.array(1.0 - 2.0 * bits.astype(np.float32))
    mx.eval(values)  # lazy arrays cannot cross threads
    return values


@cache
def _transposed_hadamard(dim: int) -> mx.array:
    """The matrix M with `x @ M` inverse to `mx.hadamard_transform(x)`."""
    matrix = mx.hadamard_transform(mx.eye(dim)).T  # row i of the transform of I is H e_i
    matrix = mx.contiguous(matrix)
    mx.eval(matrix)
    return matrix


def check_dim(dim: int) -> None:
    """Raise `CodecError` for head sizes without a Hadamard matrix."""
    if not has_hadamard(dim):
        raise CodecError(
            f"the head size must be m * 2^k with m in 1, 12, 20, 28 for a Hadamard rotation, got {dim}; use affine"
        )


def rotate(x: mx.array, seed: int) -> mx.array:
    """Rotate `(..., D)` floats; norms and inner products are kept."""
    if x.size == 0:  # mx.hadamard_transform refuses empty arrays
        return x
    return mx.hadamard_transform(x * signs(x.shape[-1], seed).astype(x.dtype))


def unrotate(x: mx.array, seed: int) -> mx.array:
    """Inverse of `rotate`."""
    dim = x.shape[-1]
    if x.size == 0:
        return x
    if dim & (dim - 1) == 0:
        y = mx.hadamard_transform(x)  # symmetric for powers of two
    else:
        y = x @ _transposed_hadamard(dim).astype(x.dtype)
    return y * signs(dim, seed).astype(x.dtype)
