"""Kernel files keep to the rules of Metal, and the preludes define the same names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import kernel_cpu
import metal_check
import mlx.core as mx
import pytest
from kernel_cpu import KernelRunError, run_body

from mlx_kvq_plugin.kernels import build

PRELUDES = ("cuda", "cpu", "metal")
FOLDER = resources.files("mlx_kvq_plugin.kernels")
FILES = sorted(file.name for file in FOLDER.iterdir() if file.name.endswith(".h"))
KERNELS = [name for name in FILES if name.removesuffix(".h") not in PRELUDES]

# Names that one prelude needs for itself.
PRIVATE = {
    "cuda": {"kvq_as_uint", "kvq_as_half2"},
    "cpu": {
        "kvq_half_bits",
        "kvq_bits_half",
        "kvq_flushed",
        "kvq_half_fma",
        "kvq_transposed",
    },
    "metal": {"KVQ_LANE_OF", "kvq_matrix", "kvq_mma_rows", "kvq_transposed"},
}

# Names that only texts with products of bytes need, which Metal does not have.
BYTES = {"kvq_mma_bytes", "kvq_permute", "kvq_round", "kvq_inverse", "kvq_float_bits", "kvq_bits_float"}
BYTE_TEXTS = ("attend_first.h", "attend_bytes.h", "byte_codes.py")
# Names that only the text needs which lets the last group merge.
LAST = {"KVQ_FENCE", "kvq_arrive"}


def names(prelude: str) -> dict[str, list[int]]:
    found = metal_check.names_defined((FOLDER / f"{prelude}.h").read_text())
    return {name: counts for name, counts in found.items() if name not in PRIVATE[prelude]}


@pytest.mark.parametrize("prelude", PRELUDES)
def test_preludes_define_the_same_names(prelude: str) -> None:
    # And overloads of as many arguments. What one writes as a macro may be a function of another.
    def counts(of: str) -> dict[str, list[int]]:
        return {name: [n for n in found if n >= 0] for name, found in names(of).items()}

    expected = counts("cuda")
    assert set(expected) >= BYTES | LAST
    if prelude == "metal":
        expected = {name: found for name, found in expected.items() if name not in BYTES | LAST}
    assert counts(prelude) == expected


def test_only_some_texts_use_names_that_metal_lacks() -> None:
    for file in FOLDER.iterdir():
        if file.name in KERNELS or file.name.endswith(".py"):
            found = {name for name in BYTES | LAST if re.search(rf"\b{name}\(", file.read_text())}
            assert found <= (BYTES if file.name in BYTE_TEXTS else LAST if file.name == "last.h" else set()), file.name


@pytest.mark.parametrize("prelude", PRELUDES)
def test_private_names_are_defined_once_and_used_nowhere_else(prelude: str) -> None:
    text = (FOLDER / f"{prelude}.h").read_text()
    assert PRIVATE[prelude] <= set(metal_check.names_defined(text))
    elsewhere = " ".join(
        file.read_text() for file in FOLDER.iterdir() if file.name in KERNELS or file.name.endswith(".py")
    )
    assert {name for name in PRIVATE[prelude] if re.search(rf"\b{name}\b", elsewhere)} == set()


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_use_names_of_the_preludes_only(name: str) -> None:
    text = metal_check.without_comments((FOLDER / name).read_text())
    # What CUDA or Metal alone would know.
    found = re.findall(
        r"\b(?:threadIdx|blockIdx|__\w+|simd_\w+|simdgroup\w*|threadgroup\w*|device|metal|asm|half2)\b", text
    )
    assert found == []


@pytest.mark.parametrize("name", [*KERNELS, "metal.h"])
def test_files_keep_to_the_rules_of_metal(name: str) -> None:
    assert metal_check.complaints((FOLDER / name).read_text()) == []


@pytest.mark.parametrize("name", KERNELS)
def test_bodies_name_the_macros_of_bodies_only(name: str) -> None:
    # Functions of a Metal kernel know no thread: what stands for one is a variable of the body.
    text = metal_check.without_comments((FOLDER / name).read_text())
    body_names = r"\b(?:KVQ_(?:THREAD|LANE|WARP|GROUP_[XYZ]|SHARED_ARRAY)|kvq_to_b|kvq_rows_to_b)\b"
    for function in re.finditer(r"KVQ_FUNC[^{;]*\{", text):
        at, depth = function.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        assert re.findall(body_names, text[function.start() : at]) == [], function.group()


@pytest.mark.parametrize("name", KERNELS)
def test_shared_arrays_belong_to_the_whole_body(name: str) -> None:
    text = metal_check.without_comments((FOLDER / name).read_text())
    for found in re.finditer(r"KVQ_SHARED_ARRAY", text):
        assert text.count("{", 0, found.start()) == text.count("}", 0, found.start())


def test_prologue_names_every_attribute_that_the_prelude_needs() -> None:
    metal = (FOLDER / "metal.h").read_text()
    needed = set(re.findall(r"#define KVQ_\w+ (kvq_\w+)$", metal, re.MULTILINE))
    prologue = build.PROLOGUES[build.METAL]
    assert needed == set(re.findall(r"\b(kvq_\w+) =", prologue))
    for attribute in metal_check.ATTRIBUTES:
        assert attribute in prologue
        assert attribute not in metal


# Texts that break one rule each, and what must be said.
WRONG = {
    "void f(float* x) {}": "a pointer must have an address space",
    "void f(KVQ_DEVICE float* x, const kvq_byte* y) {}": "an address space, got ', const kvq_byte*'",
    "int f() { return *(kvq_uint*)(1); }": "a pointer must have an address space",
    "template <typename T> void f(T& x) {}": "a reference must have an address space",
    "void f(float (&x)[4]) {}": "a reference must have an address space",
    "double x = 1.0f;": "no 'double'",
    "float x = 1.0 * y;": "got '1.0' without an f",
    "float x = 1e-3;": "got '1e-3' without an f",
    "static int x[4];": "no 'static'",
    "float constant = 0.0f;": "'constant' is a word of Metal",
    "int f(int thread) { return 0; }": "'thread' is a word of Metal",
    "KVQ_FUNC int f(int x) { return 0; }\nconst int y = 3;\n": "no global variables",
    "KVQ_FUNC int f(int x) { return x ? f(x - 1) : 0; }": "must not call themselves, f does",
    "KVQ_FUNC int g(int x) { return f(x); }\nKVQ_FUNC int f(int x) { return g<2>(x); }": "must not call themselves",
}


@pytest.mark.parametrize("text", WRONG)
def test_broken_rules_are_found(text: str) -> None:
    assert any(WRONG[text] in complaint for complaint in metal_check.complaints(text)), metal_check.complaints(text)


def test_right_texts_are_left_alone() -> None:
    text = (
        "template <typename P> KVQ_FUNC float f(P p, KVQ_PRIVATE float* q, const KVQ_DEVICE kvq_byte* r) {\n"
        "const float a = 2.0f * q[0], b = 1.5e-3f * a * (float)(4 * 3), c = a & 3; // a double* of 1.0\n"
        "KVQ_DEVICE const kvq_uint* w = (KVQ_DEVICE const kvq_uint*)r;\n"
        "return sizeof(float) * 4 + p[0] * a; }"
    )
    assert metal_check.complaints(text) == []


# Bodies that only a compiler with address spaces knows to be wrong, or with Metal's standard of C++.
MISMATCHED = {
    "KVQ_PRIVATE float* p = x; y[0] = p[0];": "cannot initialize",
    "KVQ_SHARED_ARRAY(float, s, 4); KVQ_DEVICE float* p = s; y[0] = p[0];": "cannot initialize",
    "KVQ_DEVICE const float* p = small; y[0] = p[0];": "cannot initialize",
    "kvq_uint w = kvq_load1((KVQ_DEVICE const kvq_byte*)small); y[0] = (float)w;": "a cast must keep the address space",
    "x[0] = 1.0f;": "read-only",
    "if constexpr (sizeof(int) == 4) y[0] = 1.0f;": "C++17",
    "KVQ_SHARED_ARRAY(float, s, 9000); y[0] = s[0];": "at most 32768 bytes, got 36000",
    "y[0] = (float)KVQ_LANE_COUNT;": "undeclared identifier",
}


@pytest.mark.parametrize("body", MISMATCHED)
def test_address_spaces_are_checked_by_clang(body: str) -> None:
    pytest.importorskip("clang.cindex")
    inputs = {"x": mx.zeros((64,)), "small": mx.zeros((4,))}
    with pytest.raises(KernelRunError, match=re.escape(MISMATCHED[body])):
        run_body(body, inputs, {"y": ((64,), mx.float32)}, "cpu-metal")


def test_small_inputs_lie_in_constant_memory() -> None:
    pytest.importorskip("clang.cindex")
    if kernel_cpu.why_not():
        pytest.skip(kernel_cpu.why_not())
    function = "template <typename P> KVQ_FUNC float first(P p) { return p[0]; }\n"
    inputs = {"x": mx.ones((64,)), "small": mx.ones((4,))}
    out = {"y": ((64,), mx.float32)}
    (got,) = run_body("y[0] = first(x) + first(small) + small[1];", inputs, out, "cpu-metal", functions=function)
    assert got[0].item() == 3


def test_a_kernel_is_known_by_all_that_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(build, "_custom", {})
    build.register_backend("here", lambda **arguments: made.append(arguments), "metal")
    build.build("k", ["a"], ["b"], KERNELS[:1], defines={"X": True}, on="here", prologue="int z;\n")
    build.build("k", ["a"], ["b"], KERNELS[:1], defines={"X": False}, on="here", prologue="int z;\n")
    build.build("k", ["a"], ["b"], KERNELS[:1], defines={"X": True}, on="here", prologue="int w;\n")
    assert len({arguments["name"] for arguments in made}) == 3
    assert made[0]["header"].startswith("#define X 1\n")
    assert made[0]["source"].startswith(build.PROLOGUES[build.METAL] + "int z;\n")
    assert "//" not in made[0]["source"] + made[0]["header"]


@pytest.fixture
def kept_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache directory of its own, looked up anew."""
    monkeypatch.setenv("KVQ_CACHE_DIR", str(tmp_path / "cache"))
    build._folder.cache_clear()
    yield tmp_path / "cache"
    build._folder.cache_clear()


def test_cuda_texts_are_files_that_two_lines_include(kept_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # MLX hashes the text that it is given at every call, and looks there for the shapes that a kernel reads.
    made: list[dict[str, str]] = []
    monkeypatch.setattr(build, "_maker", lambda name: lambda **arguments: made.append(arguments))
    numbers = "int n = a_shape[0];\n"
    for value in (True, False, True):
        build.build("k", ["a", "b"], ["c"], KERNELS[:1], defines={"X": value}, on=build.CUDA, prologue=numbers)
    names = [arguments["name"] for arguments in made]
    assert names[0] == names[2] != names[1]
    for arguments, constant in zip(made, ("#define X 1\n", "#define X 0\n", "#define X 1\n"), strict=True):
        lines = [arguments["header"], *arguments["source"].splitlines()]
        assert lines[2:] == ["// a_shape"]
        header, body = (Path(re.fullmatch(r'#include "(.+)"\n?', line)[1]) for line in lines[:2])  # type: ignore[index]
        assert header.parent == body.parent == kept_in / "kernels"
        assert header.read_text() == constant + build.text("cuda.h")
        assert body.read_text() == numbers + build.text(KERNELS[0])


def test_a_damaged_text_is_written_again(kept_in: Path) -> None:
    line = build.included("int x;\n")
    (file,) = (kept_in / "kernels").iterdir()
    file.write_text("int")
    assert build.included("int x;\n") == line and file.read_text() == "int x;\n"


def test_texts_that_cannot_be_kept_are_said_to_be_compiled_anew(
    kept_in: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept_in.write_text("a file where the folder should be")
    line = build.included("int x;\n")
    assert str(kept_in) not in line and build.included("int x;\n") == line
    (message,) = caplog.messages
    assert "compiled anew" in message and "KVQ_CACHE_DIR" in message and "\n" not in message
