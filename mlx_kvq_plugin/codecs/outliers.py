"""`tq2.5`, `tq3.5`, `tq{b}o{N}`: TurboQuant with outlier channels (arXiv 2504.19874, section 4.3).

The N channels of most energy, chosen once per row and KV head from the first tokens, are quantized apart at b + 1 bits
(`tq{b}o{N}x{B}`: at B bits), the others at b bits; each part has a rotation, a scale and planes of its own. The scheme
modifier `outliers=N` writes `tq{b}o{N}`.

`tq2.5` and `tq3.5` take half of the channels as outliers, which is exactly b + 1/2 bits before scales. (The paper gives
32 channels of 128 three bits and 96 two, and calls it 2.5; that is 2.25.) Scales cost 32 / D bits an element more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..arrays import plain_tokens
from ..errors import CodecError
from ..rotation import DENSE, has_hadamard
from . import NO_STATISTICS, Codec, Plane, Planes, Published, Statistics
from .scalar import SHRINKAGE, scaled_band
from .turboquant import PAPER, TurboQuant, mse_bound

_OUTLIER = "outlier_"
_ORDER = "uint16"


@dataclass(frozen=True)
class OutlierTurboQuant(Codec):
    """`outlier_bits` bits for `count` channels (0: half of them), `bits` for the others, two 16-bit scales a token."""

    family: ClassVar[str] = "tq"
    fitted: ClassVar[bool] = True
    mixes_channels: ClassVar[bool] = True

    bits: int = 2
    count: int = 0
    outlier_bits: int = 3

    @classmethod
    def from_split(cls, suffix: str, seed: int) -> Codec:
        """From `2.5`, `2o16` or `2o16x4`."""
        if suffix.endswith(".5"):
            bits = int(suffix[0])
            return cls(seed=seed, bits=bits, outlier_bits=bits + 1)
        low, _, rest = suffix.partition("o")
        count, _, high = rest.partition("x")
        return cls(seed=seed, bits=int(low), count=int(count), outlier_bits=int(high or min(6, int(low) + 1)))

    @property
    def name(self) -> str:
        if self.count == 0:
            return f"tq{self.bits}.5"
        plain = self.outlier_bits == min(6, self.bits + 1)
        return f"tq{self.bits}o{self.count}" + ("" if plain else f"x{self.outlier_bits}")

    @property
    def shrinkage(self) -> float | None:  # type: ignore[override]
        return SHRINKAGE[self.scaling]

    def outliers(self, dim: int) -> int:
        """Outlier channels at head size `dim`; raises `CodecError` if it cannot be split so."""
        count = self.count or dim // 2
        if not self._splits(dim, count):
            valid = [n for n in range(8, dim, 8) if self._splits(dim, n)]
            raise CodecError(
                f"{self.name} must split a head of {dim} channels into two parts that pack and rotate, got {count} and "
                f"{dim - count}; outlier channels can be {', '.join(map(str, valid)) or 'none'}"
            )
        return count

    def _splits(self, dim: int, count: int) -> bool:
        parts = (count, dim - count)
        return all(n > 0 and n % 8 == 0 and (self.rotation == DENSE or has_hadamard(n)) for n in parts)

    def _parts(self) -> tuple[TurboQuant, TurboQuant]:
        """The codecs of outlier channels and of the others; unequal seeds where both may have one size."""
        big = TurboQuant(self.seed + 1, self.rotation, self.scaling, self.outlier_bits)
        return big, TurboQuant(self.seed, self.rotation, self.scaling, self.bits)

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        count = self.outliers(dim)
        big, small = self._parts()
        first = [Plane(_OUTLIER + p.name, p.dtype, p.width) for p in big.planes(count, dtype)]
        return (*first, *small.planes(dim - count, dtype))

    def expected_mse(self, dim: int) -> tuple[float, float] | None:
        """Both parts as random vectors of their size; in random directions no channel is larger than others."""
        count = self.outliers(dim)
        sizes = (count, self.outlier_bits), (dim - count, self.bits)
        parts = [(size, scaled_band(bits, size, self.scaling)) for size, bits in sizes]
        low, high = (sum(size * band[i] for size, band in parts) / dim for i in (0, 1))
        return low, high

    def published(self, dim: int) -> Published | None:
        share = self.outliers(dim) / dim
        bound = share * mse_bound(self.outlier_bits) + (1 - share) * mse_bound(self.bits)
        return Published(f"{PAPER}, theorem 1 for both parts", mse_bound=bound)

    def statistics_nbytes(self, dim: int) -> int:
        dtype: mx.Dtype = getattr(mx, _ORDER)
        return dim * dtype.size

    def fit(self, x: mx.array) -> dict[str, mx.array]:
        """`order` `(B, Hkv, 1, D)`: the outlier channels, then the others, each ascending."""
        x = plain_tokens(x)
        count, dim = self.outliers(x.shape[-1]), x.shape[-1]
        energy = mx.sum(mx.square(x.astype(mx.float32)), axis=2, keepdims=True)
        ranked = mx.argsort(-energy, axis=-1)
        order = mx.concatenate([mx.sort(ranked[..., :count], axis=-1), mx.sort(ranked[..., count:], axis=-1)], axis=-1)
        assert dim < 2**16
        return {"order": order.astype(getattr(mx, _ORDER))}

    def _ordered(self, x: mx.array, order: mx.array) -> mx.array:
        return mx.take_along_axis(x, mx.broadcast_to(order.astype(mx.int32), x.shape), axis=-1)

    def _split(self, x: mx.array, dim: int) -> tuple[mx.array, mx.array]:
        count = self.outliers(dim)
        return x[..., :count], x[..., count:]

    def _encode(self, x: mx.array, statistics: Statistics) -> dict[str, mx.array]:
        parts = self._split(self._ordered(x.astype(mx.float32), statistics["order"]), x.shape[-1])
        first, second = (codec._encode(part, {}) for codec, part in zip(self._parts(), parts, strict=True))
        return {**{_OUTLIER + name: plane for name, plane in first.items()}, **second}

    @staticmethod
    def _planes_of(planes: Planes) -> tuple[Planes, Planes]:
        first = {name.removeprefix(_OUTLIER): plane for name, plane in planes.items() if name.startswith(_OUTLIER)}
        return first, {name: plane for name, plane in planes.items() if not name.startswith(_OUTLIER)}

    def _decode(self, planes: Planes, dim: int, dtype: mx.Dtype, statistics: Statistics) -> mx.array:
        count = self.outliers(dim)
        sizes = (count, dim - count)
        parts = [
            codec._decode(part, size, mx.float32, {})
            for codec, part, size in zip(self._parts(), self._planes_of(planes), sizes, strict=True)
        ]
        return self._restored(mx.concatenate(parts, axis=-1), statistics).astype(dtype)

    def _restored(self, x: mx.array, statistics: Statistics) -> mx.array:
        """Channels put back to their places."""
        return self._ordered(x, mx.argsort(statistics["order"], axis=-1))

    def transform_queries(self, queries: mx.array, statistics: Statistics = NO_STATISTICS) -> mx.array:
        parts = self._split(self._ordered(queries, statistics["order"]), queries.shape[-1])
        turned = [codec.transform_queries(part) for codec, part in zip(self._parts(), parts, strict=True)]
        return mx.concatenate(turned, axis=-1)

    def scores(self, queries: mx.array, planes: Planes, statistics: Statistics = NO_STATISTICS) -> mx.array:
        parts = self._split(queries, queries.shape[-1])
        first, second = (
            codec.scores(part, stored)
            for codec, part, stored in zip(self._parts(), parts, self._planes_of(planes), strict=True)
        )
        return first + second

    def weighted_sum(
        self, weights: mx.array, planes: Planes, dim: int, statistics: Statistics = NO_STATISTICS
    ) -> mx.array:
        count = self.outliers(dim)
        parts = [
            codec.weighted_sum(weights, stored, size)
            for codec, stored, size in zip(self._parts(), self._planes_of(planes), (count, dim - count), strict=True)
        ]
        return mx.concatenate(parts, axis=-1)

    def untransform_output(self, output: mx.array, statistics: Statistics = NO_STATISTICS) -> mx.array:
        parts = self._split(output, output.shape[-1])
        turned = [codec.untransform_output(part) for codec, part in zip(self._parts(), parts, strict=True)]
        return self._restored(mx.concatenate(turned, axis=-1), statistics)
