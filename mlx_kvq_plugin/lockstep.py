"""Lockstep: one forward of a model for the caches of many runs.

A decode step reads all weights for a few rows of activations, so a step for ten runs takes little longer than one. The
rows of all runs go through the model together; only its attention sees which rows belong to which caches, and calls
for each run what it would call for that run alone. Products of more rows may round differently, in the last bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from .adapters import FULL, GENERIC, SLIDING
from .cache import KVQCache
from .errors import AttentionError, UnsupportedModelError
from .loading import CacheMaker
from .routing import NAME, Globals, attention_globals
from .sliding import SlidingKVQCache

KINDS = (KVCache, QuantizedKVCache, RotatingKVCache, KVQCache, SlidingKVQCache)

Caches = list[Any]  # of one run: an entry for each layer


class _Tokens:
    """Keys or values of all runs: what a model hands from its cache to its attention, in place of arrays."""

    def __init__(self, parts: Sequence[Any], entry: _Entry, shape: tuple[int, ...], dtype: mx.Dtype):
        self.parts, self.entry, self.shape, self.dtype = parts, entry, shape, dtype


class _Entry:
    """One cache entry of all runs, as a model sees it."""

    def __init__(self, caches: Sequence[Any], alike: bool):
        """
        Args:
            caches: one for each run, all at the same position.
            alike: whether all runs have the same rows, which the model then computes once.
        """
        self.caches, self.alike = caches, alike

    @property
    def offset(self) -> int:
        """Tokens seen."""
        return int(self.caches[0].offset)

    def make_mask(self, *arguments: Any, **options: Any) -> Any:
        """The mask, which must be the same for all runs."""
        first, *others = (cache.make_mask(*arguments, **options) for cache in self.caches)
        if not all(_same(first, other) for other in others):
            raise AttentionError("runs in lockstep must have the same mask, got different ones; run them one by one")
        return first

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[_Tokens, _Tokens]:
        """Each run's rows to its own cache."""
        rows = zip(self.caches, self.rows_of(keys), self.rows_of(values), strict=True)
        parts = [cache.update_and_fetch(*new) for cache, *new in rows]
        held = self.offset
        return (
            _Tokens([k for k, _ in parts], self, (*keys.shape[:2], held, keys.shape[-1]), keys.dtype),
            _Tokens([v for _, v in parts], self, (*values.shape[:2], held, values.shape[-1]), values.dtype),
        )

    def rows_of(self, x: mx.array) -> list[mx.array]:
        """Each run's rows of an array."""
        found: Any = [x] * len(self.caches) if self.alike else mx.split(x, len(self.caches))
        return list(found)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, mx.array) and isinstance(b, mx.array):
        return mx.array_equal(a, b).item() is True
    return a is b or (isinstance(a, str) and a == b)


def _attention_of(routed: Any) -> Any:
    """`scaled_dot_product_attention` that calls `routed` for every run."""

    def attention(
        queries: mx.array, keys: Any, values: Any, cache: Any = None, *arguments: Any, **options: Any
    ) -> mx.array:
        if not isinstance(keys, _Tokens):
            found: mx.array = routed(queries, keys, values, cache, *arguments, **options)
            return found
        entry = keys.entry
        rows = zip(entry.rows_of(queries), keys.parts, values.parts, entry.caches, strict=True)
        outputs = [routed(q, k, v, one, *arguments, **options) for q, k, v, one in rows]
        return outputs[0] if entry.alike else mx.concatenate(outputs)

    return attention


def lockstep_modules(maker: CacheMaker) -> list[Globals]:
    """Globals of the modules whose attention has to tell runs apart; empty for models that cannot run in lockstep.

    They can if every layer is attention of its own through mlx-lm's function: no recurrent states, no layer that reads
    another one's keys, no attention that a model adapter replaces.
    """
    plans = maker.plan()
    own = all(
        plan.geometry.kind in (FULL, SLIDING) and plan.geometry.member is None and not plan.geometry.shared
        for plan in plans
    )
    if not own or maker.adapter is GENERIC or maker.adapter.attention is not None:
        return []
    try:
        found = {id(module): module for module in (attention_globals(plan.geometry.attention) for plan in plans)}
    except UnsupportedModelError:
        return []
    return list(found.values())


@contextmanager
def lockstep(modules: Sequence[Globals]) -> Iterator[None]:
    """Within, `joint_logits` and `joint_chunk` work; the modules must be routed (`compress`) before and after."""
    before = [(module, module[NAME]) for module in modules]
    for module, routed in before:
        module[NAME] = _attention_of(routed)
    try:
        yield
    finally:
        for module, routed in before:
            module[NAME] = routed


def can_join(caches: Caches) -> bool:
    """Whether all entries of a run are of kinds that are known to work."""
    return all(type(cache) in KINDS for cache in caches)


def joint_logits(model: Any, runs: Sequence[Caches], tokens: mx.array) -> mx.array:
    """Logits `(N, B, V)` after one more token of each row `(N, B, 1)` of N runs; their caches change."""
    entries = [_Entry(caches, alike=False) for caches in zip(*runs, strict=True)]
    logits: mx.array = model(tokens.reshape(-1, 1), cache=entries)[:, -1]
    return logits.reshape(*tokens.shape[:2], -1)


def joint_chunk(model: Any, runs: Sequence[Caches], tokens: mx.array) -> None:
    """Feed the first tokens `(B, L)` to fresh caches of all runs: nothing is packed yet, so they all compute the same.

    Nothing is evaluated; the caches then hold what depends on it.
    """
    model(tokens, cache=[_Entry(caches, alike=True) for caches in zip(*runs, strict=True)])
