"""RateQuant: which codec each layer's KV heads get for an average number of bits (arXiv 2605.06675).

Components are (layer, KV head, K or V). A component with weight w and b bits costs w D(b), with D(b) = alpha beta^-b
the relative distortion of the codec family, measured on real keys and values apart (calibration.py). The sum is least
for `b_i = mean + (ln w_i - mean ln w) / ln beta` (Theorem 2, `optimal_bits`); with whole bits, for the greedy that
always gives the next bit where it saves most (`allocate_bits`), which is optimal because D is convex. Difference from
the paper: the greedy looks distortions up in the measured table instead of the fitted curve, which is off at 1 bit.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .codecs import GROUP, list_codecs
from .errors import AllocationError, SchemeError
from .plugins import load_plugin

GRADIENT, ACTIVATION = "gradient", "activation"
SENSITIVITIES = (GRADIENT, ACTIVATION)
KEY, VALUE = "key", "value"
SIDES = (KEY, VALUE)

_BUDGET = re.compile(r"([a-z]+)@(\d+(?:\.\d+)?)")


def whole_bits(family: str) -> tuple[int, ...]:
    """The whole numbers among the suffixes of a codec family, ascending."""
    return tuple(sorted(int(suffix) for suffix in load_plugin(GROUP, family).suffixes if suffix.isdecimal()))


@dataclass(frozen=True)
class Budget:
    """Average bits over the components of a model: `tq@2.5`.

    Attributes:
        family: of codecs; component i gets `family + str(b_i)`.
        bits: the average of b_i.
    """

    family: str
    bits: float

    @staticmethod
    def parse(name: str) -> Budget | None:
        """The budget that a codec name asks for, or `None`; raises `SchemeError` for one that no codecs meet."""
        match = _BUDGET.fullmatch(name)
        if match is None:
            if "@" in name:
                raise SchemeError(f'average bits must be written like "tq@2.5", got {name!r}')
            return None
        budget = Budget(match[1], float(match[2]))
        if budget.family not in list_codecs():
            raise SchemeError(f"a codec family must be one of {', '.join(list_codecs())}, got {budget.family!r}")
        choices = budget.choices()
        if len(choices) < 2 or not choices[0] <= budget.bits <= choices[-1]:
            limits = f"{choices[0]} to {choices[-1]}" if len(choices) > 1 else "none: it has one codec"
            raise SchemeError(f"average bits of {budget.family} must be in {limits}, got {budget.bits:g}")
        return budget

    def choices(self) -> tuple[int, ...]:
        """Bits that a component can get, ascending."""
        return whole_bits(self.family)


@dataclass(frozen=True)
class DistortionCurve:
    """Relative squared error of a codec family by its bits, on some data.

    Attributes:
        bits, mse: what was measured, ascending bits.
        alpha, beta: of the fit `mse = alpha * beta ** -bits`.
    """

    bits: tuple[int, ...]
    mse: tuple[float, ...]
    alpha: float
    beta: float

    @staticmethod
    def fit(bits: Sequence[int], mse: Sequence[float]) -> DistortionCurve:
        """Least squares on `ln mse`, from 2 bits up where there are two such points; raises `AllocationError`."""
        if len(bits) < 2 or len(bits) != len(mse) or min(mse, default=0.0) <= 0.0:
            raise AllocationError(
                f"a distortion curve must be fitted to two or more positive errors, got {list(mse)} at {list(bits)} "
                "bits; measure more rates"
            )
        points = [(b, e) for b, e in zip(bits, mse, strict=True) if b >= 2]
        points = points if len(points) >= 2 else list(zip(bits, mse, strict=True))
        mean_b = sum(b for b, _ in points) / len(points)
        mean_l = sum(math.log(e) for _, e in points) / len(points)
        slope = sum((b - mean_b) * (math.log(e) - mean_l) for b, e in points) / sum(
            (b - mean_b) ** 2 for b, _ in points
        )
        return DistortionCurve(tuple(bits), tuple(mse), math.exp(mean_l - slope * mean_b), math.exp(-slope))

    def at(self, bits: float) -> float:
        """The fitted curve."""
        return float(self.alpha * self.beta**-bits)

    def measured(self, bits: int) -> float:
        """What was measured."""
        return self.mse[self.bits.index(bits)]


@dataclass(frozen=True)
class Component:
    """What gets bits: the keys or the values of one KV head.

    Attributes:
        layer: cache entry.
        head: KV head.
        side: `key` or `value`.
        weight: what a relative squared error of 1 costs.
        elements: numbers a token.
    """

    layer: int
    head: int
    side: str
    weight: float
    elements: int


def optimal_bits(weights: Sequence[float], average: float, beta: float) -> list[float]:
    """Theorem 2: real-valued bits of least total distortion with the given average, not clipped to any range."""
    if beta <= 1.0 or not weights or min(weights) <= 0.0:
        raise AllocationError(
            f"weights must be positive and beta above 1, got {len(weights)} weights, beta {beta:g}; calibrate again"
        )
    logs = [math.log(weight) for weight in weights]
    mean = sum(logs) / len(logs)
    return [average + (log - mean) / math.log(beta) for log in logs]


def predicted_gain(weights: Sequence[float]) -> float:
    """Total distortion of equal bits over that of optimal ones: arithmetic over geometric mean of the weights."""
    geometric = math.exp(sum(math.log(weight) for weight in weights) / len(weights))
    return sum(weights) / len(weights) / geometric


def allocate_bits(
    components: Sequence[Component],
    average: float,
    choices: Sequence[int],
    curves: Mapping[str, DistortionCurve],
) -> list[int]:
    """Whole bits of least total distortion whose average over elements is `average`, or as near below as they come.

    Args:
        components: with weights of at least 0.
        choices: bits that a component can get, ascending.
        curves: by side.

    Raises:
        AllocationError: when the average is outside of the choices, or there is nothing to allocate to.
    """
    if not components or not choices[0] <= average <= choices[-1]:
        raise AllocationError(
            f"average bits must be in {choices[0]} to {choices[-1]} for at least one component, got {average:g} for "
            f"{len(components)}; choose another average"
        )
    steps = [0] * len(components)
    left = average * sum(c.elements for c in components) - choices[0] * sum(c.elements for c in components)

    def gain(i: int) -> tuple[float, int]:
        """Negative saving per stored bit of the next step, and ties in the order of the components."""
        component, curve = components[i], curves[components[i].side]
        low, high = choices[steps[i]], choices[steps[i] + 1]
        saved = component.weight * (curve.measured(low) - curve.measured(high))
        return -saved / ((high - low) * component.elements), i

    queue = [gain(i) for i in range(len(components)) if len(choices) > 1]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        cost = (choices[steps[i] + 1] - choices[steps[i]]) * components[i].elements
        if cost > left + 1e-6:
            continue  # a smaller component may still fit
        left -= cost
        steps[i] += 1
        if steps[i] + 1 < len(choices):
            heapq.heappush(queue, gain(i))
    return [choices[step] for step in steps]


@dataclass(frozen=True)
class Allocation:
    """Codecs of every allocated layer, by side: `names[side][layer]` is one codec name a KV head."""

    names: Mapping[str, Mapping[int, tuple[str, ...]]]
    gain: float

    def codec(self, side: str, layer: int) -> str:
        """The codec name of a layer's side; "" if the allocation does not have it."""
        heads = self.names.get(side, {}).get(layer, ())
        return heads[0] if len(set(heads)) == 1 else "+".join(heads)


def allocate(
    components: Sequence[Component],
    budgets: Mapping[str, Budget],
    curves: Mapping[tuple[str, str], DistortionCurve],
) -> Allocation:
    """Allocate codecs to all components whose side has a budget; equal budgets of both sides share one average.

    Args:
        budgets: by side.
        curves: by (family, side).
    """
    names: dict[str, dict[int, tuple[str, ...]]] = {}
    gain = 1.0
    pools = [tuple(budgets)] if len(set(budgets.values())) == 1 else [(side,) for side in budgets]
    for pool in pools:
        budget = budgets[pool[0]]
        own = [component for component in components if component.side in pool]
        missing = [side for side in pool if (budget.family, side) not in curves]
        if missing:
            raise AllocationError(
                f"a calibration must have the distortion of {budget.family} for {' and '.join(missing)}, got none; "
                "calibrate again with this codec installed"
            )
        bits = allocate_bits(own, budget.bits, budget.choices(), {side: curves[budget.family, side] for side in pool})
        gain = max(gain, predicted_gain([max(c.weight, 1e-30) for c in own]))
        for component, b in zip(own, bits, strict=True):
            layers = names.setdefault(component.side, {})
            layers[component.layer] = (*layers.get(component.layer, ()), f"{budget.family}{b}")
    return Allocation(names, gain)
