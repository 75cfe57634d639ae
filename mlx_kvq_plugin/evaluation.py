"""What a scheme costs on a model: the same text, teacher-forced, through two caches of the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Fidelity:
    """Distance of a run from the reference run, over all scored positions.

    Attributes:
        kl_mean, kl_median, kl_p99, kl_max: KL(reference || run), nats a token.
        top1: fraction of positions whose most likely token agrees.
        perplexity, reference_perplexity: of the true next tokens.
        positions: how many were scored.
    """

    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1: float
    perplexity: float
    reference_perplexity: float
    positions: int


def step_logprobs(model: Any, caches: list[Any], tokens: Sequence[int], prefill: int, chunk: int = 2048) -> mx.array:
    """Log probabilities `(len(tokens) - prefill, V)` float32 of single-token steps after a prefill.

    The first `prefill` tokens go in chunks of `chunk`; every later one is a step of its own that reads the cache.
    """
    for start in range(0, prefill, chunk):
        model(mx.array([tokens[start : min(start + chunk, prefill)]]), cache=caches)
        mx.eval([cache.state for cache in caches])
    rows = []
    for token in tokens[prefill:]:
        logits = model(mx.array([[token]]), cache=caches)[0, -1].astype(mx.float32)
        rows.append(logits - mx.logsumexp(logits))
        mx.eval(rows[-1])
    return mx.stack(rows)


def _number(x: mx.array) -> float:
    value = x.item()
    assert isinstance(value, int | float)
    return float(value)


def compare(reference: mx.array, run: mx.array, tokens: Sequence[int]) -> Fidelity:
    """Compare `step_logprobs` of two runs over the same tokens (the stepped ones)."""
    kl = mx.maximum(mx.sum(mx.exp(reference) * (reference - run), axis=-1), 0.0)
    ordered = mx.sort(kl)
    count = kl.shape[0]
    targets = mx.array(list(tokens[1:]))[:, None]

    def perplexity(logprobs: mx.array) -> float:
        return _number(mx.exp(-mx.mean(mx.take_along_axis(logprobs[:-1], targets, axis=-1))))

    return Fidelity(
        kl_mean=_number(mx.mean(kl)),
        kl_median=_number(ordered[count // 2]),
        kl_p99=_number(ordered[min(count - 1, int(0.99 * count))]),
        kl_max=_number(ordered[-1]),
        top1=_number(mx.mean(mx.argmax(reference, axis=-1) == mx.argmax(run, axis=-1))),
        perplexity=perplexity(run),
        reference_perplexity=perplexity(reference),
        positions=count,
    )
