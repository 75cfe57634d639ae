"""What the benchmarks share: models, texts, tables, and one JSON file of results per benchmark under results."""

from __future__ import annotations

import importlib
import inspect
import json
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm

import mlx_kvq_plugin as kvq

RESULTS = Path(__file__).resolve().parent / "results"

_DOCUMENTED = (
    "argparse",
    "collections",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "fractions",
    "heapq",
    "logging",
    "optparse",
    "pickle",
    "random",
    "statistics",
    "string",
    "textwrap",
    "threading",
    "unittest",
)


def documentation() -> str:
    """Python's own library documentation, as the docstrings of standard modules."""
    parts = []
    for name in _DOCUMENTED:
        module = importlib.import_module(name)
        parts.append(inspect.getdoc(module) or "")
        for _, member in sorted(vars(module).items()):
            if inspect.isclass(member) and member.__module__ == name:
                parts.append(inspect.getdoc(member) or "")
    return "\n\n".join(part for part in parts if part)


def source_code() -> str:
    """Python source of a standard module."""
    return inspect.getsource(importlib.import_module("textwrap")) + inspect.getsource(importlib.import_module("heapq"))


def story() -> str:
    """The prose of the demo."""
    return (Path(__file__).resolve().parent.parent / "examples" / "document.txt").read_text()


def licence() -> str:
    """Legal prose: the licence that transformers comes with."""
    files = distribution("transformers").files or []
    return next(file for file in files if file.name == "LICENSE").read_text()


TEXTS = {"documentation": documentation, "code": source_code, "story": story}
LONG_TEXTS = {"documentation": documentation, "code": source_code, "licence": licence}  # 2,000 tokens at least


def model_path(name: str) -> Path:
    """The folder of a demo model, or `name` itself if it is a folder."""
    return Path(name) if Path(name).is_dir() else kvq.demo_model_path(name)


@contextmanager
def uncalibrated(name: str) -> Iterator[str]:
    """A folder with the model's config.json alone: `auto` goes by the texts that the model writes itself."""
    with tempfile.TemporaryDirectory() as source:
        shutil.copy(model_path(name) / "config.json", source)
        yield source


def load(name: str) -> tuple[Any, Any]:
    """A demo model or a folder's, in float32 (half precision products are slow on CPUs), and its tokenizer."""
    model, tokenizer = mlx_lm.load(str(model_path(name)))
    model.set_dtype(mx.float32)
    return model, tokenizer


def machine() -> str:
    """The device that the numbers are from."""
    return (
        f"{mx.default_device()}, {platform.machine()} {platform.system()}, Python {platform.python_version()}, "
        f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"
    )


def print_table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """A Markdown table."""
    head = list(head)
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def store(name: str, rows: list[dict[str, Any]]) -> None:
    """Write `results/<name>.json` beside this file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
