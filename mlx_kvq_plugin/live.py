"""A text through a compressed model, and what the probes say about its caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .layouts import CHUNK
from .loading import compress, make_prompt_cache
from .probes import Distortion, KeyNorms, LayerTiming, Skipped, distortion, key_norms, layer_timing, recorded_queries

STEPS = 16  # last tokens of the text, fed singly: their queries weigh the errors of the scores


@dataclass(frozen=True)
class LiveReport:
    """What the probes found for one scheme: a record per cache entry each."""

    scheme: str
    tokens: int
    norms: list[KeyNorms | Skipped]
    distortions: list[Distortion | Skipped]
    timings: list[LayerTiming | Skipped]


def probe_scheme(
    model: Any, ids: Sequence[int], scheme: str, *, unknown_arch: str = "error", source: str = "", repeats: int = 0
) -> LiveReport:
    """Run the probes over the caches of a scheme.

    Args:
        model: from mlx-lm, not compressed.
        ids: tokens, more than `STEPS`, the last of which are fed singly.
        scheme, unknown_arch, source: as for `compress`.
        repeats: timed runs of each layer's attention; 0 leaves the timings out.
    """
    with compress(model, scheme, unknown_arch=unknown_arch, source=source):
        caches = make_prompt_cache(model)
        prompt = len(ids) - STEPS
        for first in range(0, prompt, CHUNK):
            model(mx.array([ids[first : min(first + CHUNK, prompt)]]), cache=caches)
            mx.eval([cache.state for cache in caches])
        with recorded_queries(caches) as queries:
            for token in ids[prompt:]:
                mx.eval(model(mx.array([[token]]), cache=caches))
        timings = layer_timing(caches, model, repeats) if repeats else []
        return LiveReport(scheme, len(ids), key_norms(caches), distortion(caches, queries), timings)
