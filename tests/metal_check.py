"""What Metal's compiler would say about a kernel, as far as can be known without it.

`complaints` reads text: rules of Metal that a C++ compiler does not know. `compiler_complaints` gives the assembled
text, with the signature that MLX would write, to clang (PyPI package libclang), for which address spaces are real.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

HERE = Path(__file__).parent
SHARED_LIMIT = 32 << 10
CONSTANT_BELOW = 8  # elements of an input that MLX puts into constant memory

QUALIFIERS = "KVQ_DEVICE|KVQ_GROUP_MEMORY|KVQ_PRIVATE|device|threadgroup|thread|constant"
RESERVED = (
    "device|constant|thread|threadgroup|threadgroup_imageblock|kernel|vertex|fragment|half|sampler|ray_data|visible"
)
# Parameters that MLX adds if a body names them; those that kernels need, in MLX's order.
ATTRIBUTES = {
    "simdgroup_index_in_threadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
}
MSL_TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
}


def without_comments(text: str) -> str:
    """The text without comments; lines stay where they are."""
    text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found.group().count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def names_defined(text: str) -> dict[str, list[int]]:
    """Macros, types and functions that a prelude defines, with the numbers of arguments of their overloads.

    Arguments with a default value, by which the CPU prelude learns the line of a call, do not count; -1: none.
    """
    text = without_comments(text)
    found: dict[str, set[int]] = {}
    for name, arguments in re.findall(r"^#define (kvq_\w+|KVQ_\w+)(\([^)]*\))?", text, re.MULTILINE):
        found.setdefault(name, set()).add(_count(arguments[1:-1]) if arguments else -1)
    for name in re.findall(r"^typedef [^;]*?(\w+);", text, re.MULTILINE) + re.findall(
        r"^struct (\w+)", text, re.MULTILINE
    ):
        found.setdefault(name, set()).add(-1)
    for name, arguments in re.findall(r"^KVQ_FUNC [\w:]+ (kvq_\w+)\(([^{]*)\) \{", text, re.MULTILINE):
        found.setdefault(name, set()).add(_count(arguments))
    return {name: sorted(counts) for name, counts in found.items()}


def _count(arguments: str) -> int:
    return len([one for one in arguments.split(",") if one.strip() and "=" not in one])


def _lines(text: str, pattern: str) -> Iterator[tuple[int, re.Match[str]]]:
    for found in re.finditer(pattern, text):
        yield text.count("\n", 0, found.start()) + 1, found


def complaints(text: str) -> list[str]:
    """What breaks Metal's rules in a file or an assembled text, one line each."""
    text = without_comments(text)
    found = []
    types = {"float", "int", "bool", "char", "half", "uint", "void", "auto", r"kvq_(?:byte|uint|long|bfloat|half)"}
    types |= {f"u?int{bits}_t" for bits in (8, 16, 32, 64)} | {"uchar", "ushort", r"(?:half|float|uint)[234]"}
    types |= set(re.findall(r"\b(?:typename|class) (\w+)", text)) | set(re.findall(r"\bstruct (\w+)", text))
    kinds = "|".join(sorted(types))
    for line, match in _lines(text, rf"(?:^|[;{{}}(),<\n])([^;{{}}(),<\n]*)\b(?:{kinds})\b(?:\s+const\b)?\s*([*&])"):
        if not re.search(rf"\b(?:{QUALIFIERS})\b", match.group()):
            kind = "pointer" if match.group(2) == "*" else "reference"
            found.append(f"line {line}: a {kind} must have an address space, got {match.group().strip()!r}")
    for line, match in _lines(text, r"[^\n]*\(\s*&\s*\w+\s*\)\s*\["):
        if not re.search(rf"\b(?:{QUALIFIERS})\b", match.group()):
            found.append(f"line {line}: a reference must have an address space, got {match.group().strip()!r}")
    for line, match in _lines(text, r"\b(?:double|goto|new|delete|throw|dynamic_cast|thread_local|virtual|static)\b"):
        found.append(f"line {line}: Metal kernels have no {match.group()!r}")
    for line, match in _lines(text, r"(?<![\w.])(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?(?![\w.])"):
        found.append(f"line {line}: numbers must be float32, got {match.group()!r} without an f")
    for line, match in _lines(text, rf"\b(?:float|int|bool|auto|kvq_\w+|uint)\s+({RESERVED})\b\s*[=;,\[)]"):
        found.append(f"line {line}: {match.group(1)!r} is a word of Metal, use another name")
    for line, match in _lines(
        text, r"(?m)^(?:const(?:expr)? )?(?:float|int|bool|kvq_\w+|uint)\s+\w+(?:\[[^\]]*\])?\s*=[^\n]*"
    ):
        if _depth(text, match.start()) == 0 and "KVQ_FUNC" in text:
            found.append(f"line {line}: Metal has no global variables outside of constant memory: {match.group()!r}")
    return found + _recursive(text)


def _depth(text: str, at: int) -> int:
    return text.count("{", 0, at) - text.count("}", 0, at)


def _recursive(text: str) -> list[str]:
    calls: dict[str, set[str]] = {}
    starts = list(re.finditer(r"KVQ_FUNC\s+[\w:]+\s+(\w+)\s*\(", text))
    for match in starts:
        at = text.find("{", match.end())
        end, depth = at + 1, 1
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        calls.setdefault(match.group(1), set()).update(re.findall(r"\b(\w+)\s*(?:<[^<>;]*>)?\(", text[at:end]))
    found = []
    for name in calls:
        seen, open_ = set(), [name]
        while open_:
            for callee in calls.get(open_.pop(), set()) - seen:
                seen.add(callee)
                open_.append(callee)
        # Overloads call each other by one name: only those of one argument type do, which the preludes do not have.
        if name in seen:
            found.append(f"functions must not call themselves, {name} does")
    return found


def signature(
    names: Sequence[str], dtypes: Sequence[mx.Dtype], shapes: Sequence[Sequence[int]], inputs: int, source: str
) -> str:
    """Parameters as MLX writes them: small inputs lie in constant memory, shapes and strides come if they occur."""
    parameters = []
    for i, (name, dtype, shape) in enumerate(zip(names, dtypes, shapes, strict=True)):
        size = 1
        for n in shape:
            size *= n
        if i < inputs:
            space = "constant" if size < CONSTANT_BELOW else "device"
            parameters.append(f"const {space} {MSL_TYPES[dtype]}* {name}")
            if f"{name}_shape" in source:
                parameters.append(f"const constant int* {name}_shape")
            if f"{name}_strides" in source:
                parameters.append(f"const constant int64_t* {name}_strides")
        else:
            parameters.append(f"device {MSL_TYPES[dtype]}* {name}")
    for name, kind in ATTRIBUTES.items():
        if name in source:
            parameters.append(f"{kind} {name}")
    return ", ".join(parameters)


def has_clang() -> bool:
    """Whether the package libclang is installed."""
    return importlib.util.find_spec("clang") is not None


def _space(kind: Any) -> int:
    """The number of a type's address space, as metal_clang.h gives them out; 0 for that of a thread."""
    return int(kind.get_address_space()) if kind.kind.value else 0


@cache
def compiler_complaints(header: str, source: str, parameters: str) -> tuple[str, ...]:
    """Errors and warnings of clang for an assembled kernel, and shared memory above the limit; none without clang."""
    if not has_clang():
        return ()
    from clang.cindex import CursorKind, Index, TypeKind

    header = re.sub(r"#include <[^\n]*\n", "", header)
    header = header.replace("alignas(16) threadgroup", "alignas(16) static threadgroup")  # clang: none on the stack
    text = (
        f'#include "{HERE / "metal_clang.h"}"\n#line 1 "functions"\n{header}\n'
        f'#line 1 "body"\nvoid kvq_body({parameters}) {{\n#line 1\n{source}\n}}\n'
    )
    flags = ["-std=c++14", "-nostdinc", "-Wdouble-promotion", "-Wno-undefined-internal", "-ferror-limit=0"]
    unit = Index.create().parse("kernel.cpp", args=flags, unsaved_files=[("kernel.cpp", text)])
    found = [one.format() for one in unit.diagnostics if one.severity >= one.Warning]
    shared = 0
    for one in unit.cursor.walk_preorder():
        if one.kind == CursorKind.VAR_DECL and _space(one.type.get_array_element_type()) == 3:
            shared += -(-one.type.get_size() // 16) * 16
        if one.kind == CursorKind.CSTYLE_CAST_EXPR and one.type.kind == TypeKind.POINTER:
            (inner,) = [child for child in one.get_children() if child.kind.is_expression()] or [one]
            if inner.type.kind == TypeKind.POINTER and _space(inner.type.get_pointee()) != _space(
                one.type.get_pointee()
            ):
                found.append(f"a cast must keep the address space, got {inner.type.spelling} to {one.type.spelling}")
    if shared > SHARED_LIMIT:
        found.append(f"shared arrays must have at most {SHARED_LIMIT} bytes, got {shared}")
    return tuple(found)
