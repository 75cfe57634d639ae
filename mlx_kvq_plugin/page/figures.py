"""The pictures of the page of `kvq report`: inline SVG whose colours are the page's, so that they follow its theme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..attention_errors import AttentionErrors
from ..plots import FRONT, LEADER, MAJOR, MINOR, OURS, THEIRS, bits_figure, frontier_figure, require_matplotlib
from ..probes import Distortion, KeyNorms
from ..results import SchemeResult
from .facts import LayerBits, PageFacts

WIDTH = 4.6  # inches: on a phone a picture shrinks to two thirds, and its texts stay readable
MANY = 14  # schemes: a frontier of more gets a larger picture
INK = "#010203"
SERIES = ("#1f5fa8", "#c2571a", "#2f7d4f", "#7a4fa3", "#a3303f", "#5f6b1f")
SIDES = ("keys", "values", "scores")
MARKERS = ("o", "s", "^", "D", "v", "P")

# Colours in the drawings, and what the page's style sheet calls them.
THEME = {
    INK: "currentColor",
    MAJOR: "var(--grid)",
    MINOR: "var(--grid-fine)",
    FRONT: "var(--front)",
    LEADER: "var(--muted)",
    OURS: "var(--series-0)",
    THEIRS: "var(--series-1)",
    **{color: f"var(--series-{i})" for i, color in enumerate(SERIES)},
}


def inline_svg(figure: Any, name: str, text: str) -> str:
    """An SVG element for an HTML page.

    Args:
        figure: of matplotlib.
        name: makes the ids of this picture its own.
        text: what it shows, for those who do not see it.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    for color, theme in THEME.items():
        svg = svg.replace(color, theme)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    least = f"min-width: {width}px; " if float(width) > 1.5 * 72 * WIDTH else ""  # larger ones scroll on a phone
    head = (
        f'<svg class="plot" role="img" aria-label="{_attribute(text)}" viewBox="0 0 {width} {height}" '
        f'style="{least}max-width: {2 * float(width):.0f}px" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return head + svg[svg.index(">") + 1 :]


def _attribute(text: str) -> str:
    for plain, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(plain, escaped)
    return text


@contextmanager
def page_style() -> Any:
    """matplotlib with the page's ink and sizes."""
    require_matplotlib()
    import matplotlib

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    sizes = {"font.size": 9.5, "axes.titlesize": 10, "axes.labelsize": 9.5, "legend.fontsize": 8.5}
    with matplotlib.rc_context(
        {
            **ink,
            **sizes,
            "axes.titlelocation": "left",
            "grid.color": MAJOR,
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "svg.hashsalt": "kvq",
        }
    ):
        yield


def new_figure(height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    """A figure of the page's width with panels below each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def size_text(nbytes: float, _: object = None) -> str:
    """Bytes in decimal units, as `kvq plan` prints them."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if nbytes >= u or u == 1)
    return f"{nbytes / unit:.3g} {name}"


def _count(tokens: float, _: object = None) -> str:
    """Tokens in units of 1024 where they are whole."""
    return f"{int(tokens) // 1024}k" if tokens >= 1024 and int(tokens) % 1024 == 0 else f"{tokens:g}"


def memory_figure(facts: PageFacts) -> Any:
    """Bytes of the cache over the tokens that it holds, both logarithmic."""
    figure, (axes,) = new_figure(3.6)
    steps = facts.contexts
    axes.plot(steps, [facts.stock.nbytes(n) for n in steps], color=INK, linestyle="--", linewidth=1.4, label="fp16")
    for i, part in enumerate(part for part in facts.parts if not part.error):
        color, marker = _series(i)
        nbytes = [part.plan.nbytes(n) for n in steps]
        axes.plot(steps, nbytes, color=color, marker=marker, markersize=4, linewidth=1.4, label=part.scheme)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(steps, [_count(n) for n in steps])
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter(size_text)
    axes.minorticks_off()
    axes.set_xlabel("tokens of one sequence")
    axes.set_ylabel("bytes of its cache")
    axes.grid(True)
    _legend_above(figure, axes)
    return figure


def _legend_above(figure: Any, axes: Any) -> None:
    """One legend for all panels, where it covers no line."""
    legend = figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a path may have dollars


def _series(i: int) -> tuple[str, str]:
    return SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]


def quality_figure(rows: Sequence[SchemeResult]) -> Any:
    """The frontier, larger where it has many schemes; `None` where no scheme has a KL above 0."""
    drawn = [row for row in rows if row.overall is not None]
    if not any(0 < row.overall.kl_mean < float("inf") for row in drawn if row.overall is not None):
        return None
    return frontier_figure(rows, "", (WIDTH, 4.0) if len(drawn) <= MANY else (9, 6.5))


def head_bits_figure(bits: Sequence[LayerBits]) -> Any:
    """Bits of each KV head, a row a layer; `None` where all keys are equal, and all values."""
    sides = {
        "key": {layer.index: layer.keys for layer in bits},
        "value": {layer.index: layer.values for layer in bits},
    }
    if all(len({b for heads in layers.values() for b in heads}) < 2 for layers in sides.values()):
        return None
    return bits_figure(sides, "", upright=True, width=WIDTH)


def norms_figure(norms: Sequence[KeyNorms]) -> Any:
    """Norms and outlier channels of the keys of every layer."""
    figure, (top, bottom) = new_figure(4.8, 2)
    layers = [row.index for row in norms]
    _line(top, layers, [mean(row.mean) for row in norms], 0, "mean")
    _line(top, layers, [max(row.largest) for row in norms], 1, "largest")
    top.set_title("norm of a key")
    _line(bottom, layers, [max(row.channel_peak) for row in norms], 0, "of the keys")
    framed = [(row.index, max(row.framed_channel_peak)) for row in norms if row.framed_channel_peak is not None]
    if framed:
        _line(bottom, [x for x, _ in framed], [y for _, y in framed], 1, "in the key frame")
    bottom.set_title("energy of the strongest channel of keys ÷ average")
    _by_layer((top, bottom), zero=True)
    for axes in (top, bottom):
        axes.set_ylim(top=1.28 * axes.get_ylim()[1])
        axes.legend(ncols=2, loc="upper right")
    return figure


def errors_figure(found: Mapping[int, tuple[str, Sequence[Distortion]]]) -> Any:
    """Squared errors of keys, values and scores of every layer, a line a scheme by its number."""
    figure, panels = new_figure(6.4, 3)
    for axes, side in zip(panels, SIDES, strict=True):
        axes.set_title(f"squared error of {side} ÷ {'variance' if side == 'scores' else 'energy'}")
        for i, (scheme, rows) in found.items():
            heads = [(row.index, getattr(row, side)) for row in rows]
            points = [(index, mean(values)) for index, values in heads if values is not None]
            if points:
                _line(axes, [x for x, _ in points], [y for _, y in points], i, scheme)
        if any(line.get_ydata().min() > 0 for line in axes.lines):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _by_layer(panels, zero=False)
    _legend_above(figure, panels[0])
    return figure


def _by_layer(panels: Sequence[Any], zero: bool) -> None:
    """Panels below each other over the same layers; `zero`: from 0 on."""
    for axes in panels:
        axes.grid(True)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if zero:
            axes.set_ylim(bottom=0)
    for axes in panels[:-1]:
        axes.sharex(panels[-1])
        axes.tick_params(labelbottom=False)
    panels[-1].set_xlabel("cache entry (layer)")


def _line(axes: Any, x: Sequence[float], y: Sequence[float], series: int, label: str) -> None:
    color, marker = _series(series)
    axes.plot(x, y, color=color, marker=marker, markersize=3.5, linewidth=1.2, label=label)


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def attention_figure(found: Mapping[int, AttentionErrors]) -> Any:
    """Errors of outputs by position and of scores by distance, a line a scheme, numbered as in `memory_figure`."""
    figure, (top, bottom) = new_figure(5.6, 2)
    for i, errors in found.items():
        _line(
            top,
            [(r.first + r.last) / 2 for r in errors.positions],
            [r.value for r in errors.positions],
            i,
            errors.scheme,
        )
        _line(bottom, range(len(errors.distances)), [r.value for r in errors.distances], i, errors.scheme)
    top.set_title("relative error of the attention output")
    top.set_xlabel("position of the token that attends")
    bottom.set_title("error of a score, nats")
    bottom.set_xlabel("tokens between it and the one that is attended to")
    longest = max((errors.distances for errors in found.values()), key=len)
    bottom.set_xticks(range(len(longest)), [f"{r.first}–{r.last}" for r in longest])
    for axes in (top, bottom):
        axes.set_ylim(bottom=0)
        axes.grid(True)
    _legend_above(figure, top)
    return figure
