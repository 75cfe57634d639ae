"""What compressed caches cost the attention of a model, position by position, with everything else exact.

A text runs through the model in one chunk. In every compressed layer the keys and values are encoded and decoded with
the layer's codecs and the statistics that they fit to this text; attention is computed with them wherever a query
would read codes while decoding, and exactly. The model goes on with the exact result, so that a layer's error is its
own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .attention import AttendArgs
from .cache import KVQCache
from .errors import KVQError
from .frame import MIN_TOKENS, SKIP_TOKENS
from .growth import BLOCK
from .loading import compress
from .probes import own_cache, recoded
from .sensitivity import far_tokens, shifted_attention

Array = npt.NDArray[np.float64]

LEAST_TOKENS = MIN_TOKENS + SKIP_TOKENS  # the statistics' need


@dataclass(frozen=True)
class Ranged:
    """A figure for a range of positions or distances.

    Attributes:
        first, last: of the range, both included.
        value: the figure.
    """

    first: int
    last: int
    value: float


@dataclass(frozen=True)
class AttentionErrors:
    """Errors of a scheme's attention on one text.

    Attributes:
        scheme: as given.
        tokens: of the text.
        layers: error of the attention output of each compressed layer, by cache entry: the square root of squared error
            over squared norm, summed over the positions.
        positions: the same by the position of the query; squares averaged over the layers.
        distances: root mean square error of `q . k` times the scale, in nats, by how far the key is behind the query,
            around each query's mean error, which softmax does not see; over all layers and heads.
        dense: keys less than so many positions behind the query are read dense, and have no error.
    """

    scheme: str
    tokens: int
    layers: dict[int, float]
    positions: tuple[Ranged, ...]
    distances: tuple[Ranged, ...]
    dense: int


@dataclass
class _Sums:
    """Sums over the heads of one layer: `error` and `energy` of outputs `(L,)`, squared score errors by distance."""

    error: Array
    energy: Array
    scores: Array
    pairs: Array

    @staticmethod
    def of(tokens: int) -> _Sums:
        return _Sums(*(np.zeros(tokens) for _ in range(4)))


def attention_errors(
    model: Any, tokens: Sequence[int], scheme: str, *, unknown_arch: str = "error", source: str = "", bins: int = 16
) -> AttentionErrors | None:
    """Measure one scheme.

    Args:
        model: from mlx-lm, not compressed.
        tokens: of the text, fed in one chunk.
        scheme, unknown_arch, source: as for `compress`.
        bins: ranges of equal length that positions are gathered in.

    Returns:
        The errors; `None` for a scheme that compresses no layer.

    Memory on top of the model: scores `(B, Hq, L, L)` of one layer in float32, several times.

    Raises:
        KVQError: for a text that is too short, and as `compress`.
    """
    if len(tokens) < LEAST_TOKENS:
        raise KVQError(f"a text must have at least {LEAST_TOKENS} tokens, got {len(tokens)}; give a longer one")
    sums: dict[int, _Sums] = {}
    with compress(model, scheme, unknown_arch=unknown_arch, source=source) as compression:
        caches = compression.maker()
        for index, entry in enumerate(caches):
            cache = own_cache(entry)
            if cache is not None:
                sums[index] = _Sums.of(len(tokens))
                cache.probe = _probe(sums[index])
        if not sums:
            return None
        mx.eval(model(mx.array([list(tokens)]), cache=caches))
        recent = next(cache.spec.recent for cache in map(own_cache, caches) if cache is not None)
    dense = recent + BLOCK // 2
    relative = {index: found.error / np.maximum(found.energy, 1e-30) for index, found in sums.items()}
    whole = {index: float(np.sqrt(f.error.sum() / max(f.energy.sum(), 1e-30))) for index, f in sums.items()}
    by_position = np.mean(list(relative.values()), axis=0)
    return AttentionErrors(
        scheme,
        len(tokens),
        whole,
        _by_position(by_position, bins),
        _by_distance(sum(f.scores for f in sums.values()), sum(f.pairs for f in sums.values()), dense),
        dense,
    )


def _by_position(squared: Array, bins: int) -> tuple[Ranged, ...]:
    edges = np.unique(np.linspace(0, len(squared), bins + 1).astype(int))
    return tuple(
        Ranged(int(first), int(last) - 1, float(np.sqrt(squared[first:last].mean()))) for first, last in pairwise(edges)
    )


def _by_distance(squared: Any, pairs: Any, dense: int) -> tuple[Ranged, ...]:
    found, first = [], dense
    while first < len(pairs):
        last = min(2 * first, len(pairs)) - 1
        count = pairs[first : last + 1].sum()
        if count:
            found.append(Ranged(first, last, float(np.sqrt(squared[first : last + 1].sum() / count))))
        first = last + 1
    return tuple(found)


def _probe(sums: _Sums) -> Callable[[AttendArgs], mx.array]:
    """Attention that adds its errors to `sums` and gives the exact output."""

    def attend(args: AttendArgs) -> mx.array:
        cache = copy.copy(args.cache)  # the statistics stay with the copy
        cache.observe_queries(args.queries)
        cache._freeze()
        keys, values = (x.astype(mx.float32) for x in cache.dense_tokens())
        decoded_keys, decoded_values = recoded(cache, keys, values, cache.offset - keys.shape[2])
        nothing = mx.zeros_like(keys), mx.zeros_like(values)
        exact = shifted_attention(args, *nothing)
        lossy = shifted_attention(args, decoded_keys - keys, decoded_values - values)
        axes = (0, 1, 3)
        error, energy = mx.sum(mx.square(lossy - exact), axis=axes), mx.sum(mx.square(exact), axis=axes)
        scores, pairs = _score_errors(args, cache, decoded_keys - keys)
        mx.eval(error, energy, scores, pairs)
        sums.error += np.array(error, np.float64)
        sums.energy += np.array(energy, np.float64)
        distances = (np.arange(len(sums.error))[:, None] - np.arange(len(sums.error))).clip(0)
        for total, found in ((sums.scores, scores), (sums.pairs, pairs)):
            total += np.bincount(distances.ravel(), np.array(found, np.float64).ravel(), len(total))
        return exact.astype(args.queries.dtype)

    return attend


def _score_errors(args: AttendArgs, cache: KVQCache, shift: mx.array) -> tuple[mx.array, mx.array]:
    """Squared errors of scores summed over the heads, and how many there are: both `(L, L)`, 0 where no code is read.

    Around the mean error of each query over the codes that it reads.
    """
    B, Hq, L, D = args.queries.shape
    Hkv = shift.shape[1]
    queries = (args.queries.astype(mx.float32) * args.scale).reshape(B, Hkv, -1, D)
    errors = (queries @ shift.swapaxes(-1, -2)).reshape(B, Hq, L, L)
    read = far_tokens(cache, L)
    if cache.window is not None:
        position = mx.arange(L)
        read = read & (position[:, None] - position < cache.window)
    read = read.astype(mx.float32)
    mean = mx.sum(errors * read, axis=-1, keepdims=True) / mx.maximum(mx.sum(read, axis=-1, keepdims=True), 1.0)
    return mx.sum(mx.square(errors - mean) * read, axis=(0, 1)), B * Hq * read
