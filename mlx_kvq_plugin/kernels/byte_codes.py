"""Codes of up to four bits as 8-bit operands of integer products: levels from tables of bytes, four a register.

Four indices of one nibble each choose four bytes of a table in one instruction (`kvq_permute`), so codes are first
moved to the nibbles of words (`nibble words`: eight codes each). A table has eight entries; 16 levels take two, one for
the lower and one for the upper half of the codes, whose products add up: an index whose highest bit is set gives 0 or
-1, the sign of the entry, and the other table is one larger to make up for the -1.

Levels are rounded to integers of at most 126 in a unit chosen for each number of bits (`byte_levels`): within 0.003 of
a standard deviation at 4 bits, 0.0013 at 3, less below. Queries and weights, which are the other operand, are two bytes
each: 14 bits and a sign.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from ..codebooks import odd_codebook
from .codes import CodeLayout, loader, moved

MAX_BITS = 4
LARGEST = 126  # of a level: one more is a byte too


@cache
def byte_levels(bits: int) -> tuple[tuple[int, ...], float]:
    """Levels of `odd_codebook(bits)` as ascending integers, and their unit: `integer * unit` is near the level.

    The unit is the one of least mean squared difference, by the probabilities of cells.
    """
    book = odd_codebook(bits)
    levels = np.array(book.levels[len(book.levels) // 2 :])
    density = np.exp(-(levels**2) / 3)  # of cells of a Lloyd-Max quantizer, about
    units = levels[-1] / np.arange(LARGEST - 40, LARGEST + 0.4, 0.01)
    integers = np.minimum(np.round(levels / units[:, None]), LARGEST)
    lost = np.sum(density * (integers * units[:, None] - levels) ** 2, axis=1)
    best = int(np.argmin(lost))
    half = tuple(int(x) for x in integers[best])
    return (*(-x for x in reversed(half)), *half), float(units[best])


def has_bytes(layout: CodeLayout) -> bool:
    """Whether the codes fit nibbles."""
    return layout.bits <= MAX_BITS


def tables(bits: int) -> list[tuple[int, int]]:
    """Tables of eight bytes, as two words each, whose entries are summed; see the module's text."""
    levels = list(byte_levels(bits)[0])
    if bits == MAX_BITS:
        parts = [levels[:8], [level + 1 for level in levels[8:]]]
    else:
        parts = [levels + [0] * (8 - len(levels))]
    words = [np.array(part, np.int8).view(np.uint32) for part in parts]
    return [(int(low), int(high)) for low, high in words]


def _repeated(mask: int) -> int:
    """A mask of four bits in every nibble."""
    return mask * 0x11111111


def _partner(layout: CodeLayout) -> int:
    """How many slots lie between the two codes of a byte of a nibble word."""
    return 4 // layout.wide


def _nibbles(side: str, layout: CodeLayout) -> str:
    """`<side>_nibbles(words of the fields, out)`: word j holds slots j, low nibble, and j + 4 / width of each byte."""
    names = [f"w{i}" for i in range(len(layout.fields))]
    fields = list(zip(names, layout.fields, strict=True))
    body = ""
    step = layout.wide
    if layout.wide == 1 and len(fields) == 2:  # two single bits: first together, of every other slot
        low, high = sorted(fields, key=lambda item: item[1].shift)
        body += f"  const kvq_uint even = kvq_select(0x55555555u, {low[0]}, {high[0]} << 1);\n"
        body += f"  const kvq_uint odd = kvq_select(0x55555555u, {low[0]} >> 1, {high[0]});\n"
        for j in range(4):
            word = moved("odd" if j % 2 else "even", -2 * (j // 2))
            body += f"  out[{j}] = {word} & 0x33333333u;\n"
    elif layout.wide == MAX_BITS:
        body += f"  out[0] = {names[0]};\n"
    else:
        for j in range(_partner(layout)):
            terms = [
                f"({moved(name, field.shift - j * step)} & 0x{_repeated(((1 << field.width) - 1) << field.shift):08x}u)"
                for name, field in fields
            ]
            body += f"  out[{j}] = {' | '.join(terms)};\n"
    parameters = ", ".join(f"kvq_uint {name}" for name in names)
    return f"KVQ_FUNC void {side}_nibbles({parameters}, KVQ_PRIVATE kvq_uint* out) {{\n{body}}}\n"


def _lookups(side: str, layout: CodeLayout) -> str:
    """`<side>_lookup(nibbles, high, out, stride)`: levels of the four low, or high, nibbles, from each table."""
    found = tables(layout.bits)
    body = ""
    for i, (low, high) in enumerate(found):
        index = "nibbles" if i == 0 else "(nibbles ^ 0x88888888u)"
        body += f"  out[{i} * stride] = kvq_permute(0x{low:08x}u, 0x{high:08x}u, high ? {index} >> 16 : {index});\n"
    name = side.upper()
    return (
        f"#define KVQ_{name}_TABLES {len(found)}\n#define KVQ_{name}_UNIT {byte_levels(layout.bits)[1]:.9e}f\n"
        f"KVQ_FUNC void {side}_lookup(kvq_uint nibbles, bool high, KVQ_PRIVATE kvq_uint* out, int stride) "
        f"{{\n{body}}}\n"
    )


def _given(layout: CodeLayout, words: int, word: int, name: str) -> list[str]:
    return [f"{name}[{i * words + word}]" for i in range(len(layout.fields))]


def _shared_text(side: str, layout: CodeLayout, parts: int) -> str:
    """What both sides have: loads of one of `parts` parts of rows, nibble words, lookups."""
    return loader(side, layout, parts) + _nibbles(side, layout) + _lookups(side, layout)


def key_bytes_text(layout: CodeLayout) -> str:
    """Functions and constants of a key codec.

    * `key_fields`, `key_load`: as of `codes.key_text`
    * `key_quads(words, out)`: `dim / 16` registers of four levels each, a table after the other
    * `key_channel(quarter, quad, i)`: the channel of one of the four
    """
    chunk = layout.run // 4
    words, pairs, slots = -(-chunk // 4), _partner(layout), layout.slots
    halves = 2 if chunk >= 4 else 1
    quads = layout.dim // 16
    body = f"  kvq_uint nibbles[{pairs}];\n"
    for word in range(words):
        body += f"  key_nibbles({', '.join(_given(layout, words, word, 'words'))}, nibbles);\n"
        for j in range(pairs):
            for half in range(halves):
                at = (word * pairs + j) * halves + half
                body += f"  key_lookup(nibbles[{j}], {'true' if half else 'false'}, out + {at}, {quads});\n"
    byte = f"quad / {pairs * halves} * 4 + quad % {halves} * 2 + i / 2"
    slot = f"quad / {halves} % {pairs} + i % 2 * {pairs}"
    assert words * pairs * halves == quads and slots == 2 * pairs
    return (
        _shared_text("key", layout, 4)
        + f"KVQ_FUNC void key_quads(KVQ_PRIVATE const kvq_uint* words, KVQ_PRIVATE kvq_uint* out) {{\n{body}}}\n"
        + "KVQ_FUNC int key_channel(int quarter, int quad, int i) {\n"
        + f"  return ({slot}) * {layout.run} + quarter * {chunk} + {byte};\n}}\n"
    )


def value_bytes_text(layout: CodeLayout) -> str:
    """Functions and constants of a value codec.

    * `value_fields`, `value_load`: as of `codes.value_text`
    * `value_quads(a, b, c, d, out)`: `dim / 8` registers of the levels of four tokens, a table after the other
    * `value_channel(eighth, quad)`: their channel
    """
    chunk = layout.run // 8
    words, pairs = -(-chunk // 4), _partner(layout)
    bytes_ = min(4, chunk)
    quads = layout.dim // 8
    narrow = chunk < 4  # two tokens share a word
    lines = [f"kvq_uint {name}[{pairs}];" for name in ("p", "q", "r", "s")]
    lines.append("kvq_uint low, high, both;")
    at = 0
    for word in range(words):
        tokens = {name: _given(layout, words, word, name) for name in "abcd"}
        if narrow:
            sides = {
                "p": [f"kvq_low_halves({x}, {y})" for x, y in zip(tokens["a"], tokens["c"], strict=True)],
                "q": [f"kvq_low_halves({x}, {y})" for x, y in zip(tokens["b"], tokens["d"], strict=True)],
            }
        else:
            sides = {"p": tokens["a"], "q": tokens["b"], "r": tokens["c"], "s": tokens["d"]}
        lines += [f"value_nibbles({', '.join(given)}, {name});" for name, given in sides.items()]
        for j in range(pairs):
            for odd in range(2):

                def joined(x: str, y: str, j: int = j, odd: int = odd) -> str:
                    """Nibbles of two tokens in each byte: of the even, or the odd, nibbles."""
                    if odd:
                        return f"kvq_select(0x0f0f0f0fu, {x}[{j}] >> 4, {y}[{j}])"
                    return f"kvq_select(0x0f0f0f0fu, {x}[{j}], {y}[{j}] << 4)"

                lines.append(f"low = {joined('p', 'q')};")
                if narrow:
                    chosen = ["kvq_permute(low, low, 0x3120u)"]
                else:
                    lines.append(f"high = {joined('r', 's')};")
                    chosen = ["kvq_permute(low, high, 0x5140u)", "kvq_permute(low, high, 0x7362u)"]
                for i, some in enumerate(chosen):
                    lines.append(f"both = {some};")
                    for half in range(2):
                        if 2 * i + half < bytes_:
                            lines.append(f"value_lookup(both, {'true' if half else 'false'}, out + {at}, {quads});")
                            at += 1
    assert at == quads
    body = "".join(f"  {line}\n" for line in lines)
    slot = f"quad / {2 * bytes_} % {pairs} + quad / {bytes_} % 2 * {pairs}"
    byte = f"quad / {2 * bytes_ * pairs} * 4 + quad % {bytes_}"
    tokens_ = ", ".join(f"KVQ_PRIVATE const kvq_uint* {name}" for name in "abcd")
    return (
        _shared_text("value", layout, 8)
        + f"KVQ_FUNC void value_quads({tokens_}, KVQ_PRIVATE kvq_uint* out) {{\n{body}}}\n"
        + "KVQ_FUNC int value_channel(int eighth, int quad) {\n"
        + f"  return ({slot}) * {layout.run} + eighth * {chunk} + {byte};\n}}\n"
    )
