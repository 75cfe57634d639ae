"""RateQuant: closed form and greedy against independent solutions, budgets and curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_kvq_plugin.allocation import (
    KEY,
    SIDES,
    VALUE,
    Allocation,
    Budget,
    Component,
    DistortionCurve,
    allocate,
    allocate_bits,
    optimal_bits,
    predicted_gain,
    total_distortion,
)
from mlx_kvq_plugin.errors import AllocationError, SchemeError

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=5)


def curve(bits: Sequence[int] = (1, 2, 3, 4, 5, 6), alpha: float = 1.5, beta: float = 3.6) -> DistortionCurve:
    """Exponential, but for a measured first point below the fit, as Lloyd-Max has it."""
    mse = [alpha * beta**-b * (0.9 if b == 1 else 1.0) for b in bits]
    return DistortionCurve(tuple(bits), tuple(mse), alpha, beta)


CURVES = {KEY: curve(), VALUE: curve(alpha=1.2, beta=4.1)}


def components(weights: Sequence[float], elements: Sequence[int] = (), sides: Sequence[str] = ()) -> list[Component]:
    """One head a layer."""
    return [
        Component(i, 0, sides[i % len(sides)] if sides else KEY, w, elements[i % len(elements)] if elements else 64)
        for i, w in enumerate(weights)
    ]


# ---- whole bits ------------------------------------------------------------------------------------------------------


@st.composite
def convex_curves(draw: st.DrawFn) -> DistortionCurve:
    """Errors whose steps shrink: four rates from 1 bit up."""
    steps = sorted(draw(st.lists(st.floats(1e-3, 1.0), min_size=4, max_size=4)), reverse=True)
    mse = [sum(steps[i:]) for i in range(4)]
    return DistortionCurve((1, 2, 3, 4), tuple(mse), 1.0, 4.0)


@EXAMPLES
@given(WEIGHTS, convex_curves(), convex_curves(), st.floats(1.0, 4.0))
def test_greedy_bits_are_the_best_of_all(
    weights: list[float], keys: DistortionCurve, values: DistortionCurve, average: float
) -> None:
    curves, own = {KEY: keys, VALUE: values}, components(weights, sides=SIDES)
    found = allocate_bits(own, average, (1, 2, 3, 4), curves)
    budget = math.floor(average * len(own) + 1e-9)

    def cost(bits: Sequence[int]) -> float:
        return sum(c.weight * curves[c.side].measured(b) for c, b in zip(own, bits, strict=True))

    best = min(cost(bits) for bits in itertools.product((1, 2, 3, 4), repeat=len(own)) if sum(bits) <= budget)
    assert sum(found) == budget
    assert cost(found) == pytest.approx(best, rel=1e-9)


@EXAMPLES
@given(st.lists(st.floats(0.0, 1e3), min_size=1, max_size=40), st.integers(10, 60))
def test_the_average_is_exact_within_one_step(weights: list[float], tenths: int) -> None:
    assume(max(weights) > 0)
    own = components(weights, sides=SIDES)
    total = sum(allocate_bits(own, tenths / 10, (1, 2, 3, 4, 5, 6), CURVES))
    assert total == tenths * len(own) // 10


@EXAMPLES
@given(st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=20), st.integers(1, 6))
def test_a_whole_average_is_that_of_equal_bits_with_unequal_heads_too(weights: list[float], average: int) -> None:
    own = components(weights, elements=(64, 512, 128), sides=SIDES)
    bits = allocate_bits(own, average, (1, 2, 3, 4, 5, 6), CURVES)
    left = sum((average - b) * c.elements for b, c in zip(bits, own, strict=True))
    could_grow = [c.elements for b, c in zip(bits, own, strict=True) if b < 6]
    assert 0 <= left < min(could_grow, default=1)  # not even the smallest step fits
    if any(b < 6 for b, c in zip(bits, own, strict=True) if c.elements == 64):
        assert left == 0


def test_a_stored_bit_goes_where_it_saves_most() -> None:
    small, large = Component(0, 0, KEY, 1.0, 64), Component(1, 0, KEY, 1.5, 512)
    assert allocate_bits([small, large], 1 + 64 / 576, (1, 2), CURVES) == [2, 1]  # 1 / 64 is more than 1.5 / 512
    assert allocate_bits([small, large], 1 + 512 / 576, (1, 2), CURVES) == [2, 1]  # what is left is too little for both
    assert allocate_bits([small, large], 2, (1, 2), CURVES) == [2, 2]


def test_steps_of_several_bits_are_weighed_by_their_length() -> None:
    choices = (2, 4, 5)
    curves = {KEY: curve(choices)}
    own = components([1.0, 1.0, 1e-6])
    assert allocate_bits(own, 8 / 3, choices, curves) == [4, 2, 2]
    assert allocate_bits(own, 10 / 3, choices, curves) == [4, 4, 2]
    assert allocate_bits(own, 11 / 3, choices, curves) == [5, 4, 2]
    assert allocate_bits(components([12.0, 12.0, 1.0]), 4, choices, curves) == [5, 5, 2]  # not two bits for the third


def test_ties_go_to_the_first_and_heads_without_weight_come_last() -> None:
    assert allocate_bits(components([1.0] * 4), 2.5, (2, 3), CURVES) == [3, 3, 2, 2]
    assert allocate_bits(components([0.0, 1.0, 0.0]), 2, (1, 2, 3), CURVES) == [2, 3, 1]
    assert allocate_bits(components([1.0, 2.0]), 6, (1, 2, 3, 4, 5, 6), CURVES) == [6, 6]


@pytest.mark.parametrize("average", [0.9, 6.1])
def test_averages_out_of_range_are_refused(average: float) -> None:
    with pytest.raises(AllocationError, match=f"must be in 1 to 6 .* got {average}"):
        allocate_bits(components([1.0]), average, (1, 2, 3, 4, 5, 6), CURVES)
    with pytest.raises(AllocationError, match="for at least one component, got 2 for 0"):
        allocate_bits([], 2, (1, 2, 3), CURVES)


@pytest.mark.parametrize("weights", [[1.0, math.nan], [1.0, math.inf], [1.0, -1e-9], [0.0, 0.0]])
def test_weights_that_say_nothing_are_refused(weights: list[float]) -> None:
    for function in (
        lambda own: allocate_bits(own, 2, (1, 2, 3), CURVES),
        lambda own: optimal_bits(own, 2, CURVES),
    ):
        with pytest.raises(AllocationError, match="must be finite, at least 0 and not all 0"):
            function(components(weights))


# ---- the closed form -------------------------------------------------------------------------------------------------


@EXAMPLES
@given(WEIGHTS, st.floats(1.0, 6.0), st.floats(2.0, 6.0))
def test_the_closed_form_is_theorem_2(weights: list[float], average: float, beta: float) -> None:
    found = optimal_bits(components(weights), average, {KEY: curve(beta=beta)})
    mean = float(np.mean(np.log(weights)))
    assert found == pytest.approx([average + (math.log(w) - mean) / math.log(beta) for w in weights])


@EXAMPLES
@given(WEIGHTS, st.floats(1.0, 6.0))
def test_at_the_optimum_a_bit_more_saves_the_same_everywhere(weights: list[float], average: float) -> None:
    own = components(weights, elements=(64, 64, 512), sides=(KEY, VALUE, VALUE))
    found = optimal_bits(own, average, CURVES)
    step = 1e-4
    slopes = [
        c.weight * (CURVES[c.side].at(b - step) - CURVES[c.side].at(b + step)) / c.elements
        for c, b in zip(own, found, strict=True)
    ]
    assert slopes == pytest.approx([slopes[0]] * len(own), rel=1e-6)
    assert np.average(found, weights=[c.elements for c in own]) == pytest.approx(average)


def test_a_head_without_weight_gets_fewest_bits_not_an_error() -> None:
    found = optimal_bits(components([0.0, 1.0, 2.0]), 3, CURVES)
    assert found[0] < 0 and sum(found) == pytest.approx(9)


def test_a_distortion_that_does_not_fall_is_refused() -> None:
    flat = DistortionCurve((1, 2), (0.5, 0.5), 0.5, 1.0)
    with pytest.raises(AllocationError, match="must fall with bits, got beta 1"):
        optimal_bits(components([1.0, 2.0]), 1.5, {KEY: flat})


@EXAMPLES
@given(WEIGHTS)
def test_the_predicted_gain_is_the_arithmetic_over_the_geometric_mean(weights: list[float]) -> None:
    geometric = float(np.prod(weights)) ** (1 / len(weights))
    assert predicted_gain(weights) == pytest.approx(float(np.mean(weights)) / geometric)
    own = components(weights)
    best = sum(c.weight * CURVES[KEY].at(b) for c, b in zip(own, optimal_bits(own, 3, CURVES), strict=True))
    assert sum(weights) * CURVES[KEY].at(3) / best == pytest.approx(predicted_gain(weights))


# ---- curves ----------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(st.floats(0.5, 2.0), st.floats(2.0, 6.0))
def test_a_fit_finds_the_parameters(alpha: float, beta: float) -> None:
    bits = (1, 2, 3, 4, 6)
    found = DistortionCurve.fit(bits, [0.36, *(alpha * beta**-b for b in bits[1:])])  # 1 bit is left out
    assert (found.alpha, found.beta) == pytest.approx((alpha, beta))
    assert found.at(2.5) == pytest.approx(alpha * beta**-2.5)
    assert found.measured(1) == 0.36 and found.between(1) == 0.36
    assert found.between(4.5) == pytest.approx(found.at(4.5)) == found.between(4) * beta**-0.5


def test_a_fit_is_the_least_squares_line_and_takes_two_points_from_1_bit_if_there_are_no_others() -> None:
    bits, mse = (2, 3, 4, 5), (0.11, 0.036, 0.009, 0.0029)
    slope, intercept = np.polyfit(bits, np.log(mse), 1)
    found = DistortionCurve.fit(bits, mse)
    assert (found.alpha, found.beta) == pytest.approx((math.exp(intercept), math.exp(-slope)))
    assert DistortionCurve.fit((1, 2), (0.4, 0.1)).beta == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("bits", "mse"),
    [((2,), (0.1,)), ((), ()), ((2, 3), (0.1, 0.0)), ((2, 3), (0.1,)), ((2, 2), (0.1, 0.1)), ((2, 3), (0.1, math.nan))],
)
def test_too_little_for_a_curve_is_refused(bits: tuple[int, ...], mse: tuple[float, ...]) -> None:
    with pytest.raises(AllocationError, match="two or more positive errors"):
        DistortionCurve.fit(bits, mse)


# ---- budgets ---------------------------------------------------------------------------------------------------------

BUDGETS = {
    "tq@2.5": Budget("tq", 2.5),
    "tq@3": Budget("tq", 3.0),
    "tq@1": Budget("tq", 1.0),
    "tq@6": Budget("tq", 6.0),
    "rvq@1.5": Budget("rvq", 1.5),
    "affine@2.25": Budget("affine", 2.25),
    "tq4": None,
    "tq2.5": None,
    "fp16": None,
    "tq3+tq2": None,
}
REFUSED = {
    "tq@0.5": "average bits of tq must be in 1 to 6, got 0.5",
    "tq@6.5": "average bits of tq must be in 1 to 6, got 6.5",
    "rvq@4": "average bits of rvq must be in 1 to 3, got 4",
    "nosuch@3": "codec family must be one of .*, got 'nosuch'",
    "identity@3": "must be in none: it has one codec",
    "tq@": "must be written like",
    "tq@x": "must be written like",
    "@3": "must be written like",
    "tq@-1": "must be written like",
    "tq@3@3": "codec family must be one of .*, got 'tq@3'",
}


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_are_read(name: str) -> None:
    assert Budget.parse(name) == BUDGETS[name]


@pytest.mark.parametrize("name", REFUSED)
def test_budgets_that_no_codecs_meet_are_refused(name: str) -> None:
    with pytest.raises(SchemeError, match=REFUSED[name]):
        Budget.parse(name)


def test_choices_are_whole_bits_only() -> None:
    assert Budget("tq", 2.5).choices() == (1, 2, 3, 4, 5, 6)  # not tq2.5, tq3.5
    assert Budget("affine", 3).choices()[:2] == (2, 3)


# ---- both sides ------------------------------------------------------------------------------------------------------

TWO_LAYERS = [
    Component(layer, head, side, weight, 64)
    for (layer, side), weights in {
        (0, KEY): (64.0, 4.0), (0, VALUE): (4.0, 1.0), (1, KEY): (4.0, 4.0), (1, VALUE): (0.25, 0.25)
    }.items()
    for head, weight in enumerate(weights)
]  # fmt: skip
TQ = {("tq", side): DistortionCurve.fit(range(1, 7), [4.0**-b for b in range(1, 7)]) for side in SIDES}


def averages(found: Allocation) -> dict[str, float]:
    return {
        side: float(np.mean([b for heads in layers.values() for b in heads])) for side, layers in found.bits.items()
    }


def test_equal_budgets_share_one_average_and_others_have_their_own() -> None:
    shared = allocate(TWO_LAYERS, {KEY: Budget("tq", 3), VALUE: Budget("tq", 3)}, TQ)
    assert shared.bits == {KEY: {0: (6, 4), 1: (3, 3)}, VALUE: {0: (4, 2), 1: (1, 1)}}  # ties go to the first
    assert shared.optimum == {
        KEY: {0: pytest.approx((5.375, 3.375)), 1: pytest.approx((3.375, 3.375))},
        VALUE: {0: pytest.approx((3.375, 2.375)), 1: pytest.approx((1.375, 1.375))},
    }
    apart = allocate(TWO_LAYERS, {KEY: Budget("tq", 3), VALUE: Budget("tq", 2)}, TQ)
    assert averages(apart) == {KEY: 3.0, VALUE: 2.0}
    assert apart.codec(KEY, 0) == "tq5+tq3" and apart.codec(KEY, 1) == "tq2"
    assert apart.optimum[KEY][0] == pytest.approx((4.5, 2.5))  # log4 of 64 and 4 about their mean with 4 and 4


def test_one_side_alone_leaves_the_other_out() -> None:
    found = allocate(TWO_LAYERS, {KEY: Budget("tq", 3)}, TQ)
    assert averages(found) == {KEY: 3.0} and found.codec(VALUE, 0) == ""
    assert found.gain == pytest.approx(predicted_gain([64, 4, 4, 4]))


def test_families_may_differ() -> None:
    curves = {**TQ, ("rvq", VALUE): DistortionCurve.fit((1, 2, 3), (0.13, 0.02, 0.003))}
    found = allocate(TWO_LAYERS, {KEY: Budget("tq", 3), VALUE: Budget("rvq", 1.5)}, curves)
    assert found.codec(VALUE, 0) == "rvq2" and found.codec(VALUE, 1) == "rvq1"


def test_the_gain_is_that_of_both_sides_together() -> None:
    found = allocate(TWO_LAYERS, {KEY: Budget("tq", 3), VALUE: Budget("tq", 1)}, TQ)
    keys, values = ([c.weight for c in TWO_LAYERS if c.side == side] for side in SIDES)
    equal = sum(keys) * 4.0**-3 + sum(values) * 4.0**-1
    best = sum(keys) * 4.0**-3 / predicted_gain(keys) + sum(values) * 4.0**-1 / predicted_gain(values)
    assert found.gain == pytest.approx(equal / best)


def test_a_family_that_was_not_calibrated_is_refused() -> None:
    with pytest.raises(AllocationError, match="must have the distortion of rvq for key and value"):
        allocate(TWO_LAYERS, {side: Budget("rvq", 2) for side in SIDES}, TQ)


def test_total_distortion_is_the_weighted_sum() -> None:
    own = components([2.0, 3.0], sides=SIDES)
    expected = 2.0 * CURVES[KEY].measured(1) + 3.0 * CURVES[VALUE].measured(4)
    assert total_distortion(own, [1, 4], CURVES) == pytest.approx(expected)
