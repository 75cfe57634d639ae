"""The preludes compute what a GPU does, each function against NumPy."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import kernel_cpu
import metal_check
import mlx.core as mx
import numpy as np
import pytest
from kernel_cpu import KernelRunError, run_body

if kernel_cpu.why_not():
    pytest.skip(kernel_cpu.why_not(), allow_module_level=True)

PRELUDES = ["cpu-orders", "cpu-metal-layout", "cpu-metal"]

# Expressions of floats and NumPy's, with a relative error where a GPU has one.
FLOATS = {
    "kvq_exp2(x)": (lambda x, y, z: np.exp2(x), 1e-6),
    "kvq_log2(kvq_abs(x))": (lambda x, y, z: np.log2(np.abs(x)), 1e-6),
    "kvq_rsqrt(kvq_abs(x))": (lambda x, y, z: 1 / np.sqrt(np.abs(x)), 1e-6),
    "kvq_sqrt(kvq_abs(x))": (lambda x, y, z: np.sqrt(np.abs(x)), 0),
    "kvq_tanh(x)": (lambda x, y, z: np.tanh(x), 1e-6),
    "kvq_max(x, y)": (lambda x, y, z: np.maximum(x, y), 0),
    "kvq_least(x, y)": (lambda x, y, z: np.minimum(x, y), 0),
    "kvq_fma(x, y, z)": (lambda x, y, z: (x.astype(np.longdouble) * y + z).astype(np.float32), 0),
    "(float)kvq_min((int)x, (int)y)": (lambda x, y, z: np.minimum(np.trunc(x), np.trunc(y)), 0),
    "kvq_to_float(x)": (lambda x, y, z: x, 0),
    "kvq_exp2(-1000.0f + x)": (lambda x, y, z: 0 * x, 0),
    "kvq_exp2(-140.0f)": (lambda x, y, z: 0 * x, 0),  # no denormal numbers
    "kvq_max(x, -KVQ_INFINITY)": (lambda x, y, z: x, 0),
}


@pytest.mark.parametrize("on", PRELUDES)
def test_functions_of_floats(on: str) -> None:
    rng = np.random.default_rng(1)
    x, y, z = (rng.standard_normal((3, 512)) * 8).astype(np.float32)
    body = "for (int i = KVQ_THREAD; i < 512; i += 32) {\nconst float x = a[i], y = b[i], z = c[i];\n"
    body += "".join(f"o[{n} * 512 + i] = {text};\n" for n, text in enumerate(FLOATS)) + "}"
    inputs = {"a": mx.array(x), "b": mx.array(y), "c": mx.array(z)}
    (got,) = run_body(body, inputs, {"o": ((len(FLOATS), 512), mx.float32)}, on)
    for row, (text, (function, error)) in zip(np.array(got), FLOATS.items(), strict=True):
        np.testing.assert_allclose(row, function(x, y, z), rtol=error, atol=0, err_msg=text)


def _pairs(function: Any) -> Any:
    """Of words what `function` is of float64 numbers, rounded to half precision once."""

    def apply(*words: np.ndarray) -> np.ndarray:
        halves = [word.view(np.float16).astype(np.float64) for word in words]
        with np.errstate(over="ignore"):
            return function(*halves).astype(np.float16).view(np.uint32)

    return apply


WORDS = {
    "kvq_hadd2(x, y)": _pairs(lambda x, y, z: x + y),
    "kvq_hsub2(x, y)": _pairs(lambda x, y, z: x - y),
    "kvq_hmin2(x, y)": _pairs(lambda x, y, z: np.minimum(x, y)),
    "kvq_hmul2(x, y)": _pairs(lambda x, y, z: x * y),
    "kvq_hfma2(x, y, z)": _pairs(lambda x, y, z: x * y + z),
    "kvq_hfma2(x, x, z)": _pairs(lambda x, y, z: x * x + z),
    "kvq_pack_half2(kvq_low_half(x), kvq_high_half(y))": lambda x, y, z: (x & 0xFFFF) | (y & 0xFFFF0000),
    "kvq_low_halves(x, y)": lambda x, y, z: (x & 0xFFFF) | (y << 16),
    "kvq_high_halves(x, y)": lambda x, y, z: (x >> 16) | (y & 0xFFFF0000),
    "kvq_select(x, y, z)": lambda x, y, z: (x & y) | (~x & z),
    "kvq_funnel(x, y, 1)": lambda x, y, z: x << 1 | y >> 31,
    "kvq_funnel(x, y, 8)": lambda x, y, z: x << 8 | y >> 24,
    "kvq_not(x)": lambda x, y, z: ~x,
    "kvq_flip(x, 0x88888888u)": lambda x, y, z: x ^ 0x88888888,
    "kvq_opaque(x)": lambda x, y, z: x,
    "kvq_shuffle_xor_uint(x, 5)": lambda x, y, z: x.reshape(-1, 32)[:, np.arange(32) ^ 5].reshape(-1),
    "kvq_shuffle_uint(x, 31 - KVQ_LANE)": lambda x, y, z: x.reshape(-1, 32)[:, ::-1].reshape(-1),
    "kvq_ballot((x & 1u) != 0u)": lambda x, y, z: np.repeat((x.reshape(-1, 32) & 1) @ (1 << np.arange(32)), 32),
    "(kvq_uint)kvq_any((x & 31u) == 0u)": lambda x, y, z: np.repeat(((x.reshape(-1, 32) & 31) == 0).any(1), 32),
    "(kvq_uint)kvq_shuffle((float)(x & 255u), 3)": lambda x, y, z: np.repeat(x.reshape(-1, 32)[:, 3] & 255, 32),
    "(kvq_uint)kvq_shuffle_xor((float)(x & 255u), 16)": lambda x, y, z: np.roll(
        x.reshape(-1, 32) & 255, 16, axis=1
    ).reshape(-1),
}


CUDA = metal_check.names_defined(resources.files("mlx_kvq_plugin.kernels").joinpath("cuda.h").read_text())
WORDS = {text: function for text, function in WORDS.items() if set(re.findall(r"kvq_\w+", text)) <= CUDA.keys()}


@pytest.mark.parametrize("on", PRELUDES)
def test_functions_of_words(on: str) -> None:
    n = 8192
    rng = np.random.default_rng(2)
    halves = rng.integers(0, 0x7C00, (3, 2 * n)) | rng.integers(0, 2, (3, 2 * n)) << 15  # finite, of any exponent
    halves[:, n:] = (rng.standard_normal((3, n)) * 0.1).astype(np.float16).view(np.uint16)  # and near to each other
    # 1 + 2^-10 plus or minus a little less than half of its last place: float32 sees a tie.
    near = np.array([1 + 2**-10, (1 - 2**-10) * 2**-11, 1 + 2**-10], np.float16)
    halves[:, 0], halves[:, 1] = near.view(np.uint16), (near * np.array([1, -1, -1], np.float16)).view(np.uint16)
    x, y, z = np.ascontiguousarray(halves.astype(np.uint16)).view(np.uint32)
    body = f"for (int i = KVQ_THREAD; i < {n}; i += 32) {{\nconst kvq_uint x = a[i], y = b[i], z = c[i];\n"
    body += "".join(f"o[{k} * {n} + i] = {text};\n" for k, text in enumerate(WORDS)) + "}"
    inputs = {"a": mx.array(x), "b": mx.array(y), "c": mx.array(z)}
    (got,) = run_body(body, inputs, {"o": ((len(WORDS), n), mx.uint32)}, on)
    for row, (text, function) in zip(np.array(got), WORDS.items(), strict=True):
        want = function(x, y, z)
        np.testing.assert_array_equal(row, np.asarray(want).astype(np.uint32), err_msg=text)


@pytest.mark.parametrize("on", PRELUDES)
def test_dtypes_are_rounded_to_nearest_even(on: str) -> None:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 0x7F00 << 16, 4096).astype(np.uint32) | (rng.integers(0, 2, 4096).astype(np.uint32) << 31)
    bits[:1024] = (bits[:1024] & 0xFFFF0000) | 0x8000  # ties
    x = mx.array(bits.view(np.float32))
    half = mx.array((rng.standard_normal(4096) * 100).astype(np.float32))
    body = (
        "for (int i = KVQ_THREAD; i < 4096; i += 32) {\n"
        "kvq_store(o, i, x[i]); p[i] = kvq_to_bfloat(x[i]); kvq_store(q, i, h[i]);\n"
        "kvq_store(r, i, kvq_load_bfloat(b, i)); s[i] = kvq_to_float(b[i]); t[i] = kvq_to_float(g[i]); }"
    )
    inputs = {"x": x, "h": half, "b": x.astype(mx.bfloat16), "g": half.astype(mx.float16)}
    kinds = {"o": mx.bfloat16, "p": mx.bfloat16, "q": mx.float16, "r": mx.float32, "s": mx.float32, "t": mx.float32}
    got = run_body(body, inputs, {name: ((4096,), kind) for name, kind in kinds.items()}, on)
    brain, short = x.astype(mx.bfloat16), half.astype(mx.float16)
    wanted = [brain, brain, short, brain.astype(mx.float32), brain.astype(mx.float32), short.astype(mx.float32)]
    for name, one, want in zip(kinds, got, wanted, strict=True):
        assert mx.array_equal(one, want), name


@pytest.mark.parametrize("on", PRELUDES)
def test_loads_of_pairs(on: str) -> None:
    x = mx.arange(64).astype(mx.float32)
    body = "float a, b; kvq_load_floats(x + 2 * KVQ_LANE, a, b); o[2 * KVQ_LANE] = b; o[2 * KVQ_LANE + 1] = a;"
    (got,) = run_body(body, {"x": x}, {"o": ((32, 2), mx.float32)}, on)
    np.testing.assert_array_equal(np.array(got), np.arange(64).reshape(32, 2)[:, ::-1])
    with pytest.raises(kernel_cpu.KernelRunError, match="align"):
        run_body(body.replace("x + ", "x + 1 + "), {"x": mx.zeros((66,))}, {"o": ((32, 2), mx.float32)}, on)


@pytest.mark.parametrize("on", PRELUDES)
def test_loads(on: str) -> None:
    rng = np.random.default_rng(4)
    data = rng.integers(0, 256, 32 * 16).astype(np.uint8)
    body = (
        "KVQ_DEVICE const kvq_byte* p = x + 16 * KVQ_LANE; kvq_uint w[16];\n"
        "w[0] = kvq_load1(p + 1); w[1] = kvq_load2(p + 2); w[2] = kvq_load4(p + 4);\n"
        "kvq_load8(p + 8, w + 3); kvq_load16(p, w + 5);\n"
        "for (int i = 0; i < 9; i++) o[9 * KVQ_LANE + i] = w[i];"
    )
    (got,) = run_body(body, {"x": mx.array(data)}, {"o": ((32, 9), mx.uint32)}, on)
    rows = data.reshape(32, 16)
    words = rows.view(np.uint32)
    want = np.column_stack([rows[:, 1], rows[:, 2] + 256 * rows[:, 3].astype(int), words[:, 1], words[:, 2:], words])
    np.testing.assert_array_equal(np.array(got), want)


# c = a b, where a lane reads what the preludes say that it holds: b as it is, and from its transpose.
PRODUCT = """
const int lane = KVQ_LANE, row = KVQ_ROW(lane), col = KVQ_COL(lane);
kvq_uint left[4], right[2];
for (int i = 0; i < 4; i++) {
const int at = (row + i % 2 * 8) * 16 + 2 * col + i / 2 * 8;
left[i] = kvq_pack_half2(a[at], a[at + 1]);
}
for (int i = 0; i < 2; i++) {
#if TRANSPOSED
const int at = row * 16 + 8 * i + 2 * col;
right[i] = kvq_to_b(kvq_pack_half2(b[at], b[at + 1]));
#else
const int at = (8 * i + row) * 8 + 2 * col;
right[i] = kvq_rows_to_b(kvq_pack_half2(b[at], b[at + 1]));
#endif
}
float sum[4] = {1.0f, 1.0f, 1.0f, 1.0f};
kvq_mma(sum, left[0], left[1], left[2], left[3], right[0], right[1]);
for (int i = 0; i < 4; i++) c[(row + i / 2 * 8) * 8 + 2 * col + i % 2] = sum[i];
float rows = (float)row;
for (int i = 0; i < 3; i++) rows += kvq_shuffle_xor(rows, KVQ_ROW_BIT(i));
d[lane] = rows + 100.0f * (float)col;
"""


@pytest.mark.parametrize("on", PRELUDES)
@pytest.mark.parametrize("transposed", [0, 1])
def test_products(transposed: int, on: str) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8))
    inputs = {
        "a": mx.array(a.astype(np.float32)),
        "b": mx.array(np.ascontiguousarray(b.T if transposed else b).astype(np.float32)),
    }
    outputs = {"c": ((16, 8), mx.float32), "d": ((32,), mx.float32)}
    c, d = run_body(PRODUCT, inputs, outputs, on, functions=f"#define TRANSPOSED {transposed}\n")
    np.testing.assert_array_equal(np.array(c), a @ b + 1)
    # The three bits of a row go through all rows, and through one column only.
    np.testing.assert_array_equal(np.sort(np.array(d)), np.repeat(28.0 + 100 * np.arange(4), 8))


@pytest.mark.parametrize(("on", "wrong"), [("cpu-orders", "kvq_rows_to_b"), ("cpu-metal-layout", "kvq_to_b")])
def test_a_body_that_leaves_the_transposition_out_is_wrong_in_one_layout(on: str, wrong: str) -> None:
    rng = np.random.default_rng(6)
    a, b = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8))
    right = np.ascontiguousarray(b.T if wrong == "kvq_to_b" else b).astype(np.float32)
    inputs = {"a": mx.array(a.astype(np.float32)), "b": mx.array(right)}
    outputs = {"c": ((16, 8), mx.float32), "d": ((32,), mx.float32)}
    define = f"#define TRANSPOSED {int(wrong == 'kvq_to_b')}\n"
    c, _ = run_body(PRODUCT.replace(f"{wrong}(", "("), inputs, outputs, on, functions=define)
    assert not np.array_equal(np.array(c), a @ b + 1)


# c += a b of signed bytes, and what lanes do before and after it.
BYTE_PRODUCT = """
const int lane = KVQ_LANE, row = KVQ_ROW(lane), col = KVQ_COL(lane);
kvq_uint left[4] = {0, 0, 0, 0}, right[2] = {0, 0};
for (int i = 0; i < 4; i++) {
for (int part = 0; part < 4; part++) {
const int x = kvq_round(a[(row + part % 2 * 8) * 32 + 4 * col + part / 2 * 16 + i]);
left[part] |= ((kvq_uint)x & 0xffu) << (8 * i);
}
for (int part = 0; part < 2; part++)
right[part] |= ((kvq_uint)kvq_round(b[(4 * col + 16 * part + i) * 8 + row]) & 0xffu) << (8 * i);
}
int sum[4] = {1, 1, 1, 1};
kvq_mma_bytes(sum, left[0], left[1], left[2], left[3], right[0], right[1]);
for (int i = 0; i < 4; i++) c[(row + i / 2 * 8) * 8 + 2 * col + i % 2] = (float)sum[i];
"""


def test_products_of_bytes() -> None:
    rng = np.random.default_rng(8)
    a, b = rng.integers(-128, 128, (16, 32)), rng.integers(-128, 128, (32, 8))
    inputs = {"a": mx.array(a.astype(np.float32)), "b": mx.array(b.astype(np.float32))}
    (c,) = run_body(BYTE_PRODUCT, inputs, {"c": ((16, 8), mx.float32)}, "cpu-orders")
    np.testing.assert_array_equal(np.array(c), a @ b + 1)


def test_functions_of_bytes() -> None:
    rng = np.random.default_rng(9)
    words = rng.integers(0, 2**32, (3, 256), dtype=np.uint32)
    body = (
        "for (int i = KVQ_THREAD; i < 256; i += 32) {\no[i] = kvq_permute(low[i], high[i], chosen[i]);\n"
        "o[256 + i] = kvq_float_bits(kvq_bits_float(low[i] & 0x7f7fffffu));\n"
        "o[512 + i] = kvq_float_bits(kvq_inverse(kvq_bits_float(0x3f800000u + (low[i] >> 9))));\n}"
    )
    inputs = {name: mx.array(word) for name, word in zip(("low", "high", "chosen"), words, strict=True)}
    got = np.array(run_body(body, inputs, {"o": ((3, 256), mx.uint32)}, "cpu-orders")[0])
    both = words[0].astype(np.uint64) | words[1].astype(np.uint64) << np.uint64(32)
    expected = np.zeros(256, np.uint32)
    for place in range(4):
        nibble = words[2] >> np.uint32(4 * place) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (nibble & 7).astype(np.uint64)) & np.uint64(0xFF)).astype(np.uint32)
        expected |= np.where(nibble & 8, (byte >> 7) * np.uint32(0xFF), byte) << np.uint32(8 * place)
    np.testing.assert_array_equal(got[0], expected)
    np.testing.assert_array_equal(got[1], words[0] & np.uint32(0x7F7FFFFF))
    x = (np.uint32(0x3F800000) + (words[0] >> np.uint32(9))).view(np.float32)
    np.testing.assert_allclose(got[2].view(np.float32), 1 / x, rtol=1e-6)


@pytest.mark.parametrize("on", PRELUDES)
def test_stored_numbers_are_loaded_together(on: str) -> None:
    body = "float a[2], b[4], c[8];\nkvq_load_stored<2>(x + 2, a); kvq_load_stored<4>(x + 4, b);\n"
    body += "kvq_load_stored<8>(x, c);\n"
    body += "if (KVQ_LANE == 0) for (int i = 0; i < 8; i++) o[i] = c[i] + 10 * b[i % 4] + 100 * a[i % 2];"
    (got,) = run_body(body, {"x": mx.arange(8.0)}, {"o": ((8,), mx.float32)}, on)
    assert got.tolist() == [i + 10 * (4 + i % 4) + 100 * (2 + i % 2) for i in range(8)]
    if on != "cpu-metal":
        with pytest.raises(KernelRunError, match="a load of 16 bytes must be aligned"):
            run_body("float a[4]; kvq_load_stored<4>(x + 2, a);", {"x": mx.arange(8.0)}, {"o": ((1,), mx.float32)}, on)


def test_groups_are_counted_anew_in_each_order() -> None:
    # All but the order in which groups come is the same: the last one finds that all others have arrived.
    body = "if (kvq_arrive(n) + 1 == 3) o[0] = 1.0f + (float)kvq_arrive(n + 1);"
    counters = mx.zeros((2,), dtype=mx.uint32)
    (got,) = run_body(body, {"n": counters}, {"o": ((1,), mx.float32)}, "cpu-orders", threads=1, groups=(3, 1, 1))
    assert got.item() == 1


def test_every_function_of_the_preludes_is_tested_here() -> None:
    private = {"kvq_as_uint", "kvq_as_half2"}
    functions = {name for name, counts in CUDA.items() if name.startswith("kvq_") and -1 not in counts}
    here = Path(__file__).read_text()
    assert {name for name in functions - private if not re.search(rf"\b{name}[(<]", here)} == set()
