"""Codebooks of the sphere on disk: one safetensors file per rate and dimension, checked entirely on reading.

A file holds float64 `levels` (2^b) and `thresholds` (2^b - 1); its metadata names the format, the version of the
computation, rate, dimension and mean squared error.
"""

from __future__ import annotations

import math
import os
import secrets
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .cache_folder import default_cache_dir
from .errors import CodebookError
from .sphere import ScalarCodebook, check_codebook, sphere_codebook, sphere_mse

FORMAT = "kvq sphere codebook"
VERSION = 1  # of the computation: files of another one are made again
FOLDER = "codebooks"


def codebook_path(bits: int, dim: int, cache_dir: Path | None = None) -> Path:
    """Where the codebook of `bits` bits and `dim` dimensions is kept: below `cache_dir`, else below the package's
    cache folder (`$KVQ_CACHE_DIR`, else `mlx-kvq-plugin` in the user's cache directory)."""
    return (cache_dir or default_cache_dir()) / FOLDER / f"sphere-{bits}bit-{dim}.safetensors"


def load_codebook(bits: int, dim: int, cache_dir: Path | None = None) -> ScalarCodebook:
    """The Lloyd-Max codebook on the sphere (sphere.py), read from its file, or computed and stored.

    Raises:
        CodecError: for rates and dimensions without one.
        CodebookError: when the file is damaged or the folder cannot be read or written; nothing is changed.
    """
    check_codebook(bits, dim)
    path = codebook_path(bits, dim, cache_dir)
    try:
        stored = _read(path, bits, dim)
        if stored is not None:
            return stored
        book = sphere_codebook(bits, dim)
        _write(path, book)
    except OSError as error:
        raise CodebookError(
            f"the folder {path.parent} of codebooks must be readable and writable, got {error}; "
            "set KVQ_CACHE_DIR to another folder"
        ) from error
    return book


def _write(path: Path, book: ScalarCodebook) -> None:
    """The file appears by one rename, complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "bits": str(book.bits),
        "dim": str(book.dim),
        "mse": repr(book.mse),
    }
    try:
        save_file({"levels": np.array(book.levels), "thresholds": np.array(book.thresholds)}, scratch, metadata)
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.chmod(0o644)  # safetensors makes it private
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _read(path: Path, bits: int, dim: int) -> ScalarCodebook | None:
    """The codebook in a file; `None` without one, and for one of another version."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == FORMAT and metadata.get("version") != str(VERSION):
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if metadata != {**metadata, "format": FORMAT, "bits": str(bits), "dim": str(dim)}:
            raise _damaged(path, f"hold {bits} bits in {dim} dimensions", f"metadata {metadata}")
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        raise _damaged(path, "be a safetensors file", str(error)) from error
    shapes = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    sizes = {"levels": ((2**bits,), "float64"), "thresholds": ((2**bits - 1,), "float64")}
    if shapes != sizes:
        raise _damaged(path, f"hold {sizes}", f"{shapes}")
    levels, thresholds = arrays["levels"], arrays["thresholds"]
    if not (np.all(np.diff(levels) > 0) and np.array_equal(levels, -levels[::-1])):
        raise _damaged(path, "hold ascending levels symmetric about 0", "others")
    if not np.array_equal(thresholds, 0.5 * (levels[1:] + levels[:-1])):
        raise _damaged(path, "hold thresholds midway between the levels", "others")
    book = ScalarCodebook(
        bits, dim, tuple(levels.tolist()), tuple(thresholds.tolist()), _number(metadata.get("mse", ""))
    )
    found = sphere_mse(book.levels, dim)
    if not abs(found - book.mse) <= 1e-9 * found:
        raise _damaged(path, f"state the error of its levels, {found}", metadata.get("mse", "none"))
    return book


def _number(text: str) -> float:
    """Not a number for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _damaged(path: Path, must: str, got: str) -> CodebookError:
    return CodebookError(f"the codebook file {path} must {must}, got {got}; it is damaged: delete it")
