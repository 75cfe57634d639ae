"""What the benchmarks stored in benchmarks/results, and tables of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODELS = ("smollm2", "gemma3")
TITLES = {"smollm2": "SmolLM2-135M", "gemma3": "Gemma 3 270M", "qwen2.5-coder-0.5b": "Qwen2.5-Coder 0.5B"}


def results(name: str) -> dict[str, Any]:
    """Machine and rows of one benchmark."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def one(name: str, **wanted: Any) -> dict[str, Any]:
    """The only row with the wanted values."""
    rows = (row for row in results(name)["rows"] if all(row[key] == value for key, value in wanted.items()))
    (found,) = rows
    return found


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quality(model: str) -> dict[str, Any]:
    """What `benchmarks/quality.py` stored of a model: the measurement, with its rows by scheme."""
    found = results(f"quality-{model}")
    return {**found, "rows": {row["scheme"]: row for row in found["rows"]}}


def stored(name: str) -> bool:
    """Whether a benchmark has a stored run."""
    return (RESULTS / f"{name}.json").exists()


def on_gpu(name: str) -> dict[str, Any] | None:
    """Machine and rows of a benchmark if its stored run was on a GPU; `None` without one."""
    if not stored(name):
        return None
    found = results(name)
    return found if found["machine"].startswith("Device(gpu") else None
