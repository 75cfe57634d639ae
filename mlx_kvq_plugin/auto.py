"""Automatic allocation: which codecs each layer gets for `auto@3.25` or `auto:kl<=0.02`, and why.

What is known of a model comes from its calibration, or else from one on texts that the model itself writes
(self_calibration.py). The expected squared gradient is the Fisher information, so half of weight times relative error,
summed over all components, is the KL divergence that errors cost, to second order: the quantity that is made least. A
bound is one on what is then measured (bound.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .allocation import (
    GRADIENT,
    KEY,
    PER_LAYER,
    SIDES,
    VALUE,
    Allocation,
    Component,
    DistortionCurve,
    allocate_bits,
    allocation_of,
    least_bits,
    mean_rate,
    plain_curve,
    total_distortion,
)
from .auto_choice import AutoChoice, LayerChoice
from .bound import CLOSE, PREFILL, ROUNDS, STEP, Checked, mean_divergence, meet, steps_logprobs
from .codecs import get_codec
from .config import KVQConfig
from .dense_tokens import budget_of
from .errors import AllocationError
from .kept import Kept, keep_json
from .progress import Progress, silent
from .prompt_cache import model_fingerprint
from .rates import EXACT_BITS, auto_codecs, auto_curves, rate_of
from .schemes import format_scheme

if TYPE_CHECKING:
    from .calibration import Calibration


@dataclass(frozen=True)
class Chosen:
    """Bits that meet a scheme's target.

    Attributes:
        components: KV heads; where the scheme has a context, with the elements of all tokens that they pack and with
            weights that grow alike.
        bits: whole bits of each.
        average: of them, without scales.
        recent: newest dense tokens by layer, where they are chosen.
    """

    components: list[Component]
    bits: list[int]
    average: float
    recent: Mapping[int, int]

    def allocation(self, config: KVQConfig, curves: Mapping[str, DistortionCurve]) -> Allocation:
        """Codecs by name."""
        codecs = dict.fromkeys(SIDES, auto_codecs(config.family, config.per))
        return allocation_of(codecs, [(self.components, self.bits, self.average, curves)], self.recent)


def choose(
    calibration: Calibration,
    config: KVQConfig,
    layers: Sequence[int],
    windows: Mapping[int, int],
    basis: str,
    limit: float | None = None,
) -> tuple[Allocation, AutoChoice]:
    """Codecs for the compressed layers of a model.

    Args:
        calibration: of the model.
        config: with a `target`.
        layers: cache entries that the scheme compresses, at least one.
        windows: of the sliding ones among them.
        basis: what the choice says it went by.
        limit: of the predicted KL divergence, in place of the target's.

    Raises:
        AllocationError: for bits or a KL divergence that the family's codecs cannot meet on this model.
        CalibrationError: for layers that were not calibrated.
    """
    curves, heads = auto_curves(config, calibration.curves), calibration.components(GRADIENT, layers)
    chosen = chosen_bits(config, heads, windows, curves, limit)
    allocation, rate = chosen.allocation(config, curves), rate_of(config, heads)
    level = min(chosen.average, *(curve.lossy for curve in curves.values()))  # above it all needs fall alike
    need = _kl(heads, [level] * len(heads), curves) / (2 * len(layers))

    def bits_of(side: str) -> float:
        own = [i for i, c in enumerate(heads) if c.side == side]
        return mean_rate([chosen.components[i] for i in own], [chosen.bits[i] for i in own], rate)

    def costs(side: str, layer: int) -> tuple[float, float]:
        own = [i for i, c in enumerate(heads) if (c.side, c.layer) == (side, layer)]
        parts = [heads[i] for i in own]
        return _kl(parts, [chosen.bits[i] for i in own], curves), _kl(parts, [level] * len(parts), curves) / need

    found = []
    for layer in layers:
        (key_kl, key_need), (value_kl, value_need) = costs(KEY, layer), costs(VALUE, layer)
        codecs = allocation.codec(KEY, layer), allocation.codec(VALUE, layer)
        recent = chosen.recent.get(layer, config.recent)
        found.append(LayerChoice(layer, *codecs, recent, key_kl, value_kl, key_need, value_need))
    choice = AutoChoice(
        scheme=format_scheme(config),
        basis=basis,
        bits=mean_rate(chosen.components, chosen.bits, rate),
        key_bits=bits_of(KEY),
        value_bits=bits_of(VALUE),
        kl=_kl(heads, chosen.bits, curves),
        even_kl=_kl(heads, [chosen.average] * len(heads), curves),
        layers=tuple(found),
        sinks=config.sinks,
        recent=config.recent,
        edges=config.edges,
        context=config.context,
    )
    return allocation, choice


def chosen_bits(
    config: KVQConfig,
    heads: Sequence[Component],
    windows: Mapping[int, int],
    curves: Mapping[str, DistortionCurve],
    limit: float | None = None,
) -> Chosen:
    """What meets the scheme's target.

    Args:
        config: with a `target`.
        heads, curves: of the model.
        windows: of the sliding layers among those of the heads.
        limit: of the predicted KL divergence, in place of the target's.

    Raises:
        AllocationError: for a target that cannot be met.
    """
    target, rate = config.target, rate_of(config, heads)
    codecs = auto_codecs(config.family, config.per)
    choices = list(codecs)
    assert target is not None
    budget = budget_of(config, heads, windows, lambda counted: mean_rate(counted, [choices[0]] * len(counted), rate))
    components = _by_layer(budget.components) if config.per == PER_LAYER else budget.components
    if target.bits is not None:
        low, high = (mean_rate(components, [end] * len(components), rate) for end in (choices[0], choices[-1]))
        if not low - 1e-9 <= budget.bits <= high + 1e-9:
            raise AllocationError(
                f"automatic bits of {config.family} must be in {low:g} to {high:g} on this model, all-in, got "
                f"{target.bits:g}; choose another average or family"
            )
        whole = allocate_bits(components, budget.bits, choices, curves, rate)
    else:
        assert target.kl is not None
        most = target.kl if limit is None else limit
        least = _kl(components, [choices[-1]] * len(components), curves)
        if least > most:
            raise AllocationError(
                f"a KL divergence must be at least {least:.2g} nats a token, what {codecs[choices[-1]]} is "
                f"predicted to cost on this model, got {most:g}; allow more or choose another family"
            )
        whole = least_bits(components, 2 * most, choices, curves, rate)
    given = {(c.layer, c.side, c.head): b for c, b in zip(components, whole, strict=True)}
    bits = [given[c.layer, c.side, 0 if config.per == PER_LAYER else c.head] for c in heads]
    return Chosen(budget.components, bits, mean_rate(budget.components, bits), budget.recent)


def even_choice(config: KVQConfig, heads: Sequence[Component], windows: Mapping[int, int]) -> Allocation:
    """The allocation of a bits target where nothing is known of the model: equal needs; raises `AllocationError`."""
    target = config.target
    assert target is not None
    if target.kl is not None:
        raise AllocationError(
            f"bytes of a scheme with a bound on the KL divergence must be asked of a model with its weights, got "
            f"{format_scheme(config)} without; use kvq inspect, or plan with auto@BITS"
        )
    curves = dict.fromkeys(SIDES, plain_curve(list(auto_codecs(config.family, config.per)), EXACT_BITS))
    return chosen_bits(config, heads, windows, curves).allocation(config, curves)


def _kl(components: Sequence[Component], bits: Sequence[float], curves: Mapping[str, DistortionCurve]) -> float:
    """Predicted KL divergence, nats a token."""
    return 0.5 * total_distortion(components, bits, curves)


def choose_for(
    model: Any,
    config: KVQConfig,
    layers: Sequence[int],
    windows: Mapping[int, int],
    source: str,
    unknown_arch: str = "error",
    progress: Progress = silent,
) -> tuple[Allocation, AutoChoice]:
    """`choose` by the model's calibration, or by texts that it writes itself where there is none; a bound is checked.

    Raises:
        AllocationError: as `choose`, and for a bound that the most bits do not meet.
        CalibrationError: for a calibration of other weights or layers, and as `self_calibration`.
    """
    from .calibration_files import calibration_for, calibration_path
    from .self_calibration import self_calibration

    path, kept = calibration_path(config, source), list[str]()
    if path is None and not config.calibration:
        own = self_calibration(model, config, source, layers, unknown_arch, progress)
        calibration, basis = own.content, own.content.corpus
        kept.append(own.path)
    else:
        calibration = calibration_for(model, config, source)
        basis = f"gradients of the calibration {path.name if path else ''}"
    assert config.target is not None
    limit = measured = None
    if config.target.kl is not None:
        checked = _checked(model, config, layers, source, unknown_arch, calibration, progress)
        limit, measured = checked.content.limit, checked.content.kl
        kept.append(checked.path)
    allocation, choice = choose(calibration, config, layers, windows, basis, limit)
    return allocation, replace(choice, measured_kl=measured, kept=tuple(name for name in kept if name))


def _checked(
    model: Any,
    config: KVQConfig,
    layers: Sequence[int],
    source: str,
    unknown_arch: str,
    calibration: Calibration,
    progress: Progress,
) -> Kept[Checked]:
    """The bound of a scheme met by measurement on the texts that the model writes itself, kept.

    Memory: log probabilities `(B, L, V)` float32 of all positions that are compared.
    """
    from .loading import CacheMaker, compress, stock_caches
    from .ruler import ROUTES
    from .self_calibration import VERSION, first_token, own_texts

    assert config.target is not None and config.target.kl is not None
    if config.sinks + config.recent > PREFILL:
        raise AllocationError(
            f"a bound on the KL divergence must come with at most {PREFILL} dense tokens, as it is checked on short "
            f"texts, got sinks={config.sinks} and recent={config.recent}; choose fewer, or bits like auto@3.25"
        )
    bound, first = config.target.kl, first_token(source)
    curves, heads = auto_curves(config, calibration.curves), calibration.components(GRADIENT, layers)
    codecs = auto_codecs(config.family, config.per)

    def make() -> Checked:
        tokens = mx.array(own_texts(model, first, progress))
        with compress(model, ROUTES, unknown_arch=unknown_arch) as routed:
            progress("measuring fp16", 0, 1)
            expected = list(steps_logprobs(model, stock_caches(model), tokens))

            def measure(limit: float) -> float:
                progress("measuring a choice", 0, 1)
                allocation, _ = choose(calibration, config, layers, {}, "", limit)
                caches = CacheMaker(model, config, routed.maker.adapter, source, allocation)()
                return mean_divergence(expected, steps_logprobs(model, caches, tokens))

            most, *_, least = (_kl(heads, [bits] * len(heads), curves) for bits in codecs)

            def predicted(limit: float) -> float:
                return choose(calibration, config, layers, {}, "", limit)[1].kl

            return meet(bound, (least, most), predicted, measure)

    identity = {
        "version": VERSION,
        "measured on": [PREFILL, STEP, ROUNDS, CLOSE],
        "scheme": config.to_json(),
        "model": model_fingerprint(model),
        "first": first,
        "layers": list(layers),
        "weights": [c.weight for c in heads],
        "curves": {side: curve.mse for side, curve in curves.items()},
        "codecs": [get_codec(name).to_json() for name in codecs.values()],
    }
    return keep_json("bound", identity, Checked.from_json, make, asdict)


def _by_layer(heads: Sequence[Component]) -> list[Component]:
    """One component for all KV heads of a layer's side."""
    found: dict[tuple[int, str], Component] = {}
    for c in heads:
        known = found.get((c.layer, c.side), Component(c.layer, 0, c.side, 0.0, 0))
        found[c.layer, c.side] = Component(c.layer, 0, c.side, known.weight + c.weight, known.elements + c.elements)
    return list(found.values())
