"""Packing: the documented bit order, exact sizes and the way back."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvq_plugin.errors import CodecError
from mlx_kvq_plugin.packing import (
    fields,
    from_lanes,
    has_lanes,
    lane_codes,
    pack,
    packed_width,
    slot_codes,
    slot_sources,
    slot_width,
    to_lanes,
    unpack,
    word_codes,
)

BITS = (1, 2, 3, 4, 5, 6)
DIMS = (64, 80, 96, 112, 128, 192, 256, 512)
FIELDS = {1: [(1, 0)], 2: [(2, 0)], 3: [(2, 0), (1, 2)], 4: [(4, 0)], 5: [(4, 0), (1, 4)], 6: [(4, 0), (2, 4)]}

each_bits = pytest.mark.parametrize("bits", BITS)
each_dim = pytest.mark.parametrize("dim", DIMS)


def packed_bit_by_bit(codes: np.ndarray, bits: int) -> np.ndarray:
    """The documented order, one bit at a time: `codes` `(D,)`."""
    rows = []
    for width, shift in FIELDS[bits]:
        row = np.zeros(len(codes) * width // 8, dtype=np.uint8)
        for channel, code in enumerate(codes):
            slot, byte = divmod(channel, len(row))
            for bit in range(width):
                row[byte] |= ((int(code) >> (shift + bit)) & 1) << (slot * width + bit)
        rows.append(row)
    return np.concatenate(rows)


def random_codes(shape: tuple[int, ...], bits: int) -> np.ndarray:
    return np.random.default_rng(bits).integers(0, 2**bits, shape).astype(np.uint8)


@each_bits
@each_dim
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_unpacking_gives_the_codes_back(bits: int, dim: int, data: st.DataObject) -> None:
    contents = data.draw(st.binary(min_size=dim, max_size=dim))
    codes = np.frombuffer(contents, dtype=np.uint8) & (2**bits - 1)
    np.testing.assert_array_equal(np.array(unpack(pack(mx.array(codes), bits), dim, bits)), codes)


@each_bits
@each_dim
def test_bytes_follow_the_documented_bit_order(bits: int, dim: int) -> None:
    codes = random_codes((dim,), bits)
    np.testing.assert_array_equal(np.array(pack(mx.array(codes), bits)), packed_bit_by_bit(codes, bits))


@each_bits
@each_dim
def test_a_row_takes_exactly_its_bits(bits: int, dim: int) -> None:
    packed = pack(mx.array(random_codes((2, 3, 5, dim), bits)), bits)
    assert packed.dtype == mx.uint8
    assert packed.nbytes * 8 == 2 * 3 * 5 * dim * bits
    assert packed.shape == (2, 3, 5, packed_width(dim, bits))


@pytest.mark.parametrize(
    ("bits", "codes", "golden"),
    [
        (1, [1, 0, 0, 1, 1, 0, 1, 0], "59"),
        (2, [0, 1, 2, 3, 3, 2, 1, 0], "782d"),
        (3, [0, 1, 2, 3, 4, 5, 6, 7], "88ddf0"),
        (4, [0, 1, 2, 3, 12, 13, 14, 15], "c0d1e2f3"),
        (5, [0, 1, 2, 3, 28, 13, 30, 15], "c0d1e2f350"),
        (6, [0, 17, 34, 51, 60, 45, 30, 15], "c0d1e2f3782d"),
    ],
)
def test_small_rows_have_their_golden_bytes(bits: int, codes: list[int], golden: str) -> None:
    assert bytes(np.array(pack(mx.array(codes, dtype=mx.uint8), bits))).hex() == golden


@each_bits
@each_dim
def test_fields_tile_the_row_low_bits_first(bits: int, dim: int) -> None:
    found = fields(dim, bits)
    assert [(field.width, field.shift) for field in found] == FIELDS[bits]
    assert [field.start for field in found] == [0, *(field.stop for field in found[:-1])]
    assert [field.stop - field.start for field in found] == [dim * width // 8 for width, _ in FIELDS[bits]]


@each_bits
@each_dim
def test_slots_are_runs_of_channels(bits: int, dim: int) -> None:
    codes = random_codes((2, 1, 3, dim), bits)
    width = slot_width(dim, bits)
    slots = slot_codes(slot_sources(pack(mx.array(codes), bits), dim, bits), dim, bits)
    assert len(slots) * width == dim
    for i, slot in enumerate(slots):
        np.testing.assert_array_equal(np.array(slot), codes[..., i * width : (i + 1) * width])


@each_dim
@pytest.mark.parametrize("bits", [bits for bits in BITS if has_lanes(bits)])
def test_lanes_are_the_codes_of_one_byte_side_by_side(bits: int, dim: int) -> None:
    codes = random_codes((2, 1, 3, dim), bits)
    found = lane_codes(pack(mx.array(codes), bits), bits)
    slots = codes.reshape(2, 1, 3, 8 // bits, -1)
    beside = np.stack([slots[..., i, :] for i in range(8 // bits)], axis=-1).reshape(codes.shape)
    np.testing.assert_array_equal(np.array(found), beside)
    np.testing.assert_array_equal(np.array(to_lanes(mx.array(codes), bits)), beside)
    np.testing.assert_array_equal(np.array(from_lanes(found, bits)), codes)


@each_dim
@pytest.mark.parametrize("stages", [*((bits,) for bits in BITS), (1, 1), (2, 2), (3, 3), (1, 2)])
def test_words_unpack_to_the_joined_codes_of_all_stages(stages: tuple[int, ...], dim: int) -> None:
    codes = [mx.array(random_codes((2, 1, 3, dim), bits)) for bits in stages]
    joined = np.zeros((2, 1, 3, dim), dtype=np.uint8)
    for stage, bits in zip(codes, stages, strict=True):
        joined = (joined << bits) | np.array(stage)
    found = word_codes([pack(stage, bits) for stage, bits in zip(codes, stages, strict=True)], dim, stages)
    np.testing.assert_array_equal(np.array(found), joined)


@pytest.mark.parametrize("stages", [(3,), (1, 1)])
def test_words_are_read_from_a_part_of_the_rows(stages: tuple[int, ...]) -> None:
    codes = mx.array(random_codes((2, 3, 9, 64), sum(stages)))
    planes = [pack(codes, 3)] if len(stages) == 1 else [pack(codes >> 1, 1), pack(codes & 1, 1)]
    found = word_codes([plane[:, :, 2:7] for plane in planes], 64, stages)
    np.testing.assert_array_equal(np.array(found), np.array(codes[:, :, 2:7]))


@each_bits
def test_rows_are_packed_one_by_one(bits: int) -> None:
    codes = random_codes((2, 3, 5, 80), bits)
    packed = np.array(pack(mx.array(codes), bits))
    for index in np.ndindex(2, 3, 5):
        np.testing.assert_array_equal(packed[index], packed_bit_by_bit(codes[index], bits))


@pytest.mark.parametrize("bits", [-1, 0, 7, 8])
def test_bits_outside_one_to_six_are_refused(bits: int) -> None:
    with pytest.raises(CodecError, match=rf"^codes must have 1 to 6 bits, got {bits}; choose one of \[1, 2, 3, 4, 5"):
        packed_width(64, bits)
    with pytest.raises(CodecError, match=f"got {bits}"):
        pack(mx.zeros((64,), dtype=mx.uint8), bits)


@pytest.mark.parametrize("dim", [0, 4, 60, 100])
def test_head_sizes_that_are_no_multiple_of_eight_are_refused(dim: int) -> None:
    with pytest.raises(CodecError, match=rf"^the head size must be a positive multiple of 8 to pack, got {dim}; use"):
        packed_width(dim, 4)
    with pytest.raises(CodecError, match=f"got {dim}"):
        pack(mx.zeros((2, dim), dtype=mx.uint8), 4)
