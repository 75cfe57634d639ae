"""How the kernels of encode.h and decode.h read and write packed scalar codes: text for the lanes of lanes.h.

A place of a token holds 16 channels: two runs of eight, half a row apart. A field of `p` bits (packing.py) keeps the
codes of both runs in the same eight bytes, four bits apart; places whose runs share bytes differ in their bits. So a
place reads eight bytes a field, and writing them takes an exchange between the places that share them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..codebooks import Codebook
from ..codecs import LEAST_SQUARES, NORM, UNBIASED, Codec
from ..frame import frame_size
from ..rotary import Rotary
from ..rotation import HADAMARD
from ..trellis import AROUND
from .codes import CodeField, CodeLayout, code_layout, coded_text, scalar_stages
from .viterbi import no_viterbi_text, viterbi_text

HEAD_SIZES = (32, 64, 128, 256)
WARPS = 4  # of a group

_SCALINGS = {LEAST_SQUARES: 0, NORM: 1, UNBIASED: 2}


def why_not_lanes(codec: Codec, dim: int) -> str:
    """Why kernels cannot encode and decode tokens with a codec at a head size; empty if they can."""
    if not scalar_stages(codec):
        return f"codec {codec.name} has no kernel"
    if codec.rotation != HADAMARD:
        return f"rotation {codec.rotation} has no kernel"
    if dim not in HEAD_SIZES:
        return f"head size {dim} has no kernel"
    return ""


def number(x: float) -> str:
    """A float32 literal."""
    return f"{float(np.float32(x))!r}f"


def _both(name: str, key: Any, value: Any) -> dict[str, str]:
    """A constant of both sides, as a macro of the side."""
    return {f"{name}(SIDE)": f"((SIDE) == 0 ? {key} : {value})"}


def defines(
    codecs: tuple[Codec, Codec], dims: tuple[int, int], itemsizes: tuple[int, int], warps: int = WARPS
) -> dict[str, Any]:
    """The constants of both sides."""
    layouts = [code_layout(codec, dim) for codec, dim in zip(codecs, dims, strict=True)]
    return {
        "KVQ_WARPS": warps,
        **_both("KVQ_DIM", *dims),
        **_both("KVQ_ROOT", *(number(dim**0.5) for dim in dims)),
        **_both("KVQ_SCALING", *(_SCALINGS[codec.scaling] for codec in codecs)),
        **_both("KVQ_ROW_BYTES", *(dim * size for dim, size in zip(dims, itemsizes, strict=True))),
        **_both("KVQ_WORDS", *(2 * len(_runs(layout)) + (1 if layout.generators else 0) for layout in layouts)),
    }


def trellis_dim(codecs: tuple[Codec, Codec], dims: tuple[int, int]) -> int:
    """The most channels of a side with a trellis code; 0 if neither has one."""
    return max(dim if layout.generators else 0 for dim, (_, layout) in zip(dims, _sides(codecs, dims), strict=True))


def trellis_defines(codecs: tuple[Codec, Codec], dims: tuple[int, int]) -> dict[str, Any]:
    """The constants of encode_trellis.h, of no meaning for sides without a trellis code."""
    layouts = [layout for _, layout in _sides(codecs, dims)]
    return {
        "KVQ_TRELLIS": trellis_dim(codecs, dims) > 0,
        **_both("KVQ_CODED", *(len(layout.generators) for layout in layouts)),
        **_both("KVQ_SUBSETS", *(2 ** len(layout.generators) for layout in layouts)),
        **_both("KVQ_STORED", *(2 ** (layout.bits - len(layout.generators)) for layout in layouts)),
        **_both("KVQ_AROUND", *(min(AROUND, dim // 2) for dim in dims)),
    }


def frame_sizes(rotary: Rotary | None, dim: int, value_channels: int) -> dict[str, Any]:
    """The constants of `KVQCache.frame_rows`: numbers of a head, and those of them that are of keys."""
    keys = 0 if rotary is None else frame_size(dim, rotary.pairs)
    return {
        "KVQ_VALUE_SCALES": value_channels > 0,
        "KVQ_KEY_FRAME_SIZE": keys,
        "KVQ_FRAME_SIZE": keys + value_channels,
    }


def frame_defines(rotary: Rotary | None, dim: int, value_channels: int) -> dict[str, Any]:
    """The constants of the frame of keys of `dim` channels, `None` for none, and of scales for channels of values."""
    pairs = rotary.pairs if rotary is not None else 0
    half = rotary is None or rotary.layout == "half"
    beside = 0 if pairs == 0 or (half and 2 * pairs < dim) else 8 if half else 1
    return {
        "KVQ_FRAME": rotary is not None,
        **frame_sizes(rotary, dim, value_channels),
        "KVQ_PAIRS": pairs,
        "KVQ_HALF_LAYOUT": half,
        "KVQ_MAGNITUDE": number(rotary.magnitude if rotary is not None else 1.0),
        "KVQ_PARTNER": beside,
    }


def _runs(layout: CodeLayout) -> tuple[CodeField, ...]:
    """What a row holds: its fields, before them the trellis bits, which code bytes have in their highest bit."""
    return ((CodeField(0, 0, 1, 7),) if layout.generators else ()) + layout.fields


def _mask(field: CodeField) -> str:
    return f"0x{((1 << field.width) - 1) * 0x01010101:08x}u"


def _run(layout: CodeLayout, field: CodeField) -> int:
    """Bytes of a field: the distance of channels that share one."""
    return layout.dim * field.width // 8


def _place(layout: CodeLayout, field: CodeField) -> str:
    """The first of the bytes of a place, in a row."""
    run = _run(layout, field)
    return f"{field.start}" if run <= 8 else f"({field.start} + (8 * place & {run - 1}))"


def _shift(layout: CodeLayout, field: CodeField) -> str:
    """How far up in the bytes the codes of a place lie."""
    run = _run(layout, field)
    return f"(8 * place / {run} * {field.width})"


def _aligned(layout: CodeLayout, field: CodeField) -> bool:
    """Whether the eight bytes of a place lie at a multiple of eight."""
    return layout.row_bytes[field.plane] % 8 == 0 and field.start % 8 == 0


def _reader(side: str, layout: CodeLayout) -> str:
    """`<side>_read_codes(planes, row, place, words)` and `<side>_split_codes(words, place, codes)`.

    Codes are those of four quads of channels, a word each, one byte a channel.
    """
    loads, splits = "", "codes[0] = codes[1] = codes[2] = codes[3] = 0;\n"
    runs = _runs(layout)
    for i, field in enumerate(runs):
        at = f"plane{field.plane} + (row * {layout.row_bytes[field.plane]} + {_place(layout, field)})"
        low, high = f"words[{2 * i}]", f"words[{2 * i + 1}]"
        if _run(layout, field) < 8:
            loads += f"{low} = {high} = kvq_load4({at});\n"
        elif _aligned(layout, field):
            loads += f"kvq_load8({at}, words + {2 * i});\n"
        else:
            loads += f"{low} = kvq_load4({at}); {high} = kvq_load4({at} + 4);\n"
    words = [(field, f"words[{2 * i}]", f"words[{2 * i + 1}]") for i, field in enumerate(runs)]
    if layout.generators:  # the word before, in a circle, makes coded bits of the first
        before, short = f"words[{2 * len(runs)}]", layout.run < 8
        start = f"((8 * place - 4) & {layout.run - 1})"
        loads += f"{before} = kvq_load4(plane0 + (row * {layout.row_bytes[0]} + {start}));\n" if not short else ""
        count = len(layout.generators)
        splits += f"kvq_uint low_coded[{count}], high_coded[{count}];\n"
        splits += f"{side}_coded(words[0], {'words[0]' if short else before}, low_coded);\n"
        splits += f"{side}_coded(words[1], words[0], high_coded);\n"
        coded = layout.index_fields[len(layout.fields) :]
        words = words[1:] + [(field, f"low_coded[{i}]", f"high_coded[{i}]") for i, field in enumerate(coded)]
    for field, low, high in words:
        shift, more = _shift(layout, field), " + 1" if _run(layout, field) < 8 else ""
        splits += f"{{ const kvq_uint low = {low} >> {shift}, high = {high} >> ({shift}{more});\n"
        for quad, (word, down) in enumerate((("low", 0), ("high", 0), ("low", 4), ("high", 4))):
            part = f"(({word} >> {down}) & {_mask(field)})" if down else f"({word} & {_mask(field)})"
            splits += f"codes[{quad}] |= {part} << {field.shift};\n"
        splits += "}\n"
    return (
        coded_text(side, layout, 1)
        + f"KVQ_FUNC void {side}_read_codes(KVQ_DEVICE const kvq_byte* plane0, KVQ_DEVICE const kvq_byte* plane1, "
        f"kvq_long row, int place, KVQ_PRIVATE kvq_uint* words) {{\n{loads}}}\n"
        f"KVQ_FUNC void {side}_split_codes(KVQ_PRIVATE const kvq_uint* words, int place, KVQ_PRIVATE kvq_uint* codes) "
        f"{{\n{splits}}}\n"
    )


def _writer(side: str, layout: CodeLayout) -> str:
    """`<side>_write_codes(planes, row, place, used, codes)`: codes of four quads of channels; all lanes call it."""
    places, text = layout.dim // 16, ""
    for field in _runs(layout):
        run, mask = _run(layout, field), _mask(field)
        at = f"plane{field.plane} + (row * {layout.row_bytes[field.plane]} + {_place(layout, field)})"
        words = [
            f"((codes[{h}] >> {field.shift}) & {mask}) | ((codes[{h + 2}] >> {field.shift}) & {mask}) << 4"
            for h in range(2)
        ]
        text += f"{{ kvq_uint low = {words[0]}, high = {words[1]};\n"
        if run < 8:
            text += "low |= high << 1;\n"
        owners = max(1, run // 8)
        if owners < places:
            text += f"low <<= {_shift(layout, field)}; high <<= {_shift(layout, field)};\n"
        apart = owners
        while apart < places:
            text += f"low |= kvq_shuffle_xor_uint(low, {apart});\n"
            if run >= 8:
                text += f"high |= kvq_shuffle_xor_uint(high, {apart});\n"
            apart *= 2
        if run < 8:
            store = f"*(KVQ_DEVICE kvq_uint*)({at}) = low;"
        elif _aligned(layout, field):
            store = f"kvq_store_words2({at}, low, high);"
        else:
            store = f"((KVQ_DEVICE kvq_uint*)({at}))[0] = low; ((KVQ_DEVICE kvq_uint*)({at}))[1] = high;"
        text += f"if (used && place < {owners}) {{ {store} }}\n}}\n"
    return (
        f"KVQ_FUNC void {side}_write_codes(KVQ_DEVICE kvq_byte* plane0, KVQ_DEVICE kvq_byte* plane1, kvq_long row, "
        f"int place, bool used, KVQ_PRIVATE const kvq_uint* codes) {{\n{text}}}\n"
    )


def _level(side: str, book: Codebook) -> str:
    """`<side>_level(code)`: the codebook level of a code, as `scalar.levels_of` computes it."""
    step = 2.0 / 2**book.bits
    first, *rest = reversed(book.coefficients)
    text = f"const float t = code * {number(step)} + {number(0.5 * step - 1.0)};\n"
    if not rest:
        text += f"return t * {number(first)};\n"
    else:
        text += f"const float square = t * t;\nfloat total = square * {number(first)} + {number(rest[0])};\n"
        for coefficient in rest[1:]:
            text += f"total = total * square + {number(coefficient)};\n"
        text += "return total * t;\n"
    return f"KVQ_FUNC float {side}_level(float code) {{\n{text}}}\n"


def _code(side: str, book: Codebook) -> str:
    """`<side>_code(z)`: the code of the level nearest to a coordinate, as `scalar.quantize` finds it."""
    half = 2 ** (book.bits - 1)
    text = "const float size = kvq_abs(z);\nint index = 0;\n"
    for threshold in book.thresholds:
        text += f"index += size > {number(threshold)} ? 1 : 0;\n"
    text += f"return z < 0.0f ? {half - 1} - index : {half} + index;\n"
    return f"KVQ_FUNC int {side}_code(float z) {{\n{text}}}\n"


def _chosen(result: str, name: str, parameters: str, arguments: str) -> str:
    """A function of both sides, as a template of the side."""
    call = f"{name}({arguments})"
    both = f"return SIDE == 0 ? key_{call} : value_{call};"
    if result == "void":
        both = f"if (SIDE == 0) key_{call};\nelse value_{call};"
    return f"template <int SIDE> KVQ_FUNC {result} kvq_{name}({parameters}) {{\n{both}\n}}\n"


def _sides(codecs: tuple[Codec, Codec], dims: tuple[int, int]) -> list[tuple[str, CodeLayout]]:
    return [("key", code_layout(codecs[0], dims[0])), ("value", code_layout(codecs[1], dims[1]))]


def encode_text(codecs: tuple[Codec, Codec], dims: tuple[int, int]) -> str:
    """`kvq_code<SIDE>`, `kvq_level<SIDE>` and `kvq_write_codes<SIDE>`."""
    text = ""
    for side, layout in _sides(codecs, dims):
        text += _code(side, layout.book) + _level(side, layout.book) + _writer(side, layout)
        text += viterbi_text(side, layout) if layout.generators else no_viterbi_text(side)
    return (
        text
        + _chosen("int", "code", "float z", "z")
        + _chosen("kvq_uint", "parts", "int sub", "sub")
        + _chosen("int", "column", "int age", "age")
        + _chosen(
            "void",
            "steps",
            "KVQ_GROUP_MEMORY const kvq_uint* distance, kvq_uint parts, int sub, "
            "KVQ_PRIVATE kvq_uint* c, KVQ_PRIVATE kvq_uint* oldest",
            "distance, parts, sub, c, oldest",
        )
        + _chosen(
            "void",
            "first_steps",
            "KVQ_GROUP_MEMORY const kvq_uint* distance, kvq_uint parts, int sub, KVQ_PRIVATE kvq_uint* c",
            "distance, parts, sub, c",
        )
        + _chosen("float", "level", "float code", "code")
        + _chosen(
            "void",
            "write_codes",
            "KVQ_DEVICE kvq_byte* plane0, KVQ_DEVICE kvq_byte* plane1, kvq_long row, int place, bool used, "
            "KVQ_PRIVATE const kvq_uint* codes",
            "plane0, plane1, row, place, used, codes",
        )
    )


def decode_text(codecs: tuple[Codec, Codec], dims: tuple[int, int]) -> str:
    """`kvq_level<SIDE>`, `kvq_read_codes<SIDE>` and `kvq_split_codes<SIDE>`."""
    text = ""
    for side, layout in _sides(codecs, dims):
        text += _level(side, layout.book) + _reader(side, layout)
    return (
        text
        + _chosen("float", "level", "float code", "code")
        + _chosen(
            "void",
            "read_codes",
            "KVQ_DEVICE const kvq_byte* plane0, KVQ_DEVICE const kvq_byte* plane1, kvq_long row, int place, "
            "KVQ_PRIVATE kvq_uint* words",
            "plane0, plane1, row, place, words",
        )
        + _chosen(
            "void",
            "split_codes",
            "KVQ_PRIVATE const kvq_uint* words, int place, KVQ_PRIVATE kvq_uint* codes",
            "words, place, codes",
        )
    )
