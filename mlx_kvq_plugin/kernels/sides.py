"""Keys and values of a cache as the kernels of encode.h and decode.h see them: codecs, head sizes, dtypes, frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..codecs import Codec
from ..rotary import Rotary
from .build import backend, dtype_name
from .codes import code_layout
from .lanes import WARPS, defines, frame_defines, why_not_lanes

if TYPE_CHECKING:
    from ..cache import KVQCache

GROUPS_PER_CORE = 5  # groups of threads that must fit a core (a multiprocessor) together: bounds registers

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def why_not_sides(cache: KVQCache) -> str:
    """Why no kernel encodes or decodes the tokens of a cache, on any device; empty if kernels do."""
    if cache.rows:
        return "a batch of caches has no kernel"
    if cache.dense_keys is None or cache.dense_values is None:
        return "a cache without tokens has no kernel"
    for codec, dense in ((cache.key_codec, cache.dense_keys), (cache.value_codec, cache.dense_values)):
        if dense.dtype not in _FLOATS:
            return f"{dense.dtype} tokens have no kernel"
        reason = why_not_lanes(codec, dense.shape[3])
        if reason:
            return reason
    return ""


def why_not_here(cache: KVQCache) -> str:
    """As `why_not_sides`, on MLX's default device."""
    return why_not_sides(cache) if backend() else "MLX's default device is no GPU"


@dataclass(frozen=True)
class Sides:
    """What a kernel's text depends on, for keys and values.

    Attributes:
        dims: D of each.
        dtypes: of dense tokens.
        rotary: of the key frame; `None` without a frame.
        scales_values: whether channels of values have scales.
    """

    key_codec: Codec
    value_codec: Codec
    key_dim: int
    value_dim: int
    key_dtype: mx.Dtype
    value_dtype: mx.Dtype
    rotary: Rotary | None
    scales_values: bool = False

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        """Of keys and values."""
        return self.key_codec, self.value_codec

    @property
    def dims(self) -> tuple[int, int]:
        """Channels of keys and values."""
        return self.key_dim, self.value_dim

    def defines(self, warps: int = WARPS, groups: int = GROUPS_PER_CORE) -> dict[str, Any]:
        """Constants of the kernels."""
        count = [len(code_layout(codec, dim).planes) for codec, dim in zip(self.codecs, self.dims, strict=True)]
        return {
            **defines(self.codecs, self.dims, (self.key_dtype.size, self.value_dtype.size), warps),
            **frame_defines(self.rotary, self.key_dim, self.value_dim if self.scales_values else 0),
            "KVQ_KEY_TYPE": dtype_name(self.key_dtype),
            "KVQ_VALUE_TYPE": dtype_name(self.value_dtype),
            "KVQ_KEY_SECOND": f"key{count[0] - 1}",
            "KVQ_VALUE_SECOND": f"value{count[1] - 1}",
            "KVQ_GROUP_THREADS": 32 * warps,
            "KVQ_GROUPS_PER_CORE": groups,
        }

    def planes(self) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """Codec's names and widths of the planes of keys, and of values, the scales last."""
        found = []
        for codec, dim in zip(self.codecs, self.dims, strict=True):
            layout = code_layout(codec, dim)
            found.append([*zip(layout.planes, layout.row_bytes, strict=True), ("scale", 1)])
        return found[0], found[1]

    def plane_inputs(self) -> list[str]:
        """Names of all planes in the kernels."""
        keys, values = self.planes()
        names = []
        for side, planes in (("key", keys), ("value", values)):
            names += [f"{side}{i}" for i in range(len(planes) - 1)] + [f"{side}_scale"]
        return names

    def frame_inputs(self) -> list[str]:
        """Names of the arrays of frame and scales."""
        rows = ["frames"] if self.rotary is not None or self.scales_values else []
        return [*rows, *(["block_cos", "block_sin", "inner"] if self.rotary is not None and self.rotary.pairs else [])]


def sides_key(cache: KVQCache) -> tuple[Any, ...]:
    """The arguments of `Sides` for a cache that `why_not_sides` has no objection to."""
    keys, values, frame = cache.dense_keys, cache.dense_values, cache.frame
    assert keys is not None and values is not None
    return (
        cache.key_codec,
        cache.value_codec,
        keys.shape[3],
        values.shape[3],
        keys.dtype,
        values.dtype,
        None if frame is None else frame.rotary,
        cache.value_scale is not None,
    )
