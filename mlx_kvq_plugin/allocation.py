"""RateQuant: which codec each layer's KV heads get for an average number of bits (arXiv 2605.06675).

Components are (layer, KV head, K or V). A component with weight w and b bits costs w D(b), with D(b) = alpha beta^-b
the relative distortion of the codec family, measured on real keys and values apart (calibration.py). The sum is least
for `b_i = mean + (ln w_i - mean ln w) / ln beta` (Theorem 2, `optimal_bits`); with whole bits, for the greedy that
always gives the next bit where it saves most (`allocate_bits`), which is optimal because D is convex. Differences from
the paper: the greedy looks distortions up in the measured table instead of the fitted curve, which is off at 1 bit; and
components may have unequal sizes, where the average is over elements and savings are per stored bit.
"""

from __future__ import annotations

import bisect
import heapq
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .codecs import GROUP, list_codecs
from .errors import AllocationError, SchemeError
from .plugins import load_plugin

GRADIENT, ACTIVATION = "gradient", "activation"
SENSITIVITIES = (GRADIENT, ACTIVATION)
KEY, VALUE = "key", "value"
SIDES = (KEY, VALUE)

AUTO = "auto"
AUTO_FAMILY = "tq"  # of codecs that `auto` schemes choose from, where the scheme names none
PER_LAYER, PER_HEAD = "layer", "head"
GRANULARITIES = (PER_LAYER, PER_HEAD)

_NUMBER = r"\d+(?:\.\d+)?"
_BUDGET = re.compile(rf"(.+)@({_NUMBER})")
_TARGET = re.compile(rf"{AUTO}(?:@(?P<bits>{_NUMBER})|:kl<=(?P<kl>{_NUMBER}))")
_FLOOR = 1e-9  # of the largest weight: a component without any has no logarithm


def whole_bits(family: str) -> tuple[int, ...]:
    """The whole numbers among the suffixes of a codec family, ascending."""
    return tuple(sorted(int(suffix) for suffix in load_plugin(GROUP, family).suffixes if suffix.isdecimal()))


def _is_auto(name: str) -> bool:
    return name == AUTO or name.startswith((f"{AUTO}@", f"{AUTO}:"))


@dataclass(frozen=True)
class Target:
    """What `auto` schemes are to meet (auto.py): `auto@3.25` or `auto:kl<=0.02`.

    Attributes:
        bits: stored bits an element, all-in, over keys and values of the compressed layers; `None` for a `kl`.
        kl: the predicted KL divergence, nats a token, at most; `None` for `bits`.
    """

    bits: float | None = None
    kl: float | None = None

    @staticmethod
    def parse(name: str) -> Target | None:
        """The target that a codec name asks for, or `None`; raises `SchemeError` for one that says nothing."""
        if not _is_auto(name):
            return None
        match = _TARGET.fullmatch(name)
        if match is None or not float(match["bits"] or match["kl"]):
            raise SchemeError(f'automatic bits must be written like "auto@3.25" or "auto:kl<=0.02", got {name!r}')
        return Target(*(None if match[kind] is None else float(match[kind]) for kind in ("bits", "kl")))


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
        if _is_auto(name):
            return None
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

    def codecs(self) -> dict[int, str]:
        """Names by bits."""
        return {bits: f"{self.family}{bits}" for bits in self.choices()}


@dataclass(frozen=True)
class DistortionCurve:
    """Relative squared error of a codec family by its bits, on some data.

    Attributes:
        bits, mse: what was measured, ascending bits; the last may be those of an exact codec, whose error is 0.
        alpha, beta: of the fit `mse = alpha * beta ** -bits`.
    """

    bits: tuple[int, ...]
    mse: tuple[float, ...]
    alpha: float
    beta: float

    @staticmethod
    def fit(bits: Sequence[int], mse: Sequence[float]) -> DistortionCurve:
        """Least squares on `ln mse`, from 2 bits up where there are two such points; raises `AllocationError`."""
        if len(set(bits)) < 2 or len(bits) != len(mse) or not all(0.0 < error < math.inf for error in mse):
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

    def between(self, bits: float) -> float:
        """What was measured, or the exponential through the measured points around `bits`.

        On the way to an exact codec it is the line: a share of the elements is exact.
        """
        i = min(max(bisect.bisect_right(self.bits, bits), 1), len(self.bits) - 1)
        share = (bits - self.bits[i - 1]) / (self.bits[i] - self.bits[i - 1])
        if not self.mse[i]:
            return self.mse[i - 1] * (1 - share)
        return float(self.mse[i - 1] ** (1 - share) * self.mse[i] ** share)

    @property
    def lossy(self) -> int:
        """The most bits that leave an error."""
        return max(bits for bits, error in zip(self.bits, self.mse, strict=True) if error)


def plain_curve(bits: Sequence[int], exact: int | None = None) -> DistortionCurve:
    """Errors that every bit quarters, as theory has it: for even bits, where nothing is known of a model.

    Args:
        exact: those of `bits` that leave no error.
    """
    return DistortionCurve(tuple(bits), tuple(0.0 if b == exact else 4.0**-b for b in bits), 1.0, 4.0)


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


def _checked(components: Sequence[Component]) -> float:
    """The largest weight; raises `AllocationError` for weights that say nothing."""
    largest = max((c.weight for c in components), default=0.0)
    if not largest > 0.0 or not all(0.0 <= c.weight < math.inf for c in components):
        raise AllocationError(
            f"weights must be finite, at least 0 and not all 0, got {[c.weight for c in components][:4]} and so on for "
            f"{len(components)} components; calibrate again"
        )
    return largest


def optimal_bits(components: Sequence[Component], average: float, curves: Mapping[str, DistortionCurve]) -> list[float]:
    """Real-valued bits of least total distortion with the given average over elements, not clipped to any range.

    With equal elements and one curve this is Theorem 2. In general one bit more saves the same everywhere, per element.

    Args:
        components: with weights of at least 0.
        curves: by side, of which the fit is used.

    Raises:
        AllocationError: for weights that are not finite or all 0, and for a curve that does not fall.
    """
    floor = _FLOOR * _checked(components)
    beta = min(curves[c.side].beta for c in components)
    if beta <= 1.0:
        raise AllocationError(f"distortion must fall with bits, got beta {beta:g}; choose another codec family")
    rates = [math.log(curves[c.side].beta) for c in components]
    slopes = [
        math.log(max(c.weight, floor) * curves[c.side].alpha * rate / c.elements)
        for c, rate in zip(components, rates, strict=True)
    ]
    sizes = [c.elements for c in components]
    level = sum(n * slope / rate for n, slope, rate in zip(sizes, slopes, rates, strict=True)) - average * sum(sizes)
    level /= sum(n / rate for n, rate in zip(sizes, rates, strict=True))
    return [(slope - level) / rate for slope, rate in zip(slopes, rates, strict=True)]


def predicted_gain(weights: Sequence[float]) -> float:
    """Total distortion of equal bits over that of optimal ones: arithmetic over geometric mean of the weights."""
    floor = _FLOOR * max(weights)
    geometric = math.exp(sum(math.log(max(weight, floor)) for weight in weights) / len(weights))
    return sum(weights) / len(weights) / geometric


def total_distortion(
    components: Sequence[Component], bits: Sequence[float], curves: Mapping[str, DistortionCurve]
) -> float:
    """Sum of weight times measured relative error; between measured bits by exponential interpolation."""
    return sum(c.weight * curves[c.side].between(b) for c, b in zip(components, bits, strict=True))


Rate = Callable[[Component, int], float]  # bits an element that a choice of bits takes


def _as_named(component: Component, bits: int) -> float:
    """The rate that leaves scales out."""
    return bits


def allocate_bits(
    components: Sequence[Component],
    average: float,
    choices: Sequence[int],
    curves: Mapping[str, DistortionCurve],
    rate: Rate = _as_named,
) -> list[int]:
    """Whole bits of least total distortion whose average over elements is `average`, or as near below as they come.

    Least for components of equal size; among unequal ones another choice of the last steps may save a little more.

    Args:
        components: with weights of at least 0.
        choices: bits that a component can get, ascending.
        curves: by side.
        rate: what a choice takes, of which the average is meant.

    Raises:
        AllocationError: when the average is outside of the choices, there is nothing to allocate to, or weights are not
            finite or all 0.
    """
    low, high = (mean_rate(components, [choices[i]] * len(components), rate) for i in (0, -1))
    if not components or not low - 1e-9 <= average <= high + 1e-9:
        raise AllocationError(
            f"average bits must be in {low:g} to {high:g} for at least one component, got {average:g} for "
            f"{len(components)}; choose another average"
        )
    left = (average - low) * sum(c.elements for c in components)

    def take(bits: float, saved: float) -> bool:
        nonlocal left
        if bits > left + 1e-6:
            return False  # a smaller component may still fit
        left -= bits
        return True

    return _steps(components, choices, curves, rate, take)


def least_bits(
    components: Sequence[Component],
    most: float,
    choices: Sequence[int],
    curves: Mapping[str, DistortionCurve],
    rate: Rate = _as_named,
) -> list[int]:
    """Whole bits whose total distortion is at most `most`: the first ones that the greedy comes to.

    Args:
        components, choices, curves, rate: as for `allocate_bits`.

    Raises:
        AllocationError: when the most bits do not do it, there is nothing to allocate to, or weights are not finite or
            all 0.
    """
    least = total_distortion(components, [choices[-1]] * len(components), curves)
    if not components or least > most:
        raise AllocationError(
            f"a total distortion must be at least {least:g}, that of {choices[-1]} bits for all of {len(components)} "
            f"components, got {most:g}; ask for more"
        )
    left = total_distortion(components, [choices[0]] * len(components), curves) - most

    def take(bits: float, saved: float) -> bool:
        nonlocal left
        needed = left > 0
        left -= saved if needed else 0.0
        return needed

    return _steps(components, choices, curves, rate, take)


def mean_rate(components: Sequence[Component], bits: Sequence[int], rate: Rate = _as_named) -> float:
    """Bits an element, over all elements."""
    stored = sum(rate(c, b) * c.elements for c, b in zip(components, bits, strict=True))
    return stored / max(1, sum(c.elements for c in components))


def _steps(
    components: Sequence[Component],
    choices: Sequence[int],
    curves: Mapping[str, DistortionCurve],
    rate: Rate,
    take: Callable[[float, float], bool],
) -> list[int]:
    """The greedy: steps of one choice more, by what they save a stored bit, as long as `take` accepts them.

    Args:
        take: called with the stored bits of a step and the distortion that it saves; a component whose step it refuses
            stays as it is.
    """
    _checked(components)
    steps = [0] * len(components)

    def cost(i: int) -> tuple[float, float]:
        component, curve = components[i], curves[components[i].side]
        low, high = choices[steps[i]], choices[steps[i] + 1]
        bits = (rate(component, high) - rate(component, low)) * component.elements
        return bits, component.weight * (curve.measured(low) - curve.measured(high))

    def gain(i: int) -> tuple[float, int]:
        """Negative saving per stored bit of the next step, and ties in the order of the components."""
        bits, saved = cost(i)
        return -saved / bits, i

    queue = [gain(i) for i in range(len(components)) if len(choices) > 1]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        if not take(*cost(i)):
            continue
        steps[i] += 1
        if steps[i] + 1 < len(choices):
            heapq.heappush(queue, gain(i))
    return [choices[step] for step in steps]


Codecs = Mapping[str, Mapping[int, str]]  # names by side and bits
Bits = Mapping[str, Mapping[int, tuple[int, ...]]]  # by side and layer, one a KV head
RealBits = Mapping[str, Mapping[int, tuple[float, ...]]]


@dataclass(frozen=True)
class Allocation:
    """Codecs of every allocated layer.

    Attributes:
        codecs: names by bits, of every side.
        bits: by side and layer, one number a KV head.
        optimum: the same before they are made whole (`optimal_bits`).
        gain: total distortion of equal bits over that of `optimum`, by the fitted curves.
        recent: newest dense tokens by layer, where they are chosen; as the scheme has them for others.
    """

    codecs: Codecs
    bits: Bits
    optimum: RealBits
    gain: float
    recent: Mapping[int, int] = field(default_factory=dict)

    def codec(self, side: str, layer: int) -> str:
        """The codec name of a layer's side, with one name a KV head where they differ; "" for a side left out."""
        names = [self.codecs[side][bits] for bits in self.bits.get(side, {}).get(layer, ())]
        return names[0] if len(set(names)) == 1 else "+".join(names)


def allocate(
    components: Sequence[Component],
    budgets: Mapping[str, Budget],
    curves: Mapping[tuple[str, str], DistortionCurve],
) -> Allocation:
    """Allocate codecs to all components whose side has a budget; equal budgets of both sides share one average.

    Args:
        components: the KV heads of a layer in their order.
        budgets: by side.
        curves: by (family, side).

    Raises:
        AllocationError: for a family without a curve, and as `allocate_bits`.
    """
    parts = []
    pools = [tuple(budgets)] if len(set(budgets.values())) == 1 else [(side,) for side in budgets]
    for pool in pools:
        budget = budgets[pool[0]]
        missing = [side for side in pool if (budget.family, side) not in curves]
        if missing:
            raise AllocationError(
                f"a calibration must have the distortion of {budget.family} for {' and '.join(missing)}, got none; "
                "calibrate again with this codec installed"
            )
        own = [component for component in components if component.side in pool]
        fits = {side: curves[budget.family, side] for side in pool}
        parts.append((own, allocate_bits(own, budget.bits, budget.choices(), fits), budget.bits, fits))
    return allocation_of({side: budget.codecs() for side, budget in budgets.items()}, parts)


Part = tuple[Sequence[Component], Sequence[int], float, Mapping[str, DistortionCurve]]


def allocation_of(codecs: Codecs, parts: Sequence[Part], recent: Mapping[int, int] | None = None) -> Allocation:
    """An `Allocation` of whole bits.

    Args:
        codecs: names by side and bits.
        parts: components that share an average, their whole bits, the average, and curves by side.
        recent: newest dense tokens by layer, where they are chosen.
    """
    bits: dict[str, dict[int, tuple[int, ...]]] = {side: {} for side in codecs}
    optimum: dict[str, dict[int, tuple[float, ...]]] = {side: {} for side in codecs}
    equal = best = 0.0
    for own, whole, average, fits in parts:
        real = optimal_bits(own, average, fits)
        equal += sum(c.weight * fits[c.side].at(average) for c in own)
        best += sum(c.weight * fits[c.side].at(b) for c, b in zip(own, real, strict=True))
        for component, b, r in zip(own, whole, real, strict=True):
            side, layer = component.side, component.layer
            bits[side][layer] = (*bits[side].get(layer, ()), b)
            optimum[side][layer] = (*optimum[side].get(layer, ()), r)
    return Allocation(codecs, bits, optimum, equal / best, recent or {})
