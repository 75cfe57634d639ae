"""Dense tokens of a cache to planes of codes, keys and values in one launch: the kernel of encode.h.

`encode_block` gives what `frame.encode` and the codecs' `encode` give, but for codes of coordinates that lie within a
few units in the last place of a threshold. It can also give the dense buffers without the encoded tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..cache_state import pad_tokens
from ..errors import KernelError
from ..rotary import BLOCK, block_tables
from ..rotation import signs
from .build import build, numbers
from .lanes import WARPS, encode_text, trellis_defines, trellis_dim
from .sides import Sides, sides_key, why_not_here

if TYPE_CHECKING:
    from ..cache import KVQCache

TILE = 32  # tokens of a group of threads
TRELLIS_TILE = 4  # tokens of a warp that encodes by Viterbi's algorithm
TRELLIS_WARPS = 4  # of a group of them
TRELLIS_GROUPS_PER_CORE = 4

Planes = dict[str, mx.array]
Encoded = tuple[Planes, Planes, mx.array | None, mx.array | None]

_encoders: dict[tuple[Any, ...], Encoder] = {}


def why_not_encode(cache: KVQCache) -> str:
    """Why `encode_block` cannot serve a cache on this device; empty if it can."""
    return why_not_here(cache)


class Encoder:
    """The kernel for caches of one kind, and the arrays that they share."""

    def __init__(self, sides: Sides, compact: bool, on: str = ""):
        """
        Args:
            compact: whether the kernel also makes the dense buffers without the encoded tokens.
            on: a backend; empty takes that of the default device.
        """
        self.rotary, self.compact = sides.rotary, compact
        self.key_signs = signs(sides.key_dim, sides.key_codec.seed)
        self.value_signs = signs(sides.value_dim, sides.value_codec.seed)
        self.planes = sides.planes()
        self.dtypes = [mx.bfloat16 if name == "scale" else mx.uint8 for side in self.planes for name, _ in side]
        if compact:
            self.dtypes += [sides.key_dtype, sides.value_dtype]
        names = ["start", "count", "position", "dense", "capacity"]
        trellis = trellis_dim(sides.codecs, sides.dims)
        self.warps = TRELLIS_WARPS if trellis else WARPS
        self.tile = TRELLIS_TILE * self.warps if trellis else TILE
        headers = ["common.h", "lanes.h", *(["encode_trellis.h"] if trellis else []), "encode_tokens.h"]
        self.kernel = build(
            "encode",
            ["dense_keys", "dense_values", "key_signs", "value_signs", "numbers", *sides.frame_inputs()],
            [*sides.plane_inputs(), *(["new_keys", "new_values"] if compact else [])],
            ["encode.h"],
            headers,
            {
                **(sides.defines(self.warps, TRELLIS_GROUPS_PER_CORE) if trellis else sides.defines()),
                **trellis_defines(sides.codecs, sides.dims),
                "KVQ_TILE": self.tile,
                "KVQ_COMPACT": compact,
            },
            on,
            extra=encode_text(sides.codecs, sides.dims),
            prologue="const int "
            + ", ".join(f"{name} = (numbers_shape[{i}] - 1) / 2" for i, name in enumerate(names))
            + ";\n",
        )

    def __call__(self, cache: KVQCache, start: int, count: int, capacity: int) -> Encoded:
        """As `encode_block`, of at least one token."""
        keys, values, frame = cache.dense_keys, cache.dense_values, cache.frame
        assert keys is not None and values is not None
        B, H, _, Dk = keys.shape
        position = cache.offset - cache._dense + start if frame is not None else 0
        inputs = [keys, values, self.key_signs, self.value_signs]
        inputs.append(numbers(start, count, position, cache._dense, capacity))
        if frame is not None or cache.value_scale is not None:
            inputs.append(cache.frame_rows())
        if frame is not None and frame.rotary.pairs:
            inputs += block_tables(frame.rotary, (position + count - 1) // BLOCK + 1, whole=True)
        shapes = [(B, H, count, width) for side in self.planes for _, width in side]
        tiles = -(-count // self.tile)
        if self.compact:
            shapes += [(B, H, capacity, Dk), (B, H, capacity, values.shape[3])]
            tiles += -(-capacity // self.tile)
        outputs = self.kernel(
            inputs=inputs,
            grid=(tiles * 32 * self.warps, H, 2 * B),
            threadgroup=(32 * self.warps, 1, 1),
            output_shapes=shapes,
            output_dtypes=self.dtypes,
        )
        key_planes, value_planes = self._named(outputs)
        new_keys, new_values = outputs[-2:] if self.compact else (None, None)
        return key_planes, value_planes, new_keys, new_values

    def nothing(self, keys: mx.array) -> tuple[Planes, Planes]:
        """Planes of no tokens, of as many sequences and heads as `keys` has."""
        widths = [width for side in self.planes for _, width in side]
        return self._named(
            [
                mx.zeros((*keys.shape[:2], 0, width), dtype)
                for width, dtype in zip(widths, self.dtypes[: len(widths)], strict=True)
            ]
        )

    def _named(self, arrays: list[mx.array]) -> tuple[Planes, Planes]:
        keys, values = self.planes
        count = len(keys)
        return (
            {name: arrays[i] for i, (name, _) in enumerate(keys)},
            {name: arrays[count + i] for i, (name, _) in enumerate(values)},
        )


def encode_block(cache: KVQCache, start: int, count: int, compact_capacity: int | None = None, on: str = "") -> Encoded:
    """Planes of the dense tokens `[start, start + count)` of a cache, which stays as it is.

    Args:
        start: sinks, or tokens that precede the others, come before it.
        compact_capacity: rows of new dense buffers, which hold the other dense tokens, then zeros; `None` for none.
        on: a backend; empty takes that of the default device.

    Returns:
        Planes of keys and of values, `(B, Hkv, count, width)` each, and new dense keys and values
        `(B, Hkv, compact_capacity, D)` or `None`.

    Raises:
        KernelError: for tokens that the dense buffers do not hold, and for too small a capacity. The caller has asked
            `why_not_encode`.
    """
    keys, values, dense = cache.dense_keys, cache.dense_values, cache._dense
    if keys is None or values is None or start < 0 or count < 0 or start + count > dense:
        raise KernelError(
            f"encoded tokens must be among the {dense} dense ones, got {start} to {start + count}; append them first"
        )
    compact = compact_capacity is not None
    capacity = compact_capacity or 0
    if compact and capacity < dense - count:
        raise KernelError(
            f"new dense buffers must hold the {dense - count} tokens that are left, got room for {capacity}; give more"
        )
    key = (*sides_key(cache), compact and capacity > 0, on)
    encoder = _encoders.get(key)
    if encoder is None:
        encoder = _encoders[key] = Encoder(Sides(*key[:-2]), *key[-2:])
    if count:
        planes = encoder(cache, start, count, capacity)
        return planes if capacity or not compact else (*planes[:2], keys[..., :0, :], values[..., :0, :])
    key_planes, value_planes = encoder.nothing(keys)
    if not compact:
        return key_planes, value_planes, None, None
    left_keys, left_values = (pad_tokens(x[..., :dense, :], capacity - dense) for x in (keys, values))
    return key_planes, value_planes, left_keys, left_values
