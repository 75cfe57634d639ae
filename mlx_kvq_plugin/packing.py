"""Packing of b-bit codes into bytes: the one text on bit order.

A row of ``dim`` codes of ``bits`` bits is a row of ``dim * bits / 8`` bytes, made of *fields* of 1, 2 or 4 bits
(3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, low bits first), each field contiguous. In a field of width ``p`` byte ``w`` of
``W = dim * p / 8`` holds the codes of channels ``w, W + w, 2 W + w, ...``, the first in its lowest bits. Unpacking is
then a shift and a mask of whole rows: slot ``i`` of the bytes is the run of channels ``[i W, (i + 1) W)``, and no code
ever straddles a byte. ``dim`` must be a multiple of 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .errors import CodecError

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


def lanes(dim: int, bits: int) -> int:
    """L, the slots in one integer of `lane_words`."""
    return min(4, dim // slot_width(dim, bits))


def lane_words(sources: list[mx.array], dim: int, bits: int) -> list[mx.array]:
    """Codes of L slots a word, the slot in the byte: `(..., slot width)` uint16 or uint32 for each part of the slots.

    From `slot_sources`; elementwise, so it fuses under compile.
    """
    width, count = slot_width(dim, bits), lanes(dim, bits)
    dtype = mx.uint16 if count == 2 else mx.uint32
    found = []
    for part in range(dim // width // count):
        word = None
        for field in fields(dim, bits):
            runs = (field.stop - field.start) // width
            first = field.start // width
            bytes_ = sources[first].astype(dtype)
            for i in range(1, runs):
                bytes_ = bytes_ | (sources[first + i].astype(dtype) << (8 * i))
            passed = part * count // runs * field.width
            lane = _spread(bytes_ >> passed if passed else bytes_, field.width, runs, count)
            lane = lane << field.shift if field.shift else lane
            word = lane if word is None else word | lane
        assert word is not None
        found.append(word)
    return found


def _spread(x: mx.array, width: int, runs: int, count: int) -> mx.array:
    """The lowest codes of the `runs` bytes of every integer to its `count` byte lanes: of byte k to k + j runs."""
    mask = sum(((1 << width) - 1) << (8 * i) for i in range(count))
    if width == 1 and count == 4:
        return ((x & 15) * 0x00204081) & mask  # four copies, seven bits apart
    spread = x
    for j in range(1, count // runs):
        spread = spread | (x << (j * (8 * runs - width)))
    return spread & mask


def to_lanes(x: mx.array, bits: int) -> mx.array:
    """Channels `(..., D)` in the order of the bytes of `lane_words`."""
    dim = x.shape[-1]
    count = lanes(dim, bits)
    split = x.reshape(*x.shape[:-1], -1, count, slot_width(dim, bits))
    return split.swapaxes(-1, -2).reshape(x.shape)


def from_lanes(x: mx.array, bits: int) -> mx.array:
    """Inverse of `to_lanes`."""
    dim = x.shape[-1]
    count = lanes(dim, bits)
    split = x.reshape(*x.shape[:-1], -1, slot_width(dim, bits), count)
    return split.swapaxes(-1, -2).reshape(x.shape)


def unpack(packed: mx.array, dim: int, bits: int) -> mx.array:
    """Inverse of `pack`: `(..., D * bits / 8)` uint8 to codes `(..., D)` uint8."""
    return mx.concatenate(slot_codes(slot_sources(packed, dim, bits), dim, bits), axis=-1)
