"""When a sequence is complete: end tokens, stop strings, the caller's criteria, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .config import Settings

_MARGIN = 8  # tokens before those that a stop string may be made of, so that decoding begins at a whole character


@dataclass
class Ending:
    """Decides after every token whether a sequence is complete.

    Attributes:
        settings: of the call.
        decode: ids to text; needed for stop strings only.
        criteria: the caller's own, called as `(input_ids (1, T), scores)` with an MLX array and a tuple of what was
            kept for `output_scores` of this sequence, or `None`; anything true ends the sequence.
        started: seconds of the clock that `max_time` counts from.
    """

    settings: Settings
    decode: Callable[[list[int]], str] | None = None
    criteria: Sequence[Callable[..., Any]] = ()
    started: float = field(default_factory=time.monotonic)

    def reached(self, tokens: list[int], scores: Sequence[mx.array]) -> bool:
        """Whether `tokens`, a sequence with its prompt, end with their last one."""
        if tokens[-1] in self.settings.ends:
            return True
        if any(self._stops(tokens, text) for text in self.settings.stop_strings):
            return True
        if self.settings.max_time is not None and time.monotonic() - self.started > self.settings.max_time:
            return True
        if not self.criteria:
            return False
        given = (mx.array([tokens]), tuple(scores) if self.settings.output_scores else None)
        return any(bool(np.all(np.array(criterion(*given)))) for criterion in self.criteria)

    def _stops(self, tokens: list[int], text: str) -> bool:
        """Whether `text` ends in the last token."""
        assert self.decode is not None
        tail = tokens[-(len(text.encode()) + _MARGIN) :]
        decoded, before = self.decode(tail), self.decode(tail[:-1])
        at = decoded.rfind(text)
        return at >= 0 and at + len(text) > len(before)
