"""One codec for each KV head: `tq3+tq2+tq3`, as an allocation of bits asks for (allocation.py).

Heads with the same codec share its planes, so the planes of different codecs have different numbers of heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from ..arrays import plain_tokens
from ..errors import CodecError
from . import NO_STATISTICS, Codec, Plane, Planes, Statistics, get_codec


@dataclass(frozen=True)
class _Part:
    """A codec and the KV heads that have it."""

    codec: Codec
    heads: tuple[int, ...]

    @property
    def prefix(self) -> str:
        """Of this codec's array names; by head, since dots in names of codecs (`tq2.5`) would split those in files."""
        return f"head{self.heads[0]}_"

    def of(self, arrays: Planes) -> dict[str, mx.array]:
        """This codec's own arrays."""
        return {name.removeprefix(self.prefix): array for name, array in arrays.items() if name.startswith(self.prefix)}

    def named(self, arrays: Planes) -> dict[str, mx.array]:
        """Inverse of `of`."""
        return {self.prefix + name: array for name, array in arrays.items()}


@dataclass(frozen=True)
class PerHead(Codec):
    """The codecs called `names`, one a KV head."""

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.names:
            get_codec(
                name, self.seed, self.rotation, self.scaling
            )  # unknown names are refused here, not when tokens are encoded

    @property
    def name(self) -> str:
        return "+".join(self.names)

    @property
    def partner(self) -> str:
        return "+".join(get_codec(name).partner for name in self.names)

    @cached_property
    def parts(self) -> tuple[_Part, ...]:
        """Distinct codecs in the order of their first heads."""
        return tuple(
            _Part(
                get_codec(name, self.seed, self.rotation, self.scaling),
                tuple(head for head, other in enumerate(self.names) if other == name),
            )
            for name in dict.fromkeys(self.names)
        )

    @cached_property
    def _back(self) -> tuple[int, ...]:
        """Places of the KV heads when the parts are joined."""
        order = [head for part in self.parts for head in part.heads]
        return tuple(np.argsort(order).tolist())

    def _heads(self, x: mx.array, part: _Part) -> mx.array:
        if x.shape[1] != len(self.names):
            raise CodecError(
                f"a codec for each KV head must be given for all of them, got {len(self.names)} codecs ({self.name}) "
                f"for {x.shape[1]} heads; calibrate this model"
            )
        return x if len(self.parts) == 1 else x[:, mx.array(part.heads)]

    def _joined(self, parts: list[mx.array]) -> mx.array:
        if len(parts) == 1:
            return parts[0]
        return mx.concatenate(parts, axis=1)[:, mx.array(self._back)]

    # Facts of the parts; a class attribute of a codec is a property here.

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return all(part.codec.exact for part in self.parts)

    @property
    def fitted(self) -> bool:  # type: ignore[override]
        return any(part.codec.fitted for part in self.parts)

    @property
    def mixes_channels(self) -> bool:  # type: ignore[override]
        return any(part.codec.mixes_channels for part in self.parts)

    @property
    def values(self) -> bool:  # type: ignore[override]
        return all(part.codec.values for part in self.parts)

    @property
    def group(self) -> int:  # type: ignore[override]
        return int(np.lcm.reduce([part.codec.group for part in self.parts]))

    def _byte_version(self) -> int | list[int]:
        return [part.codec.version for part in self.parts]

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        """Planes of all parts; `share` is the part's share of the heads."""
        return tuple(
            Plane(
                part.prefix + plane.name,
                plane.dtype,
                plane.width,
                plane.tokens,
                len(part.heads) / len(self.names),
            )
            for part in self.parts
            for plane in part.codec.planes(dim, dtype)
        )

    def statistics_nbytes(self, dim: int) -> float:
        return sum(part.codec.statistics_nbytes(dim) * len(part.heads) for part in self.parts) / len(self.names)

    def fit(self, x: mx.array) -> dict[str, mx.array]:
        x = plain_tokens(x)
        found: dict[str, mx.array] = {}
        for part in self.parts:
            found.update(part.named(part.codec.fit(self._heads(x, part))))
        return found

    def _encode(self, x: mx.array, statistics: Statistics) -> dict[str, mx.array]:
        planes: dict[str, mx.array] = {}
        for part in self.parts:
            planes.update(part.named(part.codec._encode(self._heads(x, part), part.of(statistics))))
        return planes

    def _decode(self, planes: Planes, dim: int, dtype: mx.Dtype, statistics: Statistics) -> mx.array:
        return self._joined(
            [part.codec._decode(part.of(planes), dim, dtype, part.of(statistics)) for part in self.parts]
        )

    def scores(self, queries: mx.array, planes: Planes, statistics: Statistics = NO_STATISTICS) -> mx.array:
        """As the parts give them; their transforms, which differ, are applied here, to queries and outputs only."""
        found = []
        for part in self.parts:
            own = part.of(statistics)
            turned = part.codec.transform_queries(self._heads(queries, part).astype(mx.float32), own)
            found.append(part.codec.scores(turned.astype(queries.dtype), part.of(planes), own).astype(mx.float32))
        return self._joined(found)

    def weighted_sum(
        self, weights: mx.array, planes: Planes, dim: int, statistics: Statistics = NO_STATISTICS
    ) -> mx.array:
        found = []
        for part in self.parts:
            own = part.of(statistics)
            output = part.codec.weighted_sum(self._heads(weights, part), part.of(planes), dim, own)
            found.append(part.codec.untransform_output(output, own))
        return self._joined(found)
