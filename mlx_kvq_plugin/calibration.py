"""Calibration: how much each KV head's keys and values matter to a model, measured once.

A calibration holds the sensitivities of sensitivity.py and the distortion of every codec family on the model's own keys
and values; allocation.py turns both into bits, calibration_files.py keeps it in a file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .adapters import FULL, SLIDING
from .allocation import (
    KEY,
    SENSITIVITIES,
    SIDES,
    VALUE,
    Allocation,
    Budget,
    Component,
    DistortionCurve,
    whole_bits,
)
from .allocation import allocate as allocate_components
from .codecs import get_codec, list_codecs
from .config import SIDE_SCALING, KVQConfig
from .corpus import CORPUS, corpus_text
from .errors import CalibrationError, CodecError
from .progress import Progress, silent
from .prompt_cache import model_fingerprint
from .standalone import fit_distortion_curve

LEAST_TOKENS = 128  # of a sequence: the key frame takes 68

Weights = Mapping[str, Mapping[int, tuple[float, ...]]]  # by side and layer, one a KV head


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` measured.

    Attributes:
        fingerprint: of the model's weights in any float dtype.
        model: its name, for messages.
        sensitivities: by kind, side and cache entry: one weight a KV head.
        elements: by side and cache entry: the head size.
        attention: all cache entries of attention layers, of which `edges` leaves out the first and last.
        curves: distortions by codec family and side.
        sinks, recent: tokens that were taken to stay dense.
        sequences, length: how many sequences of how many tokens were used.
        corpus: digest of the texts.
    """

    fingerprint: str
    model: str
    sensitivities: Mapping[str, Weights]
    elements: Mapping[str, Mapping[int, int]]
    attention: tuple[int, ...]
    curves: Mapping[tuple[str, str], DistortionCurve]
    sinks: int
    recent: int
    sequences: int
    length: int
    corpus: str

    def layers(self, edges: int = 0) -> list[int]:
        """Cache entries that a scheme with so many `edges` compresses."""
        inner = self.attention[edges : max(0, len(self.attention) - edges)]
        return [layer for layer in sorted(self.elements[KEY]) if layer in inner]

    def components(self, kind: str, layers: Sequence[int]) -> list[Component]:
        """Components of some layers with the weights of one kind; raises `CalibrationError` for layers it lacks."""
        weights = self.sensitivities[kind]
        missing = [layer for layer in layers if layer not in weights[KEY]]
        if missing:
            raise CalibrationError(
                f"the calibration of {self.model} must have every compressed layer, got none for {missing}; "
                "calibrate again"
            )
        return [
            Component(layer, head, side, weight, self.elements[side][layer])
            for layer in layers
            for side in SIDES
            for head, weight in enumerate(weights[side][layer])
        ]

    def allocate(self, config: KVQConfig, layers: Sequence[int] | None = None) -> Allocation:
        """Codecs for a scheme with average bits, over the layers that it compresses.

        Raises:
            CalibrationError: for layers that were not calibrated.
            AllocationError: for a codec family or weights that bits cannot be allocated by.
        """
        budgets: dict[str, Budget] = {
            side: budget for side, budget in zip(SIDES, config.budgets, strict=True) if budget is not None
        }
        chosen = self.layers(config.edges) if layers is None else layers
        return allocate_components(self.components(config.sensitivity, chosen), budgets, self.curves)


def calibration_sequences(tokenizer: Any, texts: Sequence[str], sequences: int, length: int) -> list[list[int]]:
    """Token sequences from every text in turn, spread evenly over each; raises `CalibrationError` for short texts.

    All begin with the tokenizer's first token, if it has one: models attend to it as to nothing else.
    """
    if length < LEAST_TOKENS or sequences < 1:
        raise CalibrationError(
            f"a calibration must have sequences of at least {LEAST_TOKENS} tokens, got {sequences} of {length}; "
            "choose more"
        )
    found: list[list[int]] = [[] for _ in range(sequences)]
    for i, text in enumerate(texts[:sequences]):
        ids = list(tokenizer.encode(text))
        if len(ids) < length:
            raise CalibrationError(
                f"a calibration text must have at least {length} tokens, got {len(ids)} in text {i + 1}; "
                "give longer texts or a smaller --length"
            )
        first = ids[:1] if ids[0] == getattr(tokenizer, "bos_token_id", None) else []
        places = range(i, sequences, len(texts))
        for place, start in zip(places, np.linspace(0, len(ids) - length, len(places)).astype(int), strict=True):
            found[place] = first + ids[start + len(first) : start + length]
    return found


def calibrate(
    model: Any,
    tokenizer: Any,
    *,
    texts: Sequence[str] = (),
    sequences: int = 9,
    length: int = 256,
    seed: int = 0,
    source: str = "",
    unknown_arch: str = "error",
    progress: Progress = silent,
) -> Calibration:
    """Measure sensitivities and distortion curves of a model.

    Args:
        model, tokenizer: as mlx-lm loads them, not compressed.
        texts: to calibrate on; the package's corpus of prose, code and chat without any.
        sequences, length: how many sequences of how many tokens; each takes a forward and a backward pass.
        seed: of the tokens drawn from the model.
        source: repository or folder of the model, for messages.
        unknown_arch: as for `compress`.
        progress: called with the sequences that are done and their number.

    Memory on top of the model: activations of all layers for one sequence, with scores `(Hq, length, length)`.

    Raises:
        CalibrationError: for texts that are too short, or a model through which gradients do not pass.
        UnsupportedModelError: as `compress`.
    """
    texts = list(texts) or [corpus_text(name) for name in CORPUS]
    ids = calibration_sequences(tokenizer, texts, sequences, length)
    return calibrate_on(
        model,
        ids,
        sampled=len(texts),
        corpus=hashlib.blake2b("\0".join(texts).encode(), digest_size=16).hexdigest(),
        seed=seed,
        source=source,
        unknown_arch=unknown_arch,
        progress=progress,
    )


def calibrate_on(
    model: Any,
    ids: Sequence[Sequence[int]],
    *,
    sampled: int,
    corpus: str,
    config: KVQConfig | None = None,
    families: Sequence[str] = (),
    seed: int = 0,
    source: str = "",
    unknown_arch: str = "error",
    progress: Progress = silent,
) -> Calibration:
    """`calibrate` on sequences of tokens, all of one length.

    Args:
        ids: the sequences.
        sampled: distortion curves are measured on the first so many.
        corpus: what the calibration says of their origin.
        families: of codecs whose distortion is measured; all that are installed without any.
        config: how many `sinks` and `recent` tokens are taken to stay dense, and which codecs give the key frames;
            `None` stands for `tq4`.
        model, seed, source, unknown_arch, progress: as for `calibrate`.

    Raises:
        CalibrationError, UnsupportedModelError: as `calibrate`.
    """
    from .loading import compress
    from .sensitivity import measure_sensitivities

    config = config or KVQConfig(key="tq4", value="tq4")
    with compress(model, config, unknown_arch=unknown_arch) as compression:
        entries = compression.maker.plan()
        plans = [plan for plan in entries if plan.spec is not None]
        if not plans:
            raise CalibrationError("a model must have layers to compress for a calibration, got none; nothing to do")
        found = []
        progress("calibrating", 0, len(ids))
        for step, sequence in enumerate(ids):
            tokens = mx.array([list(sequence)])
            found.append(measure_sensitivities(model, compression.maker(), plans, tokens, seed + step))
            progress("calibrating", step + 1, len(ids))

    def mean(kind: str, name: tuple[str, int]) -> tuple[float, ...]:
        weights = np.mean([getattr(one[name], kind) for one in found], axis=0).astype(np.float32)  # as in the file
        return tuple(weights.astype(float).tolist())

    sensitivities = {
        kind: {side: {plan.index: mean(kind, (side, plan.index)) for plan in plans} for side in SIDES}
        for kind in SENSITIVITIES
    }
    check_weights(sensitivities)
    dims = {
        KEY: {plan.index: plan.geometry.key_dim for plan in plans},
        VALUE: {plan.index: plan.geometry.value_dim for plan in plans},
    }
    samples = {name: [one[name].sample for one in found[:sampled]] for name in found[0]}
    return Calibration(
        fingerprint=model_fingerprint(model, any_float=True),
        model=(Path(source).name if Path(source).is_dir() else source) or type(model).__module__,
        sensitivities=sensitivities,
        elements=dims,
        attention=tuple(entry.index for entry in entries if entry.geometry.kind in (FULL, SLIDING)),
        curves=_curves(samples, families or list_codecs()),
        sinks=config.sinks,
        recent=config.recent,
        sequences=len(ids),
        length=len(ids[0]),
        corpus=corpus,
    )


def check_weights(sensitivities: Mapping[str, Weights]) -> None:
    """Raise `CalibrationError` for weights that nothing can be allocated by."""
    for kind, sides in sensitivities.items():
        weights = [w for layers in sides.values() for heads in layers.values() for w in heads]
        if not max(weights) > 0.0 or not all(0.0 <= w < math.inf for w in weights):
            raise CalibrationError(
                f"sensitivities must be finite and not all 0, got {min(weights):g} to {max(weights):g} by {kind}; "
                "check the model's weights, or calibrate in float32"
            )


def _curves(
    samples: Mapping[tuple[str, int], list[mx.array]], families: Sequence[str]
) -> dict[tuple[str, str], DistortionCurve]:
    """Distortion curves of the families with two or more whole rates that can do the head sizes."""
    curves: dict[tuple[str, str], DistortionCurve] = {}
    for side in SIDES:
        data = [x for (own, _), parts in sorted(samples.items()) if own == side for x in parts]
        for family in families:
            rates = whole_bits(family)
            if len(rates) < 2 or (side == VALUE and not get_codec(f"{family}{rates[0]}").values):
                continue
            try:
                curves[family, side] = fit_distortion_curve(family, data, scaling=SIDE_SCALING[side])
            except CodecError:  # a head size that the family cannot do
                continue
    return curves
