"""The fibers that run kernel texts on the CPU find broken kernels."""

from __future__ import annotations

import re
from typing import Any

import kernel_cpu
import metal_check
import mlx.core as mx
import numpy as np
import pytest
from kernel_cpu import ALL_ORDERS, FORWARD, REVERSE, KernelRunError, run_body

if kernel_cpu.why_not():
    pytest.skip(kernel_cpu.why_not(), allow_module_level=True)

PRELUDES = ["cpu-orders", "cpu-metal-layout", "cpu-metal"]
X = mx.arange(64).astype(mx.float32)
OUT: dict[str, Any] = {"y": ((64,), mx.float32)}

# A body, what the report must say, and the backend: each is the mistake that its name says.
BROKEN = {
    "read above": ("y[KVQ_THREAD] = x[KVQ_THREAD + 1];", "a read of 4 bytes at byte 256 of input array 'x'"),
    "read below": ("y[KVQ_THREAD] = x[KVQ_THREAD - 1];", "a read of 4 bytes at byte -4 of input array 'x'"),
    "read far away": ("y[KVQ_THREAD] = x[KVQ_THREAD + 100000];", "a read of 4 bytes at byte 400000 of input array 'x'"),
    "write above": ("y[KVQ_THREAD + 1] = x[KVQ_THREAD];", "a write of 4 bytes at byte 256 of output array 'y'"),
    "write below": ("y[KVQ_THREAD - 1] = x[KVQ_THREAD];", "a write of 4 bytes at byte -4 of output array 'y'"),
    "shared write": (
        "KVQ_SHARED_ARRAY(float, s, 32); KVQ_GROUP_MEMORY float* p = s; p[KVQ_THREAD] = x[0]; y[KVQ_THREAD] = p[0];",
        "a write at byte 128 of shared array 's'",
    ),
    "shared index": ("KVQ_SHARED_ARRAY(float, s, 32); s[KVQ_THREAD] = x[0]; y[KVQ_THREAD] = s[0];", "index 32 out of"),
    "local index": ("int a[4] = {0, 0, 0, 0}; y[KVQ_THREAD] = (float)a[KVQ_THREAD];", "index 4 out of bounds"),
    "shared size": ("KVQ_SHARED_ARRAY(float, s, 12289); s[KVQ_THREAD] = x[0]; y[KVQ_THREAD] = s[0];", "at most 49152"),
    "shift": ("y[KVQ_THREAD] = (float)(1 << KVQ_THREAD);", "shift exponent 32 is too large"),
    "unaligned load": (
        "kvq_uint w[4]; kvq_load16((KVQ_DEVICE const kvq_byte*)x + 4 * KVQ_THREAD, w); y[KVQ_THREAD] = (float)w[0];",
        "align",
    ),
    "some end": ("if (KVQ_LANE < 3) KVQ_BARRIER();\ny[KVQ_THREAD] = x[0];", "thread 3 at ended"),
    "a warp ends": ("if (KVQ_WARP == 0) KVQ_BARRIER();\ny[KVQ_THREAD] = x[0];", "thread 32 at ended"),
    "two kinds": (
        "if (KVQ_LANE < 3) KVQ_WARP_BARRIER();\nelse y[0] = kvq_shuffle(x[0], 0);\ny[KVQ_THREAD] = x[0];",
        "thread 0 is at KVQ_WARP_BARRIER",
    ),
    "two barriers": (
        "if (KVQ_WARP == 0) { KVQ_BARRIER(); }\nelse { KVQ_BARRIER(); }\ny[KVQ_THREAD] = x[0];",
        "thread 32 at KVQ_BARRIER",
    ),
    "two kinds on a line": (
        "if (KVQ_LANE < 3) KVQ_WARP_BARRIER(); else KVQ_BARRIER(); y[KVQ_THREAD] = x[0];",
        "thread 0 is at KVQ_WARP_BARRIER",
    ),
    "more barriers": (
        "for (int i = 0; i <= KVQ_WARP; i++) KVQ_BARRIER();\ny[KVQ_THREAD] = x[0];",
        "thread 0 is at ended",
    ),
    "loop of some": (
        "float z = 0.0f;\nfor (int i = 0; i <= KVQ_LANE % 2; i++) z += kvq_shuffle(x[0], 0);\ny[KVQ_THREAD] = z;",
        "thread 1 at a shuffle",
    ),
}


@pytest.mark.parametrize("on", PRELUDES)
@pytest.mark.parametrize("mistake", BROKEN)
def test_broken_kernels_are_reported(mistake: str, on: str) -> None:
    body, report = BROKEN[mistake]
    if on == "cpu-metal" and mistake == "shared size" and metal_check.has_clang():
        report = "shared arrays must have at most 32768 bytes"
    with pytest.raises(KernelRunError, match=re.escape(report)):
        run_body(body, {"x": X}, OUT, on, threads=64)


def test_two_shuffles_in_two_branches_are_not_one() -> None:
    body = "if (KVQ_LANE < 3) y[0] = kvq_shuffle(x[0], 0);\nelse y[1] = kvq_shuffle(x[0], 0);"
    with pytest.raises(KernelRunError, match=r"thread 0 is at a shuffle \(line 1\), thread 3 at a shuffle \(line 2\)"):
        run_body(body, {"x": X}, OUT)


def test_missing_lanes_cannot_be_read() -> None:
    with pytest.raises(KernelRunError, match="a shuffle must read lane 0 to 15, got 20"):
        run_body("y[KVQ_THREAD] = kvq_shuffle(x[0], 20);", {"x": X}, OUT, threads=16)


@pytest.mark.parametrize("on", PRELUDES)
@pytest.mark.parametrize("barrier", ["KVQ_BARRIER();", ""])
@pytest.mark.parametrize("reader", ["63 - KVQ_THREAD", "KVQ_THREAD ^ 1", "(KVQ_THREAD + 32) % 64"])
def test_missing_barrier_is_found(reader: str, barrier: str, on: str) -> None:
    body = f"KVQ_SHARED_ARRAY(float, s, 64); s[KVQ_THREAD] = x[KVQ_THREAD]; {barrier} y[KVQ_THREAD] = s[{reader}];"
    if barrier:
        (got,) = run_body(body, {"x": X}, OUT, on, threads=64)
        order = [eval(reader.replace("KVQ_THREAD", str(i))) for i in range(64)]
        assert got.tolist() == order
    else:
        with pytest.raises(KernelRunError, match="must not depend on the order of threads"):
            run_body(body, {"x": X}, OUT, on, threads=64)


def test_missing_warp_barrier_is_found() -> None:
    body = "KVQ_SHARED_ARRAY(float, s, 32); s[KVQ_LANE] = x[KVQ_LANE]; {} y[KVQ_LANE] = s[31 - KVQ_LANE];"
    run_body(body.format("KVQ_WARP_BARRIER();"), {"x": X}, OUT, orders=ALL_ORDERS)
    with pytest.raises(KernelRunError, match="must not depend on the order of threads"):
        run_body(body.format(""), {"x": X}, OUT, orders=ALL_ORDERS)


@pytest.mark.parametrize("reader", ["KVQ_THREAD ^ 1", "KVQ_THREAD ^ 32"])
@pytest.mark.parametrize("other", ALL_ORDERS[1:])
def test_each_order_is_another_one(other: tuple[int, int], reader: str) -> None:
    body = f"KVQ_SHARED_ARRAY(float, s, 64); s[KVQ_THREAD] = x[KVQ_THREAD]; y[KVQ_THREAD] = s[{reader}];"
    with pytest.raises(KernelRunError, match="must not depend on the order of threads"):
        run_body(body, {"x": X}, OUT, threads=64, orders=(FORWARD, other))


# Statements between a write to shared memory and a read of what another thread wrote there: enough, or not.
ORDERED = {
    "KVQ_BARRIER();": ("KVQ_THREAD ^ 33", True),
    "KVQ_BARRIER(); ": ("KVQ_THREAD ^ 1", True),
    "KVQ_WARP_BARRIER();": ("KVQ_THREAD ^ 1", True),
    "KVQ_WARP_BARRIER(); ": ("KVQ_THREAD ^ 32", False),
    "": ("KVQ_THREAD", True),
    "float z = kvq_shuffle(x[0], 0);": ("KVQ_THREAD ^ 1", False),
    "kvq_uint z = kvq_ballot(x[0] > 0.0f);": ("KVQ_THREAD ^ 1", False),
    "kvq_uint z = kvq_to_b(kvq_rows_to_b(1u));": ("KVQ_THREAD ^ 1", False),
    "float z[4] = {0.0f, 0.0f, 0.0f, 0.0f}; kvq_mma(z, 1u, 1u, 1u, 1u, 1u, 1u);": ("KVQ_THREAD ^ 1", False),
}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("between", ORDERED)
def test_races_are_found_whatever_the_order(between: str, backwards: bool) -> None:
    reader, enough = ORDERED[between]
    shared = "KVQ_SHARED_ARRAY(float, s, 64); s[KVQ_THREAD] = 1.0f; KVQ_BARRIER();\n"
    write, read = "s[KVQ_THREAD] = x[KVQ_THREAD];", f"y[KVQ_THREAD] = s[{reader}];"
    first, second = (read, write) if backwards else (write, read)
    if enough:
        run_body(f"{shared}{first} {between} {second}", {"x": X}, OUT, "cpu-races", threads=64)
    else:
        with pytest.raises(KernelRunError, match="a barrier must stand between accesses of threads"):
            run_body(f"{shared}{first} {between} {second}", {"x": X}, OUT, "cpu-races", threads=64)


RACES = {
    "one place": (
        "KVQ_SHARED_ARRAY(float, s, 64); s[0] = x[0]; KVQ_BARRIER(); y[KVQ_THREAD] = s[0];",
        "of threads 0 and 1",
    ),
    "two readers, one writer": (
        "KVQ_SHARED_ARRAY(float, s, 64); s[KVQ_THREAD] = x[0]; KVQ_BARRIER(); y[KVQ_THREAD] = s[0];\n"
        "KVQ_WARP_BARRIER(); if (KVQ_THREAD == 40) s[0] = x[1];",
        "and 40 to byte 0 of shared array 's'",
    ),
    "the last reader writes": (
        "KVQ_SHARED_ARRAY(float, s, 64); s[KVQ_THREAD] = x[0]; KVQ_BARRIER(); y[KVQ_THREAD] = s[32 * KVQ_WARP];\n"
        "if (KVQ_LANE == 31) s[32 * KVQ_WARP] = x[1];",
        "a barrier must stand between accesses of threads 30 and 31 to byte 0",
    ),
    "output of another": (
        "y[KVQ_THREAD] = x[0]; KVQ_BARRIER(); if (KVQ_THREAD == 0) y[63] = y[1];",
        "of output array 'y' must be touched by one thread only, got thread 1 of this group and thread 0",
    ),
    "output of two": ("y[KVQ_THREAD / 2] = x[0];", "got thread 0 of this group and thread 1"),
}


@pytest.mark.parametrize("race", RACES)
def test_races_of_many_are_found(race: str) -> None:
    body, report = RACES[race]
    with pytest.raises(KernelRunError, match=re.escape(report)):
        run_body(body, {"x": X}, OUT, "cpu-races", threads=64)


# What a group does between its writes and reads of what others have written, and the report where it is not enough.
ARRIVAL = "if (KVQ_THREAD == 0) s[0] = kvq_arrive(n);"
ARRIVALS = {
    f"KVQ_FENCE(); KVQ_BARRIER(); {ARRIVAL} KVQ_BARRIER(); KVQ_FENCE();": "",
    f"KVQ_BARRIER(); {ARRIVAL} KVQ_BARRIER(); KVQ_FENCE();": "a fence must follow what thread 0 has written to outputs",
    f"KVQ_FENCE(); {ARRIVAL} KVQ_BARRIER(); KVQ_FENCE();": "a barrier must stand between what thread 1 writes",
    f"KVQ_FENCE(); {ARRIVAL.replace('== 0', '== 63')} KVQ_BARRIER(); KVQ_FENCE();": "the fence of thread 0 and the",
    f"KVQ_FENCE(); KVQ_BARRIER(); {ARRIVAL} KVQ_FENCE(); KVQ_BARRIER();": "must be touched by one thread only",
    f"KVQ_FENCE(); KVQ_BARRIER(); {ARRIVAL} KVQ_BARRIER();": "must be touched by one thread only",
    f"KVQ_FENCE(); KVQ_BARRIER(); {ARRIVAL.replace('(n)', '(n + KVQ_GROUP_X)')} KVQ_BARRIER(); KVQ_FENCE();": (
        "must be touched by one thread only, got thread 1 of an earlier group"
    ),
}


@pytest.mark.parametrize("between", ARRIVALS)
def test_a_group_sees_what_groups_have_stored_that_arrived_before(between: str) -> None:
    body = f"""KVQ_SHARED_ARRAY(kvq_uint, s, 1); y[64 * KVQ_GROUP_X + KVQ_THREAD] = x[KVQ_THREAD];
    {between}
    if (KVQ_GROUP_X == 1) z[KVQ_THREAD] = y[KVQ_THREAD ^ 1] + y[64 + (KVQ_THREAD ^ 40)];"""
    inputs = {"x": X, "n": mx.zeros((2,), dtype=mx.uint32)}
    outputs = {"y": ((128,), mx.float32), "z": ((64,), mx.float32)}
    if not ARRIVALS[between]:
        _, got = run_body(body, inputs, outputs, "cpu-races", threads=64, groups=(2, 1, 1))
        at = np.arange(64)
        assert np.array_equal(np.array(got), np.array(X)[at ^ 1] + np.array(X)[at ^ 40])
    else:
        with pytest.raises(KernelRunError, match=ARRIVALS[between]):
            run_body(body, inputs, outputs, "cpu-races", threads=64, groups=(2, 1, 1))


def test_races_of_groups_are_found() -> None:
    with pytest.raises(KernelRunError, match="got thread 0 of an earlier group and thread 0"):
        run_body("y[KVQ_THREAD] = x[0];", {"x": X}, OUT, "cpu-races", groups=(2, 1, 1))
    body = "KVQ_SHARED_ARRAY(float, s, 32); s[KVQ_LANE] = x[0]; y[32 * KVQ_GROUP_X + 31 - KVQ_LANE] = s[KVQ_LANE];"
    run_body(body, {"x": X}, OUT, "cpu-races", groups=(2, 1, 1))  # groups have shared arrays of their own


def test_groups_that_meet_in_an_output_are_found() -> None:
    body = "if (KVQ_THREAD == 0) y[0] = (float)KVQ_GROUP_X;"
    with pytest.raises(KernelRunError, match="must not depend on the order of threads"):
        run_body(body, {"x": X}, OUT, groups=(2, 1, 1), orders=(FORWARD, REVERSE))


@pytest.mark.parametrize("on", PRELUDES)
def test_shared_memory_and_outputs_begin_as_nan(on: str) -> None:
    body = (
        "KVQ_SHARED_ARRAY(float, s, 32);\n"
        "if (KVQ_GROUP_X < 2) { y[32 * KVQ_GROUP_X + KVQ_LANE] = s[KVQ_LANE]; s[KVQ_LANE] = x[KVQ_LANE]; }"
    )
    (got,) = run_body(body, {"x": X}, {"y": ((96,), mx.float32)}, on, groups=(3, 1, 1))
    assert np.isnan(np.array(got)).all()  # of the second group too, and where nothing was written


@pytest.mark.parametrize("on", PRELUDES)
def test_places_of_threads(on: str) -> None:
    body = (
        "const int at = ((KVQ_GROUP_Z * 3 + KVQ_GROUP_Y) * 2 + KVQ_GROUP_X) * 96 + KVQ_THREAD;\n"
        "y[at] = ((KVQ_GROUP_X * 10 + KVQ_GROUP_Y) * 10 + KVQ_GROUP_Z) * 1000 + KVQ_WARP * 100 + KVQ_LANE;"
    )
    (got,) = run_body(body, {"x": X}, {"y": ((4, 3, 2, 96), mx.int32)}, on, threads=96, groups=(2, 3, 4))
    z, y, x, t = np.indices((4, 3, 2, 96))
    np.testing.assert_array_equal(np.array(got), (x * 100 + y * 10 + z) * 1000 + t // 32 * 100 + t % 32)


def test_inputs_must_be_what_a_gpu_can_read() -> None:
    with pytest.raises(KernelRunError, match="input x must be row-contiguous"):
        run_body("y[0] = x[0];", {"x": X.reshape(8, 8).T}, OUT)
    with pytest.raises(KernelRunError, match="input x must have a dimension"):
        run_body("y[0] = x[0];", {"x": mx.array(1.0)}, OUT)
    (got,) = run_body("y[0] = x[0] + x_shape[1];", {"x": mx.broadcast_to(mx.array(1.0), (5, 10**9))}, OUT)
    assert got[0].item() == np.float32(1 + 10**9)
    with pytest.raises(KernelRunError, match="a read of 4 bytes at byte 4 of input array 'x', which has 4 bytes"):
        run_body("y[0] = x[1];", {"x": mx.broadcast_to(mx.array(1.0), (5, 5))}, OUT)


def test_a_grid_holds_whole_groups() -> None:
    kernel = kernel_cpu.cpu_kernel("k", ["x"], ["y"], "", "")
    for grid, group in ((48, 1, 1), (32, 1, 1)), ((64, 2, 1), (32, 2, 1)), ((0, 1, 1), (32, 1, 1)):
        with pytest.raises(KernelRunError, match="must"):
            kernel(inputs=[X], grid=grid, threadgroup=group, output_shapes=[(64,)], output_dtypes=[mx.float32])
    with pytest.raises(KernelRunError, match="1 to 1024 threads"):
        run_body("y[0] = x[0];", {"x": X}, OUT, threads=2048)


def test_texts_that_do_not_compile_are_reported() -> None:
    with pytest.raises(KernelRunError, match=r"kernel_body:2.*no_such_name"):
        run_body("y[0] = x[0];\ny[1] = no_such_name;", {"x": X}, OUT)
