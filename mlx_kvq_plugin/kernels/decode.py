"""Stored tokens of some KV heads as dense keys and values, in one launch: the kernel of decode.h.

`decode_heads` gives what `KVQCache.decode_all` gives. It allocates its result alone, so that prefill can attend to a
few heads at a time in a workspace of bounded size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..cache_state import pad_tokens
from ..errors import KernelError
from ..rotary import BLOCK, block_tables
from ..rotation import signs
from .build import build, numbers
from .lanes import WARPS, decode_text
from .sides import Sides, sides_key, why_not_here

if TYPE_CHECKING:
    from ..cache import KVQCache

BLOCKS = 2  # blocks of 64 positions of a group of threads
CONSTANT_ROWS = 8  # arrays of fewer elements would lie in another address space on Metal

_decoders: dict[tuple[Any, ...], Decoder] = {}


def why_not_decode(cache: KVQCache) -> str:
    """Why `decode_heads` cannot serve a cache on this device; empty if it can."""
    return why_not_here(cache)


class Decoder:
    """The kernel for caches of one kind, and the arrays that they share."""

    def __init__(self, sides: Sides, on: str = ""):
        """
        Args:
            on: a backend; empty takes that of the default device.
        """
        self.rotary = sides.rotary
        self.key_signs = signs(sides.key_dim, sides.key_codec.seed)
        self.value_signs = signs(sides.value_dim, sides.value_codec.seed)
        self.dtypes = [sides.key_dtype, sides.value_dtype]
        self.planes = tuple([name for name, _ in side] for side in sides.planes())
        inputs = ["dense_keys", "dense_values", "key_signs", "value_signs", "numbers", *sides.plane_inputs()]
        names = ["first_head", "heads", "packed", "row", "position", "dense", "sinks"]
        self.kernel = build(
            "decode",
            [*inputs, *sides.frame_inputs()],
            ["keys", "values"],
            ["decode.h"],
            ["common.h", "lanes.h", "decode_tokens.h"],
            {**sides.defines(), "KVQ_BLOCKS": BLOCKS},
            on,
            extra=decode_text(sides.codecs, sides.dims),
            prologue="const int "
            + ", ".join(f"{name} = (numbers_shape[{i}] - 1) / 2" for i, name in enumerate(names))
            + ";\n",
        )

    def __call__(self, cache: KVQCache, first_head: int, heads: int) -> tuple[mx.array, mx.array]:
        """As `decode_heads`, of a cache with packed tokens."""
        keys, values, frame = cache.dense_keys, cache.dense_values, cache.frame
        assert keys is not None and values is not None
        packed, dense = cache.packed_tokens, cache._dense
        position = cache.packed_position if frame is not None else 0
        inputs = [keys, values, self.key_signs, self.value_signs]
        inputs.append(numbers(first_head, heads, packed, cache._packed_start, position, dense, cache.sink_tokens))
        key_planes, value_planes = cache.key_planes, cache.value_planes
        inputs += [key_planes[name] for name in self.planes[0]]
        inputs += [value_planes[name] for name in self.planes[1]]
        if key_planes["scale"].shape[2] < CONSTANT_ROWS:
            inputs[5:] = [pad_tokens(plane, CONSTANT_ROWS - plane.shape[2]) for plane in inputs[5:]]
        if frame is not None or cache.value_scale is not None:
            inputs.append(cache.frame_rows())
        if frame is not None and frame.rotary.pairs:
            inputs += block_tables(frame.rotary, (position + packed - 1) // BLOCK + 1, whole=True)
        blocks = -(-(position % BLOCK + packed) // BLOCK)
        groups = -(-blocks // BLOCKS) + -(-dense // BLOCK)
        B = keys.shape[0]
        found_keys, found_values = self.kernel(
            inputs=inputs,
            grid=(groups * 32 * WARPS, heads, 2 * B),
            threadgroup=(32 * WARPS, 1, 1),
            output_shapes=[(B, heads, packed + dense, x.shape[3]) for x in (keys, values)],
            output_dtypes=self.dtypes,
        )
        return found_keys, found_values


def decode_heads(cache: KVQCache, first_head: int, count: int, on: str = "") -> tuple[mx.array, mx.array]:
    """Stored keys and values `(B, count, held, D)` of KV heads from `first_head` on, in order, in the model's dtype.

    Args:
        on: a backend; empty takes that of the default device.

    Raises:
        KernelError: for heads that the cache does not have. The caller has asked `why_not_decode`.
    """
    keys, values, dense = cache.dense_keys, cache.dense_values, cache._dense
    heads = 0 if keys is None else keys.shape[1]
    if keys is None or values is None or first_head < 0 or count < 1 or first_head + count > heads:
        raise KernelError(
            f"heads must be among the cache's {heads}, got {count} from {first_head} on; ask for heads that it has"
        )
    if cache.packed_tokens == 0:
        last = first_head + count
        return keys[:, first_head:last, :dense], values[:, first_head:last, :dense]
    key = (*sides_key(cache), on)
    decoder = _decoders.get(key)
    if decoder is None:
        decoder = _decoders[key] = Decoder(Sides(*key[:-1]), on)
    return decoder(cache, first_head, count)
