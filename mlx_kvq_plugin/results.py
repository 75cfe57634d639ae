"""What the ruler found: rows, their JSON, their table and their Pareto front."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from .evaluation import LAST, Fidelity
from .needle import Retrieval

ROUNDING = 1e-3  # of a mean KL: schemes with the same codes under two names may differ by as much

_BYTES = ("nbytes", "nbytes_16bit", "fp16_nbytes")


@dataclass(frozen=True)
class TextResult:
    """One scheme on one text: how far from the reference, and after how many greedy tokens it says something else."""

    fidelity: Fidelity
    greedy: int


@dataclass(frozen=True)
class SchemeResult:
    """One scheme on all texts.

    Attributes:
        scheme: its name.
        error: why the model cannot do it; then everything else is empty.
        note: what an `auto` scheme chose, and what is left to mlx-lm, if anything.
        bits: per element of packed keys and values in 16-bit models, everything that is stored with them counted;
            the average of all layers with keys and values, where those left to mlx-lm have 16.
        nbytes: bytes that the caches of all texts really hold at the end, slack and statistics counted.
        nbytes_16bit: the same if the model computed in 16 bits, which is what tokens kept dense then take; in a model
            of 32 bits they take twice as much.
        fp16_nbytes: of the same tokens in 16 bits, without slack.
        overall: the fidelity over all texts.
        texts: by the names of the texts.
        needle: one for each depth; empty if it was not asked for.
        reference_needle: the same with mlx-lm's caches.
    """

    scheme: str
    error: str = ""
    note: str = ""
    bits: float = 0.0
    nbytes: int = 0
    nbytes_16bit: int = 0
    fp16_nbytes: int = 0
    overall: Fidelity | None = None
    texts: Mapping[str, TextResult] = field(default_factory=dict)
    needle: tuple[Retrieval, ...] = ()
    reference_needle: tuple[Retrieval, ...] = ()

    @property
    def ratio(self) -> float:
        """fp16 bytes over bytes held."""
        return self.fp16_nbytes / self.nbytes if self.nbytes else 1.0

    @property
    def ratio_16bit(self) -> float:
        """fp16 bytes over those that a model of 16 bits holds."""
        return self.fp16_nbytes / self.nbytes_16bit if self.nbytes_16bit else 1.0

    @property
    def greedy(self) -> float:
        """Greedy tokens before the first other one, on average."""
        return sum(text.greedy for text in self.texts.values()) / max(len(self.texts), 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a scheme that cannot be done has its name and the reason only."""
        if self.overall is None:
            return {"scheme": self.scheme, "error": self.error}
        return {
            "scheme": self.scheme,
            "note": self.note,
            "bits": self.bits,
            "nbytes": self.nbytes,
            "nbytes_16bit": self.nbytes_16bit,
            "fp16_nbytes": self.fp16_nbytes,
            "ratio": self.ratio,
            "ratio_16bit": self.ratio_16bit,
            "greedy": self.greedy,
            **asdict(self.overall),
            "texts": {name: {**asdict(text.fidelity), "greedy": text.greedy} for name, text in self.texts.items()},
            "needle": [asdict(found) for found in self.needle],
            "reference_needle": [asdict(found) for found in self.reference_needle],
        }

    @staticmethod
    def from_dict(row: Mapping[str, Any]) -> SchemeResult:
        """Inverse of `to_dict`."""
        if "error" in row:
            return SchemeResult(row["scheme"], error=row["error"])

        def fidelity(found: Mapping[str, Any]) -> Fidelity:
            return Fidelity(**_numbers({field.name: found[field.name] for field in fields(Fidelity)}))

        def needle(found: Sequence[Mapping[str, Any]]) -> tuple[Retrieval, ...]:
            return tuple(Retrieval(**_numbers(depth)) for depth in found)

        return SchemeResult(
            **{name: row[name] for name in ("scheme", "note", "bits", *_BYTES)},
            overall=fidelity(row),
            texts={name: TextResult(fidelity(found), found["greedy"]) for name, found in row["texts"].items()},
            needle=needle(row["needle"]),
            reference_needle=needle(row["reference_needle"]),
        )


def pareto_front(rows: Sequence[SchemeResult]) -> list[SchemeResult]:
    """Those of the rows that no other one beats in bits and mean KL, by growing bits; equals stand side by side.

    Mean KL that differ by less than the fraction `ROUNDING` count as equal.
    """

    def beats(other: SchemeResult, row: SchemeResult) -> bool:
        assert other.overall is not None and row.overall is not None
        if math.isclose(other.bits, row.bits):
            return other.overall.kl_mean < row.overall.kl_mean * (1 - ROUNDING)
        return other.bits < row.bits and other.overall.kl_mean <= row.overall.kl_mean

    measured = [row for row in rows if row.overall is not None and math.isfinite(row.overall.kl_mean)]
    front = [row for row in measured if not any(beats(other, row) for other in measured)]
    return sorted(front, key=lambda row: row.bits)


def machine() -> str:
    """The device and the versions that figures are from."""
    return (
        f"{mx.default_device()}, {platform.machine()} {platform.system()}, Python {platform.python_version()}, "
        f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"
    )


@dataclass(frozen=True)
class Measurement:
    """All rows of a model, and what they are from.

    Attributes:
        model: name or folder.
        texts: names.
        prefill, steps: tokens of each text.
        machine: as `machine` says.
        dtype: of the keys and values that mlx-lm's caches would hold, an MLX dtype name.
        rows: in the order of the schemes.
        joint: as for `measure`.
        command: that measured them, and `measured` when it ended (ISO 8601); empty in files of earlier versions.
    """

    model: str
    texts: tuple[str, ...]
    prefill: int
    steps: int
    machine: str
    dtype: str
    rows: tuple[SchemeResult, ...]
    joint: bool = True
    command: str = ""
    measured: str = ""

    def to_json(self) -> str:
        """One JSON object; numbers that are not finite become null."""
        found = {**vars(self), "rows": [row.to_dict() for row in self.rows]}
        return json.dumps(_nulls(found), indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Measurement:
        """Inverse of `to_json`."""
        found = json.loads(text)
        rows = tuple(SchemeResult.from_dict(row) for row in found["rows"])
        return Measurement(**{**found, "texts": tuple(found["texts"]), "rows": rows})


def _nulls(value: Any) -> Any:
    """JSON-ready, with null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `_nulls`."""
    return {key: math.nan if value is None else value for key, value in row.items()}


# ---- tables ----------------------------------------------------------------------------------------------------------

HEAD = (
    *("scheme", "text", "bits", "MiB", "ratio", "16-bit ratio", "KL mean", "median", "p99", "max", f"last {LAST}"),
    *("top-1", "perplexity (fp16)", "greedy"),
)


def table(rows: Sequence[SchemeResult], texts: bool = True) -> list[list[str]]:
    """Cells, the head first: a line for all texts of each scheme, then one for each text, unless there is only one.

    Schemes that cannot be done are left out. Needle margins come last, with those of mlx-lm's caches in parentheses.
    """
    depths = next(([found.depth for found in row.needle] for row in rows if row.needle), [])
    lines = [[*HEAD, *(f"needle {depth:g} (fp16)" for depth in depths)]]
    for row in rows:
        if row.overall is None:
            continue
        held = [f"{row.bits:.2f}", f"{row.nbytes / 2**20:.2f}", f"{row.ratio:.2f}x", f"{row.ratio_16bit:.2f}x"]
        margins = [
            f"{found.margin:.2f} ({stock.margin:.2f})"
            for found, stock in zip(row.needle, row.reference_needle, strict=True)
        ]
        only = next(iter(row.texts)) if len(row.texts) == 1 else "all"
        lines.append([row.scheme, only, *held, *_fidelity_cells(row.overall, f"{row.greedy:.0f}"), *margins])
        if texts and len(row.texts) > 1:
            for name, text in row.texts.items():
                cells = _fidelity_cells(text.fidelity, f"{text.greedy}")
                lines.append(["", name, *("" for _ in held), *cells, *("" for _ in margins)])
    return lines


def _fidelity_cells(found: Fidelity, greedy: str) -> list[str]:
    distances = (found.kl_mean, found.kl_median, found.kl_p99, found.kl_max, found.kl_last)
    perplexities = f"{found.perplexity:.2f} ({found.reference_perplexity:.2f})"
    return [*(f"{value:.3g}" for value in distances), f"{found.top1:.1%}", perplexities, greedy]


def remarks(rows: Sequence[SchemeResult]) -> list[str]:
    """A line for every scheme that cannot be done, chooses by itself, or leaves layers as they are."""
    return [f"{row.scheme}: {row.error or row.note}" for row in rows if row.error or row.note]
