"""Probes over live caches: how large their keys are, what encoding costs them, how long their attention takes.

All take a list of caches as from `make_prompt_cache`, after the model has run, and change nothing. Each gives one
record per cache entry, in order; for an entry without a compressed cache a `Skipped` with the reason.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import CacheList

from .attention import AttendArgs, attend
from .batch import BatchKVQCache
from .cache import STEP_TOKENS, KVQCache
from .errors import CacheStateError, UnsupportedModelError
from .frame import SKIP_TOKENS
from .loading import compression_of
from .rotary import turn

Heads = tuple[float, ...]


@dataclass(frozen=True)
class Skipped:
    """A cache entry that a probe says nothing about.

    Attributes:
        index: position in the cache list.
        reason: in words.
    """

    index: int
    reason: str


@dataclass(frozen=True)
class KeyNorms:
    """Keys of one layer. Tuples have a number per KV head; the sequences of a batch are taken together.

    Attributes:
        index: position in the cache list.
        tokens: how many are held. Packed ones are decoded, so their norms have the codec's error.
        mean, largest: norm of a key.
        largest_to_median: the largest norm over the median one.
        mean_share: energy of the mean key over the mean energy of the keys, with the rotary turn taken back, from 0
            (nothing in common) to 1 (all equal). Without the first tokens, as in the frame's own statistics.
        framed_mean_share: the same of what is encoded, after the key frame; `None` without a frame.
        channel_peak: energy of the strongest channel over that of the average one, of the keys that are held.
        framed_channel_peak: the same of what is encoded, after the key frame, before the codec's own rotation; `None`
            without a frame.
    """

    index: int
    tokens: int
    mean: Heads
    largest: Heads
    largest_to_median: Heads
    mean_share: Heads
    framed_mean_share: Heads | None
    channel_peak: Heads
    framed_channel_peak: Heads | None


@dataclass(frozen=True)
class Distortion:
    """What encoding costs the tokens of one layer that are packed next. Tuples have a number per KV head.

    Attributes:
        index: position in the cache list.
        tokens: how many were encoded and decoded: those still dense, without the sinks, which stay dense for ever.
        keys, values: squared error over squared norm, summed over the tokens.
        scores: squared error of `q . k` over its variance, both around their means over the tokens, since softmax does
            not see what all tokens have in common; `None` without queries.
    """

    index: int
    tokens: int
    keys: Heads
    values: Heads
    scores: Heads | None


@dataclass(frozen=True)
class LayerTiming:
    """The attention of one layer in a step of one token.

    Attributes:
        index: position in the cache list.
        heads: query heads.
        tokens, packed: held in all, and as codes.
        seconds: median over the repeats.
    """

    index: int
    heads: int
    tokens: int
    packed: int
    seconds: float


def own_cache(entry: Any) -> KVQCache | None:
    """The compressed cache of an entry, alone or a member of a list."""
    members = entry.caches if isinstance(entry, CacheList) else [entry]
    return next((member for member in members if isinstance(member, KVQCache)), None)


def _compressed(index: int, entry: Any) -> KVQCache | Skipped:
    """The compressed cache of an entry, if it holds tokens."""
    cache = own_cache(entry)
    if cache is not None:
        return cache if cache.held else Skipped(index, "it holds no tokens")
    if isinstance(entry, BatchKVQCache):
        return Skipped(index, "it is a batch of sequences: extract one")
    return Skipped(index, vars(entry).get("kvq_note") or "mlx-lm's own cache")


def _by_head(x: mx.array) -> Heads:
    """Numbers `(Hkv,)` as a tuple."""
    return tuple(float(number) for number in np.array(x.astype(mx.float32)))


# ---- keys ----------------------------------------------------------------------------------------------------------


def key_norms(caches: Sequence[Any]) -> list[KeyNorms | Skipped]:
    """Norms of the held keys and the share of their mean; decodes one layer at a time."""
    found: list[KeyNorms | Skipped] = []
    for index, entry in enumerate(caches):
        cache = _compressed(index, entry)
        found.append(_key_norms(index, cache) if isinstance(cache, KVQCache) else cache)
    return found


def _key_norms(index: int, cache: KVQCache) -> KeyNorms:
    keys = cache.decode_all()[0].astype(mx.float32)
    first = cache.offset - cache.held
    norms = np.array(mx.linalg.norm(keys, axis=-1).swapaxes(0, 1).reshape(keys.shape[1], -1))
    middle = np.median(norms, axis=1)
    skip = min(max(0, SKIP_TOKENS - first), cache.held - 1)
    body, start = keys[..., skip:, :], first + skip
    framed = None if cache.frame is None else cache.frame.encode(body, start)
    return KeyNorms(
        index=index,
        tokens=cache.held,
        mean=tuple(norms.mean(axis=1).tolist()),
        largest=tuple(norms.max(axis=1).tolist()),
        largest_to_median=tuple((norms.max(axis=1) / np.maximum(middle, 1e-30)).tolist()),
        mean_share=_mean_share(cache, body, start),
        framed_mean_share=None if framed is None else _mean_share(cache, framed, start),
        channel_peak=_channel_peak(body),
        framed_channel_peak=None if framed is None else _channel_peak(framed),
    )


def _channel_peak(x: mx.array) -> Heads:
    """Energy of the strongest channel of `(B, Hkv, L, D)` over the mean of all channels."""
    energy = mx.mean(x * x, axis=(0, 2))
    return _by_head(mx.max(energy, axis=-1) / mx.maximum(mx.mean(energy, axis=-1), 1e-30))


def _mean_share(cache: KVQCache, x: mx.array, start: int) -> Heads:
    """Energy of the mean over the mean energy of `x` `(B, Hkv, L, D)`, turned back from positions from `start`."""
    x = turn(cache.rotary, x, start, x.shape[2], inverse=True)
    mean = mx.mean(x, axis=2)
    energy = mx.sum(mx.mean(x * x, axis=2), axis=(0, 2))
    return _by_head(mx.sum(mean * mean, axis=(0, 2)) / mx.maximum(energy, 1e-30))


# ---- distortion ----------------------------------------------------------------------------------------------------


def distortion(caches: Sequence[Any], queries: Mapping[int, mx.array] | None = None) -> list[Distortion | Skipped]:
    """Relative squared errors of the tokens that are still dense, encoded with the layer's codecs and statistics.

    A layer that has not fitted its statistics yet is measured with those that it would fit now.

    Args:
        caches: a prompt cache.
        queries: `(B, Hq, L, Dk)` after RoPE by cache entry (`recorded_queries`), for the errors of scores.
    """
    found: list[Distortion | Skipped] = []
    for index, entry in enumerate(caches):
        cache = _compressed(index, entry)
        if isinstance(cache, KVQCache):
            found.append(_distortion(index, cache, None if queries is None else queries.get(index)))
        else:
            found.append(cache)
    return found


def _distortion(index: int, cache: KVQCache, queries: mx.array | None) -> Distortion | Skipped:
    sinks = cache.sink_tokens
    keys, values = (x[..., sinks:, :].astype(mx.float32) for x in cache.dense_tokens())
    count = keys.shape[2]
    if not count:
        return Skipped(index, "no tokens but the sinks are dense")
    if not cache._frozen:
        cache = copy.copy(cache)  # the statistics stay with the copy
        if not cache._freeze():
            return Skipped(index, f"{cache.held} tokens are too few for its statistics")
    decoded, decoded_values = recoded(cache, keys, values, cache.offset - count)
    return Distortion(
        index=index,
        tokens=count,
        keys=_relative(keys - decoded, keys),
        values=_relative(values - decoded_values, values),
        scores=None if queries is None else _score_errors(queries, keys, decoded),
    )


def recoded(cache: KVQCache, keys: mx.array, values: mx.array, start: int) -> tuple[mx.array, mx.array]:
    """Keys and values `(B, Hkv, L, D)` of positions from `start`, encoded and decoded by a cache with statistics."""
    body = keys if cache.frame is None else cache.frame.encode(keys, start)
    codes = cache.key_codec.encode(body, cache.key_statistics)
    decoded = cache.key_codec.decode(codes, keys.shape[-1], mx.float32, cache.key_statistics)
    if cache.frame is not None:
        decoded = cache.frame.decode(decoded, start)
    codes = cache.value_codec.encode(cache.scaled_values(values), cache.value_statistics)
    return decoded, cache.decoded_values(codes, values.shape[-1], mx.float32)


def _relative(error: mx.array, x: mx.array) -> Heads:
    """Squared error over energy, both `(B, Hkv, ...)`."""
    axes = (0, *range(2, x.ndim))
    return _by_head(mx.sum(error * error, axis=axes) / mx.maximum(mx.sum(x * x, axis=axes), 1e-30))


def _score_errors(queries: mx.array, keys: mx.array, decoded: mx.array) -> Heads:
    B, Hkv, _, D = keys.shape
    grouped = queries.astype(mx.float32).reshape(B, Hkv, -1, D)

    def scores(x: mx.array) -> mx.array:
        found = grouped @ x.swapaxes(-1, -2)
        return found - mx.mean(found, axis=-1, keepdims=True)

    return _relative(scores(keys - decoded), scores(keys))


@contextmanager
def recorded_queries(caches: Sequence[Any]) -> Iterator[dict[int, mx.array]]:
    """Collect what the compressed layers are asked while the model runs inside of the context.

    Yields:
        Queries `(B, Hq, L, Dk)` after RoPE by cache entry, complete when the context ends: of all calls in it, those of
        layers that share the entry's keys and values too.

    Raises:
        CacheStateError: for a step of several tokens, which is computed in parts.
    """
    found: dict[int, mx.array] = {}
    parts: dict[int, list[mx.array]] = {}
    watched = [
        (index, cache) for index, entry in enumerate(caches) for cache in [own_cache(entry)] if cache is not None
    ]

    def watch(index: int, cache: KVQCache) -> None:
        observe = cache.observe_queries

        def record(queries: mx.array) -> None:
            if 1 < queries.shape[2] <= STEP_TOKENS:
                raise CacheStateError(
                    f"queries must come from single tokens or prefill chunks of more than {STEP_TOKENS} tokens to be "
                    f"recorded, got {queries.shape[2]} tokens; feed them one by one"
                )
            parts.setdefault(index, []).append(queries)
            observe(queries)

        cache.observe_queries = record  # type: ignore[method-assign]

    for index, cache in watched:
        watch(index, cache)
    try:
        yield found
    finally:
        for _, cache in watched:
            del cache.observe_queries  # the class has it again
        found.update({index: mx.concatenate(queries, axis=2) for index, queries in parts.items()})
        mx.eval(found)


# ---- time ----------------------------------------------------------------------------------------------------------


def layer_timing(caches: Sequence[Any], model: Any = None, repeats: int = 20) -> list[LayerTiming | Skipped]:
    """Time of one layer's attention for one more token, with random queries, on the tokens held.

    Args:
        caches: a prompt cache.
        model: the compressed model that they belong to, for its numbers of query heads; without it there is one query
            head for each KV head.
        repeats: timed runs, after one that is not.

    Raises:
        UnsupportedModelError: for a model that is not compressed.
    """
    plans = None
    if model is not None:
        maker = compression_of(model)
        if maker is None:
            raise UnsupportedModelError(
                "a model must be compressed to tell the query heads of its caches, got one that is not; "
                "call kvq.compress or leave the model out"
            )
        plans = maker.plan()
    found: list[LayerTiming | Skipped] = []
    for index, entry in enumerate(caches):
        cache = _compressed(index, entry)
        if isinstance(cache, KVQCache):
            found.append(_timing(index, cache, plans[index].geometry.heads if plans else None, repeats))
        else:
            found.append(cache)
    return found


def _timing(index: int, cache: KVQCache, heads: int | None, repeats: int) -> LayerTiming:
    assert cache.dense_keys is not None and cache.dense_values is not None
    B, Hkv, _, D = cache.dense_keys.shape
    heads = Hkv if heads is None else heads
    view = copy.copy(cache)
    view.shared = True  # so that it packs nothing: other layers might still read
    queries = mx.random.normal((B, heads, 1, D), key=mx.random.key(index)).astype(cache.dense_keys.dtype)
    args = AttendArgs(queries, view, D**-0.5, None, None, cache.dense_keys.dtype, cache.dense_values.dtype)
    mx.eval(queries, attend(args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(attend(args))
        times.append(time.perf_counter() - start)
    return LayerTiming(index, heads, cache.held, cache.packed_tokens, median(times))
