"""Where the package keeps files between runs: demo models, codebooks, texts of kernels."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def default_cache_dir() -> Path:
    """`$KVQ_CACHE_DIR`, else the platform's folder for caches."""
    if chosen := os.environ.get("KVQ_CACHE_DIR"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-kvq-plugin"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mlx-kvq-plugin"
