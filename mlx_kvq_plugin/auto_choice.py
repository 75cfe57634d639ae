"""What an `auto` scheme chose for a model, and what it went by, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from .config import FP16
from .rates import EXACT


@dataclass(frozen=True)
class LayerChoice:
    """What one layer got.

    Attributes:
        index: cache entry.
        key, value: codecs; `identity` stands for 16 bits, and for a layer that stays as mlx-lm makes it on both sides.
        recent: newest tokens that stay dense, at least.
        key_kl, value_kl: the part of the predicted KL divergence that its keys and its values cost, nats a token.
        key_need, value_need: the same if the layer had the average bits, over that of the average layer's side: above 1
            it gets more bits than others.
    """

    index: int
    key: str
    value: str
    recent: int
    key_kl: float
    value_kl: float
    key_need: float
    value_need: float


@dataclass(frozen=True)
class AutoChoice:
    """What an `auto` scheme chose for a model, and what it went by.

    Attributes:
        scheme: as a string.
        basis: where the sensitivities are from, in words.
        bits: stored bits an element, all-in, over keys and values of the compressed layers.
        key_bits, value_bits: the same of either side.
        kl: the predicted KL divergence, nats a token, to second order, of contexts as long as those measured on.
        even_kl: that of the same bits for all layers and both sides; between whole bits by exponential interpolation.
        layers: of the compressed layers.
        sinks, recent, edges: as the scheme has them; with a context layers have their own `recent`.
        context: tokens that bytes are counted at, 0 for bits of packed tokens alone. With a context `bits` are those of
            what layers pack of it.
        measured_kl: of a scheme with a bound, on the model's own texts; `None` for one with bits.
        kept: the files that the calibration and the measurement are kept in, of those that were made here.
    """

    scheme: str
    basis: str
    bits: float
    key_bits: float
    value_bits: float
    kl: float
    even_kl: float
    layers: tuple[LayerChoice, ...]
    sinks: int
    recent: int
    edges: int
    context: int = 0
    measured_kl: float | None = None
    kept: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def summary(self) -> str:
        """One line."""
        measured = "" if self.measured_kl is None else f", measured {self.measured_kl:.4f}"
        where = f" of packed tokens at {self.context} tokens" if self.context else ""
        return (
            f"{self.bits:.3f} bits an element{where} (keys {self.key_bits:.3f}, values {self.value_bits:.3f}), "
            f"predicted KL {self.kl:.4f}{measured} ({self.even_kl:.4f} predicted with the same bits everywhere), "
            f"by {self.basis}"
        )

    def lines(self) -> list[str]:
        """All that was chosen: the summary, what stays dense, and layers, those in a row with equal codecs together."""
        chosen = ["dense newest"] if self.context else []
        rows = [["layers", "keys", "values", *chosen, "need of keys", "of values", "predicted KL"]]
        for (key, value, recent), group in groupby(self.layers, lambda layer: (layer.key, layer.value, layer.recent)):
            layers = list(group)
            first, last = layers[0].index, layers[-1].index
            needs = [_span([getattr(layer, name) for layer in layers]) for name in ("key_need", "value_need")]
            kl = sum(layer.key_kl + layer.value_kl for layer in layers)
            span = f"{first}-{last}" if last > first else f"{first}"
            rows.append([span, _shown(key), _shown(value), *([f"{recent}"] if chosen else []), *needs, f"{kl:.5f}"])
        low, high = (end(layer.recent for layer in self.layers) for end in (min, max))
        newest = f"{low}" if low == high else f"{low} to {high}"
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            self.summary(),
            f"dense: {self.sinks} first and {newest} last tokens, and {self.edges} layers at both ends",
            *(f"kept in {path}" for path in self.kept),
            *("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows),
        ]

    def __str__(self) -> str:
        return "\n".join([f"{self.scheme}:", *self.lines()])


def _shown(codec: str) -> str:
    return FP16 if codec == EXACT else codec


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low}-{high}"
