"""KVHandle: what a compressed cache returns to a model in place of arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from .cache import KVQCache


class KVHandle:
    """A reference to the keys or the values of a cache.

    Not an array on purpose: an attention that was not routed fails loudly instead of attending to the wrong tokens.
    It has what model code reads, `dtype`, `shape` `(B, Hkv, S, D)` and `astype`.
    """

    __slots__ = ("cache", "dtype", "shape")

    def __init__(self, cache: KVQCache, shape: tuple[int, ...], dtype: mx.Dtype):
        self.cache, self.shape, self.dtype = cache, shape, dtype

    def astype(self, dtype: mx.Dtype) -> KVHandle:
        """The same tokens, for attention that computes in `dtype`."""
        return KVHandle(self.cache, self.shape, dtype)
