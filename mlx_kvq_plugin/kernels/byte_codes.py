"""Codes of up to four bits as 8-bit operands of integer products: levels from tables of bytes, four a register.

Four indices of one nibble each choose four bytes of a table in one instruction (`kvq_permute`), so codes are first
moved to the nibbles of words (`nibble words`: eight codes each). A table has eight entries; 16 levels take two, one for
the lower and one for the upper half of the codes, whose products add up: an index whose highest bit is set gives 0 or
-1, the sign of the entry, and the other table is one larger to make up for the -1.

The 32 levels of a trellis code take as much: 16 sizes, of which one table or the other gives a byte and the other one
0, and a sign: its bit is moved to the highest of a byte, which `kvq_permute` repeats, and the byte of ones turns `x`
into `-1 - x`. Levels then are half a unit above their bytes, which sums of the other operand make up for.

Levels are rounded to integers of at most 126 in a unit chosen for each number of bits (`byte_levels`): within 0.003 of
a standard deviation at 4 bits, 0.0013 at 3, less below; to 0.012 for 32 levels. Queries and weights, which are the
other operand, are two bytes each: 14 bits and a sign.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from ..codebooks import Codebook
from .codes import CodeLayout, coded_text, index_words, loader, moved

MAX_BITS = 4
SIGNED_BITS = 5  # of the codes whose tables hold sizes
LARGEST = 126  # of a level: one more is a byte too


@cache
def byte_levels(book: Codebook) -> tuple[tuple[int, ...], float]:
    """Levels of a codebook as ascending integers, and their unit: `integer * unit` is near the level.

    The unit is the one of least mean squared difference, by the probabilities of cells. With a sign, integers are odd:
    twice a byte, and 1.
    """
    levels = np.array(book.levels[len(book.levels) // 2 :])
    density = np.exp(-(levels**2) / 3)  # of cells of a Lloyd-Max quantizer, about
    units = levels[-1] / np.arange(LARGEST - 40, LARGEST + 0.4, 0.01)
    if book.bits == SIGNED_BITS:
        integers = 2 * np.clip(np.round(levels / units[:, None] - 0.5), 0, LARGEST) + 1
        units = units / 2
    else:
        integers = np.minimum(np.round(levels / units[:, None]), LARGEST)
    lost = np.sum(density * (integers * units[:, None] - levels) ** 2, axis=1)
    best = int(np.argmin(lost))
    half = tuple(int(x) for x in integers[best])
    return (*(-x for x in reversed(half)), *half), float(units[best])


def has_bytes(layout: CodeLayout) -> bool:
    """Whether the codes fit nibbles, or nibbles and signs of single bits."""
    return layout.bits <= MAX_BITS or (layout.bits == SIGNED_BITS and layout.generators != ())


def _signed(layout: CodeLayout) -> bool:
    return layout.bits == SIGNED_BITS


def tables(book: Codebook) -> list[tuple[int, int]]:
    """Tables of eight bytes, as two words each, whose entries are summed; see the module's text."""
    levels = list(byte_levels(book)[0])
    if book.bits == SIGNED_BITS:
        sizes = [level // 2 for level in levels[16:]]
        parts = [sizes[:8], sizes[8:]]
    elif book.bits == MAX_BITS:
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


def _single_bits(names: dict[int, str]) -> str:
    """Statements that join the words of four single bits, by place in the index, to nibble words `out[0..3]`."""
    text = ""
    for low in (0, 2):
        a, b = names[low], names[low + 1]
        text += f"  const kvq_uint even{low} = kvq_select(0x55555555u, {a}, {b} << 1);\n"
        text += f"  const kvq_uint odd{low} = kvq_select(0x55555555u, {a} >> 1, {b});\n"
    for j in range(4):
        kind = "odd" if j % 2 else "even"
        first, second = (f"{kind}0", f"{kind}2 << 2") if j < 2 else (f"{kind}0 >> 2", f"{kind}2")
        text += f"  out[{j}] = kvq_select(0x33333333u, {first}, {second});\n"
    return text


def _nibbles(side: str, layout: CodeLayout) -> str:
    """`<side>_nibbles(words of the fields, out)`: word j holds slots j, low nibble, and j + 4 / width of each byte.

    Of signed codes the nibbles choose sizes, and the word of signs follows: 1 for negative levels.
    """
    names = [f"w{i}" for i in range(len(layout.index_fields))]
    fields = list(zip(names, layout.index_fields, strict=True))
    body = ""
    step = layout.wide
    places = {field.shift: name for name, field in fields}
    if layout.generators and layout.bits >= MAX_BITS:
        if _signed(layout):
            sign = places.pop(MAX_BITS)
            body += f"  out[4] = kvq_not({sign});\n"
            body += "".join(f"  const kvq_uint s{place} = {name} ^ out[4];\n" for place, name in places.items())
            places = {place: f"s{place}" for place in places}
        body += _single_bits(places)
    elif layout.wide == 1 and len(fields) == 2:  # two single bits: first together, of every other slot
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
    """`<side>_lookup(nibbles, negative, high, out, stride)`: levels of the four low, or high, nibbles, from each table.

    `negative` counts for signed codes only, whose tables give one level: ones in the bytes of negative levels.
    """
    found = tables(layout.book)
    chosen = []
    for i, (low, high) in enumerate(found):
        index = "nibbles" if i == 0 else "kvq_flip(nibbles, 0x88888888u)"
        chosen.append(f"kvq_permute(0x{low:08x}u, 0x{high:08x}u, high ? {index} >> 16 : {index})")
    name, unit = side.upper(), byte_levels(layout.book)[1]
    if _signed(layout):
        body = f"  out[0] = ({' | '.join(chosen)}) ^ negative;\n"
        count, unit = 1, 2 * unit
    else:
        body = "".join(f"  out[{i} * stride] = {text};\n" for i, text in enumerate(chosen))
        count = len(found)
    return (
        f"#define KVQ_{name}_TABLES {count}\n#define KVQ_{name}_UNIT {unit:.9e}f\n"
        f"#define KVQ_{name}_SIGNED {int(_signed(layout))}\n"
        f"KVQ_FUNC void {side}_lookup(kvq_uint nibbles, kvq_uint negative, bool high, KVQ_PRIVATE kvq_uint* out, "
        f"int stride) {{\n{body}}}\n"
    )


def _signs_of(word: str, slot: int) -> str:
    """A word whose bytes have the bit of a slot at the place of their sign, for `kvq_permute` to repeat it."""
    return moved(word, 7 - slot)


def _shared_text(side: str, layout: CodeLayout, parts: int, upper: bool = False) -> str:
    """What both sides have: loads of one of `parts` parts of rows, coded bits, nibble words, lookups."""
    coded = coded_text(side, layout, parts, upper)
    return loader(side, layout, parts) + coded + _nibbles(side, layout) + _lookups(side, layout)


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
    signed = _signed(layout)
    text, found = index_words("key", layout, words, "words")
    body = text + f"  kvq_uint nibbles[{pairs + signed}];\n"
    for word, given in enumerate(found):
        body += f"  key_nibbles({', '.join(given)}, nibbles);\n"
        for j in range(pairs):
            first, second = (_signs_of("nibbles[4]", slot) for slot in (j, j + 4))
            for half in range(halves):
                at, high = (word * pairs + j) * halves + half, "true" if half else "false"
                order = "0xfbeau" if half else "0xd9c8u"
                negative = f"kvq_permute({first}, {second}, {order})" if signed else "0u"
                body += f"  key_lookup(nibbles[{j}], {negative}, {high}, out + {at}, {quads});\n"
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
    narrow = chunk < 4  # two tokens share a word, in bytes in turn
    upper = chunk == 2  # coded bits are in the high halves of words
    signed = _signed(layout)
    lines = [f"kvq_uint {name}[{pairs + signed}];" for name in ("p", "q", "r", "s")]
    lines.append("kvq_uint low, high, both;")
    own = {name: index_words("value", layout, words, name) for name in "abcd"}
    at = 0

    def negatives(byte: int, slot: int, word: int) -> str:
        """Ones in the bytes of those of four tokens whose level is negative."""
        if not signed:
            return "0u"
        if narrow:
            return f"kvq_permute({_signs_of('p[4]', slot)}, {_signs_of('q[4]', slot)}, {('0xd9c8u', '0xfbeau')[byte]})"
        ab, cd = (f"{'high' if byte > 1 else 'low'}_{pair}{word}" for pair in ("ab", "cd"))
        return f"kvq_permute({_signs_of(ab, slot)}, {_signs_of(cd, slot)}, {('0xdc98u', '0xfebau')[byte % 2]})"

    for word in range(words):
        tokens = {name: own[name][1][word] for name in "abcd"}
        if narrow:
            sides = {
                name: [
                    f"kvq_permute({x}, {y}, {'0x7362u' if upper and i >= len(layout.fields) else '0x5140u'})"
                    for i, (x, y) in enumerate(zip(tokens[first], tokens[second], strict=True))
                ]
                for name, first, second in (("p", "a", "c"), ("q", "b", "d"))
            }
        else:
            sides = {"p": tokens["a"], "q": tokens["b"], "r": tokens["c"], "s": tokens["d"]}
        lines += [f"value_nibbles({', '.join(given)}, {name});" for name, given in sides.items()]
        if signed and not narrow:  # signs of tokens a and b, and c and d, in bytes in turn: two bytes, then the others
            for name, order in (("low_ab", "0x5140u"), ("high_ab", "0x7362u")):
                lines.append(f"const kvq_uint {name}{word} = kvq_permute(p[4], q[4], {order});")
                lines.append(f"const kvq_uint {name[:-2]}cd{word} = kvq_permute(r[4], s[4], {order});")
        for j in range(pairs):
            for odd in range(2):

                def joined(x: str, y: str, j: int = j, odd: int = odd) -> str:
                    """Nibbles of two tokens in each byte: of the even, or the odd, nibbles."""
                    if odd:
                        return f"kvq_select(0x0f0f0f0fu, {x}[{j}] >> 4, {y}[{j}])"
                    return f"kvq_select(0x0f0f0f0fu, {x}[{j}], {y}[{j}] << 4)"

                lines.append(f"low = {joined('p', 'q')};")
                if narrow:
                    chosen = ["low"]
                else:
                    lines.append(f"high = {joined('r', 's')};")
                    chosen = [f"kvq_permute(low, high, {order})" for order in ("0x5140u", "0x7362u")]
                for i, some in enumerate(chosen):  # codes of four tokens in each half
                    lines.append(f"both = {some};")
                    for half in range(min(2, bytes_ - 2 * i)):
                        negative, high = negatives(2 * i + half, j + 4 * odd, word), "true" if half else "false"
                        lines.append(f"value_lookup(both, {negative}, {high}, out + {at}, {quads});")
                        at += 1
    assert at == quads
    body = "".join(own[name][0] for name in "abcd") + "".join(f"  {line}\n" for line in lines)
    slot = f"quad / {2 * bytes_} % {pairs} + quad / {bytes_} % 2 * {pairs}"
    byte = f"quad / {2 * bytes_ * pairs} * 4 + quad % {bytes_}"
    tokens_ = ", ".join(f"KVQ_PRIVATE const kvq_uint* {name}" for name in "abcd")
    return (
        _shared_text("value", layout, 8, upper)
        + f"KVQ_FUNC void value_quads({tokens_}, KVQ_PRIVATE kvq_uint* out) {{\n{body}}}\n"
        + "KVQ_FUNC int value_channel(int eighth, int quad) {\n"
        + f"  return ({slot}) * {layout.run} + eighth * {chunk} + {byte};\n}}\n"
    )
