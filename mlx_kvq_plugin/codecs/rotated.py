"""Codecs whose one transform is the rotation: what follows from their decoded tokens in the rotated domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..rotation import rotate, unrotate
from . import NO_STATISTICS, Codec, Planes, Statistics


@dataclass(frozen=True)
class Rotated(Codec):
    """A codec that implements `planes`, `_encode` and `_rotated`."""

    mixes_channels: ClassVar[bool] = True

    def _rotated(self, planes: Planes, dim: int) -> mx.array:
        """Decoded tokens `(B, Hkv, S, D)` float32 in the rotated domain."""
        raise NotImplementedError

    def _decode(self, planes: Planes, dim: int, dtype: mx.Dtype, statistics: Statistics) -> mx.array:
        return unrotate(self._rotated(planes, dim), self.seed, self.rotation).astype(dtype)

    def transform_queries(self, queries: mx.array, statistics: Statistics = NO_STATISTICS) -> mx.array:
        return rotate(queries, self.seed, self.rotation)

    def scores(self, queries: mx.array, planes: Planes, statistics: Statistics = NO_STATISTICS) -> mx.array:
        keys = self._rotated(planes, queries.shape[-1])
        return queries.astype(mx.float32) @ keys.swapaxes(-1, -2)  # in half precision large keys overflow

    def weighted_sum(
        self, weights: mx.array, planes: Planes, dim: int, statistics: Statistics = NO_STATISTICS
    ) -> mx.array:
        return weights @ self._rotated(planes, dim).astype(weights.dtype)

    def untransform_output(self, output: mx.array, statistics: Statistics = NO_STATISTICS) -> mx.array:
        return unrotate(output, self.seed, self.rotation)
