"""`auto:kl<=0.02` as a bound: what a choice of codecs costs is measured on the model's own texts, and the choice moved.

Teacher-forced, as by the ruler: the same tokens through the choice's caches and through mlx-lm's, and the mean KL
divergence of the positions after a prefill. These are fed `STEP` at a time, so few that caches take them for a step of
decoding: the same tokens are read as codes as in single steps, but for a block. Predictions say in which order codecs
get better; how large the divergence is they say within a factor of about two, so the predicted bound is moved until the
measured one is met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .errors import AllocationError
from .evaluation import divergence, logprobs

PREFILL, STEP = 192, 8  # tokens of every text before the first position, and tokens fed at once after them
ROUNDS = 4  # measurements, but for a bound that none of them meets
CLOSE = 0.05  # a measured divergence that is less than this share below the bound is not raised any more
_TINY = 1e-12  # in place of 0, which has no logarithm


@dataclass(frozen=True)
class Checked:
    """A bound that is met.

    Attributes:
        limit: the bound on the predicted KL divergence by which the choice was made.
        kl: the choice's measured KL divergence, nats a token.
        rounds: predicted and measured KL divergence of all choices that were measured.
    """

    limit: float
    kl: float
    rounds: tuple[tuple[float, float], ...]

    @staticmethod
    def from_json(content: Any) -> Checked:
        """Inverse of `dataclasses.asdict`; raises `KeyError`, `TypeError` or `ValueError`."""
        rounds = tuple((float(predicted), float(measured)) for predicted, measured in content["rounds"])
        found = Checked(float(content["limit"]), float(content["kl"]), rounds)
        if not (0.0 <= found.limit < math.inf and 0.0 <= found.kl < math.inf):
            raise ValueError("no bound")
        return found


def meet(
    bound: float, ends: tuple[float, float], predicted: Callable[[float], float], measured: Callable[[float], float]
) -> Checked:
    """The choice of fewest bits found whose measured KL divergence is at most `bound`.

    Args:
        bound: nats a token.
        ends: predicted KL divergence of the most and of the fewest bits.
        predicted: that of the choice of fewest bits which is predicted to cost at most so much.
        measured: what this choice costs.

    Raises:
        AllocationError: when the most bits cost more.
    """
    least, most = ends
    found: dict[float, tuple[float, float]] = {}  # measured KL and limit, by predicted KL
    limit = min(max(bound, least), most)
    while True:
        kl = predicted(limit)
        if kl in found:  # choices are discrete: there is none between
            break
        found[kl] = (measured(limit), limit)
        met = [own for own, (cost, _) in found.items() if cost <= bound]
        if not met and kl <= least:
            raise AllocationError(
                f"a KL divergence must be at least {found[kl][0]:.2g} nats a token, what the most bits of the family "
                f"cost on this model's own texts, got {bound:g}; allow more or choose another family"
            )
        close = any(found[own][0] >= (1 - CLOSE) * bound for own in met)
        if close or (met and (len(found) >= ROUNDS or limit >= most)):
            break
        limit = _next(bound * (1 - CLOSE / 2), {own: cost for own, (cost, _) in found.items()})
        if not met:
            limit = min(limit, 0.98 * min(found))
        limit = min(max(limit, least), most)
    best = max(own for own, (cost, _) in found.items() if cost <= bound)
    return Checked(found[best][1], found[best][0], tuple((own, cost) for own, (cost, _) in found.items()))


def _next(aim: float, found: dict[float, float]) -> float:
    """The prediction at which `aim` is expected to be measured: on the line of the two nearest, in logarithms."""
    points = sorted((math.log(max(own, _TINY)), math.log(max(cost, _TINY))) for own, cost in found.items())
    target = math.log(aim)
    near = sorted(points, key=lambda point: abs(point[1] - target))[:2]
    (x, y), slope = near[0], 1.0
    if len(near) == 2 and near[1][1] != y:
        slope = (near[1][1] - y) / (near[1][0] - x)
    return math.exp(x + (target - y) / min(max(slope, 0.5), 2.0))


def steps_logprobs(model: Any, caches: list[Any], tokens: mx.array) -> Iterator[mx.array]:
    """Log probabilities `(B, STEP, V)` float32 of all positions after the prefill; uses the caches up."""
    model(tokens[:, :PREFILL], cache=caches)
    mx.eval([cache.state for cache in caches])
    for start in range(PREFILL, tokens.shape[1], STEP):
        found = logprobs(model(tokens[:, start : start + STEP], cache=caches))
        mx.eval(found)
        yield found


def mean_divergence(expected: Sequence[mx.array], found: Iterator[mx.array]) -> float:
    """Mean KL divergence, nats a token, of parts of log probabilities `(B, L, V)` one after the other."""
    parts = [divergence(reference, own) for reference, own in zip(expected, found, strict=True)]
    mean: Any = mx.mean(mx.concatenate(parts, axis=1)).item()
    return float(mean)
