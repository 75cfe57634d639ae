"""Running the model: prompts in chunks, one token at a time for all sequences, or several with a draft model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream, speculative_generate_step
from mlx_lm.models.cache import TokenBuffer

from ..errors import GenerationError
from ..sliding import allow_speculation
from .config import Settings
from .endings import Ending
from .processors import Processor, make_sampler, reported_scores


@dataclass
class Row:
    """One sequence of a call.

    Attributes:
        tokens: ids so far, from the prompt on.
        prompt: how many of them are the prompt.
        caches: one per layer; of the sequence alone before and after decoding, in a batch meanwhile.
        held: how many tokens the caches hold.
        scores, logits: `(V,)` of every new token, if they are kept.
    """

    tokens: list[int]
    prompt: int
    caches: list[Any]
    held: int
    scores: list[mx.array] = field(default_factory=list)
    logits: list[mx.array] = field(default_factory=list)


def read(model: Any, caches: list[Any], tokens: Sequence[int], chunk: int) -> None:
    """Let a model read `tokens` into its caches, `chunk` at a time, as mlx-lm's `generate_step` does."""
    with mx.stream(generation_stream):
        for start in range(0, len(tokens), chunk):
            model(mx.array([list(tokens[start : start + chunk])]), cache=caches)
            mx.eval([cache.state for cache in caches])
            mx.clear_cache()


@dataclass
class _Chosen:
    """Tokens `(B,)`, and what was kept of the scores they were chosen by, `(B, V)`."""

    tokens: mx.array
    scores: mx.array | None
    logits: mx.array | None

    def of(self, keep: list[int]) -> _Chosen:
        index = mx.array(keep)
        return _Chosen(*(None if x is None else x[index] for x in (self.tokens, self.scores, self.logits)))  # type: ignore[arg-type]


class _Batch:
    """Sequences that take their steps together: caches, and what their processors look at."""

    def __init__(self, model: Any, rows: Sequence[Row], processors: Sequence[Sequence[Processor]], settings: Settings):
        self.model, self.rows, self.settings = model, list(rows), settings
        self.processors = list(processors)
        self.sampler = make_sampler(settings.sampling)
        self.alone = len(rows) == 1
        self.caches = rows[0].caches
        if not self.alone:
            self.caches = _merged([row.caches for row in rows])
            for row in rows:
                row.caches = []
        self.contexts = [TokenBuffer(row.tokens[:-1]) for row in rows] if any(processors) else []

    def step(self, tokens: mx.array) -> _Chosen:
        """Feed the newest token of every row and choose the next ones; nothing waits for the result."""
        with mx.stream(generation_stream):
            logits = self.model(tokens[:, None], cache=self.caches)[:, -1, :]
            for row in self.rows:
                row.held += 1
            kept = logits if self.settings.output_logits else None
            if self.contexts:
                logits = mx.concatenate([self._processed(i, tokens, logits) for i in range(len(self.rows))])
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            scores = reported_scores(logits, logprobs, self.settings) if self.settings.output_scores else None
            chosen = _Chosen(self.sampler(logprobs), scores, kept)
            mx.async_eval([x for x in (chosen.tokens, scores, kept) if x is not None])  # type: ignore[no-untyped-call]
        return chosen

    def _processed(self, i: int, tokens: mx.array, logits: mx.array) -> mx.array:
        context = self.contexts[i].update_and_fetch(tokens[i : i + 1])
        row = logits[i : i + 1]
        for processor in self.processors[i]:
            row = processor(context, row)
        return row

    def leave(self, i: int) -> None:
        """Give a row its own caches back."""
        if not self.alone:
            self.rows[i].caches = [cache.extract(i) for cache in self.caches]

    def keep(self, keep: list[int]) -> None:
        """Go on with some rows only."""
        if not self.alone and keep:
            with mx.stream(generation_stream):
                for cache in self.caches:
                    cache.filter(keep)
        self.rows = [self.rows[i] for i in keep]
        self.processors = [self.processors[i] for i in keep]
        self.contexts = [self.contexts[i] for i in keep] if self.contexts else []


def _merged(caches: Sequence[list[Any]]) -> list[Any]:
    """One batch cache per layer of copies of the rows' caches."""
    layers = list(zip(*caches, strict=True))
    for layer in layers:
        if not callable(getattr(layer[0], "merge", None)):  # by which mlx-lm tells these caches itself
            raise GenerationError(
                f"several sequences at once must have caches that mlx-lm can batch, got {type(layer[0]).__name__}; "
                "generate one sequence at a time"
            )
    return [layer[0].merge(list(layer)) for layer in layers]


def decode(
    model: Any,
    rows: Sequence[Row],
    processors: Sequence[Sequence[Processor]],
    settings: Settings,
    ending: Ending,
    emit: Callable[[dict[int, int]], None],
    ahead: bool,
) -> None:
    """Generate until every row is complete; their tokens, caches, scores and logits are updated.

    Args:
        model: mlx-lm's.
        rows: sequences whose caches hold all their tokens but the last.
        processors: of every row.
        settings, ending: of the call.
        emit: told the new token of every row that is not complete, by its place in `rows`.
        ahead: whether the next step may start before a token is looked at. That hides the time of Python from a GPU;
            a row that ends early then holds its last token too, and processors see one step more than is used.
    """
    batch = _Batch(model, rows, processors, settings)
    try:
        _decode(batch, settings, ending, emit, ahead)
    finally:
        for i in range(len(batch.rows)):  # those that an error has stopped
            batch.leave(i)


def _decode(
    batch: _Batch, settings: Settings, ending: Ending, emit: Callable[[dict[int, int]], None], ahead: bool
) -> None:
    rows = batch.rows
    places = {id(row): i for i, row in enumerate(rows)}
    chosen = batch.step(mx.array([row.tokens[-1] for row in rows]))
    for count in range(1, settings.new_tokens + 1):
        last = count == settings.new_tokens
        following = batch.step(chosen.tokens) if ahead and not last else None
        tokens: list[int] = np.array(chosen.tokens).tolist()
        for i, (row, token) in enumerate(zip(batch.rows, tokens, strict=True)):
            row.tokens.append(token)
            if chosen.scores is not None:
                row.scores.append(chosen.scores[i])
            if chosen.logits is not None:
                row.logits.append(chosen.logits[i])
        emit({places[id(row)]: token for row, token in zip(batch.rows, tokens, strict=True)})
        complete = [last or ending.reached(row.tokens, row.scores) for row in batch.rows]
        if any(complete):
            for i, done in enumerate(complete):
                if done:
                    batch.leave(i)
            keep = [i for i, done in enumerate(complete) if not done]
            batch.keep(keep)
            if not keep:
                return
            chosen = chosen.of(keep)
            following = None if following is None else following.of(keep)
        chosen = batch.step(chosen.tokens) if following is None else following
        if count % 256 == 0:
            mx.clear_cache()


def speculate(
    model: Any,
    draft: Any,
    draft_caches: list[Any],
    row: Row,
    processors: Sequence[Processor],
    settings: Settings,
    ending: Ending,
    emit: Callable[[dict[int, int]], None],
) -> None:
    """Generate one sequence with a draft model, by mlx-lm's `speculative_generate_step`; tokens are those of `decode`.

    Args:
        model, draft: mlx-lm's.
        draft_caches: of the draft; they hold as many tokens as `row.caches`.
        row: the sequence; its caches may lack any number of its tokens.
        processors, settings, ending, emit: as for `decode`.

    Raises:
        GenerationError: for models whose caches mlx-lm cannot tell apart from the draft's, or cannot trim.
    """
    if len(row.caches) != len(model.layers):
        raise GenerationError(
            f"assistant_model must help a model with one cache a layer, got {len(row.caches)} caches for "
            f"{len(model.layers)} layers; generate without it"
        )
    before = mx.array(row.tokens[:-1], mx.uint32)  # mlx-lm shows processors no more than the last prompt token
    whole = [_with_prefix(processor, before) for processor in processors]
    caches = row.caches + draft_caches
    allow_speculation(caches)
    options = {} if settings.drafted is None else {"num_draft_tokens": settings.drafted}
    unread = mx.array(row.tokens[row.held :])
    steps = speculative_generate_step(
        unread,
        model,
        draft,
        max_tokens=settings.new_tokens,
        sampler=make_sampler(settings.sampling),
        logits_processors=whole,
        prompt_cache=caches,
        prefill_step_size=settings.prefill_chunk_size,
        **options,
    )
    with closing(steps):
        for token, _, drafted in _started(steps):
            row.tokens.append(int(token))
            row.held = len(row.tokens) - (0 if drafted else 1)
            emit({0: int(token)})
            if ending.reached(row.tokens, row.scores):
                return


def _started(steps: Any) -> Any:
    """The generator itself; mlx-lm's refusal of caches that cannot be trimmed as our own error."""
    try:
        first = next(steps)
    except ValueError as error:
        raise GenerationError(
            f"assistant_model must help a model whose caches can be trimmed, got: {error}; generate without it"
        ) from error
    yield first
    yield from steps


def _with_prefix(processor: Processor, before: mx.array) -> Processor:
    return lambda tokens, logits: processor(mx.concatenate([before, tokens]), logits)
