"""Constants of fused attention in one array: rotation signs, and what turns queries by a rotary."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..codecs import Codec
from ..rotary import BLOCK, Rotary
from ..rotation import signs


def _inner_turns(rotary: Rotary) -> npt.NDArray[np.float32]:
    """cos and sin of i theta_j for i < 64 as left operands of 16 x 16 products: half precision, as float32 words.

    Order: 4 x 16 tokens, steps of 8 rotary pairs, 32 places of a lane (row, then column), 4 pairs of numbers.
    """
    steps = -(-rotary.pairs // 8)
    angles = np.zeros(8 * steps)
    angles[: rotary.pairs] = rotary.angles
    turned = np.arange(BLOCK)[:, None] * angles
    used = np.arange(8 * steps) < rotary.pairs
    table = np.stack([np.cos(turned) * used, np.sin(turned) * used], axis=-1).astype(np.float16)
    # (token, pair, 2) -> (sub, near or far, row, step, first or second four pairs, column, 2)
    table = table.reshape(4, 2, 8, steps, 2, 4, 2).transpose(0, 3, 2, 5, 4, 1, 6)
    return np.ascontiguousarray(table).reshape(-1).view(np.float32)


class Tables:
    """Constants of a plan in one array, float32: signs of keys and values, then what turns by the rotary.

    Offsets: `inner` holds cos, then sin, of places in a block; `inner_turns` the same as operands; `block_turns` cos
    and sin in turn of the starts of blocks, which grow with the tokens, by doubling.
    """

    def __init__(self, key_signs: mx.array, value_signs: mx.array, rotary: Rotary | None):
        self._parts = [np.array(key_signs), np.array(value_signs)]
        self.rotary, self._blocks = rotary, 0
        self.value_signs = key_signs.size
        self.inner_turns = self.value_signs + value_signs.size
        self.inner = self.block_turns = self.inner_turns
        if rotary is not None:
            turns = _inner_turns(rotary)
            turned = np.arange(BLOCK)[:, None] * np.array(rotary.angles)
            self.inner = self.inner_turns + turns.size
            self.block_turns = self.inner + 2 * turned.size
            self._parts += [turns, np.concatenate([np.cos(turned), np.sin(turned)], axis=1).reshape(-1)]
        self._array = mx.array(0.0)

    def array(self, blocks: int) -> mx.array:
        """The array, with at least `blocks` blocks."""
        if self._blocks < blocks or self._blocks == 0:
            self._blocks = max(64, 1 << (blocks - 1).bit_length())
            parts = list(self._parts)
            if self.rotary is not None:
                starts = np.arange(self._blocks)[:, None] * BLOCK * np.array(self.rotary.angles)
                parts.append(np.stack([np.cos(starts), np.sin(starts)], axis=-1).reshape(-1))
            self._array = mx.array(np.concatenate(parts).astype(np.float32))
            mx.eval(self._array)  # lazy arrays cannot cross threads
        return self._array

    @property
    def nbytes(self) -> int:
        return int(self._array.nbytes)


@cache
def tables_of(key: Codec, key_dim: int, value: Codec, value_dim: int, rotary: Rotary | None) -> Tables:
    """The tables for codecs, head sizes and a rotary, shared by all layers that have them."""
    return Tables(signs(key_dim, key.seed), signs(value_dim, value.seed), rotary)
