"""C++ for CPUs that the package brings as text, compiled by the machine's compiler at first use and kept."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path

from .cache_folder import default_cache_dir

log = logging.getLogger("mlx_kvq_plugin")

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off")


def compiler() -> str | None:
    """The path of a C++ compiler: `$CXX`, g++, clang++ or c++."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of `mlx_kvq_plugin/<name>.cpp`; `None`, with one warning, where it cannot be compiled."""
    source = resources.files(__package__).joinpath(f"{name}.cpp").read_text()
    built = compiler()
    if built is None:
        _warn(name, "there is no C++ compiler; install g++, or name one in CXX")
        return None
    try:
        identity = "\n".join([built, *FLAGS, sys.platform, platform.machine(), source])
        folder = default_cache_dir() / "native"
        path = folder / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(built, source, path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        _warn(name, f"{built} says: {error.stderr.strip().splitlines()[0] if error.stderr else error}")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        _warn(name, f"{error}; set KVQ_CACHE_DIR to a folder that can be written")
    return None


def _compile(built: str, source: str, path: Path) -> None:
    """The file appears by one rename, complete."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        text, made = Path(scratch) / "text.cpp", Path(scratch) / "made.so"
        text.write_text(source)
        subprocess.run([built, *FLAGS, "-o", str(made), str(text)], check=True, capture_output=True, text=True)
        os.replace(made, path)


def _warn(name: str, reason: str) -> None:
    log.warning("%s runs as plain MLX operations, far slower, as it cannot be compiled: %s", name, reason)
