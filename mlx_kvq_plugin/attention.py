"""Attention on a compressed cache: softmax over sinks, packed and recent tokens.

Candidates are tried in order; the last accepts every well-formed call and is the oracle of the others:

* `attend_dense`: nothing is packed, or the codecs are exact: MLX's fused attention on the stored tokens.
* `attend_fused`: a step of few tokens on a GPU, where codecs and shapes have kernels (kernels/).
* `attend_packed`: a step of few tokens. Codes are scored in the transform domain: the query is rotated once, keys
  never are; values are summed in the transform domain and the sum is rotated back once.
* `attend_decoded`: a prefill chunk, or the reference: the past of this one layer is decoded and joined with the dense
  tokens for MLX's fused attention; no `(Hq, L, S)` score matrix of ours.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from .errors import AttentionError
from .kernels.build import backend
from .kernels.decode import decode_heads, why_not_decode
from .kernels.dispatch import accepts_fused, accepts_rows, fused_attention, fused_rows, next_step, pending_rows
from .packed_attention import attend_packed, grouped_mask

if TYPE_CHECKING:
    from .batch import BatchKVQCache
    from .cache import KVQCache

Mask = mx.array | str | None

WORKSPACE_NBYTES = 256 * 2**20  # of decoded keys and values at a time, where heads can be decoded apart
LARGE_NBYTES = 32 * 2**20  # of a layer's decoded past: from here on few layers of a prefill chunk are queued at a time,
QUEUED_LAYERS = 2  # beside the one that a GPU works on
PACKED_QUERIES = 16  # more new tokens than this and decoding the past once is cheaper than scoring it packed


class _Queue(threading.local):
    """Numbers that are there when the attention of a layer is done; by thread, as models run."""

    def __init__(self) -> None:
        self.layers: deque[mx.array] = deque()


_queue = _Queue()


@dataclass(slots=True)
class AttendArgs:
    """Everything an attention function may look at.

    Attributes:
        queries: `(B, Hq, L, Dk)` post-RoPE, for the newest L stored tokens.
        cache: holds T tokens, the newest L included.
        scale: factor of the scores.
        mask: `None`, `"causal"` (lower-right aligned), bool `(T,)`, `(L, T)`, `(B, 1 or Hq, L, T)`, or additive.
        sinks: attention-sink logits `(Hq,)` that join the softmax and carry no value, or `None`.
        key_dtype, value_dtype: what the model sees the tokens as.
        softcap: scores become `softcap * tanh(scores / softcap)` before the mask (Gemma 2), or `None`.
    """

    queries: mx.array
    cache: KVQCache
    scale: float
    mask: Mask
    sinks: mx.array | None
    key_dtype: mx.Dtype
    value_dtype: mx.Dtype
    softcap: float | None = None

    def report(self) -> str:
        """One line with every shape, for errors."""
        mask = self.mask if not isinstance(self.mask, mx.array) else f"{self.mask.dtype}{self.mask.shape}"
        return (
            f"queries {self.queries.dtype}{self.queries.shape}, cache {type(self.cache).__name__} "
            f"{self.cache.spec.label} with {self.cache.held} tokens ({self.cache.packed_tokens} packed), "
            f"mask {mask}, sinks {None if self.sinks is None else self.sinks.shape}"
        )


def attend(args: AttendArgs) -> mx.array:
    """Attention output `(B, Hq, L, Dv)` in the queries' dtype; then lets the cache pack what overflows.

    A decode step like the one before goes straight to its kernels.
    """
    if args.cache.batched:
        return attend_rows(args)
    output = next_step(args) if args.cache.plans else None
    if output is not None:
        args.cache.settle()
        return output
    if args.cache.probe is not None:
        return args.cache.probe(args)
    parts = args.cache.step_parts(args.queries.shape[2]) if args.mask is not None else []
    if parts:
        args.cache.observe_queries(args.queries)
        return attend_parts(args, parts)
    for accepts, function in _CANDIDATES:
        if accepts(args):
            args.cache.observe_queries(args.queries)
            output = function(args)
            args.cache.settle()
            if function is attend_decoded and backend():
                finish_large(args.cache, output)
            return output
    raise AttentionError(
        f"queries must be (B, Hq, L, Dk) with the cache's B and Dk and a multiple of its heads, got {args.report()}; "
        "check the model adapter"
    )


def finish_large(cache: KVQCache, output: mx.array) -> None:
    """Start the attention of a prefill chunk, and what it packed, and wait for earlier layers, if the past is large.

    Layers that are queued while a GPU works allocate what they decode, and new planes beside the old ones; all layers
    together that would be more than the caches. `QUEUED_LAYERS` keep the GPU busy while the host prepares the next.
    """
    if cache.dense_nbytes(output.dtype.size) >= LARGE_NBYTES:
        done = output[:1, :1, :1, :1] + 0  # a number of its own: to hold the output would keep its memory
        mx.async_eval(done, cache.key_planes, cache.value_planes)  # type: ignore[no-untyped-call]
        _queue.layers.append(done)
        while len(_queue.layers) > QUEUED_LAYERS:
            mx.eval(_queue.layers.popleft())


def attend_rows(args: AttendArgs) -> mx.array:
    """A batch of sequences: each row as if it were alone, so that it computes the same; padding gives zeros."""
    batch = cast("BatchKVQCache", args.cache)
    if batch.pending and batch.says_causal(args.mask):
        return pending_rows(batch, args)
    calls = batch.row_calls(args.mask)
    if accepts_rows(calls, args):
        together = fused_rows([row for row, *_ in calls], args)
        for row, *_ in calls:
            row.settle()
        return together
    rows = []
    for i, (row, start, stop, mask) in enumerate(calls):
        new = args.queries.shape[2]
        queries = args.queries[i : i + 1, :, start:stop]
        output = attend(replace(args, queries=queries, cache=row, mask=mask)) if stop > start else None
        rows.append(_pad_queries(output, start, new - stop) if output is not None else None)
    some = next((row for row in rows if row is not None), None)
    if some is None:
        raise AttentionError(f"a batch must have a row with a new token, got padding only: {args.report()}")
    return mx.concatenate([mx.zeros_like(some) if row is None else row for row in rows], axis=0)


def attend_parts(args: AttendArgs, parts: list[tuple[int, int]]) -> mx.array:
    """A step of several tokens as single steps would compute it, which pack in between: in parts, on a view."""
    view, keys, values = args.cache.before_newest()
    L, outputs = args.queries.shape[2], []
    for start, stop in parts:
        view.update_and_fetch(keys[..., start:stop, :], values[..., start:stop, :])
        mask = args.mask
        if isinstance(mask, mx.array):
            last = mask.shape[-1] - L + stop
            mask = mask[..., start:stop, last - view.held : last]
        outputs.append(attend(replace(args, queries=args.queries[..., start:stop, :], cache=view, mask=mask)))
        view.compact()
    return mx.concatenate(outputs, axis=2)


def _pad_queries(output: mx.array, before: int, after: int) -> mx.array:
    return mx.pad(output, [(0, 0), (0, 0), (before, after), (0, 0)]) if before or after else output


def attend_dense(args: AttendArgs) -> mx.array:
    """MLX's fused attention on exactly stored tokens: the same call that mlx-lm makes."""
    keys, values = args.cache.attention_tokens()
    return _attention(args, keys.astype(args.key_dtype), values.astype(args.value_dtype))


def attend_decoded(args: AttendArgs) -> mx.array:
    """MLX's fused attention on decoded tokens: the reference. Allocates this layer's dense K and V.

    Where a kernel decodes, it does so for a few KV heads at a time, so that they stay below `WORKSPACE_NBYTES`.
    """
    cache = args.cache
    if not backend() or why_not_decode(cache):
        keys, values = cache.decode_all()
        return _attention(args, keys.astype(args.queries.dtype), values.astype(args.queries.dtype))
    assert cache.dense_keys is not None and cache.dense_values is not None
    B, Hkv, _, Dk = cache.dense_keys.shape
    repeat = args.queries.shape[1] // Hkv
    nbytes = B * cache.held * (Dk + cache.dense_values.shape[3]) * cache.dense_keys.dtype.size
    count = max(1, min(Hkv, WORKSPACE_NBYTES // nbytes))
    outputs = []
    for first in range(0, Hkv, count):
        keys, values = decode_heads(cache, first, min(count, Hkv - first))
        own = args if count == Hkv else _heads_of(args, first * repeat, keys.shape[1] * repeat)
        outputs.append(_attention(own, keys.astype(args.queries.dtype), values.astype(args.queries.dtype)))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)


def _heads_of(args: AttendArgs, first: int, count: int) -> AttendArgs:
    """The call for some of the query heads."""
    heads, mask, sinks = slice(first, first + count), args.mask, args.sinks
    if isinstance(mask, mx.array) and mask.ndim > 2 and mask.shape[-3] > 1:
        mask = mask[..., heads, :, :]
    return replace(args, queries=args.queries[:, heads], mask=mask, sinks=None if sinks is None else sinks[heads])


def _attention(args: AttendArgs, keys: mx.array, values: mx.array) -> mx.array:
    """MLX's fused attention, or its formula where scores are capped, which the fused one cannot do."""
    if args.softcap is None:
        return mx.fast.scaled_dot_product_attention(
            args.queries, keys, values, scale=args.scale, mask=args.mask, sinks=args.sinks
        )
    if args.sinks is not None:
        raise AttentionError(f"capped scores must come without attention sinks, got {args.report()}; drop one of them")
    return softcapped_attention(args.queries, keys, values, args.scale, args.softcap, args.mask)


def softcapped_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, softcap: float, mask: Mask
) -> mx.array:
    """Attention `(B, Hq, L, Dv)` whose scores are `softcap * tanh(scores / softcap)`, with every mask of `AttendArgs`.

    The operations of mlx-lm's Gemma 2 in its order; allocates the scores `(B, Hq, L, T)`.
    """
    B, Hq, L, Dk = queries.shape
    Hkv, total = keys.shape[1], keys.shape[2]
    q = (queries * scale).reshape(B, Hkv, Hq // Hkv, L, Dk)
    scores = q @ keys[:, :, None].swapaxes(-1, -2)
    scores = mx.tanh(scores / softcap) * softcap
    if isinstance(mask, str):
        mask = mx.arange(total - L, total)[:, None] >= mx.arange(total)
    if mask is not None and mask.dtype == mx.bool_:
        scores = mx.where(grouped_mask(mask, Hkv), scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    elif mask is not None:
        scores = scores + grouped_mask(mask, Hkv)
    weights = mx.softmax(scores, precise=True, axis=-1)
    return (weights @ values[:, :, None]).reshape(B, Hq, L, values.shape[-1])


def attend_fused(args: AttendArgs) -> mx.array:
    """The kernels of kernels/attend.py: reads codes once, allocates the partial sums of its splits."""
    return fused_attention([args.cache], 0, args, args.mask)


def _fits(args: AttendArgs) -> bool:
    if args.queries.ndim != 4 or args.cache.dense_keys is None:
        return False
    B, Hkv, _, Dk = args.cache.dense_keys.shape
    return args.queries.shape[0] == B and args.queries.shape[1] % Hkv == 0 and args.queries.shape[3] == Dk


def _accepts_dense(args: AttendArgs) -> bool:
    return _fits(args) and (args.cache.packed_tokens == 0 or args.cache.exact)


def _accepts_fused(args: AttendArgs) -> bool:
    return _fits(args) and accepts_fused(args)


def _accepts_packed(args: AttendArgs) -> bool:
    return _fits(args) and args.queries.shape[2] <= PACKED_QUERIES


_CANDIDATES: tuple[tuple[Callable[[AttendArgs], bool], Callable[[AttendArgs], mx.array]], ...] = (
    (_accepts_dense, attend_dense),
    (_accepts_fused, attend_fused),
    (_accepts_packed, attend_packed),
    (_fits, attend_decoded),
)
