"""Rotations: seeded random orthogonal maps that spread a vector's energy evenly over its coordinates.

After one the coordinates are nearly Gaussian whatever the input (TurboQuant, arXiv 2504.19874, uses a dense one).

* `hadamard`: seeded signs, then an orthonormal Hadamard matrix: O(D log D), D bits of parameters.
* `hadamard2`, `hadamard3`: two or three rounds of that, each with signs of its own. One round turns a vector with a
  single large channel into entries of equal size, which is not Gaussian; two rounds do not.
* `dense`: a uniformly random orthogonal matrix (QR of a Gaussian one): O(D^2), and any head size that packs. Its
  entries agree between platforms to float32 rounding, not to the bit, and a GPU may multiply by them in TF32.
"""

from __future__ import annotations

import hashlib
from functools import cache

import mlx.core as mx
import numpy as np

from .errors import CodecError

HADAMARD, DENSE = "hadamard", "dense"
_ROUNDS = {HADAMARD: 1, "hadamard2": 2, "hadamard3": 3}
ROTATIONS = (*_ROUNDS, DENSE)


def has_hadamard(dim: int) -> bool:
    """Whether an orthonormal Hadamard matrix of size `dim` exists in MLX: m * 2^k with m in 1, 12, 20, 28."""
    for m in (1, 12, 20, 28):
        power, rest = divmod(dim, m)
        if rest == 0 and power > 0 and power & (power - 1) == 0:
            return True
    return False


@cache
def signs(dim: int, seed: int, label: str = "") -> mx.array:
    """`(D,)` float32 of +1 and -1, the same on every platform for equal arguments."""
    digest = hashlib.shake_256(f"mlx-kvq signs {dim} {seed}{label}".encode()).digest((dim + 7) // 8)
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


@cache
def _dense_matrix(dim: int, seed: int, label: str) -> mx.array:
    """`(D, D)` float32, uniformly distributed over the orthogonal matrices (QR with a positive diagonal)."""
    digest = hashlib.sha256(f"mlx-kvq dense {dim} {seed}{label}".encode()).digest()
    draw = np.random.RandomState(np.frombuffer(digest[:16], dtype=np.uint32))  # its streams never change
    q, r = np.linalg.qr(draw.standard_normal((dim, dim)))
    matrix = mx.array((q * np.sign(np.diagonal(r))).astype(np.float32))
    mx.eval(matrix)
    return matrix


def check_dim(dim: int, rotation: str = HADAMARD) -> None:
    """Raise `CodecError` for head sizes without a Hadamard matrix."""
    if rotation != DENSE and not has_hadamard(dim):
        raise CodecError(
            f"the head size must be m * 2^k with m in 1, 12, 20, 28 for a Hadamard rotation, got {dim}; "
            "use rotation=dense, or affine"
        )


def _labels(rotation: str, label: str) -> list[str]:
    """One label of signs a round, the first round of the default rotation without one."""
    return [label + (f" round {i}" if i else "") for i in range(_ROUNDS[rotation])]


def rotate(x: mx.array, seed: int, rotation: str = HADAMARD, label: str = "") -> mx.array:
    """Rotate `(..., D)` floats; norms and inner products are kept. Different labels give independent rotations."""
    if x.size == 0:  # mx.hadamard_transform refuses empty arrays
        return x
    dim = x.shape[-1]
    if rotation == DENSE:
        return x @ _dense_matrix(dim, seed, label).astype(x.dtype)
    for text in _labels(rotation, label):
        x = mx.hadamard_transform(x * signs(dim, seed, text).astype(x.dtype))
    return x


def unrotate(x: mx.array, seed: int, rotation: str = HADAMARD, label: str = "") -> mx.array:
    """Inverse of `rotate`."""
    dim = x.shape[-1]
    if x.size == 0:
        return x
    if rotation == DENSE:
        return x @ _dense_matrix(dim, seed, label).T.astype(x.dtype)
    for text in reversed(_labels(rotation, label)):
        if dim & (dim - 1) == 0:
            x = mx.hadamard_transform(x)  # symmetric for powers of two
        else:
            x = x @ _transposed_hadamard(dim).astype(x.dtype)
        x = x * signs(dim, seed, text).astype(x.dtype)
    return x
