"""Plain arrays in and out of codecs: NumPy to MLX and back, and arrays without batch or head axes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .errors import CodecError

AXES = 4  # (B, Hkv, L, D)


def from_numpy(x: npt.NDArray[Any], dtype: str = "") -> mx.array:
    """A NumPy array as an MLX one; `dtype` "bfloat16" reads the uint16 of the bits, float64 becomes float32."""
    if dtype == "bfloat16" and x.dtype == np.uint16:
        return mx.array(x).view(mx.bfloat16)
    return mx.array(x.astype(np.float32) if x.dtype == np.float64 else x)


def to_numpy(x: mx.array) -> npt.NDArray[Any]:
    """An MLX array as a NumPy one; bfloat16, which NumPy does not have, as the uint16 of its bits."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def lead_axes(ndim: int) -> int:
    """How many axes an array of `ndim` axes lacks before the token axis; raises `CodecError`."""
    if not 2 <= ndim <= AXES:
        raise CodecError(f"tokens must be (L, D), (Hkv, L, D) or (B, Hkv, L, D), got {ndim} axes; reshape them")
    return AXES - ndim


def with_lead_axes(x: mx.array) -> mx.array:
    """`(L, D)` or `(Hkv, L, D)` as `(B, Hkv, L, D)`."""
    return x.reshape(*(1,) * lead_axes(x.ndim), *x.shape)


def plain_tokens(x: Any) -> mx.array:
    """Tokens of MLX, NumPy or nested lists, `(L, D)`, `(Hkv, L, D)` or `(B, Hkv, L, D)`, as `(B, Hkv, L, D)`."""
    return with_lead_axes(x if isinstance(x, mx.array) else from_numpy(np.asarray(x)))
