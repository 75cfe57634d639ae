"""What a scheme costs on a model: the same text, teacher-forced, through two caches of the same weights.

Whoever holds the log probabilities of both runs calls `compare`; ruler.py steps both at once, reduces every step to
`Scores` and never holds more than one step of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

LAST = 64  # last positions that are averaged on their own: dense first and recent tokens flatter the others


@dataclass(frozen=True)
class Fidelity:
    """Distance of a run from the reference run, over all scored positions.

    Attributes:
        kl_mean, kl_median, kl_p99, kl_max: KL(reference || run), nats a token.
        top1: fraction of positions whose most likely token agrees.
        perplexity, reference_perplexity: of the true next tokens.
        positions: how many were scored.
        kl_last: mean KL of the last `LAST` positions of every text.
    """

    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1: float
    perplexity: float
    reference_perplexity: float
    positions: int
    kl_last: float


@dataclass(frozen=True)
class Scores:
    """What is kept of a run beside its reference: scalars a position, a row a text.

    Attributes:
        kl: KL(reference || run) in nats, `(B, P)`.
        same: whether the most likely token agrees, `(B, P)`.
        logprobs, reference_logprobs: of the true next tokens, `(B, P - 1)`: the last one's is not known.
    """

    kl: mx.array
    same: mx.array
    logprobs: mx.array
    reference_logprobs: mx.array

    def row(self, index: int) -> Scores:
        """One text of several."""
        rows = slice(index, index + 1)
        return Scores(self.kl[rows], self.same[rows], self.logprobs[rows], self.reference_logprobs[rows])

    def fidelity(self) -> Fidelity:
        """The summary over all texts and positions."""
        ordered = mx.sort(self.kl.reshape(-1))
        count = ordered.shape[0]
        return Fidelity(
            kl_mean=_number(mx.mean(self.kl)),
            kl_median=_number(ordered[count // 2]),
            kl_p99=_number(ordered[min(count - 1, int(0.99 * count))]),
            kl_max=_number(ordered[-1]),
            top1=_number(mx.sum(self.same)) / count,
            perplexity=_number(mx.exp(-mx.mean(self.logprobs))),
            reference_perplexity=_number(mx.exp(-mx.mean(self.reference_logprobs))),
            positions=count,
            kl_last=_number(mx.mean(self.kl[:, -LAST:])),
        )


def logprobs(logits: mx.array) -> mx.array:
    """Log probabilities `(..., V)` float32; the largest logit is taken off first, so that sums lose no digits to it."""
    wide = logits.astype(mx.float32)
    wide = wide - mx.max(wide, axis=-1, keepdims=True)
    return wide - mx.log(mx.sum(mx.exp(wide), axis=-1, keepdims=True))


def divergence(reference: mx.array, run: mx.array) -> mx.array:
    """KL(reference || run) `(...)` in nats of log probabilities `(..., V)`: exactly 0 where they are equal."""
    possible = reference > -mx.inf  # a token without any probability adds nothing, however unlikely the run finds it
    terms = mx.where(possible, mx.exp(reference) * (reference - run), 0.0)
    return mx.maximum(mx.sum(terms, axis=-1), 0.0)


def agreement(reference: mx.array, run: mx.array) -> mx.array:
    """Whether the most likely tokens of `(..., V)` are the same."""
    return mx.argmax(reference, axis=-1) == mx.argmax(run, axis=-1)


def step_logprobs(model: Any, caches: list[Any], tokens: Sequence[int], prefill: int, chunk: int = 2048) -> mx.array:
    """Log probabilities `(len(tokens) - prefill, V)` float32 of single-token steps after a prefill.

    The first `prefill` tokens go in chunks of `chunk`; every later one is a step of its own that reads the cache.
    """
    for start in range(0, prefill, chunk):
        model(mx.array([tokens[start : min(start + chunk, prefill)]]), cache=caches)
        mx.eval([cache.state for cache in caches])
    rows = []
    for token in tokens[prefill:]:
        rows.append(logprobs(model(mx.array([[token]]), cache=caches)[0, -1]))
        mx.eval(rows[-1])
    return mx.stack(rows)


def _number(x: mx.array) -> float:
    value = x.item()
    assert isinstance(value, int | float)
    return float(value)


def compare(reference: mx.array, run: mx.array, tokens: Sequence[int]) -> Fidelity:
    """Compare `step_logprobs` of two runs over the same tokens (the stepped ones)."""
    targets = mx.array(list(tokens[1:]), mx.int32)[:, None]

    def of_targets(found: mx.array) -> mx.array:
        return mx.take_along_axis(found[:-1], targets, axis=-1).reshape(1, -1)

    scores = Scores(
        divergence(reference, run)[None], agreement(reference, run)[None], of_targets(run), of_targets(reference)
    )
    return scores.fidelity()
