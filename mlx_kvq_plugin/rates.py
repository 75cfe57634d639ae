"""What `auto` schemes choose from: the whole rates of a family, those of the families that go on above it, and 16 bits.

Sixteen bits are keys or values as they are: what `edges` does by position, `auto` does by need. Heads of one layer's
side do not mix them with codes, as encoded keys are in a frame that exact ones are not in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from .allocation import PER_LAYER, SIDES, Component, DistortionCurve, Rate, whole_bits
from .codecs import load_family
from .errors import AllocationError

if TYPE_CHECKING:
    from .config import KVQConfig

EXACT, EXACT_BITS = "identity", 16


def family_rates(family: str) -> dict[str, list[int]]:
    """Rates that are taken from a family and from those that go on above it, each ascending and above the last."""
    found: dict[str, list[int]] = {}
    highest = 0
    while family:
        own = [bits for bits in whole_bits(family) if bits > highest]
        if not own:
            break
        found[family], highest = own, own[-1]
        family = load_family(family).continued_by
    return found


def auto_codecs(family: str, per: str = PER_LAYER) -> dict[int, str]:
    """Codec names by rate, ascending: what a layer's side, or a KV head, gets from an `auto` scheme."""
    found = {bits: f"{name}{bits}" for name, rates in family_rates(family).items() for bits in rates}
    return {**found, EXACT_BITS: EXACT} if per == PER_LAYER else found


def auto_curves(config: KVQConfig, curves: Mapping[tuple[str, str], DistortionCurve]) -> Mapping[str, DistortionCurve]:
    """Distortions of what an `auto` scheme chooses from, by side; the fit is that of its family.

    Args:
        config: with a `target`.
        curves: by family and side.

    Raises:
        AllocationError: for a family or a rate that was not measured.
    """
    families = family_rates(config.family)
    for family, rates in families.items():
        missing = [s for s in SIDES if (family, s) not in curves or not set(rates) <= set(curves[family, s].bits)]
        if missing:
            raise AllocationError(
                f"a calibration must have the distortion of {family} for {' and '.join(missing)}, got none; calibrate "
                "again with this codec installed, or choose another family"
            )

    def curve(side: str) -> DistortionCurve:
        points = {bits: curves[name, side].measured(bits) for name, rates in families.items() for bits in rates}
        if config.per == PER_LAYER:
            points[EXACT_BITS] = 0.0
        own = curves[config.family, side]
        return DistortionCurve(tuple(points), tuple(points.values()), own.alpha, own.beta)

    return {side: curve(side) for side in SIDES}


def rate_of(config: KVQConfig, heads: Sequence[Component]) -> Rate:
    """Stored bits an element, all-in, that a choice of bits takes; of KV heads, or of layers made of them.

    Args:
        config: with a `target`.
        heads: whose elements are head sizes.
    """
    dims = {(c.side, c.layer): c.elements for c in heads}
    names = auto_codecs(config.family, config.per)

    @cache
    def stored(side: str, dim: int, bits: int) -> float:
        return config.layer_spec(names[bits], names[bits]).bits_per_element(dim, dim)[SIDES.index(side)]

    return lambda component, bits: stored(component.side, dims[component.side, component.layer], bits)
