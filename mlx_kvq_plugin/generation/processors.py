"""What happens to scores between the model and the choice of a token.

A processor is a callable of mlx-lm's kind: `(tokens, logits) -> logits` with the ids `(T,)` of one sequence so far and
logits `(1, V)`. The order is that of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    categorical_sampling,
    greedy_sampler,
    make_logits_processors,
)

from ..errors import GenerationError
from .config import Sampling, Settings

Processor = Callable[[mx.array, mx.array], mx.array]

_NEVER = -float("inf")
_ALL = 2**31 - 1  # tokens that mlx-lm's repetition penalty looks back at


def make_processors(settings: Settings, prompt: int, given: Sequence[Callable[..., Any]] = ()) -> list[Processor]:
    """Processors of one sequence.

    Args:
        settings: of the call.
        prompt: tokens of the sequence's prompt, padding not counted.
        given: the caller's own, called as `(input_ids (1, T), scores (1, V))` with MLX arrays after all others.
    """
    found: list[Processor] = []
    if settings.repetition_penalty != 1.0:
        found += make_logits_processors(repetition_penalty=settings.repetition_penalty, repetition_context_size=_ALL)
    if settings.no_repeat_ngram_size:
        found.append(_no_repeated_ngrams(settings.no_repeat_ngram_size))
    if settings.bad_words_ids:
        found.append(_no_bad_words(settings.bad_words_ids, settings.ends))
    if settings.at_least and settings.ends:
        found.append(_suppressed(settings.ends, lambda tokens: tokens < prompt + settings.at_least))
    if settings.suppress_tokens:
        found.append(_suppressed(settings.suppress_tokens, lambda _: True))
    if settings.begin_suppress_tokens:
        found.append(_suppressed(settings.begin_suppress_tokens, lambda tokens: tokens == prompt))
    return found + [_callers(processor) for processor in given]


def make_sampler(sampling: Sampling | None) -> Callable[[mx.array], mx.array]:
    """Log probabilities `(B, V)` to tokens `(B,)`, with mlx-lm's own filters and draws."""
    if sampling is None:
        return greedy_sampler  # type: ignore[no-any-return]
    return lambda logprobs: categorical_sampling(warped(logprobs, sampling), 1.0)


def warped(logprobs: mx.array, sampling: Sampling) -> mx.array:
    """Log probabilities over the temperature, minus infinity where top-k, top-p or min-p leave a token out.

    The order is transformers'. `mlx_lm.sample_utils.make_sampler` applies top-p before the temperature and before
    top-k, which is another distribution.
    """
    scores = logprobs * (1.0 / sampling.temperature)
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = apply_top_k(scores, sampling.top_k)
    if sampling.top_p < 1.0:
        scores = apply_top_p(scores - mx.logsumexp(scores, axis=-1, keepdims=True), sampling.top_p)
    if sampling.min_p > 0.0:
        scores = apply_min_p(scores, sampling.min_p)
    return scores


def reported_scores(logits: mx.array, logprobs: mx.array, settings: Settings) -> mx.array:
    """Scores `(B, V)` as transformers reports them: processed, not normalized unless that was asked for."""
    scores = logits
    if settings.sampling is not None:
        left_out = warped(logprobs, settings.sampling) == _NEVER
        scores = mx.where(left_out, _NEVER, logits * (1.0 / settings.sampling.temperature))
    if settings.renormalize_logits:
        scores = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
    return scores


def _suppressed(ids: Sequence[int], applies: Callable[[int], bool]) -> Processor:
    """Never one of `ids`; those without a score never come anyway, and MLX would write past the scores."""

    def suppress(tokens: mx.array, logits: mx.array) -> mx.array:
        known = [token for token in ids if token < logits.shape[-1]]
        if known and applies(tokens.size):
            logits[:, mx.array(known)] = _NEVER
        return logits

    return suppress


def _no_repeated_ngrams(size: int) -> Processor:
    """Never a token that completes `size` tokens in a row that were there before."""

    def suppress(tokens: mx.array, logits: mx.array) -> mx.array:
        known = np.array(tokens).tolist()
        start = tuple(known[len(known) - size + 1 :])
        banned = {known[i + size - 1] for i in range(len(known) - size + 1) if tuple(known[i : i + size - 1]) == start}
        if banned:
            logits[:, mx.array(sorted(banned))] = _NEVER
        return logits

    return suppress


def _no_bad_words(words: Sequence[Sequence[int]], ends: Sequence[int]) -> Processor:
    """Never a token that completes one of `words`; an end token is no bad word."""
    for word in words:
        if not word:
            raise GenerationError("bad_words_ids must hold lists of at least one id, got an empty one; leave it out")
    kept = [tuple(word) for word in words if tuple(word) not in {(end,) for end in ends}]

    def suppress(tokens: mx.array, logits: mx.array) -> mx.array:
        longest = max((len(word) for word in kept), default=1)
        tail = tuple(np.array(tokens[-longest:]).tolist())
        banned = {word[-1] for word in kept if len(word) == 1 or tail[-len(word) + 1 :] == word[:-1]}
        if banned:
            logits[:, mx.array(sorted(banned))] = _NEVER
        return logits

    return suppress


def _callers(processor: Callable[..., Any]) -> Processor:
    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        scores = processor(tokens[None], logits)
        if isinstance(scores, np.ndarray):
            scores = mx.array(scores)
        if not isinstance(scores, mx.array) or scores.shape != logits.shape:
            raise GenerationError(
                f"a logits_processor must return scores of shape {logits.shape} as an MLX or NumPy array, got "
                f"{getattr(scores, 'shape', type(scores).__name__)}; return the scores it was given, changed"
            )
        return scores.astype(logits.dtype)

    return process
