"""Which attention runs where: the fused kernels if a GPU and the layer allow, and one warning if not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import mlx.core as mx

from .attend import MAX_QUERIES, MAX_REPEAT, MAX_ROWS, Call, FusedPlan, why_not_fused
from .build import CUDA, backend, dtype_name
from .codes import scalar_stages
from .launch import Launch, device_name, launch_sizes

if TYPE_CHECKING:
    from ..attention import AttendArgs
    from ..batch import BatchKVQCache
    from ..cache import KVQCache
    from ..codecs import Codec
    from ..rotary import Rotary

MANY_BITS = 4  # codes that take more registers to decode: fewer groups of their kernel fit a core
ROWS_OF_LAUNCH = 16  # rows of a batch that one launch serves: each brings arrays of its own

log = logging.getLogger("mlx_kvq_plugin")

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@cache
def warn_once(text: str) -> None:
    """Log a warning the first time that it is given."""
    log.warning(text)


def why_not(cache: KVQCache, heads: int, dim: int, value_dim: int, repeat: int) -> str:
    """Why no kernel serves the decode steps of a layer on this device; empty if one does.

    Args:
        heads: KV heads; repeat: query heads of each.
        dim, value_dim: head sizes of keys and values.
    """
    if not backend():
        return "MLX's default device is no GPU"
    if repeat > MAX_REPEAT:
        return f"{repeat} query heads of a KV head are more than {MAX_REPEAT}"
    return why_not_fused(cache, dim, value_dim)


def accepts_fused(args: AttendArgs) -> bool:
    """Whether the fused kernels take a call; logs once why they do not, if the call is a decode step on a GPU."""
    cache, (_, Hq, L, Dk) = args.cache, args.queries.shape
    if not backend() or L > MAX_QUERIES or cache.packed_tokens == 0:
        return False
    assert cache.dense_keys is not None and cache.dense_values is not None
    Hkv, Dv = cache.dense_keys.shape[1], cache.dense_values.shape[3]
    reason = why_not(cache, Hkv, Dk, Dv, Hq // Hkv)
    if not reason and Hq // Hkv * L > MAX_ROWS:
        reason = f"{Hq // Hkv * L} query rows of a KV head are more than {MAX_ROWS}"
    if not reason and (args.queries.dtype not in _FLOATS or cache.dense_keys.dtype not in _FLOATS):
        reason = f"{args.queries.dtype} queries have no kernel"
    if reason:
        warn_once(
            f"decode steps of {cache.spec.label} layers run as plain MLX operations, slower than mlx-lm's own cache: "
            f"{reason}; `kvq inspect --kernels` lists what has kernels"
        )
    return not reason


def _mask_of(mask: mx.array | str | None) -> tuple[mx.array | None, tuple[int, ...], str]:
    if mask is None or isinstance(mask, str):
        return None, (), ""
    while mask.ndim < 4:
        mask = mask[None]
    kind = "bool" if mask.dtype == mx.bool_ else "float"
    return mx.contiguous(mask if kind == "bool" else mask.astype(mx.float32)), tuple(mask.shape[:3]), kind


def prepared_call(
    caches: Sequence[KVQCache], rows: int, args: AttendArgs, mask: mx.array | str | None, pending: int = 0
) -> tuple[Sequence[KVQCache], Call, mx.array | None, tuple[Codec, Codec, Rotary | None]]:
    """What a plan is made of for a call: the caches with whole tiles, the call, its mask as kernels read it, codecs."""
    queries, first = args.queries, caches[0]
    own_mask, mask_shape, mask_dtype = _mask_of(mask)
    assert first.dense_keys is not None and first.dense_values is not None
    B, Hq, L, Dk = queries.shape
    Hkv = first.dense_keys.shape[1]
    call = Call(
        batch=B,
        rows=rows,
        heads=Hkv,
        repeat=Hq // Hkv,
        queries=L,
        key_dim=Dk,
        value_dim=first.dense_values.shape[3],
        dtype=dtype_name(queries.dtype),
        dense_dtype=dtype_name(first.dense_keys.dtype),
        scale=args.scale,
        softcap=args.softcap or 0.0,
        causal=isinstance(mask, str),
        mask=mask_shape,
        mask_dtype=mask_dtype,
        sinks="" if args.sinks is None else dtype_name(args.sinks.dtype),
        pending=pending,
        scales_values=first.value_scale is not None,
    )
    for own in caches:
        own.reserve_tiles()
    rotary = first.rotary if first.frame is not None else None
    return caches, call, own_mask, (first.key_codec, first.value_codec, rotary)


def accepts_rows(calls: Sequence[tuple[KVQCache, int, int, mx.array | str | None]], args: AttendArgs) -> bool:
    """Whether one launch serves all rows of a batch: one new token each, no masks, packed tokens in every row.

    Args:
        calls: of `BatchKVQCache.row_calls`.
    """
    if args.queries.shape[2] != 1 or backend() != CUDA:  # Metal has 31 buffers for a kernel: row by row there
        return False
    for row, start, stop, mask in calls:
        if stop - start != 1 or isinstance(mask, mx.array) or row.packed_tokens == 0 or row.probe is not None:
            return False
    rows = [row for row, *_ in calls]
    first = rows[0]
    if any(type(row) is not type(first) or row.spec != first.spec for row in rows):
        return False
    return bool(first.plans) or accepts_fused(replace(args, cache=first, mask=None))


def fused_rows(rows: Sequence[KVQCache], args: AttendArgs) -> mx.array:
    """Attention of one new token in each row of a batch, `ROWS_OF_LAUNCH` rows a launch; `accepts_rows` has agreed."""
    outputs = []
    for start in range(0, len(rows), ROWS_OF_LAUNCH):
        some = rows[start : start + ROWS_OF_LAUNCH]
        queries = args.queries if len(some) == len(rows) else args.queries[start : start + len(some)]
        key = (queries.shape, queries.dtype, len(some), args.scale, args.softcap, None, args.sinks is None)
        plan = some[0].plans.get(key)
        if plan is None:
            outputs.append(fused_attention(some, len(some), replace(args, queries=queries), None))
            continue
        for row in some:
            row.reserve_tiles()
        outputs.append(plan(some, queries, None, args.sinks))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=0)


def why_not_pending(rows: Sequence[KVQCache]) -> str:
    """Why a batch cannot leave new tokens of its rows in one array for a while; empty if it can."""
    if backend() != CUDA:
        return "rows decode together on CUDA alone"
    if len(rows) > ROWS_OF_LAUNCH:
        return f"{len(rows)} rows are more than the {ROWS_OF_LAUNCH} of a launch"
    first = rows[0]
    for row in rows:
        if row.window is not None or row.shared or row.probe is not None or row.spec != first.spec:
            return "windows, shared layers and probes need rows up to date"
        if row.packed_tokens == 0:
            return "a row has no packed tokens"
    assert first.dense_keys is not None and first.dense_values is not None
    return why_not_fused(first, first.dense_keys.shape[3], first.dense_values.shape[3])


def pending_rows(batch: BatchKVQCache, args: AttendArgs) -> mx.array:
    """Attention of one new token in each row of a batch that keeps its newest tokens in one array."""
    rows, (count, keys, values) = batch.own_rows, batch.pending_tokens()
    queries = args.queries
    key = (queries.shape, queries.dtype, keys.shape[2], args.scale, args.softcap, args.sinks is None)
    plan = rows[0].plans.get(key)
    if plan is None:
        _, call, _, codecs = prepared_call(rows, len(rows), args, None, keys.shape[2])
        plan = rows[0].plans[key] = _plan(call, *codecs, backend())
    for row in rows:
        row.reserve_tiles()
    return plan(rows, queries, None, args.sinks, (count, keys, values))


def next_step(args: AttendArgs) -> mx.array | None:
    """The fused attention of one new token without a mask, if the cache has done such a step before; else `None`."""
    cache, queries = args.cache, args.queries
    if queries.shape[2] != 1 or cache._packed == 0 or isinstance(args.mask, mx.array) or cache.probe is not None:
        return None
    plan = cache.plans.get((queries.shape, queries.dtype, 0, args.scale, args.softcap, None, args.sinks is None))
    if plan is None:
        return None
    cache.reserve_tiles()
    return plan((cache,), queries, None, args.sinks)


def fused_attention(caches: Sequence[KVQCache], rows: int, args: AttendArgs, mask: mx.array | str | None) -> mx.array:
    """Attention of the fused kernels; `accepts_fused` has said that they take the call.

    Args:
        caches: the one cache of `args`, or the caches of a batch's rows.
        rows: their number in a batch, 0 for a single cache.
    """
    queries, sinks = args.queries, args.sinks
    if queries.shape[2] == 1 and isinstance(mask, str):
        mask = None  # causal, which one new token is anyway
    caches, call, own_mask, codecs = prepared_call(caches, rows, args, mask)
    plan = _plan(call, *codecs, backend())
    if own_mask is None:
        caches[0].plans[queries.shape, queries.dtype, rows, args.scale, args.softcap, mask, sinks is None] = plan
    return plan(caches, queries, own_mask, sinks)


@cache
def _plan(call: Call, key: Codec, value: Codec, rotary: Rotary | None, on: str) -> FusedPlan:
    """The plan of a kind of call, shared by all layers of that kind."""
    return FusedPlan(call, key, value, rotary, fitting_launch(call, key, value, launch_sizes(device_name())), on)


def fitting_launch(call: Call, key: Codec, value: Codec, launch: Launch) -> Launch:
    """Launch sizes were measured for few query rows, small heads and few bits; other kernels need more registers."""
    bits = max(sum(scalar_stages(key)), sum(scalar_stages(value)))
    small = call.repeat * call.queries <= 4 and max(call.key_dim, call.value_dim) <= 128 and bits < MANY_BITS
    return launch if small else launch.with_fewer_groups(2)
