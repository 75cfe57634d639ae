"""Where the package keeps files between runs: demo models, codebooks, texts of kernels, what automatic bits go by."""

from __future__ import annotations

import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path


def default_cache_dir() -> Path:
    """`$KVQ_CACHE_DIR`, else the platform's folder for caches."""
    if chosen := os.environ.get("KVQ_CACHE_DIR"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-kvq-plugin"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mlx-kvq-plugin"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears by one rename, complete; raises `OSError` and then leaves nothing behind."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
