"""`affine{2,3,4,5,6,8}`: MLX's own group quantization (`mx.quantize`), scale and bias per group, per token.

Groups of 64 channels, or 32 where the head size is not a multiple of 64; always 32 with `g32` (`affine2g32`). Head
sizes that are no multiple of 32 (80, 112) are padded with zeros to the next one; the padding is stored and counted.
Scales and biases have the input's dtype, as in mlx-lm's `QuantizedKVCache`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import mlx.core as mx
import numpy as np

from . import NO_STATISTICS, Codec, Plane, Planes, Statistics
from .scalar import sphere_rows


def _padded(dim: int) -> int:
    return (dim + 31) // 32 * 32


def _pad(x: mx.array) -> mx.array:
    short = _padded(x.shape[-1]) - x.shape[-1]
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else x


@cache
def _simulated(bits: int, size: int, padding: int, dim: int) -> float:
    """Relative error of `size` channels of a random unit vector, a group together with `padding` zeros.

    The rule of `mx.quantize`: equal steps from the extreme that is farther from zero, widened so that zero is one.
    """
    x = sphere_rows(size, dim) / dim**0.5
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    if padding:
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    below = -low > high
    edge = np.where(below, low, high)
    step = (high - low) / (2**bits - 1) * np.where(below, 1.0, -1.0)
    step = edge / np.round(edge / step)
    codes = np.clip(np.round((x - edge) / step), 0, 2**bits - 1)
    stored = codes * step.astype(np.float16) + edge.astype(np.float16)
    return float(dim * np.mean((stored - x) ** 2))


def _quantized_matmul_runs(planes: Planes) -> bool:
    """MLX's CUDA build has no kernel for these shapes; CPU and Metal have, but divide by zero without tokens."""
    return planes["codes"].shape[2] > 0 and not (mx.default_device() == mx.gpu and mx.cuda.is_available())


@dataclass(frozen=True)
class Affine(Codec):
    """`bits` bits a channel plus a scale and a bias per group."""

    family: ClassVar[str] = "affine"
    suffixes: ClassVar[tuple[str, ...]] = ("2", "3", "4", "5", "6", "8")

    bits: int = 4
    small_groups: bool = False

    @classmethod
    def accepts(cls, suffix: str) -> bool:
        return suffix.removesuffix("g32") in cls.suffixes

    @classmethod
    def _build(cls, suffix: str, seed: int) -> Codec:
        return cls(seed=seed, bits=int(suffix.removesuffix("g32")), small_groups=suffix.endswith("g32"))

    @property
    def name(self) -> str:
        return f"affine{self.bits}" + ("g32" if self.small_groups else "")

    def group_size(self, dim: int) -> int:
        """Channels that share a scale and a bias at head size `dim`."""
        return 64 if _padded(dim) % 64 == 0 and not self.small_groups else 32

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        groups = _padded(dim) // self.group_size(dim)
        words = _padded(dim) * self.bits // 32
        return Plane("codes", "uint32", words), Plane("scales", dtype, groups), Plane("biases", dtype, groups)

    def expected_mse(self, dim: int) -> tuple[float, float] | None:
        """The definition, simulated in float64 with scales and biases in float16."""
        size = self.group_size(dim)
        filled = [min(size, dim - start) for start in range(0, dim, size)]
        mse = sum(count * _simulated(self.bits, count, size - count, dim) for count in filled) / dim
        return 0.99 * mse, 1.01 * mse

    def _encode(self, x: mx.array, statistics: Statistics) -> dict[str, mx.array]:
        if x.shape[2] == 0:  # mx.quantize refuses empty arrays
            return {
                plane.name: mx.zeros((*x.shape[:3], plane.width), dtype=getattr(mx, plane.dtype))
                for plane in self.planes(x.shape[-1], str(x.dtype).removeprefix("mlx.core."))
            }
        codes, scales, biases = mx.quantize(_pad(x), group_size=self.group_size(x.shape[-1]), bits=self.bits)
        return {"codes": codes, "scales": scales, "biases": biases}

    def _decode(self, planes: Planes, dim: int, dtype: mx.Dtype, statistics: Statistics) -> mx.array:
        if planes["codes"].shape[2] == 0:
            return mx.zeros((*planes["codes"].shape[:3], dim), dtype=dtype)
        x = mx.dequantize(
            planes["codes"],
            planes["scales"].astype(dtype),
            planes["biases"].astype(dtype),
            group_size=self.group_size(dim),
            bits=self.bits,
        )
        return x[..., :dim]

    def _matmul(self, x: mx.array, planes: Planes, dim: int, transpose: bool) -> mx.array:
        return mx.quantized_matmul(
            x,
            planes["codes"],
            planes["scales"].astype(x.dtype),
            planes["biases"].astype(x.dtype),
            transpose=transpose,
            group_size=self.group_size(dim),
            bits=self.bits,
        )

    def scores(self, queries: mx.array, planes: Planes, statistics: Statistics = NO_STATISTICS) -> mx.array:
        if not _quantized_matmul_runs(planes):
            return super().scores(queries, planes, statistics)
        return self._matmul(_pad(queries), planes, queries.shape[-1], transpose=True)

    def weighted_sum(
        self, weights: mx.array, planes: Planes, dim: int, statistics: Statistics = NO_STATISTICS
    ) -> mx.array:
        if not _quantized_matmul_runs(planes):
            return super().weighted_sum(weights, planes, dim, statistics)
        return self._matmul(weights, planes, dim, transpose=False)[..., :dim]
