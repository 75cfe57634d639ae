"""Packing of b-bit codes into bytes: the one text on bit order.

A row of ``dim`` codes of ``bits`` bits is a row of ``dim * bits / 8`` bytes, made of *fields* of 1, 2 or 4 bits
(3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, low bits first), each field contiguous. In a field of width ``p`` byte ``w`` of
``W = dim * p / 8`` holds the codes of channels ``w, W + w, 2 W + w, ...``, the first in its lowest bits. Unpacking is
then a shift and a mask of whole rows: slot ``i`` of the bytes is the run of channels ``[i W, (i + 1) W)``, and no code
ever straddles a byte. ``dim`` must be a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from .errors import CodecError

_WORDS = (mx.uint64, mx.uint32, mx.uint16, mx.uint8)
_FIELD_WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}


@dataclass(frozen=True)
class Field:
    """`width` bits of every code, stored in bytes `[start, stop)` of the packed row and worth `1 << shift` each."""

    width: int
    shift: int
    start: int
    stop: int


def packed_width(dim: int, bits: int) -> int:
    """Bytes of a packed row of `dim` codes of `bits` bits; raises `CodecError` for sizes that do not pack."""
    if bits not in _FIELD_WIDTHS:
        raise CodecError(f"codes must have 1 to 6 bits, got {bits}; choose one of {sorted(_FIELD_WIDTHS)}")
    if dim <= 0 or dim % 8:
        raise CodecError(f"the head size must be a positive multiple of 8 to pack, got {dim}; use the identity codec")
    return dim * bits // 8


def fields(dim: int, bits: int) -> tuple[Field, ...]:
    """The fields of a packed row, in the order of their bytes."""
    packed_width(dim, bits)
    found: list[Field] = []
    shift = start = 0
    for width in _FIELD_WIDTHS[bits]:
        stop = start + dim * width // 8
        found.append(Field(width, shift, start, stop))
        shift, start = shift + width, stop
    return tuple(found)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes `(..., D)` uint8 below `2**bits` into `(..., D * bits / 8)` uint8."""
    dim = codes.shape[-1]
    rows = []
    for field in fields(dim, bits):
        part = (codes >> field.shift) & ((1 << field.width) - 1)
        slots = mx.split(part, 8 // field.width, axis=-1)
        row = slots[0]
        for i, slot in enumerate(slots[1:], start=1):
            row = row | (slot << (i * field.width))
        rows.append(row)
    return rows[0] if len(rows) == 1 else mx.concatenate(rows, axis=-1)


def slot_width(dim: int, bits: int) -> int:
    """Channels in one slot of `unpack_slots`: set by the narrowest field."""
    return dim * min(_FIELD_WIDTHS[bits]) // 8


def slot_sources(packed: mx.array, dim: int, bits: int) -> list[mx.array]:
    """The byte runs that `slot_codes` reads, as views of `packed` `(..., D * bits / 8)`, slot width each."""
    width = slot_width(dim, bits)
    if packed.shape[-1] == width:
        return [packed]
    return list(mx.split(packed, packed.shape[-1] // width, axis=-1))


def slot_codes(sources: list[mx.array], dim: int, bits: int) -> list[mx.array]:
    """Codes `(..., slot width)` uint8 of every slot, from `slot_sources`; elementwise, so it fuses under compile."""
    width = slot_width(dim, bits)
    slots = []
    for i in range(dim // width):
        code = None
        for field in fields(dim, bits):
            runs = (field.stop - field.start) // width
            source = sources[field.start // width + i % runs]
            part = (source >> (i // runs * field.width)) & ((1 << field.width) - 1)
            part = part << field.shift if field.shift else part
            code = part if code is None else code | part
        assert code is not None
        slots.append(code)
    return slots


def has_lanes(bits: int) -> bool:
    """Whether rows of `bits` bits have one field, whose bytes hold few codes: `lane_codes` unpacks them."""
    return bits in (2, 4)


def lane_codes(packed: mx.array, bits: int) -> mx.array:
    """`unpack` of rows with lanes, `(..., D)` uint8 in the order of lanes (`to_lanes`): one operation on whole rows.

    Each byte becomes an integer of as many bytes as it holds codes, which stay beside each other.
    """
    return _spread(bits)(packed).view(mx.uint8)


@cache
def _spread(bits: int) -> Callable[[mx.array], mx.array]:
    """Compiled: slot i of every byte to byte i of an integer."""
    slots = 8 // bits
    mask = sum(((1 << bits) - 1) << (8 * i) for i in range(slots))

    def spread(packed: mx.array) -> mx.array:
        x = packed.astype(mx.uint16 if slots == 2 else mx.uint32)
        total = x
        for i in range(1, slots):
            total = total | (x << (i * (8 - bits)))
        return total & mask

    return mx.compile(spread, shapeless=True)


def to_lanes(x: mx.array, bits: int) -> mx.array:
    """Channels `(..., D)` in the order of `lane_codes`: those of one byte side by side."""
    return x.reshape(*x.shape[:-1], 8 // bits, -1).swapaxes(-1, -2).reshape(x.shape)


def from_lanes(x: mx.array, bits: int) -> mx.array:
    """Inverse of `to_lanes`."""
    return x.reshape(*x.shape[:-1], -1, 8 // bits).swapaxes(-1, -2).reshape(x.shape)


def word_codes(packed: Sequence[mx.array], dim: int, stages: tuple[int, ...]) -> mx.array:
    """Codes `(..., D)` uint8 of packed stages `(..., D * bits / 8)`, the first the highest bits, in one operation.

    The same as `unpack` of each stage, shifted and joined, but on integers of up to 8 bytes: a slot's bytes are
    neighbours and so are its channels.
    """
    word, sources, steps, join = _word_reader(dim, stages)
    size = word.size
    views = [plane.view(word) for plane in packed]
    runs = [
        views[stage][..., start // size : stop // size].reshape(*packed[0].shape[:-1], *shape)
        for stage, start, stop, shape in sources
    ]
    return join(*runs, *steps).reshape(*packed[0].shape[:-1], dim // size).view(mx.uint8)


_Source = tuple[int, int, int, tuple[int, ...]]  # stage, first byte, end, shape of the words


@cache
def _word_reader(
    dim: int, stages: tuple[int, ...]
) -> tuple[mx.Dtype, list[_Source], list[mx.array], Callable[..., mx.array]]:
    """What `word_codes` needs: the integer, its runs of them, how far they are shifted, and the compiled function.

    Codes are `(widest fields' slots, narrow slots in one of them, words of a narrow slot)`; axes of size 1 left out.
    """
    shift, found = sum(stages), []
    for stage, bits in enumerate(stages):
        shift -= bits
        found += [(stage, field, shift + field.shift) for field in fields(dim, bits)]
    widths = [field.width for _, field, _ in found]
    wide, narrow = max(widths), min(widths)
    word = next(dtype for dtype in _WORDS if dim * narrow // 8 % dtype.size == 0)
    axes = (8 // wide, wide // narrow, dim * narrow // 8 // word.size)

    def shaped(*sizes: int) -> tuple[int, ...]:
        return tuple(size for size, whole in zip(sizes, axes, strict=True) if whole > 1)

    sources, steps = [], []
    for stage, field, _ in found:
        inner = axes[1] if field.width == wide else 1
        sources.append((stage, field.start, field.stop, shaped(1, inner, axes[2])))
        step = mx.arange(0, 8, field.width).astype(word)
        steps.append(step.reshape(shaped(axes[0], 8 // field.width // axes[0], 1)))
    mx.eval(steps)  # lazy arrays cannot cross threads
    ones = sum(1 << (8 * i) for i in range(word.size))

    def join(*arrays: mx.array) -> mx.array:
        total = None
        for (_, field, up), run, step in zip(found, arrays[: len(found)], arrays[len(found) :], strict=True):
            codes = (run >> step) & (ones * ((1 << field.width) - 1))
            codes = codes << up if up else codes
            total = codes if total is None else total | codes
        assert total is not None
        return total

    return word, sources, steps, mx.compile(join, shapeless=True)


def unpack(packed: mx.array, dim: int, bits: int) -> mx.array:
    """Inverse of `pack`: `(..., D * bits / 8)` uint8 to codes `(..., D)` uint8."""
    return mx.concatenate(slot_codes(slot_sources(packed, dim, bits), dim, bits), axis=-1)
