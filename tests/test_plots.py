"""Plots: files are written, names cover nothing, and without matplotlib there is one sentence."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from test_results import row

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.plots import frontier_figure, plot_allocation, plot_frontier, require_matplotlib
from mlx_kvq_plugin.results import SchemeResult

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def crowd() -> list[SchemeResult]:
    """Fifty schemes as real ones lie: most within two bits and two decades, some of them twice."""
    rows = [row(f"mlx-affine{bits}", bits + 0.5, 30 * 4.0**-bits) for bits in (8, 6, 5, 4, 3, 2)]
    for i in range(36):
        bits = 2.25 + 0.25 * (i % 9)
        rows.append(row(f"turbo{i}v{i % 5}", bits, 4.0**-bits * (1 + 0.8 * (i // 9))))
    twins = [row(f"twin{i}", *pair) for i, pair in enumerate([(2.25, 4.0**-2.25), (3.25, 4.0**-3.25)])]
    return [*rows, *twins, row("tq1", 1.25, 0.5), row("tq6", 6.25, 2e-4), row("affine8", 8.5, 1e-5)]


@pytest.mark.parametrize("suffix", list(MAGIC))
def test_frontier_is_written_in_every_format(tmp_path, suffix):
    path = tmp_path / f"frontier{suffix}"
    plot_frontier([row("tq4", 4.25, 0.01), row("mlx-affine4", 4.5, 0.1)], path, "two schemes")
    assert path.read_bytes().startswith(MAGIC[suffix]) and path.stat().st_size > 5000


def labels_of(figure: Any) -> dict[str, Any]:
    """Extents in pixels of the names in a figure."""
    renderer = figure.canvas.get_renderer()
    (axes,) = figure.axes
    return {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}


def overlap(a: Any, b: Any) -> bool:
    return bool(a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1)


def test_names_cover_no_mark_and_no_other_name():
    rows = crowd()
    figure = frontier_figure(rows, "crowded")
    figure.canvas.draw()
    labels, (axes,) = labels_of(figure), figure.axes
    names = [name for label in labels for name in label.split(", ")]
    assert sorted(names) == sorted(found.scheme for found in rows)
    for (one, a), (other, b) in combinations(labels.items(), 2):
        assert not overlap(a, b), (one, other)
    marks = [axes.transData.transform((found.bits, found.overall.kl_mean)) for found in rows]
    for label, box in labels.items():
        for found, (x, y) in zip(rows, marks, strict=True):
            assert not (box.x0 < x < box.x1 and box.y0 < y < box.y1), (label, found.scheme)
        whole = axes.get_window_extent()
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, label
    legend = axes.get_legend().get_window_extent()
    assert not any(overlap(legend, box) for box in labels.values())


def test_marks_in_one_place_share_a_name():
    rows = [row("tq2", 2.25, 0.1), row("rvq1", 2.25, 0.1), row("tq4", 4.25, 0.01), row("mlx-affine2", 4.25, 0.01)]
    assert set(labels_of(frontier_figure(rows, ""))) == {"tq2, rvq1", "tq4", "mlx-affine2"}


def fronts(rows: Sequence[SchemeResult]) -> list[tuple[float, float]]:
    (axes,) = frontier_figure(rows, "").axes
    return [tuple(point) for point in axes.lines[0].get_xydata().tolist()]


def test_the_line_goes_through_the_front_and_its_names_are_bold():
    rows = [row("a", 2.0, 0.5), row("b", 3.0, 0.1), row("worse", 3.5, 0.2), row("c", 4.0, 0.01)]
    assert fronts(rows) == [(2.0, 0.5), (3.0, 0.1), (4.0, 0.01)]
    (axes,) = frontier_figure(rows, "").axes
    assert {text.get_text(): text.get_fontweight() for text in axes.texts} == {
        "a": "bold",
        "b": "bold",
        "c": "bold",
        "worse": "normal",
    }
    assert axes.get_yscale() == "log"


def test_lossless_schemes_are_named_below_and_failed_ones_left_out():
    rows = [
        row("fp16", 16.0, 0.0),
        row("tq4", 4.25, 0.01),
        row("lost", 1.0, math.nan),
        SchemeResult("failed", error="no"),
    ]
    assert set(labels_of(frontier_figure(rows, ""))) == {"KL 0: fp16", "tq4"}
    with pytest.raises(kvq.KVQError, match="must have a scheme whose mean KL is above 0 and finite, got none"):
        frontier_figure(rows[:1] + rows[2:], "")


def test_allocations_are_written(tmp_path):
    bits = {"key": {0: [4, 2], 1: [3, 3]}, "value": {0: [2, 2], 1: [1]}}
    plot_allocation(bits, tmp_path / "bits.png", "bits")
    assert (tmp_path / "bits.png").read_bytes().startswith(MAGIC[".png"])


def test_without_matplotlib_one_sentence_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        require_matplotlib,
        lambda: plot_frontier([row("tq4", 4.25, 0.01)], tmp_path / "x.png", ""),
        lambda: plot_allocation({"key": {0: [1]}}, tmp_path / "x.png", ""),
    ):
        with pytest.raises(kvq.KVQError, match=r"matplotlib must be installed .* pip install 'mlx-kvq-plugin\[plot\]'"):
            draw()
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_imported_when_something_is_drawn():
    code = "import sys, mlx_kvq_plugin.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parent).returncode == 0
