"""Levels and tables of products of bytes."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_kvq_plugin.codebooks import odd_codebook
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.kernels.byte_codes import LARGEST, MAX_BITS, SIGNED_BITS, byte_levels, has_bytes, tables
from mlx_kvq_plugin.kernels.codes import code_layout

# Largest root mean squared difference to the codebook, in standard deviations of a coordinate.
LOST = {1: 1e-6, 2: 3e-4, 3: 1.5e-3, 4: 3.3e-3}


@pytest.mark.parametrize("bits", LOST)
def test_levels_are_near_those_of_the_codebook(bits: int) -> None:
    integers, unit = byte_levels(odd_codebook(bits))
    levels, codebook = np.array(integers) * unit, odd_codebook(bits)
    assert list(integers) == sorted(integers) and [-x for x in reversed(integers)] == list(integers)
    assert max(integers) <= LARGEST
    x = np.random.default_rng(1).standard_normal(200_000)
    codes = np.searchsorted(np.array(codebook.levels[:-1]) + np.diff(codebook.levels) / 2, x)
    assert np.sqrt(np.mean((levels[codes] - np.array(codebook.levels)[codes]) ** 2)) <= LOST[bits]
    assert np.mean((levels[codes] - x) ** 2) <= 1.002 * np.mean((np.array(codebook.levels)[codes] - x) ** 2)


def chosen(table: tuple[int, int], nibble: int) -> int:
    """What `kvq_permute` chooses from a table, as a signed byte."""
    byte = int(np.array(table, np.uint32).view(np.int8)[nibble & 7])
    return (-1 if byte < 0 else 0) if nibble & 8 else byte


@pytest.mark.parametrize("bits", LOST)
def test_tables_sum_to_levels(bits: int) -> None:
    found = tables(odd_codebook(bits))
    assert len(found) == (2 if bits == MAX_BITS else 1)
    for code, level in enumerate(byte_levels(odd_codebook(bits))[0]):
        assert sum(chosen(table, code ^ (8 if i else 0)) for i, table in enumerate(found)) == level


@pytest.mark.parametrize("bits", [3, 4])
def test_signed_tables_give_sizes(bits: int) -> None:
    book = get_codec(f"tcq{bits}").book
    assert book.bits == SIGNED_BITS
    (low, high), (integers, unit) = tables(book), byte_levels(book)
    assert max(integers) <= 2 * LARGEST + 1 and np.abs(np.array(integers) * unit - np.array(book.levels)).max() < 0.012
    for index, level in enumerate(integers):
        sign = index >> 4
        nibble = index & 15 if sign else ~index & 15
        size = chosen(low, nibble) | chosen(high, nibble ^ 8)
        byte = size if sign else ~size
        assert 2 * byte + 1 == level  # half a unit above the byte


def test_codes_of_up_to_four_bits_have_bytes() -> None:
    names = ("tq1", "tq2", "tq3", "tq4", "tq5", "tq6", "rvq1", "rvq2", "rvq3")
    assert {name for name in names if not has_bytes(code_layout(get_codec(name), 128))} == {
        name for name in names if code_layout(get_codec(name), 128).bits > MAX_BITS
    }
    assert all(has_bytes(code_layout(get_codec(f"tcq{bits}"), 128)) for bits in (1, 2, 3, 4))
