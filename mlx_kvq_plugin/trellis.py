"""Trellis-coded quantization of N(0, 1) with tail-biting bitshift trellises, `tcq{1..4}`.

A channel has `bits` bits. One of them, the trellis bit, enters a shift register that holds the bits of the eight
channels before; two or three *coded* bits are parities of the register (a feed-forward convolutional code), and the
other stored bits are used as they are. Together they are the index of a level, `(stored bits) << coded | coded bits`,
so that a codebook of 2 or 4 times as many levels as `2**bits` costs no more bits, and what the register has seen
decides which of them a channel may use. Any channel decodes from nine trellis bits; the register starts with the last
bits of the token (tail-biting), so no bits are spent on its state.

The encoder is Viterbi's algorithm over the 256 states of the register. It runs over the last and first channels of a
token, as neighbours, and then over all of them from and to the state that this path has at the first channel, which
costs 2% (128 channels) to 4% (64) over the best of all states (`benchmarks/trellis.py --losses`).

Sources: trellis-coded quantization (Marcellin and Fischer 1990); the parities are the best of some thousand that were
tried, levels are centroids of what the encoder chooses, as odd polynomials (`benchmarks/trellis.py` measures both).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .codebooks import Codebook, level_book
from .native import library
from .packing import from_lanes, to_lanes

log = logging.getLogger("mlx_kvq_plugin")

MEMORY = 8  # trellis bits that the register holds besides the newest
STATES = 2**MEMORY
AROUND = 32  # channels before and after the first that decide about the state there, a multiple of 8
_SLICE = 1024  # tokens that are encoded at a time: backpointers take a byte for each channel, state and token

_WIDE, _NARROW = (0x26, 0xA8, 0x1A5), (0xA6, 0x11D)
_GENERATORS = {1: _WIDE, 2: _WIDE, 3: _WIDE, 4: _NARROW}
_COEFFICIENTS = {
    1: (1.02576356, 0.921474051),
    2: (1.56939216, -0.676716536, 1.75145578),
    3: (1.54006718, 1.2953177, -2.92983177, 3.33115373),
    4: (1.79789991, -0.667057572, 2.12940958),
}


@dataclass(frozen=True)
class Trellis:
    """A code of `bits` bits a channel.

    Attributes:
        generators: of each coded bit, the lowest first: bit j stands for the trellis bit j channels before.
        book: the levels, by index.
    """

    bits: int
    generators: tuple[int, ...]
    book: Codebook

    @property
    def coded(self) -> int:
        """Bits of an index that are parities."""
        return len(self.generators)

    def taps(self, i: int) -> tuple[int, ...]:
        """Distances of the trellis bits whose parity coded bit i is."""
        return tuple(j for j in range(MEMORY + 1) if self.generators[i] >> j & 1)


@cache
def trellis(bits: int) -> Trellis:
    """The code of `bits` bits, 1 to 4."""
    generators = _GENERATORS[bits]
    return Trellis(bits, generators, level_book(bits - 1 + len(generators), _COEFFICIENTS[bits]))


def in_time(x: mx.array) -> mx.array:
    """Channels `(..., D)` in the order of the trellis: that of the bits of a packed row of single bits (packing.py)."""
    return to_lanes(x, 1)


def from_time(x: mx.array) -> mx.array:
    """Inverse of `in_time`."""
    return from_lanes(x, 1)


@cache
def _coded_planes(generators: tuple[int, ...]) -> Callable[[mx.array, mx.array], list[mx.array]]:
    def coded(packed: mx.array, before: mx.array) -> list[mx.array]:
        register = (packed.astype(mx.uint16) << 8) | before.astype(mx.uint16)
        planes = []
        for generator in generators:
            total = None
            for j in range(MEMORY + 1):
                if generator >> j & 1:
                    bits = register >> (8 - j)
                    total = bits if total is None else total ^ bits
            assert total is not None
            planes.append((total & 0xFF).astype(mx.uint8))
        return planes

    return mx.compile(coded, shapeless=True)


def coded_planes(packed: mx.array, code: Trellis) -> list[mx.array]:
    """Rows `(..., D / 8)` uint8 of single bits: the coded bits of rows of trellis bits, the highest first."""
    before = mx.concatenate([packed[..., -1:], packed[..., :-1]], axis=-1)
    return list(reversed(_coded_planes(code.generators)(packed, before)))


@cache
def _subset_table(generators: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Coded bits of a window: `(512,)`, by the oldest bit, then the state after it."""
    window = np.arange(2 * STATES)
    found = np.zeros(2 * STATES, np.uint8)
    for i, generator in enumerate(generators):
        found |= np.bitwise_count(window & generator) % 2 << i
    return found


@cache
def _level_table(code: Trellis) -> npt.NDArray[np.float32]:
    """Levels by stored bits, then coded bits."""
    return np.array(code.book.levels, np.float32).reshape(-1, 2**code.coded)


def _path(distance: mx.array, subsets: mx.array, start: mx.array | None, end: mx.array | None) -> list[mx.array]:
    """States `(N,)` int32 before each channel and after the last on the path of least distance.

    Args:
        distance: of channels to the nearest level of each subset, `(L, subsets, N)`; sums are of its dtype.
        start, end: the first and last state `(N,)`, `None` for any.
    """
    length, _, count = distance.shape
    every = mx.arange(STATES)[:, None]
    cost = mx.zeros((STATES, count)) if start is None else mx.where(every == start, 0.0, mx.inf)
    cost = cost.astype(distance.dtype)
    chosen = []  # of each new state, whether the old one had its oldest bit set
    for t in range(length):
        steps = mx.take(distance[t], subsets, axis=0).reshape(2, STATES // 2, 2, count)
        zero, one = cost.reshape(2, STATES // 2, 1, count) + steps
        chosen.append((one < zero).reshape(-1))
        cost = mx.minimum(zero, one).reshape(STATES, count)
    state = mx.argmin(cost, axis=0).astype(mx.int32) if end is None else end
    tokens, states = mx.arange(count), [state]
    for t in reversed(range(length)):
        oldest = mx.take(chosen[t], state * count + tokens).astype(mx.int32)
        state = state >> 1 | oldest << (MEMORY - 1)
        states.append(state)
    return states[::-1]


def distances(z: mx.array, code: Trellis) -> mx.array:
    """Squared distances of channels to the nearest level of each subset, `(D, subsets, N)`, of `(D, N)` in time."""
    levels = mx.array(_level_table(code))
    return mx.square(z[:, None, None] - levels[None, :, :, None]).min(axis=1)


def subsets_of(code: Trellis) -> mx.array:
    """Coded bits of a window, `(512,)` int32, by the oldest bit, then the state after it."""
    return mx.array(_subset_table(code.generators).astype(np.int32))


def trellis_bits(distance: mx.array, code: Trellis) -> mx.array:
    """Trellis bits `(D, N)` uint8 of the path that the encoder chooses by `distances`, channels in time."""
    subsets, around = subsets_of(code), min(AROUND, distance.shape[0] // 2)
    ends = mx.concatenate([distance[-around:], distance[:around]])
    first = _path(ends, subsets, None, None)[around]
    return mx.stack([state & 1 for state in _path(distance, subsets, first, first)[1:]]).astype(mx.uint8)


def encode(z: mx.array, code: Trellis) -> tuple[mx.array, mx.array]:
    """Codes of tokens of unit variance `(..., D)` float32; on a CPU by compiled code, which evaluates `z`.

    On a GPU packing is done by kernels (kernels/encode.py); what they do not do comes here, and one warning says so.

    Returns:
        Trellis bits and indices of levels, `(..., D)` uint8 each.
    """
    if z.size == 0:
        return mx.zeros(z.shape, mx.uint8), mx.zeros(z.shape, mx.uint8)
    rows = in_time(z).reshape(-1, z.shape[-1])
    native = None
    if mx.default_device().type == mx.cpu:
        native = library("trellis")
    else:
        _warn_of_plain()
    bits, index = encode_plain(rows, code) if native is None else _encode_native(native, rows, code)
    return from_time(bits).reshape(z.shape), from_time(index).reshape(z.shape)


@cache
def _warn_of_plain() -> None:
    log.warning(
        "trellis codes of this head size, rotation or array are encoded by plain MLX operations on the GPU, far slower "
        "than by its kernels; `kvq inspect --kernels` says why, tq codes are fast without kernels too"
    )


def coded_bits(bits: mx.array, code: Trellis) -> mx.array:
    """Coded bits `(N, D)` uint8 of trellis bits `(N, D)`, channels in time."""
    coded = mx.zeros_like(bits)
    for i in range(code.coded):
        for j in code.taps(i):
            coded = coded ^ mx.roll(bits, j, -1) << i
    return coded


def encode_plain(rows: mx.array, code: Trellis) -> tuple[mx.array, mx.array]:
    """Trellis bits and indices `(N, D)` of tokens `(N, D)`, channels in time: the twin of all other encoders."""
    found = [trellis_bits(distances(rows[i : i + _SLICE].T, code), code).T for i in range(0, rows.shape[0], _SLICE)]
    bits = mx.concatenate(found) if len(found) > 1 else found[0]
    coded = coded_bits(bits, code)
    errors = mx.square(rows[..., None] - mx.take(mx.array(_level_table(code).T), coded.astype(mx.int32), axis=0))
    return bits, mx.argmin(errors, axis=-1).astype(mx.uint8) << code.coded | coded


def _encode_native(native: ctypes.CDLL, rows: mx.array, code: Trellis) -> tuple[mx.array, mx.array]:
    x = np.ascontiguousarray(np.array(rows, copy=False))
    levels, subsets = _level_table(code), _subset_table(code.generators)
    bits, index = np.empty(x.shape, np.uint8), np.empty(x.shape, np.uint8)
    native.kvq_trellis_encode(
        ctypes.c_void_p(x.ctypes.data),
        ctypes.c_int64(x.shape[0]),
        x.shape[1],
        ctypes.c_void_p(levels.ctypes.data),
        *levels.shape,
        ctypes.c_void_p(subsets.ctypes.data),
        min(AROUND, x.shape[1] // 2),
        ctypes.c_void_p(bits.ctypes.data),
        ctypes.c_void_p(index.ctypes.data),
    )
    return mx.array(bits), mx.array(index)
