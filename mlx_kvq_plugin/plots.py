"""Plots of results, with matplotlib, which is an optional extra and is imported when a plot is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .contenders import AFFINE
from .errors import KVQError
from .results import SchemeResult, pareto_front

OURS, THEIRS, FRONT, LEADER = "#1f5fa8", "#c2571a", "#444444", "#888888"
MAJOR, MINOR = "#dddddd", "#eeeeee"  # grids
LABEL_SIZE, MARK_SIZE = 7.5, 4.7  # points
WIDE = 8  # inches: narrower figures have their legend above
DISTANCES = (5, 11, 18, 27, 38, 52, 70, 92, 118)  # points from a mark to its label; farther ones get a line
DIRECTIONS = tuple((math.cos(a * math.pi / 8), math.sin(a * math.pi / 8)) for a in (1, 15, 7, 9, 3, 13, 5, 11, 4, 12))


def require_matplotlib() -> None:
    """Raise `KVQError` where matplotlib is missing, before anything is measured for a plot."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise KVQError(
            "matplotlib must be installed to draw plots, got none; "
            "run: pip install 'mlx-kvq-plugin[plot]' (or pip install matplotlib)"
        ) from error


def plot_frontier(rows: Sequence[SchemeResult], path: Path, title: str) -> None:
    """Draw mean KL (logarithmic) against bits per element, every scheme with its name, and the Pareto front.

    Args:
        rows: schemes without a figure are left out; those whose KL is 0 are named below the plot.
        path: the file, whose suffix (.png, .svg, .pdf) says the format.
        title: above the plot.

    Raises:
        KVQError: without matplotlib, or when no scheme has a KL above 0.
    """
    frontier_figure(rows, title).savefig(path)


def frontier_figure(rows: Sequence[SchemeResult], title: str, size: tuple[float, float] = (12, 8)) -> Any:
    """The matplotlib figure of `plot_frontier`, with the same arguments and errors; `size` in inches."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [(row, row.overall.kl_mean) for row in rows if row.overall is not None]
    drawn = [(row, kl) for row, kl in measured if 0 < kl < math.inf]
    if not drawn:
        raise KVQError("a plot must have a scheme whose mean KL is above 0 and finite, got none; measure other schemes")
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # it can measure texts
    axes = figure.add_subplot()
    axes.set_yscale("log")
    front = [row for row in pareto_front(rows) if any(row is other for other, _ in drawn)]
    heights = {row.scheme: kl for row, kl in drawn}
    (line,) = axes.plot(
        [row.bits for row in front],
        [heights[row.scheme] for row in front],
        color=FRONT,
        linewidth=1.0,
        zorder=1,
        label="Pareto front: nothing has fewer bits and a lower KL",
    )
    for color, marker, theirs, label in ((OURS, "o", False, "kvq"), (THEIRS, "s", True, "mlx-lm's quantized cache")):
        points = [(row.bits, kl) for row, kl in drawn if row.scheme.startswith(AFFINE) is theirs]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=MARK_SIZE**2, color=color, marker=marker, zorder=2, label=label)
    low, high = min(heights.values()), max(heights.values())
    axes.set_ylim(low / 2.5, high * 2.5)
    axes.margins(x=0.08)
    axes.set_xlabel("bits per element of packed keys and values, all-in")
    axes.set_ylabel("mean KL to the fp16 cache, nats a token")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(True, which="major", color=MAJOR, linewidth=0.6)
    axes.grid(True, which="minor", color=MINOR, linewidth=0.4)
    axes.set_axisbelow(True)
    if size[0] < WIDE:
        figure.legend(loc="outside upper left", fontsize=8)
    else:
        axes.legend(loc="upper right", fontsize=8)
    exact = [row.scheme for row, kl in measured if kl == 0]
    if exact:
        axes.annotate("KL 0: " + ", ".join(exact), (0.01, 0.01), xycoords="axes fraction", fontsize=LABEL_SIZE)
    _place_labels(figure, axes, drawn, {row.scheme for row in front}, line.get_xydata())
    return figure


def _place_labels(
    figure: Any, axes: Any, drawn: Sequence[tuple[SchemeResult, float]], front: set[str], line: Any
) -> None:
    """Name every mark where its name covers no mark, no name and not the line; those of the front choose first."""
    figure.canvas.draw()  # fixes the layout, so that sizes in pixels are known
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    marks = [axes.transData.transform((row.bits, kl)) for row, kl in drawn]
    half = MARK_SIZE / 2 * scale + 1
    taken = [(x - half, y - half, x + half, y + half) for x, y in marks]
    if axes.get_legend() is not None:
        taken.append(axes.get_legend().get_window_extent(renderer).extents)
    for (x, y), (next_x, next_y) in pairwise(axes.transData.transform(line)):
        places = _points((x, y), (next_x, next_y), 4 * scale)
        taken += [(px - scale, py - scale, px + scale, py + scale) for px, py in places]
    whole, margin = axes.get_window_extent(renderer).extents, 2 * scale
    inside = (whole[0] + margin, whole[1] + margin, whole[2] - margin, whole[3] - margin)
    leaders = list[Box]()  # points of the lines from texts to their marks
    names = [row.scheme for row, _ in drawn]
    kinds = [(name.startswith(AFFINE), name in front) for name in names]
    groups = _together(kinds, marks, half / 2)
    for group in sorted(groups, key=lambda group: (names[group[0]] not in front, drawn[group[0]][0].bits)):
        row, kl = drawn[group[0]]
        label = axes.annotate(
            ", ".join(names[i] for i in group),
            (row.bits, kl),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=LABEL_SIZE,
            fontweight="bold" if row.scheme in front else "normal",
            color=THEIRS if row.scheme.startswith(AFFINE) else OURS,
            parse_math=False,
        )
        size, mark = label.get_window_extent(renderer), marks[group[0]]
        box = _best_box(mark, size.width, size.height, scale, taken, leaders, inside)
        taken.append(box)
        label.set_position(((box[0] - mark[0]) / scale, (box[1] - mark[1]) / scale))
        end = _nearest(box, mark)
        if math.dist(end, mark) > 1.5 * DISTANCES[0] * scale:
            leader = axes.transData.inverted().transform([mark, end])
            axes.plot(leader[:, 0], leader[:, 1], color=LEADER, linewidth=0.6, zorder=0.5)
            leaders += [(x - 1, y - 1, x + 1, y + 1) for x, y in _points(mark, end, 4 * scale)]


def _nearest(box: Sequence[float], mark: Sequence[float]) -> tuple[float, float]:
    """The point of a box that is nearest to a mark."""
    return min(max(mark[0], box[0]), box[2]), min(max(mark[1], box[1]), box[3])


def _points(start: Sequence[float], end: Sequence[float], step: float) -> list[tuple[float, float]]:
    """Points on a line, about `step` apart, without its end."""
    count = 1 + int(math.dist(start, end) / step)
    return [
        (start[0] + (end[0] - start[0]) * i / count, start[1] + (end[1] - start[1]) * i / count) for i in range(count)
    ]


def _together(kinds: Sequence[Any], marks: Sequence[Any], near: float) -> list[list[int]]:
    """Marks of one kind that look like one, by number: they get one label."""
    groups: list[list[int]] = []
    for i, (kind, mark) in enumerate(zip(kinds, marks, strict=True)):
        for group in groups:
            if kinds[group[0]] == kind and math.dist(marks[group[0]], mark) < near:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


Box = tuple[float, float, float, float]


def _best_box(
    mark: Sequence[float],
    width: float,
    height: float,
    scale: float,
    taken: Sequence[Any],
    leaders: Sequence[Box],
    inside: Box,
) -> Box:
    """The nearest place for a text around a mark that covers nothing; else one that covers as little as can be.

    Least of all what is `taken`; then the text should not cross `leaders` of other texts, and its own line to the mark
    nothing that is taken.
    """
    obstacles = [box for box in taken if not (box[0] <= mark[0] <= box[2] and box[1] <= mark[1] <= box[3])]
    best: Box = (mark[0], mark[1], mark[0] + width, mark[1] + height)
    least: tuple[float, float] = (math.inf, math.inf)
    for distance in DISTANCES:
        for dx, dy in DIRECTIONS:
            x, y = mark[0] + dx * distance * scale, mark[1] + dy * distance * scale
            left = x if dx > 0.1 else x - width if dx < -0.1 else x - width / 2
            box = (left, y - height / 2, left + width, y + height / 2)
            if box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3]:
                continue
            line = [(px, py, px, py) for px, py in _points(mark, _nearest(box, mark), 2 * scale)]
            crossed = sum(_overlap(box, other) for other in leaders)
            crossed += sum(_overlap(point, other) for point in line for other in obstacles)
            cost: tuple[float, float] = (sum(_overlap(box, other) for other in taken), crossed)
            if not any(cost):
                return box
            if cost < least:
                best, least = box, cost
    return best


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def plot_allocation(bits: Mapping[str, Mapping[int, Sequence[int]]], path: Path, title: str) -> None:
    """Draw bits per layer and KV head, a panel for keys and one for values.

    Args:
        bits: by side and cache entry, one number a KV head.
        path: the file, whose suffix (.png, .svg, .pdf) says the format.
        title: above the plot.

    Raises:
        KVQError: without matplotlib.
    """
    bits_figure(bits, title).savefig(path)


def bits_figure(
    bits: Mapping[str, Mapping[int, Sequence[float]]], title: str, *, upright: bool = False, width: float = 12
) -> Any:
    """The matplotlib figure of `plot_allocation`.

    Args:
        bits, title: as there; the bits need not be whole.
        upright: a row a layer and a panel beside the other, for narrow pages; else a column a layer.
        width: inches.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    numbers = sorted({b for layers in bits.values() for heads in layers.values() for b in heads})
    norm = LogNorm(numbers[0] / 1.1, numbers[-1] * 1.1)  # so that 16 bits do not make all others one colour
    sides = {side: list(layers) for side, layers in bits.items()}
    rows = {side: max(len(heads) for heads in layers.values()) for side, layers in bits.items()}
    lengths = [len(layers) for layers in sides.values()]
    if upright:
        figure = Figure(figsize=(width, 1.0 + 0.19 * max(lengths)), dpi=130, layout="constrained")
        panels = figure.subplots(1, len(bits), squeeze=False, width_ratios=list(rows.values()))[0]
    else:
        height = sum(1.0 + max(0.8, 0.24 * count) for count in rows.values())
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
        panels = figure.subplots(len(bits), 1, squeeze=False, height_ratios=list(rows.values()))[:, 0]
    FigureCanvasAgg(figure)
    size = 6 if upright and 0.28 * sum(rows.values()) > width else 7
    written = not upright or 0.2 * sum(rows.values()) <= width  # narrower cells have no room for their numbers
    for axes, (side, layers) in zip(panels, bits.items(), strict=True):
        heads = range(rows[side])
        cells = [[row[h] if h < len(row) else math.nan for row in layers.values()] for h in heads]
        mesh = axes.pcolormesh(list(zip(*cells, strict=True)) if upright else cells, cmap="viridis", norm=norm)
        for h, row in enumerate(cells):
            for i, b in enumerate(row):
                if written and not math.isnan(b):
                    place = (h + 0.5, i + 0.5) if upright else (i + 0.5, h + 0.5)
                    color = "white" if norm(b) < 0.6 else "black"
                    axes.text(*place, f"{round(b, 2):g}", ha="center", va="center", fontsize=size, color=color)
        along, across = (axes.yaxis, axes.xaxis) if upright else (axes.xaxis, axes.yaxis)
        along.set_ticks([i + 0.5 for i in range(len(layers))], [str(layer) for layer in layers], fontsize=7)
        across.set_ticks([h + 0.5 for h in heads], [str(h) for h in heads], fontsize=7)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.invert_yaxis()
        across.set_label_text(f"{side}s: KV head")
        along.set_label_text("cache entry (layer)" if axes is panels[0 if upright else -1] else "")
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    if upright and written:
        return figure
    bar = figure.colorbar(mesh, ax=panels, label="bits per element" if upright else "bits", ticks=numbers)
    bar.minorticks_off()
    bar.ax.set_yticklabels([f"{round(b, 2):g}" for b in numbers], fontsize=7)
    return figure
