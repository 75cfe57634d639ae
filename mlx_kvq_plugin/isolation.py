"""Batched generation in which a failing request fails alone.

mlx-lm's `BatchGenerator` computes many requests in one call of the model. When that raises, its batches are in an
undefined state and every request in them is lost; in the server the thread that generates dies. Here the requests
involved are computed again one by one, from their tokens: who raises alone is at fault and gets the error, the others
go on where they were.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch

log = logging.getLogger(__name__)

_FILLER = 16  # elements of the log-probabilities of a failure: the server looks at no more than 11 of them
Responses = tuple[list[Any], list[Any]]


class Failure(str):
    """The finish reason of a failed request: `"error"`, with what was raised."""

    error: Exception

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The finish reason for an error."""
        failure = cls("error")
        failure.error = error
        return failure


@dataclass
class _Request:
    """What is needed to compute a request again.

    Attributes:
        segments: the prompt in the pieces in which it is processed, the cached prefix first.
        max_tokens, sampler, processors, stops: as given to `insert_segments`.
        emitted: tokens delivered.
    """

    segments: list[list[int]]
    max_tokens: int
    sampler: Any
    processors: Any
    stops: Any
    emitted: list[int] = field(default_factory=list)


class _Resumed:
    """Stop sequences of a request that has delivered tokens already: its matcher stands after them."""

    def __init__(self, stops: Any, emitted: list[int]):
        self.stops, self.emitted = stops, emitted

    def matcher(self) -> Any:
        """A matcher that has seen what was delivered."""
        matcher = self.stops.matcher()
        for token in self.emitted:
            matcher.advance(token)
        return matcher


class IsolatingBatchGenerator(BatchGenerator):
    """mlx-lm's `BatchGenerator`, none of whose methods that the server calls raises for a request's fault.

    A failed request gets one response with finish reason `Failure`, without caches. After a failure each request that
    was in the failing call is computed anew from its tokens, without cached prefix, until it has one more token; that
    costs its prefill, and all others wait meanwhile.
    """

    _generation_batch: Any
    _prompt_batch: Any
    _unprocessed_sequences: Any
    _currently_processing: Any

    def __init__(
        self,
        model: Any,
        *,
        after_step: Callable[[IsolatingBatchGenerator], None] | None = None,
        may_start: Callable[[IsolatingBatchGenerator], bool] | None = None,
        **options: Any,
    ):
        """
        Args:
            model, options: as for `BatchGenerator`.
            after_step: called after every step.
            may_start: whether waiting requests may join running ones now.
        """
        super().__init__(model, **options)
        self._after_step, self._may_start, self._options = after_step, may_start, options
        self._requests: dict[int, _Request] = {}
        self._failed: dict[int, Exception] = {}  # to be told with the next step
        self._broken: Exception | None = None  # a batch was damaged outside of a step
        self._stepped: list[Any] | None = None
        self._joining = False
        self.recoveries = self.failures = 0
        self._watch()

    def _watch(self) -> None:
        """Note what the generation batch has delivered in this step, and whether another one is joining it."""
        owner: Any = weakref.proxy(self)
        batch = self._generation_batch
        step, join = batch.next, batch.extend

        def next_responses() -> list[Any]:
            responses: list[Any] = step()
            owner._stepped = responses
            return responses

        def extend(other: Any) -> None:
            owner._joining = True
            join(other)
            owner._joining = False

        batch.next, batch.extend = next_responses, extend

    # ---- mlx-lm's calls ----------------------------------------------------------------------------------------

    def insert_segments(self, segments: list[Any], *arguments: Any, **options: Any) -> list[int]:
        """As mlx-lm's; a request that cannot be inserted gets an id too and fails in the next step."""
        given = [[list(piece) for piece in pieces] for pieces in segments]
        try:
            uids: list[int] = super().insert_segments(segments, *arguments, **options)
        except Exception as error:
            uids = list(range(self._uid_count, self._uid_count + len(segments)))
            self._uid_count += len(segments)
            self._failed.update(dict.fromkeys(uids, error.with_traceback(None)))
            return uids
        inserted = list(self._unprocessed_sequences)[-len(uids) :]
        for uid, pieces, (_, _, max_tokens, _, cached, sampler, processors, stops) in zip(
            uids, given, inserted, strict=True
        ):
            prefix = [list(cached)] if cached else []
            self._requests[uid] = _Request(prefix + pieces, max_tokens, sampler, processors, stops)
        return uids

    def extract_cache(self, uids: Any) -> dict[int, Any]:
        """As mlx-lm's; a cache that cannot be extracted is left out."""
        found: dict[int, Any] = {}
        for uid in uids:
            try:
                found |= super().extract_cache([uid])
            except Exception:
                log.exception("kvq: the prompt cache of a request could not be extracted")
        return found

    def remove(self, uids: Any, return_prompt_caches: bool = False) -> dict[int, Any]:
        """As mlx-lm's."""
        for uid in uids:
            self._requests.pop(uid, None)
            self._failed.pop(uid, None)
        try:
            removed: dict[int, Any] = super().remove(uids, return_prompt_caches)
        except Exception as error:
            self._broken = error
            removed = {}
        return removed

    @property
    def prompt_cache_nbytes(self) -> int:
        """Bytes of all requests in flight."""
        return sum(cache.nbytes for caches in self.live_caches() for cache in caches)

    @property
    def running(self) -> int:
        """Requests that are being computed."""
        return len(self._prompt_batch) + len(self._generation_batch)

    @property
    def prompting(self) -> int:
        """Requests whose prompts are being processed."""
        return len(self._prompt_batch)

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._unprocessed_sequences)

    def live_caches(self) -> list[list[Any]]:
        """The caches of both batches, one per layer, and of each waiting request."""
        waiting = [sequence[3] for sequence in self._unprocessed_sequences]
        return [self._prompt_batch.prompt_cache, self._generation_batch.prompt_cache, *waiting]

    def _next(self) -> Responses:
        self._stepped, self._joining = None, False
        error = self._broken
        prompts: list[Any] = []
        generated: list[Any] = []
        if error is None:
            held = self._hold()
            try:
                prompts, generated = super()._next()
            except Exception as raised:
                error = raised
            self._unprocessed_sequences.extendleft(reversed(held))
        if error is not None:
            prompts, generated = self._recovered(error)
        generated = generated + [self._failure(uid, why) for uid, why in self._failed.items()]
        self._failed = {}
        self._note(generated)
        if self._after_step is not None:
            self._after_step(self)
        return prompts, generated

    def _hold(self) -> list[Any]:
        """Take the waiting requests out of the queue for one step, if they may not start yet."""
        if self._may_start is None or not self.running or not self.waiting or self._may_start(self):
            return []
        held = list(self._unprocessed_sequences)
        self._unprocessed_sequences.clear()
        return held

    # ---- failures ----------------------------------------------------------------------------------------------

    def _note(self, generated: list[Any]) -> None:
        for response in generated:
            if response.finish_reason is not None:
                self._requests.pop(response.uid, None)
            elif response.uid in self._requests:
                self._requests[response.uid].emitted.append(response.token)

    def _failure(self, uid: int, error: Exception) -> Any:
        self.failures += 1
        return GenerationBatch.Response(
            uid=uid,
            token=0,
            logprobs=mx.zeros(_FILLER),
            finish_reason=Failure.of(error),
            prompt_cache=[],
            all_tokens=[],
        )

    def _recovered(self, error: Exception) -> Responses:
        """The responses of a step that raised, and sound batches again."""
        log.error("kvq: a step of the batch failed (%s: %s)", type(error).__name__, error, exc_info=error)
        error.__traceback__ = None  # its frames keep the caches of the failed step alive
        self.recoveries += 1
        generated = list(self._stepped or [])
        self._note([response for response in generated if response.finish_reason is not None])
        suspects = self._suspects()
        alone = len(suspects) == 1 and self._broken is None and not self._joining
        self._broken = None
        gc.collect()  # the wrapped methods of a discarded batch refer to it
        mx.clear_cache()
        # What this step delivered before it failed precedes what is computed now.
        delivered = {response.uid: [response.token] for response in generated if response.finish_reason is None}
        prompts: list[Any] = []
        for uid in suspects:
            if alone:
                self._failed[uid] = error
                continue
            try:
                batch, more_prompts, more_generated = self._alone(uid, delivered.get(uid, []))
            except Exception as own:
                log.error("kvq: request %d fails alone too and gets the error (%s: %s)", uid, type(own).__name__, own)
                self._failed[uid] = own.with_traceback(None)
                continue
            prompts += more_prompts
            generated += more_generated
            self._join(batch)
        return prompts, generated

    def _suspects(self) -> list[int]:
        """The requests whose state the failed step may have damaged; their batches are emptied."""
        waiting = {sequence[0] for sequence in self._unprocessed_sequences}
        prompting, generating = set(self._prompt_batch.uids), set(self._generation_batch.uids)
        everything = self._broken is not None or self._joining
        stepping = not everything and self._stepped is None and bool(generating)
        sound = waiting | (set() if everything else prompting if stepping else generating)
        if everything or stepping:
            self._generation_batch = GenerationBatch.empty(self.model, self.sampler)
            self._watch()
        if everything or not stepping:
            self._prompt_batch = PromptProcessingBatch.empty(
                self.model, self.sampler, prefill_step_size=self.prefill_step_size
            )
            self._currently_processing = []
        return [uid for uid in self._requests if uid not in sound]

    def _alone(self, uid: int, early: list[int]) -> tuple[Any, list[Any], list[Any]]:
        """Compute one request from its tokens until it has one more: its generation batch, and the responses."""
        request = self._requests[uid]
        emitted = request.emitted + early
        own = BatchGenerator(self.model, **self._options)
        own._uid_count = uid
        own.insert_segments(
            [[list(piece) for piece in request.segments] + ([emitted[:]] if emitted else [])],
            max_tokens=[request.max_tokens - len(emitted)],
            samplers=[request.sampler],
            logits_processors=[request.processors],
            stop_sequences=[_Resumed(request.stops, emitted) if emitted else request.stops],
        )
        prompts: list[Any] = []
        generated: list[Any] = []
        while not generated:
            more, generated = own._next()
            for response in more:  # its segments end elsewhere now: progress only
                response.end_of_segment = response.end_of_prompt = False
            prompts += more
        own._generation_batch.stop_sequences = [request.stops] * len(own._generation_batch)
        return own._generation_batch, prompts, generated

    def _join(self, batch: Any) -> None:
        """Let a request computed alone go on with the others."""
        if not len(batch):
            return
        try:
            self._generation_batch.extend(batch)
        except Exception as error:
            self._broken = error.with_traceback(None)
