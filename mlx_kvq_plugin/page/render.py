"""The HTML of the page of `kvq report`: one file, which loads nothing and runs no script but the one in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..attention_errors import AttentionErrors
from ..evaluation import LAST
from ..live import STEPS, LiveReport
from ..probes import Distortion, KeyNorms, Skipped
from ..results import pareto_front, remarks
from . import figures
from .facts import LayerBits, PageFacts, Part

TEMPLATE = "page.html"


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        caption: above it.
        head, rows: the first cell of a row names it.
        marked: numbers of rows to point out.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """An SVG element with what it shows, or nothing where a scheme has none."""

    svg: Markup
    caption: str


def render_page(facts: PageFacts) -> str:
    """The page.

    Raises:
        KVQError: without matplotlib.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    lives = {i: part.live for i, part in enumerate(_possible(facts)) if part.live is not None}
    with figures.page_style():
        blocks = {
            "memory": (_memory_picture(facts), _memory_table(facts)),
            "quality": (_quality_picture(facts), _quality_table(facts)),
            "bits": [_bits_block(i, part) for i, part in enumerate(_possible(facts))],
            "norms": _norms_block(next(iter(lives.values()))) if lives else None,
            "errors": _errors_block(lives),
            "attention": _attention_block(facts),
        }
    return environment.get_template(TEMPLATE).render(
        facts=facts,
        **blocks,
        remarks=[*(f"{p.scheme}: {p.error}" for p in facts.parts if p.error), *remarks(facts.measurement.rows)],
        last=LAST,
        steps=STEPS,
        stylesheet=Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8")),
        total=sum(facts.seconds.values()),
    )


def _possible(facts: PageFacts) -> list[Part]:
    """Parts of schemes that the model can do; their numbers choose the colours of all pictures."""
    return [part for part in facts.parts if not part.error]


def _picture(figure: Any, name: str, caption: str) -> Picture | None:
    return None if figure is None else Picture(Markup(figures.inline_svg(figure, name, caption)), caption)


# ---- memory ----------------------------------------------------------------------------------------------------------


def _memory_picture(facts: PageFacts) -> Picture | None:
    most = facts.contexts[-1]
    stock = facts.stock.nbytes(most)
    own = [(part.scheme, part.plan.nbytes(most)) for part in _possible(facts)]
    ends = [f"{scheme} {figures.size_text(size)} ({stock / size:.2f} times smaller)" for scheme, size in own]
    caption = (
        f"Bytes of the cache of one sequence, K and V, over its tokens. At {most} tokens: fp16 "
        f"{figures.size_text(stock)}, {', '.join(ends) or 'no scheme is possible'}."
    )
    return _picture(figures.memory_figure(facts), "memory", caption)


def _memory_table(facts: PageFacts) -> Table:
    rows = [["fp16", *(f"{facts.stock.nbytes(n):,}" for n in facts.contexts)]]
    for part in facts.parts:
        if not part.error:
            cells = [(part.plan.nbytes(n), facts.stock.nbytes(n)) for n in facts.contexts]
            rows.append([part.scheme, *(f"{own:,} ({stock / max(own, 1):.2f}x)" for own, stock in cells)])
    beyond = [facts.positions is not None and n > facts.positions for n in facts.contexts]
    names = [f"{n:,}{'*' if far else ''}" for n, far in zip(facts.contexts, beyond, strict=True)]
    star = f"; * is more than the {facts.positions} positions of the model" if any(beyond) else ""
    return Table(f"Bytes by tokens, and how many times smaller than fp16{star}", ["scheme", *names], rows)


# ---- quality ---------------------------------------------------------------------------------------------------------


def _quality_picture(facts: PageFacts) -> Picture | None:
    rows = [row for row in facts.measurement.rows if row.overall is not None]
    best = [row.scheme for row in pareto_front(rows)]
    caption = (
        "Mean KL divergence from the fp16 cache (logarithmic, nats a token) against bits per element. "
        f"No other scheme has fewer bits and a lower KL than {', '.join(best) or 'any'}."
    )
    return _picture(figures.quality_figure(rows), "quality", caption)


def _quality_table(facts: PageFacts) -> Table:
    rows = [(row, row.overall) for row in facts.measurement.rows if row.overall is not None]
    rows.sort(key=lambda pair: (pair[0].bits, pair[1].kl_mean))
    front = {row.scheme for row in pareto_front([row for row, _ in rows])}
    cells = [
        [
            row.scheme,
            f"{row.bits:.2f}",
            f"{row.ratio_16bit:.2f}x",
            f"{found.kl_mean:.4g}",
            f"{found.kl_p99:.3g}",
            f"{found.top1:.1%}",
            f"{found.perplexity:.3f} ({found.reference_perplexity:.3f})",
        ]
        for row, found in rows
    ]
    head = ["scheme", "bits", "smaller", "KL mean", "KL p99", "same top-1", "perplexity (fp16)"]
    marked = [i for i, (row, _) in enumerate(rows) if row.scheme in front]
    tokens = facts.measurement.prefill + facts.measurement.steps
    caption = (
        "Quality by scheme; bold: nothing has fewer bits and a lower mean KL; smaller: fp16 over bytes held at these "
        f"{tokens} tokens, in a 16-bit model"
    )
    return Table(caption, head, cells, marked)


# ---- bits ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One scheme of a section: a sentence, and what there is of a picture and a table."""

    scheme: str
    text: str
    picture: Picture | None
    table: Table | None


def _bits_block(number: int, part: Part) -> Block:
    packed = sum(layer.spec is not None for layer in part.plan.layers)
    text = f"{packed} of {len(part.bits)} layers with keys and values are packed."
    text += "".join(f" Left to mlx-lm: {reason}." for reason in part.left if reason)
    figure = figures.head_bits_figure(part.bits)
    if figure is None:
        keys, values = (_bits(heads)[0] for heads in (part.bits[0].keys, part.bits[0].values))
        sides = f"{keys} bits per element" if keys == values else f"{keys} bits per element of keys, {values} of values"
        text += f" Every KV head has {sides}."
        return Block(part.scheme, text, None, None)
    caption = f"Bits per element of every KV head by layer, {part.scheme}: {_spread(part.bits)}."
    rows = [[str(layer.index), " ".join(_bits(layer.keys)), " ".join(_bits(layer.values))] for layer in part.bits]
    table = Table("Bits of each KV head", ["layer", "keys", "values"], rows)
    return Block(part.scheme, text, _picture(figure, f"bits{number}", caption), table)


def _bits(heads: Sequence[float]) -> list[str]:
    return [f"{round(b, 2):g}" for b in heads]


def _spread(bits: Sequence[LayerBits]) -> str:
    ends = []
    for side, heads in (("keys", [layer.keys for layer in bits]), ("values", [layer.values for layer in bits])):
        ends.append(f"{side} {' to '.join(_bits((min(map(min, heads)), max(map(max, heads)))))}")
    return ", ".join(ends)


# ---- keys and values -------------------------------------------------------------------------------------------------


def _norms_block(live: LiveReport) -> Block | None:
    """Norms and channels, which are the model's: the probes of one scheme say them."""
    norms = [row for row in live.norms if isinstance(row, KeyNorms)]
    skipped = dict.fromkeys(row.reason for row in live.norms if isinstance(row, Skipped))
    text = "".join(f"Layers left out: {reason}. " for reason in skipped)
    if not norms:
        return Block(live.scheme, text, None, None)
    worst = max(norms, key=lambda row: max(row.channel_peak))
    caption = (
        f"Key norms and outlier channels of {len(norms)} layers. The strongest channel is in layer {worst.index}: "
        f"{max(worst.channel_peak):.1f} times the average energy."
    )
    head = ["layer", "norm", "largest", "over median", "mean key's share", "channel", "channel encoded"]
    table = Table("Norms (means of the KV heads); largest and strongest of all heads", head, [*map(_norms_row, norms)])
    return Block(live.scheme, text, _picture(figures.norms_figure(norms), "norms", caption), table)


def _norms_row(norms: KeyNorms) -> list[str]:
    framed = norms.framed_channel_peak
    return [
        str(norms.index),
        f"{figures.mean(norms.mean):.2f}",
        f"{max(norms.largest):.2f}",
        f"{max(norms.largest_to_median):.2f}x",
        f"{figures.mean(norms.mean_share):.1%}",
        f"{max(norms.channel_peak):.1f}x",
        "–" if framed is None else f"{max(framed):.1f}x",
    ]


def _errors_block(lives: Mapping[int, LiveReport]) -> tuple[Picture | None, list[Table]]:
    """Encoding errors of all schemes; by the number of the scheme."""
    found = {i: [row for row in live.distortions if isinstance(row, Distortion)] for i, live in lives.items()}
    found = {i: rows for i, rows in found.items() if rows}
    if not found:
        return None, []
    names = [lives[i].scheme for i in found]
    whole = [f"{lives[i].scheme} {figures.mean([figures.mean(r.keys) for r in rows]):.4f}" for i, rows in found.items()]
    caption = f"Squared encoding errors by layer. Of keys, averaged over the layers: {', '.join(whole)}."
    tables = []
    for side in figures.SIDES:
        by_layer = [{row.index: getattr(row, side) for row in rows} for rows in found.values()]
        layers = sorted({index for column in by_layer for index in column})
        cells = [[column.get(index) for column in by_layer] for index in layers]
        rows = [
            [str(i), *(_figure(None if heads is None else figures.mean(heads)) for heads in row)]
            for i, row in zip(layers, cells, strict=True)
        ]
        tables.append(Table(f"Squared error of {side} by layer", ["layer", *names], rows))
    labelled = {i: (lives[i].scheme, rows) for i, rows in found.items()}
    return _picture(figures.errors_figure(labelled), "errors", caption), tables


# ---- attention -------------------------------------------------------------------------------------------------------


def _attention_block(facts: PageFacts) -> tuple[Picture | None, list[Table]]:
    found = {i: part.attention for i, part in enumerate(_possible(facts)) if part.attention is not None}
    if not found:
        return None, []
    ends = [f"{errors.scheme} {errors.positions[-1].value:.3g}" for errors in found.values()]
    caption = (
        "Relative error of the attention output by position, and error of scores by distance. Output error at the last "
        f"positions: {', '.join(ends)}."
    )
    picture = _picture(figures.attention_figure(found), "attention", caption)
    rows = list(found.values())
    schemes = [errors.scheme for errors in rows]
    return picture, [
        Table("Output error by position", ["positions", *schemes], _ranges([r.positions for r in rows])),
        Table("Score error by distance, nats", ["tokens apart", *schemes], _ranges([r.distances for r in rows])),
        Table("Output error by layer", ["layer", *schemes], _layer_rows(rows)),
    ]


def _ranges(columns: Sequence[Sequence[Any]]) -> list[list[str]]:
    """A row for every range that a column has."""
    names = dict.fromkeys((r.first, r.last) for column in columns for r in column)
    values = [{(r.first, r.last): r.value for r in column} for column in columns]
    return [[f"{a}–{b}", *(_figure(column.get((a, b))) for column in values)] for a, b in sorted(names)]


def _layer_rows(rows: Sequence[AttentionErrors]) -> list[list[str]]:
    layers = sorted({layer for row in rows for layer in row.layers})
    return [[str(layer), *(_figure(row.layers.get(layer)) for row in rows)] for layer in layers]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
