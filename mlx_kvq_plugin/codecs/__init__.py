"""Codecs: what turns keys or values into stored planes and back. One codec a file; outside ones by entry point.

A codec is found by name: `get_codec("tq4")` is family `tq` with suffix `4`. Families come from the entry-point group
`mlx_kvq_plugin.codecs` (name = family, value = a `Codec` subclass), the built-in ones like anybody else's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ..arrays import from_numpy, lead_axes, plain_tokens, to_numpy, with_lead_axes
from ..errors import CodecError
from ..plugins import load_plugin, plugin_names
from ..rotation import HADAMARD, ROTATIONS

GROUP = "mlx_kvq_plugin.codecs"

Planes = Mapping[str, mx.array]
Statistics = Mapping[str, mx.array]
NO_STATISTICS: Statistics = {}

LEAST_SQUARES, NORM, UNBIASED = "least_squares", "norm", "unbiased"
SCALINGS = (LEAST_SQUARES, NORM, UNBIASED)


@dataclass(frozen=True)
class Plane:
    """One stored array of a codec: rows of `width` elements of `dtype` (an MLX dtype name) per KV head.

    Attributes:
        name: without dots, at which files split names.
        tokens: consecutive tokens that share a row, 1 for most.
        share: of the KV heads that have the plane at all.
    """

    name: str
    dtype: str
    width: int
    tokens: int = 1
    share: float = 1.0

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of one KV head."""
        dtype: mx.Dtype = getattr(mx, self.dtype)
        return self.width * dtype.size

    @property
    def nbytes(self) -> float:
        """Bytes per token and KV head, averaged over the tokens of a row and over the heads."""
        return self.row_nbytes * self.share / self.tokens


@dataclass(frozen=True)
class Published:
    """What the paper of a codec says of random unit vectors x in D dimensions and any unit vector y.

    Attributes:
        source: the paper, and where in it.
        mse_bound, mse: the proven upper bound of E ||x - x^||^2, and the value that it prints.
        product_bound, product: the same of D E (<y, x^> - <y, x>)^2.
    """

    source: str
    mse_bound: float | None = None
    mse: float | None = None
    product_bound: float | None = None
    product: float | None = None


@dataclass(frozen=True)
class Codec:
    """A map `(B, Hkv, L, D) -> {plane: (B, Hkv, rows, width)}` and back.

    A codec implements `planes`, `_encode` and `_decode`. What must hold:
      * token-addressable: the codes of a token depend on that token (and frozen `statistics`) alone, so encoding in
        pieces equals encoding at once and planes can be cut anywhere on the token axis. A codec with `group` above 1
        encodes that many consecutive tokens together; pieces then are multiples of it. One plane at least has a row
        for every token;
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
    unbiased: ClassVar[bool] = False  # E[decode(encode(x))] is x for a random direction of x
    shrinkage: ClassVar[float | None] = None  # the slope of <y, x^> over <y, x> is 1 - shrinkage * E ||x - x^||^2
    fitted: ClassVar[bool] = False  # needs the statistics of `fit`
    mixes_channels: ClassVar[bool] = False  # a loud channel costs all channels of its token, as a rotation spreads it
    values: ClassVar[bool] = True  # whether values can be stored with it, not only keys
    group: ClassVar[int] = 1  # tokens that are encoded together
    suffixes: ClassVar[tuple[str, ...]] = ("",)  # the suffixes that name a codec of the family, for messages
    continued_by: ClassVar[str] = ""  # the family whose codecs go on above the highest rate of this one

    seed: int = 0
    rotation: str = HADAMARD  # of codecs that rotate (rotation.py)
    scaling: str = LEAST_SQUARES  # of codecs with one scale a token: what the scale makes right (scalar.py)

    @classmethod
    def accepts(cls, suffix: str) -> bool:
        """Whether `family + suffix` names a codec."""
        return suffix in cls.suffixes

    @classmethod
    def from_suffix(cls, suffix: str, seed: int) -> Codec:
        """The codec named `family + suffix`; raises `CodecError` naming the valid ones."""
        if not cls.accepts(suffix):
            raise CodecError(
                f"codec {cls.family}{suffix} does not exist; choose one of "
                + ", ".join(cls.family + s for s in cls.suffixes)
            )
        return cls._build(suffix, seed)

    @classmethod
    def _build(cls, suffix: str, seed: int) -> Codec:
        return cls(seed=seed)

    def __deepcopy__(self, memo: object) -> Codec:
        return self

    @property
    def name(self) -> str:
        """The name that `get_codec` finds it by."""
        return self.family

    @property
    def partner(self) -> str:
        """The codec of values in a scheme that names only this one."""
        return self.name

    def to_json(self) -> str:
        """The config as JSON: name, seed, byte version, and rotation and scaling where they are not the defaults."""
        config = {"name": self.name, "seed": self.seed, "version": self._byte_version()}
        choices = {"rotation": (self.rotation, HADAMARD), "scaling": (self.scaling, LEAST_SQUARES)}
        return json.dumps({**config, **{key: own for key, (own, default) in choices.items() if own != default}})

    def _byte_version(self) -> int | list[int]:
        return self.version

    @staticmethod
    def from_json(text: str) -> Codec:
        """Inverse of `to_json`; raises `CodecError` when the installed codec writes other bytes."""
        config = json.loads(text)
        codec = get_codec(
            config["name"],
            config["seed"],
            config.get("rotation", HADAMARD),
            config.get("scaling", LEAST_SQUARES),
        )
        if codec._byte_version() != config["version"]:
            raise CodecError(
                f"codec {codec.name} must have byte version {config['version']} to read this data, "
                f"got {codec._byte_version()}; install the matching release"
            )
        return codec

    def planes(self, dim: int, dtype: str) -> tuple[Plane, ...]:
        """The stored arrays for head size `dim` and input dtype name; raises `CodecError` for sizes it cannot do."""
        raise NotImplementedError

    def bits_per_element(self, dim: int, dtype: str = "float16") -> float:
        """All-in rate: every byte stored per token (codes, scales, norms, padding) over `dim`."""
        return 8.0 * sum(plane.nbytes for plane in self.planes(dim, dtype)) / dim

    def expected_mse(self, dim: int) -> tuple[float, float] | None:
        """The band of the mean squared error of random unit vectors by the codec's theory; `None` without one.

        It holds for data that the statistics of `fit` were not read off.
        """
        return None

    def published(self, dim: int) -> Published | None:
        """What the codec's paper proves and reports of random unit vectors; `None` without such a text."""
        return None

    def statistics_nbytes(self, dim: int) -> float:
        """Bytes of the statistics of one row and KV head, averaged over the heads."""
        return 0

    def fit(self, x: mx.array) -> dict[str, mx.array]:
        """Statistics `(B, Hkv, ...)`, MLX arrays, from the first tokens `(B, Hkv, L, D)`, plain ones as in `encode`."""
        return {}

    def encode(self, x: Any, statistics: Statistics = NO_STATISTICS) -> dict[str, Any]:
        """Planes of tokens: of an MLX array `(B, Hkv, L, D)`, or of a plain one.

        Args:
            x: floats `(B, Hkv, L, D)`, L >= 0; plain arrays, of MLX or NumPy, may also be `(L, D)` or `(Hkv, L, D)`;
                float64 becomes float32.
            statistics: of `fit`; a codec with `fitted` needs them.

        Returns:
            Planes with the axes of `x`, NumPy ones for a NumPy array (bfloat16 planes as the uint16 of their bits).

        Raises:
            CodecError: for other shapes and sizes, and for a fitted codec without statistics.
        """
        self._check_statistics(statistics)
        if isinstance(x, mx.array) and x.ndim == 4:
            return self._encode(x, statistics)
        planes = self._encode(plain_tokens(x), statistics)
        axes = lead_axes(np.ndim(x))
        planes = {name: plane.reshape(*plane.shape[axes:]) for name, plane in planes.items()}
        return planes if isinstance(x, mx.array) else {name: to_numpy(plane) for name, plane in planes.items()}

    def decode(
        self,
        planes: Mapping[str, Any],
        dim: int | None = None,
        dtype: mx.Dtype = mx.float32,
        statistics: Statistics = NO_STATISTICS,
    ) -> Any:
        """Reconstruction of the tokens in `dtype`, with the axes of the planes; allocates L * D elements per head.

        Costs a look at all head sizes where `dim` is left out.

        Args:
            planes: as from `encode`, NumPy ones too (the result is then NumPy).
            dim: D; may be left out where the widths of the planes tell it.
            statistics: what the planes were encoded with.

        Raises:
            CodecError: for a fitted codec without statistics, where `dim` is needed but not given, and for plain
                planes that are not this codec's.
        """
        self._check_statistics(statistics)
        some = next(iter(planes.values()), None)
        widths = {name: plane.shape[-1] for name, plane in planes.items()}
        if dim is None:
            dim = self._dim_of(widths)
        if isinstance(some, mx.array) and some.ndim == 4:
            return self._decode(planes, dim, dtype, statistics)
        declared = {plane.name: plane for plane in self.planes(dim, "float32")}
        expected = {name: plane.width for name, plane in declared.items()}
        if some is None or widths != expected:
            raise CodecError(f"{self.name} planes of {dim} channels must have the widths {expected}, got {widths}")
        if isinstance(some, mx.array):
            arrays = dict(planes)
        else:
            arrays = {name: from_numpy(plane, declared[name].dtype) for name, plane in planes.items()}
        axes = lead_axes(some.ndim)
        x = self._decode({name: with_lead_axes(plane) for name, plane in arrays.items()}, dim, dtype, statistics)
        x = x.reshape(*x.shape[axes:])
        return x if isinstance(some, mx.array) else to_numpy(x)

    def _check_statistics(self, statistics: Statistics) -> None:
        if self.fitted and not statistics:
            raise CodecError(f"codec {self.name} must be given statistics, got none; call fit(x) on the first tokens")

    def _dim_of(self, widths: Mapping[str, int]) -> int:
        """The head size whose planes have these widths."""
        found = []
        for dim in range(1, 2049):
            try:
                planes = self.planes(dim, "float32")
            except CodecError:
                continue
            if {plane.name: plane.width for plane in planes} == dict(widths):
                found.append(dim)
        if len(found) != 1:
            which = f"each of {found[0]} to {found[-1]}" if found else "none"
            raise CodecError(
                f"the widths of {self.name} planes must tell the head size, got {dict(widths)} of {which}; pass dim="
            )
        return found[0]

    def _encode(self, x: mx.array, statistics: Statistics) -> dict[str, mx.array]:
        """Planes of `x` `(B, Hkv, L, D)`, L >= 0."""
        raise NotImplementedError

    def _decode(self, planes: Planes, dim: int, dtype: mx.Dtype, statistics: Statistics) -> mx.array:
        """Reconstruction `(B, Hkv, L, D)` in `dtype`."""
        raise NotImplementedError

    def transform_queries(self, queries: mx.array, statistics: Statistics = NO_STATISTICS) -> mx.array:
        """Queries `(B, Hkv, R, D)` moved to the transform domain of keys."""
        return queries

    def scores(self, queries: mx.array, planes: Planes, statistics: Statistics = NO_STATISTICS) -> mx.array:
        """Inner products `(B, Hkv, R, S)` of transformed queries with S stored keys, in their dtype or float32."""
        keys = self._decode(planes, queries.shape[-1], queries.dtype, statistics)
        return queries @ keys.swapaxes(-1, -2)

    def weighted_sum(
        self, weights: mx.array, planes: Planes, dim: int, statistics: Statistics = NO_STATISTICS
    ) -> mx.array:
        """Sum `(B, Hkv, R, D)` of S stored values with weights `(B, Hkv, R, S)`, in the transform domain."""
        return weights @ self._decode(planes, dim, weights.dtype, statistics)

    def untransform_output(self, output: mx.array, statistics: Statistics = NO_STATISTICS) -> mx.array:
        """`weighted_sum` results moved back from the transform domain."""
        return output


def list_codecs() -> list[str]:
    """Names of all codec families that entry points offer, sorted; loads none of them."""
    return plugin_names(GROUP)


@cache
def get_codec(name: str, seed: int = 0, rotation: str = HADAMARD, scaling: str = LEAST_SQUARES) -> Codec:
    """The codec called `name`: `tq4`, `rvq1`, `affine8`, ...; `tq3+tq2` has one codec for each KV head.

    Args:
        name: a family and a suffix, or several such names with `+` between them.
        seed: of the rotations' signs.
        rotation: one of `rotation.ROTATIONS`; of no consequence for codecs that do not rotate.
        scaling: one of `SCALINGS`; of no consequence for codecs other than `tq` and `rvq`, nor for decoding.

    Raises:
        CodecError: for unknown names.
    """
    if rotation not in ROTATIONS:
        raise CodecError(f"a rotation must be one of {', '.join(ROTATIONS)}, got {rotation!r}; choose one of these")
    if scaling not in SCALINGS:
        raise CodecError(f"a scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}; choose one of these")
    if "+" in name:
        from .per_head import PerHead

        return PerHead(seed=seed, rotation=rotation, scaling=scaling, names=tuple(name.split("+")))
    families = sorted((f for f in list_codecs() if name.startswith(f)), key=len, reverse=True)
    if not families:
        raise CodecError(f"a codec name must start with one of {', '.join(list_codecs())}, got {name!r}")
    kinds = {prefix: load_family(prefix) for prefix in families}
    owners = [prefix for prefix, kind in kinds.items() if kind.accepts(name[len(prefix) :])]
    if len(owners) > 1:
        raise CodecError(f"codec {name} must have one owner, got the families {' and '.join(owners)}; uninstall one")
    prefix = (owners or families)[0]
    codec = kinds[prefix].from_suffix(name[len(prefix) :], seed)
    return replace(codec, rotation=rotation, scaling=scaling)


def load_family(prefix: str) -> type[Codec]:
    """The class of a family of codecs; raises `CodecError` or `PluginError` where the entry point is none."""
    family = load_plugin(GROUP, prefix)
    if not (isinstance(family, type) and issubclass(family, Codec)):
        raise CodecError(f"entry point {prefix!r} in {GROUP} must be a Codec subclass, got {family!r}")
    return family
