"""Kernel texts run on the CPU: backends for `mlx_kvq_plugin.kernels.build` that compile them with g++.

`register_backends()` adds, for `build(..., on=...)`:

- `cpu`: lanes hold matrices as on CUDA;
- `cpu-orders`: the same under three orders of threads, with outputs that must be equal to the bit, which finds missing
  barriers;
- `cpu-metal-layout`: as `cpu-orders`, lanes hold matrices as on Metal;
- `cpu-metal`: the Metal prelude itself, on `metal_shim.h`, after the checks of `metal_check`;
- `cpu-races`: as `cpu`, with every access to shared arrays and outputs watched: two threads that touch the same byte
  with no barrier between them, one of them writing, are an error, whatever the order in which they ran.

A kernel becomes a program that reads its arrays from a pipe, so that sanitizers need not be loaded into Python. An
access outside of an array, an unaligned load, threads that wait at different places or too much shared memory raise
`KernelRunError`, whose text is the report. What a kernel does not write stays 0xFF bytes (NaN in floating point).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import metal_check
import mlx.core as mx
import numpy as np

from mlx_kvq_plugin.kernels import build

HERE = Path(__file__).parent
FORWARD, REVERSE = (0, 0), (1, 0)
ALL_ORDERS = (FORWARD, REVERSE, (2, 1))
TIMEOUT_SECONDS = 300
KEEP_SECONDS = 14 * 24 * 3600

# As the signatures that MLX writes call them; both preludes know the names of half precision types.
TYPES = {
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
    mx.float16: "kvq_half",
    mx.bfloat16: "kvq_bfloat",
}
NUMPY = {mx.bool_: np.bool_, mx.bfloat16: np.uint16}

# What the fibers know about the attributes of a Metal kernel.
ATTRIBUTES = {
    "simdgroup_index_in_threadgroup": "kvq_host_thread() / 32",
    "thread_index_in_simdgroup": "kvq_host_thread() % 32",
    "thread_position_in_threadgroup": "uint3(kvq_host_thread(), 0, 0)",
    "threadgroup_position_in_grid": "uint3(kvq_host_group(0), kvq_host_group(1), kvq_host_group(2))",
}

# A shared array of Metal becomes what the fibers fill with NaN and count.
METAL_SHARED = """#undef KVQ_SHARED_ARRAY
#define KVQ_SHARED_ARRAY(type, name, count) \\
  alignas(16) static type name[count]; kvq_host_shared(name, sizeof(name), #name)
"""

CHECKS = "address,alignment,bounds,float-cast-overflow,integer-divide-by-zero,shift,signed-integer-overflow"
FLAGS = ["-std=c++17", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-pedantic-errors"] + (
    ["-mf16c"] if platform.machine() in ("x86_64", "AMD64") else []
)
KERNEL_FLAGS = [*FLAGS, "-O1", "-g1", f"-fsanitize={CHECKS}", "-fno-sanitize-recover=all"]
RACE_FLAGS = [*FLAGS, "-O1", "-fsanitize=thread"]  # without its library
HOST_FLAGS = [*FLAGS, "-O2"]


class KernelRunError(AssertionError):
    """A kernel text that does not compile, or a run that a check stopped; the message is the report."""


def cache_folder() -> Path:
    """Where compiled programs are kept; those unused for two weeks are removed."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "mlx-kvq-plugin" / "kernel-tests"


@cache
def _compiler() -> str:
    """What a compiled file depends on besides its text."""
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    return version + platform.machine() + " ".join(KERNEL_FLAGS + RACE_FLAGS + HOST_FLAGS)


@cache
def _folder() -> Path:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime < time.time() - KEEP_SECONDS:
                path.unlink()
        except FileNotFoundError:
            pass  # another process was faster
    return folder


def _compiled(text: str, suffix: str, arguments: Sequence[str]) -> Path:
    """The file that g++ makes of a text, from the cache if it is there."""
    digest = hashlib.sha256("\n".join([text, _compiler(), *arguments]).encode()).hexdigest()[:32]
    path = _folder() / (digest + suffix)
    if path.exists():
        os.utime(path)
        return path
    with tempfile.TemporaryDirectory(dir=_folder().parent) as folder:
        source, made = Path(folder, "kernel.cpp"), Path(folder, "made")
        source.write_text(text)
        command = ["g++", *arguments, f"-I{HERE}", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise KernelRunError(f"a kernel text must compile, g++ says:\n{done.stderr}")
        made.replace(path)  # at once, so that processes may race
    return path


@cache
def _harness(races: bool) -> Path:
    text = (HERE / "fibers.cpp").read_text()
    for name in ("fibers.h", "races.h"):
        text += f"// {(HERE / name).read_text()!r}\n"
    return _compiled(text, ".o", [*HOST_FLAGS, "-c", *(["-DKVQ_RACES"] if races else [])])


@dataclass(frozen=True)
class CpuKernel:
    """A callable as `mx.fast.metal_kernel` returns it."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str
    metal: bool
    orders: tuple[tuple[int, int], ...]
    races: bool

    def text(self, dtypes: Sequence[mx.Dtype]) -> str:
        """The C++ text for arrays of these dtypes, inputs before outputs."""
        names = [*self.inputs, *self.outputs]
        parameters, arguments = [], []
        for i, (name, dtype) in enumerate(zip(names, dtypes, strict=True)):
            const, space = ("const ", "device ") if name in self.inputs else ("", "device ")
            kind = f"{const}{space if self.metal else ''}{TYPES[dtype]}*"
            parameters.append(f"{kind} {name}")
            arguments.append(f"({kind})arrays[{i}]")
            if name in self.inputs and f"{name}_shape" in self.source:
                parameters.append(f"const int* {name}_shape")
                arguments.append(f"shapes[{i}]")
            if name in self.inputs and f"{name}_strides" in self.source:
                parameters.append(f"const int64_t* {name}_strides")
                arguments.append(f"strides[{i}]")
            if name in self.inputs and f"{name}_ndim" in self.source:
                raise KernelRunError(f"kernels must not ask for the dimensions of {name}, they are constants")
        if self.metal:
            for attribute, kind in metal_check.ATTRIBUTES.items():
                if attribute in self.source:
                    parameters.append(f"{kind} {attribute}")
                    arguments.append(ATTRIBUTES[attribute])
        host = "metal_shim.h" if self.metal else "fibers.h"
        shim = (HERE / host).read_text() if self.metal else ""
        header = self.header
        if self.metal:
            header = re.sub(r"#include <metal[^\n]*\n", "", header) + METAL_SHARED
            header = header.replace("inline __attribute__((always_inline))", "static inline")  # compiles much faster
        body = f"kvq_body({', '.join(arguments)})"
        listed = ", ".join(f'"{name}"' for name in names)
        return (
            f'#include "{host}"\n'
            f'#line 1 "{self.name}_functions"\n{header}\n'
            f'#line 1 "{self.name}_body"\n'
            f"static void kvq_body({', '.join(parameters)}) {{\n#line 1\n{self.source}\n}}\n"
            f"const char* const kvq_host_names[] = {{{listed}}};\n"
            "void kvq_host_kernel(void* const* arrays, const int* const* shapes, const int64_t* const* strides) {\n"
            f"{body};\n}}\n"
            f"// {(HERE / 'fibers.h').read_text()!r} {shim!r}\n"
        )

    def program(self, dtypes: Sequence[mx.Dtype]) -> Path:
        """The compiled text."""
        if not self.races:
            return _compiled(self.text(dtypes), ".run", [*KERNEL_FLAGS, str(_harness(races=False))])
        # The library that would find races of real threads stays out: `-c` first, then a link without it.
        kernel = _compiled(self.text(dtypes), ".o", [*RACE_FLAGS, "-c"])
        return _compiled("", ".run", [str(kernel), str(_harness(races=True))])

    def check_metal(self, dtypes: Sequence[mx.Dtype], shapes: Sequence[Sequence[int]]) -> None:
        """Raises `KernelRunError` if the text breaks a rule of Metal, with the signature for these arrays."""
        names = [*self.inputs, *self.outputs]
        parameters = metal_check.signature(names, dtypes, shapes, len(self.inputs), self.source)
        found = metal_check.complaints(self.header) + metal_check.complaints(self.source)
        found += metal_check.compiler_complaints(self.header, self.source, parameters)
        if found:
            raise KernelRunError("\n".join([f"{self.name}: Metal would not take this text:", *found]))

    def __call__(
        self,
        inputs: Sequence[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        **_: Any,
    ) -> list[mx.array]:
        """Runs the kernel; arguments that have no meaning here (`template`, `stream`, `verbose`) are ignored.

        Raises:
            KernelRunError: with the report of a check that failed.
        """
        arrays = list(zip(self.inputs, inputs, strict=True))
        outputs = list(zip(self.outputs, output_shapes, output_dtypes, strict=True))
        threads, groups = _groups(grid, threadgroup)
        dtypes = [array.dtype for _, array in arrays] + [dtype for _, _, dtype in outputs]
        if self.metal:
            self.check_metal(dtypes, [array.shape for _, array in arrays] + [shape for _, shape, _ in outputs])
        program = self.program(dtypes)
        numbers = [len(arrays), len(outputs), threads, *groups, len(self.orders)]
        numbers += [number for order in self.orders for number in order]
        data = []
        for name, array in arrays:
            held, strides = _bytes(name, array, f"{name}_strides" in self.source)
            data.append(held)
            numbers += [len(held), array.ndim, *array.shape, *strides]
        sizes = [int(np.prod(shape, dtype=np.int64)) * dtype.size for _, shape, dtype in outputs]
        for (_, shape, _), size in zip(outputs, sizes, strict=True):
            numbers += [size, len(shape), *shape, *shape]
        written = _run(self.name, program, struct.pack(f"<{len(numbers)}q", *numbers) + b"".join(data))
        found, at = [], 0
        for (_, shape, dtype), size in zip(outputs, sizes, strict=True):
            kind = NUMPY.get(dtype) or np.dtype(str(dtype).split(".")[-1])
            host = np.frombuffer(written[at : at + size], dtype=kind).reshape(shape)
            found.append(mx.array(host).view(dtype) if dtype == mx.bfloat16 else mx.array(host))
            at += size
        return found


def _groups(grid: Sequence[int], threadgroup: Sequence[int]) -> tuple[int, list[int]]:
    """Threads of a group, and groups along each axis."""
    threads = threadgroup[0]
    if tuple(threadgroup[1:]) != (1, 1):
        raise KernelRunError(f"groups must extend along x only, got {tuple(threadgroup)}")
    if grid[0] % threads != 0 or min(grid) < 1:
        raise KernelRunError(f"a grid must hold whole groups of {threads} threads, at least one, got {tuple(grid)}")
    return threads, [grid[0] // threads, grid[1], grid[2]]


def _bytes(name: str, array: mx.array, strided: bool) -> tuple[bytes, list[int]]:
    """What lies in memory, and strides in elements: one element of a view in which all are the same, else all of them,
    in row-major order or, with `strided`, as they lie, what is between them being 0xFF.
    """
    if array.ndim == 0:
        raise KernelRunError(f"input {name} must have a dimension: on Metal a number is no pointer")
    array = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    view = memoryview(array)
    if array.size and not any(stride for stride, n in zip(view.strides or (), array.shape, strict=True) if n > 1):
        view = memoryview(array[(slice(0, 1),) * array.ndim])  # the whole may have more elements than NumPy can count
    host = np.asarray(view)
    strides = [stride // host.itemsize for stride in host.strides]
    if strided:
        last = sum((n - 1) * stride for n, stride in zip(host.shape, strides, strict=True))
        memory = np.full((last + 1) * host.itemsize, 0xFF, np.uint8).view(host.dtype)
        np.lib.stride_tricks.as_strided(memory, host.shape, host.strides)[...] = host
        return memory.tobytes(), strides
    if not host.flags.c_contiguous:
        raise KernelRunError(f"input {name} must be row-contiguous, got strides {host.strides} of shape {host.shape}")
    return host.tobytes(), [0] * array.ndim


def _run(name: str, program: Path, data: bytes) -> bytes:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "DYLD_INSERT_LIBRARIES")
    }
    environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0:exitcode=4"
    environment["UBSAN_OPTIONS"] = "print_stacktrace=0"
    done = subprocess.run([str(program)], input=data, capture_output=True, env=environment, timeout=TIMEOUT_SECONDS)
    if done.returncode != 0:
        report = done.stderr.decode(errors="replace")
        lines = [line for line in report.splitlines() if line.startswith("kernel:") or "runtime error" in line]
        raise KernelRunError("\n".join([f"{name}: " + " ".join(lines), report.partition("Shadow bytes")[0][:4000]]))
    return done.stdout


def cpu_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    layout: str = "cuda",
    orders: Sequence[tuple[int, int]] = (FORWARD,),
    prelude: str = "cpu",
    races: bool = False,
) -> CpuKernel:
    """As `mx.fast.metal_kernel`, for the CPU.

    Args:
        layout: `cuda` or `metal`, how lanes hold matrices in the CPU prelude.
        orders: pairs of an order of threads (0 forward, 1 reverse, 2 shuffled) and its seed; outputs must not differ.
        prelude: whose `header` this is, `cpu` or `metal`.
        races: look for accesses that no barrier orders, in place of accesses outside of arrays.
    """
    if layout == "metal":
        header = "#define KVQ_METAL_LAYOUT\n" + header
    names, runs = (tuple(input_names), tuple(output_names)), tuple(map(tuple, orders))
    return CpuKernel(name, *names, source, header, prelude == "metal", runs, races)


BACKENDS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cpu-orders": {"orders": ALL_ORDERS},
    "cpu-metal-layout": {"orders": ALL_ORDERS, "layout": "metal"},
    "cpu-metal": {"orders": ALL_ORDERS, "prelude": "metal"},
    "cpu-races": {"races": True},
}


def register_backends() -> None:
    """Add the backends of this module to `build`."""
    for name, options in BACKENDS.items():
        like = build.METAL if "metal" in name else build.CUDA
        build.register_backend(name, partial(cpu_kernel, **options), options.get("prelude", "cpu"), like)


def why_not() -> str:
    """Why kernel texts cannot be run on this machine; empty if they can."""
    if platform.system() != "Linux":
        return "the fibers of kernel texts are for Linux"
    return "" if shutil.which("g++") else "kernel texts need g++"


def run_body(
    body: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    on: str = "cpu",
    functions: str = "",
    threads: int = 32,
    groups: tuple[int, int, int] = (1, 1, 1),
    orders: Sequence[tuple[int, int]] | None = None,
) -> list[mx.array]:
    """The outputs of a kernel that is no file: `body` on the prelude of a backend and, after it, `functions`."""
    options = dict(BACKENDS[on]) if orders is None else {**BACKENDS[on], "orders": orders}
    prelude = options.get("prelude", "cpu")
    kernel = cpu_kernel(
        "kernel",
        list(inputs),
        list(outputs),
        build.PROLOGUES.get(prelude, "") + body,
        build.text(f"{prelude}.h") + functions,
        **options,
    )
    return kernel(
        inputs=list(inputs.values()),
        grid=(threads * groups[0], groups[1], groups[2]),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )
