"""Codecs: what turns keys or values into stored planes and back. One codec a file; outside ones by entry point.

A codec is found by name: `get_codec("tq4")` is family `tq` with suffix `4`. Families come from the entry-point group
`mlx_kvq_plugin.codecs` (name = family, value = a `Codec` subclass), the built-in ones like anybody else's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import mlx.core as mx

from ..errors import CodecError
from ..plugins import load_plugin, plugin_names

GROUP = "mlx_kvq_plugin.codecs"

Planes = Mapping[str, mx.array]
Statistics = Mapping[str, mx.array]
NO_STATISTICS: Statistics = {}


@dataclass(frozen=True)
class Plane:
    """One stored array of a codec: `width` elements of `dtype` (an MLX dtype name) per token and KV head."""

    name: str
    dtype: str
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes per token and KV head."""
        dtype: mx.Dtype = getattr(mx, self.dtype)
        return self.width * dtype.size


@dataclass(frozen=True)
class Codec:
    """A map `(B, Hkv, L, D) -> {plane: (B, Hkv, L, width)}` and back.

    What must hold for every codec:
      * token-addressable: the codes of a token depend on that token (and frozen `statistics`) alone, so encoding in
        pieces equals encoding at once and planes can be cut anywhere on the token axis;
      * deterministic: equal config, statistics and input give equal bits; `version` grows when the bytes change;
      * `scores` and `weighted_sum` work in a transform domain, so attention never inverts the transform per token:
        with k^ = decode(planes), `scores(transform_queries(q), planes) == q @ k^T`, and
        `untransform_output(weighted_sum(w, planes)) == w @ k^`. The defaults do this without any transform.
      * `statistics`: arrays `(B, Hkv, ...)` that `fit` reads off the first tokens, frozen from then on; the cache
        saves, copies and merges them. Data-oblivious codecs have none.
    """

    family: ClassVar[str] = ""
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False  # decode(encode(x)) is x, bit for bit
    suffixes: ClassVar[tuple[str, ...]] = ("",)  # the suffixes that name a codec of the family, for messages

    seed: int = 0

    @classmethod
    def from_suffix(cls, suffix: str, seed: int) -> Codec:
        """The codec named `family + suffix`; raises `CodecError` naming the valid ones."""
        if suffix not in cls.suffixes:
            raise CodecError(
                f"codec {cls.family}{suffix} does not exist; choose one of "
                + ", ".join(cls.family + s for s in cls.suffixes)
            )
        return cls._build(suffix, seed)

    @classmethod
    def _build(cls, suffix: str, seed: int) -> Codec:
        return cls(seed=seed)

    @property
    def name(self) -> str:
        """The name that `get_codec` finds it by."""
        return self.family

    def to_json(self) -> str:
        """The config as JSON: name, seed and byte version."""
        return json.dumps({"name": self.name, "seed": self.seed, "version": self.version})

    @staticmethod
    def from_json(text: str) -> Codec:
        """Inverse of `to_json`; raises `CodecError` when the installed codec writes other bytes."""
        config = json.loads(text)
        codec = get_codec(config["name"], config["seed"])
        if codec.version != config["version"]:
            raise CodecError(
                f"codec {codec.name} must have byte version {config['version']} to read this data, "
                f"got {codec.version}; install the matching release"
            )
        return codec

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        """The stored arrays for head size `dim` and input dtype name; raises `CodecError` for sizes it cannot do."""
        raise NotImplementedError

    def bits_per_element(self, dim: int, dtype: str = "float16") -> float:
        """All-in rate: every byte stored per token (codes, scales, norms, padding) over `dim`."""
        return 8.0 * sum(plane.nbytes for plane in self.planes(dim, dtype)) / dim

    def fit(self, x: mx.array) -> dict[str, mx.array]:
        """Statistics `(B, Hkv, ...)` from the first tokens `(B, Hkv, L, D)`."""
        return {}

    def encode(self, x: mx.array, statistics: Statistics = NO_STATISTICS) -> dict[str, mx.array]:
        """Planes of `x` `(B, Hkv, L, D)`, L >= 0."""
        raise NotImplementedError

    def decode(
        self, planes: Planes, dim: int, dtype: mx.Dtype = mx.float32, statistics: Statistics = NO_STATISTICS
    ) -> mx.array:
        """Reconstruction `(B, Hkv, L, D)` in `dtype`; allocates L * D elements per head."""
        raise NotImplementedError

    def transform_queries(self, queries: mx.array, statistics: Statistics = NO_STATISTICS) -> mx.array:
        """Queries `(B, Hkv, R, D)` moved to the transform domain of keys."""
        return queries

    def scores(self, queries: mx.array, planes: Planes, statistics: Statistics = NO_STATISTICS) -> mx.array:
        """Inner products `(B, Hkv, R, S)` of transformed queries with S stored keys, in their dtype or float32."""
        keys = self.decode(planes, queries.shape[-1], queries.dtype, statistics)
        return queries @ keys.swapaxes(-1, -2)

    def weighted_sum(
        self, weights: mx.array, planes: Planes, dim: int, statistics: Statistics = NO_STATISTICS
    ) -> mx.array:
        """Sum `(B, Hkv, R, D)` of S stored values with weights `(B, Hkv, R, S)`, in the transform domain."""
        return weights @ self.decode(planes, dim, weights.dtype, statistics)

    def untransform_output(self, output: mx.array, statistics: Statistics = NO_STATISTICS) -> mx.array:
        """`weighted_sum` results moved back from the transform domain."""
        return output


def list_codecs() -> list[str]:
    """Names of all codec families that entry points offer, sorted; loads none of them."""
    return plugin_names(GROUP)


@cache
def get_codec(name: str, seed: int = 0) -> Codec:
    """The codec called `name`, e.g. `tq4`, `rvq1`, `affine8`, `identity`; raises `CodecError` for unknown names."""
    families = sorted((f for f in list_codecs() if name.startswith(f)), key=len, reverse=True)
    if not families:
        raise CodecError(f"a codec name must start with one of {', '.join(list_codecs())}, got {name!r}")
    kinds = {prefix: _load_family(prefix) for prefix in families}
    owners = [prefix for prefix, kind in kinds.items() if name[len(prefix) :] in kind.suffixes]
    if len(owners) > 1:
        raise CodecError(f"codec {name} must have one owner, got the families {' and '.join(owners)}; uninstall one")
    prefix = (owners or families)[0]
    return kinds[prefix].from_suffix(name[len(prefix) :], seed)


def _load_family(prefix: str) -> type[Codec]:
    family = load_plugin(GROUP, prefix)
    if not (isinstance(family, type) and issubclass(family, Codec)):
        raise CodecError(f"entry point {prefix!r} in {GROUP} must be a Codec subclass, got {family!r}")
    return family
