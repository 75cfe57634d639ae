"""Kernel texts: a prelude, the constants of one configuration, shared functions and a body, made into a callable.

Constants are `#define`s, so a kernel has no template arguments. MLX's CUDA backend knows a compiled kernel by its name
alone, so the name ends in a digest of everything the text depends on. It also copies and hashes the text at every
call, several microseconds of them, so there the text is a file that two lines include.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..cache_folder import default_cache_dir
from ..errors import KernelError

log = logging.getLogger("mlx_kvq_plugin")

CUDA, METAL = "cuda", "metal"

# Statements before every body. MLX gives a Metal kernel the attributes that its body names, and only those.
PROLOGUES = {
    METAL: (
        "const int kvq_thread = (int)thread_position_in_threadgroup.x;\n"
        "const int kvq_lane = (int)thread_index_in_simdgroup, kvq_warp = (int)simdgroup_index_in_threadgroup;\n"
        "const int kvq_group_x = (int)threadgroup_position_in_grid.x;\n"
        "const int kvq_group_y = (int)threadgroup_position_in_grid.y;\n"
        "const int kvq_group_z = (int)threadgroup_position_in_grid.z;\n"
    )
}

Kernel = Callable[..., list[mx.array]]
Maker = Callable[..., Kernel]


def backend() -> str:
    """`cuda` or `metal` if MLX's default device is a GPU of that kind, else an empty string."""
    if mx.default_device().type != mx.gpu:
        return ""
    if mx.cuda.is_available():
        return CUDA
    return METAL if mx.metal.is_available() else ""


@cache
def text(name: str) -> str:
    """A file of this folder without comments, blank lines and indentation."""
    source = resources.files(__package__).joinpath(name).read_text()
    source = re.sub(r"//[^\n]*", "", source)
    return "\n".join(line.strip() for line in source.splitlines() if line.strip()) + "\n"


@cache
def _folder() -> Path:
    """Where included texts are kept: the cache directory, or one of this process, removed at its end."""
    try:
        folder = default_cache_dir() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        folder = Path(tempfile.mkdtemp(prefix="mlx-kvq-plugin-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        log.warning(
            "kernels are compiled anew by every process, some seconds each: their texts cannot be kept in the cache "
            "directory (%s); set KVQ_CACHE_DIR to a folder that can be written",
            error,
        )
    return folder


def included(text: str) -> str:
    """A line that includes a file with this text, which stays for later processes: MLX keeps what it compiled."""
    path = _folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.h"
    if not path.exists() or path.read_text() != text:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    return f'#include "{path}"\n'


@cache
def _maker(backend_name: str) -> Maker:
    makers: dict[str, Any] = {CUDA: mx.fast.cuda_kernel, METAL: mx.fast.metal_kernel}
    return makers[backend_name]  # type: ignore[no-any-return]


_custom: dict[str, tuple[Maker, str]] = {}
_like_cuda = {CUDA}


def register_backend(name: str, maker: Maker, prelude: str = "cpu", like: str = METAL) -> None:
    """Add a backend that is not a device of MLX, for tests.

    Args:
        maker: called as `mx.fast.metal_kernel` is.
        prelude: whose text kernels are written on: `cpu`, `metal` or `cuda`.
        like: the backend whose kernels it gets.
    """
    _custom[name] = maker, prelude
    if like == CUDA:
        _like_cuda.add(name)


def has_byte_products(name: str) -> bool:
    """Whether a backend multiplies matrices of 8-bit integers; Metal does not."""
    return name in _like_cuda


def merges_at_the_end(name: str) -> bool:
    """Whether a group of a kernel can see what other groups have stored; Metal 3.0 has no fence for that."""
    return name in _like_cuda


def build(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    body: Sequence[str],
    functions: Sequence[str] = (),
    defines: Mapping[str, Any] | None = None,
    on: str = "",
    extra: str = "",
    prologue: str = "",
) -> Kernel:
    """A kernel of one configuration, compiled at its first call.

    Args:
        name: of the kernel, for profilers; a digest is appended.
        inputs, outputs: names of the arrays in the body.
        body: files whose texts make the body of the kernel function.
        functions: files with functions that it uses.
        defines: constants; booleans become 0 and 1.
        on: a backend; empty takes that of the default device.
        extra: functions made for this configuration, after the others.
        prologue: statements before the body.

    Raises:
        KernelError: if there is no backend.
    """
    where = on or backend()
    if where not in (CUDA, METAL, *_custom):
        raise KernelError(f"a kernel must have a backend ({CUDA} or {METAL}), got {where or 'the CPU'!r}; use a GPU")
    values = {key: int(value) if isinstance(value, bool) else value for key, value in (defines or {}).items()}
    constants = "".join(f"#define {key} {value}\n" for key, value in values.items())
    make, prelude = _custom[where] if where in _custom else (_maker(where), where)
    header = constants + text(f"{prelude}.h") + "".join(map(text, functions)) + extra
    source = PROLOGUES.get(prelude, "") + prologue + "".join(map(text, body))
    if where == CUDA:  # MLX looks for the names of shapes and strides in the text that it is given
        asked = [f"{name}_{what}" for name in inputs for what in ("shape", "strides")]
        named = "".join(f"// {name}\n" for name in asked if name in source)
        header, source = included(header), included(source) + named
    digest = hashlib.sha256("\n".join([header, source, *inputs, *outputs]).encode()).hexdigest()[:16]
    return make(
        name=f"kvq_{name}_{digest}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=header,
        ensure_row_contiguous=False,
    )


def dtype_name(dtype: mx.Dtype) -> str:
    """The C type of an array's elements, as the preludes call it."""
    names = {mx.float32: "float", mx.float16: "kvq_half", mx.bfloat16: "kvq_bfloat"}
    if dtype not in names:
        raise KernelError(f"arrays of kernels must be float32, float16 or bfloat16, got {dtype}; convert the model")
    return names[dtype]


@cache
def _one() -> mx.array:
    one = mx.array(1, dtype=mx.uint8)
    mx.eval(one)
    return one


def dims(*values: int) -> mx.array:
    """Integers of at least 0 for a kernel, as the shape (plus one) of a view of a single number: nothing is copied.

    A body reads them as `dims_shape[i] - 1`.
    """
    return mx.broadcast_to(_one(), [value + 1 for value in values])


def numbers(*values: int) -> mx.array:
    """As `dims`, with shapes `2 v + 1`: odd, so that the size of the view is never 0 modulo 2^64."""
    return _numbers(threading.get_ident(), values)


@lru_cache(maxsize=4096)
def _numbers(thread: int, values: tuple[int, ...]) -> mx.array:
    """Kept, since all layers ask for the same; by thread, since lazy arrays cannot cross threads."""
    return mx.broadcast_to(_one(), [2 * value + 1 for value in values])
