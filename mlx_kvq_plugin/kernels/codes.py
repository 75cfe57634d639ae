"""How a kernel reads packed scalar codes: the text of a codec's decode functions, from the layout of its planes.

A row of codes consists of fields (packing.py): runs of bytes in which byte j holds a code's bits of channels j, j + W,
j + 2 W, ... in slots. The kernel of attention decodes two codes at a time. Bits of both are moved to the mantissas of
two half precision numbers whose exponent is chosen so that one subtraction leaves the centred index
`t = (2 i + 1) / 2^b - 1` exactly; the codebook, an odd polynomial, then takes two or three fused multiply-adds. The
leading coefficient is left out and multiplied into queries and sums (`key_lead`, `value_lead`). Codes of one and two
bits need no exponent: as subnormal numbers they give `sigma t`, with a sigma of each slot, after one multiply-add.

Rows of a trellis code (trellis.py) have single bits only. The coded bits of an index are parities of the bits before a
channel, of 32 channels in one operation each, and become words like those of stored bits.

Which channels a lane decodes follows from what is cheap to load: keys `(token, channel)` in quarters of a row, values
`(channel, token)` in eighths. Products sum over channels in any order, so queries are put into the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..codebooks import Codebook
from ..codecs import Codec
from ..packing import fields
from ..rotation import HADAMARD
from ..trellis import MEMORY

HEAD_SIZES = (64, 128, 256)


@dataclass(frozen=True)
class CodeField:
    """`width` bits of every code, from byte `start` on of a row of plane number `plane`, worth `1 << shift` each."""

    plane: int
    start: int
    width: int
    shift: int


@dataclass(frozen=True)
class CodeLayout:
    """The planes of a scalar codec at one head size.

    Attributes:
        dim, bits: channels, and bits of a code.
        fields: the widest first; all widths divide the first.
        planes: names of the code planes, as numbered by the fields.
        row_bytes: bytes of a row of each plane.
        book: the levels, by index.
        generators: of the coded bits of a trellis code, the lowest bits of an index, which no field holds. The trellis
            bits are the first of a row.
    """

    dim: int
    bits: int
    fields: tuple[CodeField, ...]
    planes: tuple[str, ...]
    row_bytes: tuple[int, ...]
    book: Codebook
    generators: tuple[int, ...] = ()

    @property
    def index_fields(self) -> tuple[CodeField, ...]:
        """The fields, and the coded bits in words like those of fields."""
        return self.fields + tuple(CodeField(0, 0, 1, i) for i in range(len(self.generators)))

    @property
    def wide(self) -> int:
        """Bits of the widest field: the distance of slots in a byte."""
        return self.index_fields[0].width

    @property
    def slots(self) -> int:
        """Codes that share a byte of the widest field."""
        return 8 // self.wide

    @property
    def run(self) -> int:
        """Bytes of the widest field, W."""
        return self.dim * self.wide // 8


def scalar_stages(codec: Codec) -> tuple[int, ...]:
    """Bits of an index, in parts, of a codec that kernels know, `()` for others; loads codecs on first use only."""
    if codec.family not in ("tq", "rvq", "tcq"):
        return ()
    from ..codecs.rvq import RVQ
    from ..codecs.trellis import TrellisCoded
    from ..codecs.turboquant import TurboQuant

    if type(codec) in (TurboQuant, RVQ, TrellisCoded):
        assert isinstance(codec, TurboQuant)
        return codec.stages
    return ()


def has_kernels(codec: Codec) -> bool:
    """Whether kernels read the codec's planes at some head sizes."""
    return scalar_stages(codec) != () and codec.rotation == HADAMARD


def why_not_codes(codec: Codec, dim: int) -> str:
    """Why kernels cannot read the codec's planes at a head size; empty if they can."""
    if not scalar_stages(codec):
        return f"codec {codec.name} has no kernel"
    if codec.rotation != HADAMARD:
        return f"rotation {codec.rotation} has no kernel"
    if dim not in HEAD_SIZES:
        return f"head size {dim} has no kernel"
    return ""


def code_layout(codec: Codec, dim: int) -> CodeLayout:
    """The layout of a codec that `why_not_codes` accepts."""
    from ..codecs.trellis import TrellisCoded
    from ..codecs.turboquant import TurboQuant

    assert isinstance(codec, TurboQuant)
    if isinstance(codec, TrellisCoded):
        width, highest = dim // 8, codec.book.bits - 1
        stored = tuple(CodeField(0, (i + 1) * width, 1, highest - i) for i in range(codec.bits - 1))
        row = codec.bits * width
        return CodeLayout(dim, codec.book.bits, stored, ("codes",), (row,), codec.book, codec.code.generators)
    stages = scalar_stages(codec)
    names = ("codes",) if len(stages) == 1 else ("stage1", "stage2")
    found, below = [], sum(stages)
    for plane, bits in enumerate(stages):
        below -= bits
        found += [CodeField(plane, f.start, f.width, below + f.shift) for f in fields(dim, bits)]
    found.sort(key=lambda field: -field.width)
    return CodeLayout(dim, sum(stages), tuple(found), names, tuple(dim * bits // 8 for bits in stages), codec.book)


def _half(x: float) -> str:
    """Two copies of a half precision number."""
    bits = int(np.array(x, dtype=np.float16).view(np.uint16))
    return f"0x{bits:04x}{bits:04x}u"


def _polynomial(book: Codebook) -> tuple[str, float]:
    """Statements from `t` to `y`, and the factor that they leave out; of three bits and more."""
    c = book.coefficients
    if len(c) == 3:  # t (t^4 + p t^2 + q) = t ((t^2 + p / 2)^2 + q - p^2 / 4)
        p, q = c[1] / c[2], c[0] / c[2]
        square = f"kvq_uint u = kvq_hfma2(t, t, {_half(p / 2)});"
        return f"{square} kvq_uint y = kvq_hmul2(kvq_hfma2(u, u, {_half(q - p * p / 4)}), t);", c[2]
    text = f"kvq_uint s = kvq_hmul2(t, t); kvq_uint y = kvq_hfma2(s, {_half(c[-1])}, {_half(c[-2])});"
    for coefficient in c[-3::-1]:
        text += f" y = kvq_hfma2(y, s, {_half(coefficient)});"
    return text + " y = kvq_hmul2(y, t);", 1.0


def moved(word: str, shift: int) -> str:
    return f"({word} << {shift})" if shift > 0 else f"({word} >> {-shift})" if shift else word


def _both(mask: int) -> int:
    return mask | mask << 16


def _small(bits: int) -> bool:
    """Whether levels are decoded from subnormal numbers, which takes one operation less (`_small_level`)."""
    return bits <= 2


def _size(layout: CodeLayout, slot: int) -> float:
    """sigma of a slot of a small codec: its decoded index is `u = sigma t`."""
    half = layout.slots // 2
    return 2.0 ** -((half - 1 - slot % half) * layout.wide)


def _small_level(layout: CodeLayout, slot: int, masked: str) -> str:
    """One or two bits at a place of the mantissa that no exponent goes with are the subnormal number c 2^(p - 24)."""
    size = _size(layout, slot)
    u = f"kvq_hfma2({masked}, {_half(2.0**15)}, {_half(-(1 - 2.0**-layout.bits) * size)})"
    if layout.bits == 1:
        return u
    c = layout.book.coefficients
    return f"kvq_cubic({u}, {_half(c[0] / c[1] * size * size)})"


def _slot_lead(layout: CodeLayout, slot: int) -> float:
    """What decoded levels of a slot have to be multiplied by."""
    c = layout.book.coefficients
    if _small(layout.bits):
        return float(c[-1] / _size(layout, slot) ** (2 * len(c) - 1))
    return _polynomial(layout.book)[1]


def _lead(side: str, layout: CodeLayout) -> str:
    """`<side>_lead(slot)`: `_slot_lead` as a function."""
    leads = [_slot_lead(layout, slot) for slot in range(layout.slots)]
    text = f"{leads[-1]:.9e}f"
    for slot, lead in enumerate(leads[:-1]):
        if lead != leads[-1]:
            text = f"slot == {slot} ? {lead:.9e}f : {text}"
    return f"KVQ_FUNC float {side}_lead(int slot) {{ return {text}; }}\n"


def _levels(side: str, layout: CodeLayout, both_bytes: bool) -> str:
    """`<side>_levels(words of the fields, masks, out)`: pairs of levels of all slots of the bytes in two half words.

    The pairs of the low bytes come first, then, with `both_bytes`, those of the high bytes. `<side>_masks(masks)` fills
    the masks, once: an instruction takes one constant, so masks that are registers save a move at every use.
    """
    bits, wide, slots = layout.bits, layout.wide, layout.slots
    small = _small(bits)
    halves = 1 if bits <= wide + 1 else 2  # of a byte, so that the highest slot stays inside the mantissa
    stride = -(-bits // wide)  # slots this far apart do not overlap when all bits of a code stand together
    names = [f"w{i}" for i in range(len(layout.index_fields))]
    body, out = "", 0
    masks: dict[int, int] = {}
    for high_byte in range(2 if both_bytes else 1):
        for half in range(halves):
            base = 1 - 8 * high_byte - (4 * half if halves == 2 else 0)
            chosen = range(half * slots // halves, (half + 1) * slots // halves)
            first = chosen[0] * wide
            merged: dict[int, str] = {}
            for rest in range(min(stride, len(chosen))):
                terms = []
                for name, field in zip(names, layout.index_fields, strict=True):
                    mask = 0
                    for slot in chosen[rest::stride]:
                        mask |= ((1 << field.width) - 1) << (slot * wide - first + 1 + field.shift)
                    terms.append((moved(name, base + field.shift), _both(mask)))
                text = terms[0][0]
                for term, mask in terms[1:]:
                    text = f"kvq_select(0x{mask:08x}u, {term}, {text})"
                merged[rest] = f"m{high_byte}{half}{rest}"
                body += f"  const kvq_uint {merged[rest]} = {text};\n"
            for i, slot in enumerate(chosen):
                word, p = merged[i % stride], i * wide + 1
                keep = _both(((1 << bits) - 1) << p)
                if small:
                    up = 10 - bits - (slots // 2 - 1 - slot % (slots // 2)) * wide - p
                    level = _small_level(
                        layout, slot, f"({moved(word, up)} & 0x{_both(((1 << bits) - 1) << p + up):08x}u)"
                    )
                else:
                    exponent = 11 - bits - p
                    magic = _both((exponent + 15) << 10 | 1 << (p - 1))
                    centre = _half(-(2.0**exponent + 1.0))
                    mask = masks.setdefault(keep, len(masks))
                    level = f"{side}_level(({word} & masks[{mask}]) | 0x{magic:08x}u, {centre})"
                body += f"  out[{out}] = {level};\n"
                out += 1
    level = ""
    if not small:
        level = (
            f"KVQ_FUNC kvq_uint {side}_level(kvq_uint x, kvq_uint centre) "
            f"{{ kvq_uint t = kvq_hadd2(x, centre); {_polynomial(layout.book)[0]} return y; }}\n"
        )
    parameters = ", ".join(f"kvq_uint {name}" for name in names)
    filled = "".join(f"  masks[{i}] = kvq_opaque(0x{mask:08x}u);\n" for mask, i in masks.items())
    return (
        f"{level}#define KVQ_{side.upper()}_MASKS {max(1, len(masks))}\n"
        f"KVQ_FUNC void {side}_masks(KVQ_PRIVATE kvq_uint* masks) {{\n  masks[0] = 0u;\n{filled}}}\n"
        f"KVQ_FUNC void {side}_levels({parameters}, KVQ_PRIVATE const kvq_uint* masks, KVQ_PRIVATE kvq_uint* out) "
        f"{{\n{body}}}\n"
    )


def _load(size: int, pointer: str, words: str) -> str:
    """Statements that load `size` aligned bytes into 32-bit words."""
    if size >= 16:
        return " ".join(f"kvq_load16({pointer} + {i}, {words} + {i // 4});" for i in range(0, size, 16))
    if size == 8:
        return f"kvq_load8({pointer}, {words});"
    return f"{words}[0] = kvq_load{size}({pointer});"


def loader(side: str, layout: CodeLayout, parts: int) -> str:
    """Loads of one of `parts` equal parts of rows, field after field.

    `<side>_fields(planes, row, part, fields)` points at a row; `<side>_load(fields, part, offset, words)` loads the row
    `offset` rows on, a compile-time constant. Of a trellis code the words of trellis bits come first, then the one
    before them.
    """
    chunk = layout.run // parts
    words = -(-chunk // 4)
    pointers = loads = ""
    if layout.generators:
        row, before = f"plane0 + (row * {layout.row_bytes[0]}u", min(chunk, 4)
        runs = [
            (f"part * {chunk}", chunk),
            (f"((part * {chunk} - {before}) & {layout.run - 1})", before),
            *((f"{field.start}u + part * {chunk}", chunk) for field in layout.fields),
        ]
        at = 0
        for i, (start, size) in enumerate(runs):
            pointers += f"  fields[{i}] = {row} + {start});\n"
            loads += "  " + _load(size, f"(fields[{i}] + offset * {layout.row_bytes[0]})", f"(words + {at})") + "\n"
            at += -(-size // 4)
        return _loader_text(side, layout, len(runs), at, pointers, loads)
    for i, field in enumerate(layout.fields):
        run, size = layout.dim * field.width // 8, layout.row_bytes[field.plane]
        offset = f"part * {chunk}" if run == layout.run else f"((part * {chunk}) & {run - 1})"
        pointers += f"  fields[{i}] = plane{field.plane} + (row * {size}u + {field.start}u + {offset});\n"
        loads += "  " + _load(chunk, f"(fields[{i}] + offset * {size})", f"(words + {i * words})") + "\n"
        if run < layout.run:
            for word in range(words):
                loads += f"  words[{i * words + word}] >>= ((part * {chunk}) / {run} * {field.width});\n"
    return _loader_text(side, layout, len(layout.fields), len(layout.fields) * words, pointers, loads)


def _loader_text(side: str, layout: CodeLayout, count: int, words: int, pointers: str, loads: str) -> str:
    planes = ", ".join(f"KVQ_DEVICE const kvq_byte* plane{i}" for i in range(len(layout.planes)))
    fields_ = "KVQ_DEVICE const kvq_byte* KVQ_PRIVATE* fields"
    return (
        f"#define KVQ_{side.upper()}_FIELDS {count}\n#define KVQ_{side.upper()}_WORDS {words}\n"
        f"KVQ_FUNC void {side}_fields({planes}, kvq_uint row, int part, {fields_}) {{\n{pointers}}}\n"
        f"KVQ_FUNC void {side}_load({fields_}, int part, int offset, KVQ_PRIVATE kvq_uint* words) {{\n{loads}}}\n"
    )


def coded_text(side: str, layout: CodeLayout, parts: int, upper: bool = False) -> str:
    """`<side>_coded(own, before, out)`: words of the coded bits of a word of trellis bits; nothing for other codes.

    A tap is a shift to the left, which not only the pipe of shifts can do, of a word that has the bits before below.
    `upper` leaves the coded bits of half words in the high halves.
    """
    if not layout.generators:
        return ""
    size = 8 * (layout.run // parts)  # bits of `own`, if that is less than a word
    body = ""
    if size < 32:
        body += f"  const kvq_uint register_ = own << {size} | before;\n"
    taken = sorted({j for generator in layout.generators for j in range(MEMORY + 1) if generator >> j & 1})
    for j in taken:
        whole = f"kvq_funnel(own, before, {j})" if j else "own"
        body += f"  const kvq_uint t{j} = {moved('register_', j) if size < 32 else whole};\n"
    for i, generator in enumerate(layout.generators):
        terms = " ^ ".join(f"t{j}" for j in taken if generator >> j & 1)
        if size == 16 and not upper:
            terms = f"({terms}) >> 16"
        elif size < 16:
            terms = f"({terms}) >> {size} & 0xffu"
        body += f"  out[{i}] = {terms};\n"
    return f"KVQ_FUNC void {side}_coded(kvq_uint own, kvq_uint before, KVQ_PRIVATE kvq_uint* out) {{\n{body}}}\n"


def index_words(side: str, layout: CodeLayout, words: int, name: str) -> tuple[str, list[list[str]]]:
    """Of the words that `loader` left in `name`: statements, and for each of `words` words those of index fields."""
    if not layout.generators:
        count = len(layout.fields)
        return "", [[f"{name}[{i * words + word}]" for i in range(count)] for word in range(words)]
    coded = len(layout.generators)
    text, found = f"  kvq_uint {name}_coded[{words * coded}];\n", []
    for word in range(words):
        before = f"{name}[{word - 1 if word else words}]"
        text += f"  {side}_coded({name}[{word}], {before}, {name}_coded + {word * coded});\n"
        stored = [f"{name}[{(i + 1) * words + 1 + word}]" for i in range(len(layout.fields))]
        found.append([*stored, *(f"{name}_coded[{word * coded + i}]" for i in range(coded))])
    return text, found


def key_text(layout: CodeLayout) -> str:
    """Functions and constants of a key codec.

    * `key_fields(planes..., row, quarter, fields)`, `key_load(fields, quarter, offset, words)`
    * `key_pairs(words, masks, out)`: `dim / 8` pairs of levels
    * `key_channel(quarter, pair, second)`: the channel that they belong to
    """
    chunk = layout.run // 4
    words = -(-chunk // 4)
    slots, whole = layout.slots, chunk >= 4
    per_word = slots * (2 if whole else 1)
    body, found = index_words("key", layout, words, "words")
    for word, given in enumerate(found):
        if not whole:  # two bytes, one for each half word
            given = [f"(({w} & 0xffu) | ({w} & 0xff00u) << 8)" for w in given]
        body += f"  key_levels({', '.join(given)}, masks, out + {word * per_word});\n"
    byte = f"pair / {per_word} * 4 + pair % {per_word} / {slots} + 2 * second" if whole else "second"
    return (
        loader("key", layout, 4)
        + coded_text("key", layout, 4)
        + _levels("key", layout, whole)
        + "KVQ_FUNC void key_pairs(KVQ_PRIVATE const kvq_uint* words, KVQ_PRIVATE const kvq_uint* masks, "
        + f"KVQ_PRIVATE kvq_uint* out) {{\n{body}}}\n"
        + "KVQ_FUNC int key_channel(int quarter, int pair, int second) {\n"
        + f"  return pair % {slots} * {layout.run} + quarter * {chunk} + {byte};\n}}\n"
        + _lead("key", layout)
        + f"#define KVQ_KEY_SLOTS {slots}\n"
    )


def value_text(layout: CodeLayout) -> str:
    """Functions and constants of a value codec.

    * `value_fields(planes..., row, eighth, fields)`, `value_load(fields, eighth, offset, words)`
    * `value_pairs(words, next, masks, out)`: `dim / 8` pairs, of the words of two tokens
    * `value_channel(eighth, pair)`
    """
    chunk = layout.run // 8
    words = -(-chunk // 4)
    slots, both = layout.slots, chunk >= 2
    per_half = slots * (2 if both else 1)
    (text, own), (more, others) = (index_words("value", layout, words, name) for name in ("words", "next"))
    body = text + more
    for half in range(max(1, chunk // 2)):
        take = "kvq_high_halves" if half % 2 else "kvq_low_halves"
        given = [f"{take}({x}, {y})" for x, y in zip(own[half // 2], others[half // 2], strict=True)]
        body += f"  value_levels({', '.join(given)}, masks, out + {half * per_half});\n"
    byte = f"pair / {per_half} * 2 + pair % {per_half} / {slots}" if both else "0"
    return (
        loader("value", layout, 8)
        + coded_text("value", layout, 8)
        + _levels("value", layout, both)
        + "KVQ_FUNC void value_pairs(KVQ_PRIVATE const kvq_uint* words, KVQ_PRIVATE const kvq_uint* next, "
        + f"KVQ_PRIVATE const kvq_uint* masks, KVQ_PRIVATE kvq_uint* out) {{\n{body}}}\n"
        + "KVQ_FUNC int value_channel(int eighth, int pair) {\n"
        + f"  return pair % {slots} * {layout.run} + eighth * {chunk} + {byte};\n}}\n"
        + _lead("value", layout)
        + f"#define KVQ_VALUE_SLOTS {slots}\n"
    )
