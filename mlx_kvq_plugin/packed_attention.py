"""Attention of a step of few tokens on packed codes, as plain operations: the path of CPUs, and the oracle of kernels.

Queries are rotated once, keys never are; values are summed in the transform domain and the sum is rotated back. What
costs time on a CPU is kept in few large operations: one product of decoded levels a side (codecs/scalar.py), an
exponential that vectorizes, weights that are normalized only after they are summed, and products of four rows where
three are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .errors import AttentionError
from .frame import mean_products, scaled_queries
from .rotary import Rotary, span_scores

if TYPE_CHECKING:
    from .attention import AttendArgs, Mask
    from .cache import KVQCache, Planes

LEVELS_NBYTES = 4 * 2**20  # of decoded levels at a time
PADDED_ROWS = 4  # float32 products on CPUs take 30 to 45% longer with three rows of queries than with four


def attend_packed(args: AttendArgs) -> mx.array:
    """Scores and sums on the packed planes; reads the codes, allocates `LEVELS_NBYTES` of levels."""
    cache, queries = args.cache, args.queries
    B, Hq, L, Dk = queries.shape
    dense_keys, dense_values = cache.dense_tokens()
    key_planes, value_planes = cache.packed_planes()
    Hkv, Dv, count = dense_keys.shape[1], dense_values.shape[-1], dense_keys.shape[2]
    rows, dtype = Hq // Hkv * L, product_dtype(queries.dtype)
    frame, padded = cache.frame, rows + pads_rows(args, rows)
    if frame is None:
        q = packed_queries = _grouped_queries(queries, args.scale, Hkv, padded)
        pairs = None
    else:
        prepare = _preparation(frame.rotary, args.scale, Hkv, padded)
        q, packed_queries, *products = prepare(queries, frame.mean, frame.scale, frame.constant)
        pairs = products[0], products[1], products[2]

    packed_queries = cache.key_codec.transform_queries(packed_queries, cache.key_statistics).astype(dtype)
    pieces = token_pieces(cache.packed_tokens, 4 * B * Hkv * max(Dk, Dv))
    found: list[mx.array] = []
    for piece in pieces:
        planes = piece_of(key_planes, piece, len(pieces), found)
        found.append(cache.key_codec.scores(packed_queries, planes, cache.key_statistics).astype(mx.float32))
    packed = found[0] if len(found) == 1 else mx.concatenate(found, axis=-1)
    if frame is not None and pairs is not None:
        packed = packed + span_scores(frame.rotary, pairs, cache.packed_position, cache.packed_tokens)
    dense = (q.astype(dtype) @ dense_keys.astype(dtype).swapaxes(-1, -2)).astype(mx.float32)

    scores = mx.concatenate([dense, packed], axis=-1)
    if args.softcap is not None:
        scores = mx.tanh(scores / args.softcap) * args.softcap
    scores = masked_scores(scores, args.mask, cache, Hq, L)
    if dtype == mx.float32:
        weights, total = softmax_parts(scores, args.sinks, Hkv, L)
    else:
        weights, total = softmax_weights(scores, args.sinks, Hkv, L).astype(dtype), None

    sums: list[mx.array] = []
    for start, stop in pieces:
        planes = piece_of(value_planes, (start, stop), len(pieces), sums)
        part = weights[..., count + start : count + stop]
        part = cache.value_codec.weighted_sum(part, planes, Dv, cache.value_statistics)
        sums.append(sums[-1] + part if sums else part)
    output = cache.value_codec.untransform_output(sums[-1], cache.value_statistics)
    if cache.value_scale is not None:
        output = output * cache.value_scale.astype(output.dtype)
    dense_output = weights[..., :count] @ dense_values.astype(dtype)
    if total is None:
        return (output + dense_output).reshape(B, Hq, L, Dv).astype(queries.dtype)
    return _finish(output, dense_output, total)[..., :rows, :].reshape(B, Hq, L, Dv).astype(queries.dtype)


def _grouped_queries(queries: mx.array, scale: float, Hkv: int, padded: int) -> mx.array:
    """Queries `(B, Hq, L, D)` times the scale as float32 rows of their KV heads `(B, Hkv, padded, D)`."""
    B, _, _, D = queries.shape
    q = (queries.astype(mx.float32) * scale).reshape(B, Hkv, -1, D)
    return mx.pad(q, [(0, 0), (0, 0), (0, padded - q.shape[2]), (0, 0)]) if padded > q.shape[2] else q


@cache
def _preparation(rotary: Rotary, scale: float, Hkv: int, padded: int) -> Callable[..., list[mx.array]]:
    """Compiled, once for each shape of the queries: what does not depend on the tokens that are stored."""

    def prepare(queries: mx.array, mean: mx.array, frame_scale: mx.array, constant: mx.array) -> list[mx.array]:
        q = _grouped_queries(queries, scale, Hkv, padded)
        return [q, scaled_queries(rotary, q, frame_scale), *mean_products(rotary, q, mean, constant)]

    return mx.compile(prepare)


def _finish_plain(packed: mx.array, dense: mx.array, total: mx.array) -> mx.array:
    return (packed + dense) / total


_finish = mx.compile(_finish_plain, shapeless=True)


def token_pieces(tokens: int, nbytes: int) -> list[tuple[int, int]]:
    """Ranges of tokens whose levels, `nbytes` a token, take at most `LEVELS_NBYTES`, or of single tokens.

    Larger arrays leave the caches of a processor, and beyond 32 MB glibc maps fresh pages for each of them.
    """
    size = max(1, LEVELS_NBYTES // nbytes)
    size = -(-tokens // -(-tokens // size))  # the same for all
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def piece_of(planes: Planes, piece: tuple[int, int], pieces: int, before: list[mx.array]) -> Planes:
    """Planes of a range of tokens, decoded only after the results `before` of other ranges are there."""
    if pieces == 1:
        return planes
    rows = [mx.contiguous(plane[..., slice(*piece), :]) for plane in planes.values()]
    return dict(zip(planes, mx.depends(rows, before[-1:]) if before else rows, strict=True))


def product_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Products run in float32 on the CPU, where half precision is slow; bfloat16 would round scores too coarsely."""
    return mx.float32 if mx.default_device() == mx.cpu or dtype == mx.float32 else mx.float16


def pads_rows(args: AttendArgs, rows: int) -> bool:
    """Whether a row of zeros joins the query rows of a KV head: no mask and no sink logits have a place for it."""
    plain = args.mask is None or (isinstance(args.mask, str) and args.queries.shape[2] == 1)
    return rows % PADDED_ROWS == PADDED_ROWS - 1 and plain and args.sinks is None and mx.default_device() == mx.cpu


def masked_scores(scores: mx.array, mask: Mask, cache: KVQCache, Hq: int, L: int) -> mx.array:
    """Apply a mask over tokens in order to scores `(B, Hkv, rep * L, T)` ordered dense first, packed last."""
    total = scores.shape[-1]
    if isinstance(mask, str):
        if mask != "causal":
            raise AttentionError(f'a mask given by name must be "causal", got {mask!r}; pass an array')
        if L == 1:
            return scores
        mask = mx.arange(total - L, total)[:, None] >= mx.arange(total)
    if mask is None:
        return scores
    sinks, packed = cache.sink_tokens, cache.packed_tokens
    parts = [mask[..., :sinks], mask[..., sinks + packed :], mask[..., sinks : sinks + packed]]
    mask = mx.concatenate(parts, axis=-1)
    B, Hkv = scores.shape[:2]
    grouped = scores.reshape(B, Hkv, Hq // Hkv, L, total)
    mask = grouped_mask(mask, Hkv)
    if mask.dtype == mx.bool_:
        grouped = mx.where(mask, grouped, mx.finfo(mx.float32).min)
    else:
        grouped = grouped + mask.astype(mx.float32)
    return grouped.reshape(scores.shape)


def grouped_mask(mask: mx.array, Hkv: int) -> mx.array:
    """A mask of up to four axes as `(B or 1, Hkv or 1, rep or 1, L, T)`."""
    while mask.ndim < 4:
        mask = mask[None]
    return mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(mask.shape[0], Hkv, -1, *mask.shape[2:])


def softmax_weights(scores: mx.array, sinks: mx.array | None, Hkv: int, L: int) -> mx.array:
    """Softmax over the last axis of `(B, Hkv, rep * L, T)`, with sink logits `(Hq,)` in the denominator."""
    if sinks is None:
        return mx.softmax(scores, axis=-1, precise=True)
    return mx.softmax(_with_sinks(scores, sinks, Hkv, L), axis=-1, precise=True)[..., 1:]


def softmax_parts(scores: mx.array, sinks: mx.array | None, Hkv: int, L: int) -> tuple[mx.array, mx.array]:
    """`softmax_weights` as numerators and their sum `(B, Hkv, rep * L, 1)`; float32, a third of the time on CPUs.

    The CPU's exponential takes elements one by one; here it is a polynomial that compiles to vector instructions. Its
    error is at most 2e-7 (1 + |x|) exp(x). Numerators below 2^-127 are 0.
    """
    if sinks is not None:
        scores = _with_sinks(scores, sinks, Hkv, L)
    mantissa, exponent = _exp(scores, mx.max(scores, axis=-1, keepdims=True))
    weights = mantissa * exponent.view(mx.float32)
    total = mx.sum(weights, axis=-1, keepdims=True)
    return weights if sinks is None else weights[..., 1:], total


def _with_sinks(scores: mx.array, sinks: mx.array, Hkv: int, L: int) -> mx.array:
    logits = mx.repeat(sinks.astype(mx.float32).reshape(Hkv, -1), L, axis=-1)  # row r * L + l of a group is head r
    logits = mx.broadcast_to(logits[None, :, :, None], (*scores.shape[:-1], 1))
    return mx.concatenate([logits, scores], axis=-1)


def _power_coefficients(terms: int) -> list[float]:
    """Of the polynomial nearest to 2^f on [-1/2, 1/2] by Chebyshev nodes, the constant first."""
    nodes = 0.5 * np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    fit = np.polynomial.chebyshev.Chebyshev.fit(nodes, 2.0**nodes, terms - 1, domain=[-0.5, 0.5])
    found: list[float] = fit.convert(kind=np.polynomial.Polynomial).coef.tolist()
    return found


_POWERS = _power_coefficients(7)
_ROUND = 1.5 * 2.0**23  # added and taken away again it rounds a float32 to an integer


def _exp_plain(x: mx.array, top: mx.array) -> tuple[mx.array, mx.array]:
    """`exp(x - top)` for x <= top as a float32 in [2^-1/2, 2^1/2] and the bits of a power of two, int32."""
    y = mx.maximum((x - top) * math.log2(math.e), -127.0)
    whole = (y + _ROUND) - _ROUND
    part = y - whole
    total = part * _POWERS[-1] + _POWERS[-2]
    for coefficient in reversed(_POWERS[:-2]):
        total = total * part + coefficient
    return total, (whole.astype(mx.int32) + 127) << 23


_exp = mx.compile(_exp_plain, shapeless=True)
