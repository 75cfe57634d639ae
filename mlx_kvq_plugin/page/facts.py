"""What the page of `kvq report` shows, measured on a model."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from ..attention_errors import AttentionErrors, attention_errors
from ..config import FP16
from ..contenders import AFFINE
from ..errors import CodecError, UnsupportedModelError
from ..live import LiveReport, probe_scheme
from ..loading import LayerPlan, compress
from ..planning import SchemePlan, head_bits, plan_caches
from ..progress import Progress, silent, within
from ..results import Measurement, SchemeResult, machine
from ..ruler import measure
from ..schemes import format_scheme, parse_scheme

MEMORY, QUALITY, KEYS, ATTENTION = "memory", "quality", "keys and values", "attention"


@dataclass(frozen=True)
class LayerBits:
    """Bits per element of one cache entry, all-in.

    Attributes:
        index: position in the cache list.
        keys, values: one a KV head; 16 where nothing is packed.
        reason: why nothing is packed, or a remark.
    """

    index: int
    keys: tuple[float, ...]
    values: tuple[float, ...]
    reason: str


@dataclass(frozen=True)
class Part:
    """What the page has of one scheme beside its quality.

    Attributes:
        scheme: its label.
        plan: bytes by context.
        bits: of every entry with keys and values.
        left: reasons of entries that have none, or are left to mlx-lm.
        live: what the probes found; `None` for a scheme that compresses nothing.
        attention: errors of attention, as `live`.
        error: why the scheme is not possible; then the rest is empty.
    """

    scheme: str
    plan: SchemePlan
    bits: tuple[LayerBits, ...] = ()
    left: tuple[str, ...] = ()
    live: LiveReport | None = None
    attention: AttentionErrors | None = None
    error: str = ""


@dataclass(frozen=True)
class PageFacts:
    """Everything on the page.

    Attributes:
        model: as it was named.
        model_type: of its config.
        entries: how many caches a prompt has.
        positions: that the model was trained for, if the config says.
        float32: whether the weights are held in float32.
        dtype: of the keys and values that mlx-lm's caches would hold here, an MLX dtype name.
        itemsize: bytes of an element of keys and values in the model's own type, which `contexts` are counted for.
        contexts: tokens that bytes are given for.
        stock: the plan of mlx-lm's own caches.
        parts: one a scheme.
        measurement: the quality, measured or read from a file.
        measured_file: the file that the measurement is from; "" for one of this page.
        calibration: label of the calibration that average bits are allocated by; "" without one.
        tokens: that the probes read.
        text: name of the text that they read.
        machine, command, made: where, how and when (ISO 8601) the page was made.
        seconds: by part of the page.
    """

    model: str
    model_type: str
    entries: int
    positions: int | None
    float32: bool
    dtype: str
    itemsize: int
    contexts: tuple[int, ...]
    stock: SchemePlan
    parts: tuple[Part, ...]
    measurement: Measurement
    measured_file: str
    calibration: str
    tokens: int
    text: str
    machine: str
    command: str
    made: str
    seconds: Mapping[str, float] = field(default_factory=dict)


def labels(schemes: Sequence[str]) -> dict[str, str]:
    """What the page calls schemes: without the path of their calibration, unless nothing else tells two apart."""
    short = {
        scheme: scheme if scheme.startswith(AFFINE) else format_scheme(replace(parse_scheme(scheme), calibration=""))
        for scheme in schemes
    }
    counts = Counter(short.values())
    return {scheme: name if counts[name] == 1 else scheme for scheme, name in short.items()}


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        schemes: of this package, for everything.
        compared: schemes that only the quality is measured of.
        contexts: tokens of a sequence.
        tokens: of the text that the probes read.
        texts: tokens by name, for the quality; the probes read the first one.
        prefill, steps: as for `measure`.
        unknown_arch, source: as for `compress`.
    """

    schemes: Sequence[str]
    compared: Sequence[str]
    contexts: Sequence[int]
    tokens: int
    texts: Mapping[str, Sequence[int]]
    prefill: int
    steps: int
    unknown_arch: str = "error"
    source: str = ""

    @property
    def labels(self) -> dict[str, str]:
        """The page's names of all schemes."""
        return labels([*self.schemes, *self.compared])


def gather(
    model: Any,
    request: Request,
    about: Mapping[str, Any],
    measurement: Measurement | None = None,
    progress: Progress = silent,
) -> PageFacts:
    """Measure everything.

    Args:
        model: from mlx-lm, not compressed; it is as before at the end.
        request: what to measure.
        about: the fields of `PageFacts` that are not measured.
        measurement: a quality that was measured before, instead of measuring it.
        progress: called with the stage and the scheme, and how much of it is done.

    Raises:
        KVQError: for texts that are too short, and as `compress`; a head size that a codec cannot do is the `error` of
            its part.
        UnsupportedModelError: for a model without keys and values.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[Progress]:
        start = time.perf_counter()
        yield within(progress, name)
        seconds[name] = time.perf_counter() - start

    with stage(MEMORY) as tell:
        tell("", 0, 1)
        stock = _planned(model, FP16, FP16, request, about["itemsize"]).plan
        if not any(map(_has_keys, stock.layers)):
            raise UnsupportedModelError("a model must have layers with keys and values to report on, got none")
        names = request.labels
        parts = [_planned(model, scheme, names[scheme], request, about["itemsize"]) for scheme in request.schemes]
    if measurement is None:
        with stage(QUALITY) as tell:
            measurement = _measured(model, request, about, tell)
    text, ids = next(iter(request.texts.items()))
    ids = list(ids)[: request.tokens]
    possible = [i for i, part in enumerate(parts) if not part.error and any(layer.spec for layer in part.plan.layers)]
    options: dict[str, Any] = {"unknown_arch": request.unknown_arch, "source": request.source}
    with stage(KEYS) as tell:
        for step, i in enumerate(possible):
            tell(parts[i].scheme, step, len(possible))
            live = probe_scheme(model, ids, request.schemes[i], **options)
            parts[i] = replace(parts[i], live=replace(live, scheme=parts[i].scheme))
    with stage(ATTENTION) as tell:
        for step, i in enumerate(possible):
            tell(parts[i].scheme, step, len(possible))
            errors = attention_errors(model, ids, request.schemes[i], **options)
            assert errors is not None
            parts[i] = replace(parts[i], attention=replace(errors, scheme=parts[i].scheme))
    return PageFacts(
        **about,
        entries=len(stock.layers),
        contexts=tuple(request.contexts),
        stock=stock,
        parts=tuple(parts),
        measurement=measurement,
        tokens=len(ids),
        text=text,
        machine=f"{machine()}, mlx-kvq-plugin {version('mlx-kvq-plugin')}, {os.cpu_count()} CPU cores",
        seconds=seconds,
    )


def _planned(model: Any, scheme: str, name: str, request: Request, itemsize: int) -> Part:
    """Bytes and bits of a scheme."""
    try:
        with compress(model, scheme, unknown_arch=request.unknown_arch, source=request.source) as compression:
            plan = plan_caches(compression.maker, itemsize)
    except CodecError as error:
        message = " ".join(str(error).split())
        return Part(name, SchemePlan(scheme, (), error=message), error=message)
    bits = tuple(LayerBits(layer.index, *head_bits(layer), layer.reason) for layer in plan.layers if _has_keys(layer))
    left = tuple(dict.fromkeys(layer.reason for layer in plan.layers if layer.spec is None))
    return Part(name, plan, bits, left)


def _has_keys(layer: LayerPlan) -> bool:
    return bool(layer.geometry.kv_heads)


def _measured(model: Any, request: Request, about: Mapping[str, Any], progress: Progress) -> Measurement:
    """The quality of all schemes, with labels for names."""
    names = request.labels
    rows: list[SchemeResult] = list(
        measure(
            model,
            request.texts,
            [*request.schemes, *request.compared],
            prefill=request.prefill,
            steps=request.steps,
            unknown_arch=request.unknown_arch,
            source=request.source,
            progress=progress,
        )
    )
    return Measurement(
        model=about["model"],
        texts=tuple(request.texts),
        prefill=request.prefill,
        steps=request.steps,
        machine=machine(),
        dtype=about["dtype"],
        rows=tuple(replace(row, scheme=names[row.scheme]) for row in rows),
        command=about["command"],
        measured=about["made"],
    )
