"""Cases of fused attention: caches with packed tokens, calls on them, what float64 and plain operations make of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_kvq_plugin.attention import AttendArgs
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.codecs import Codec
from mlx_kvq_plugin.kernels.attend import FusedPlan
from mlx_kvq_plugin.kernels.byte_codes import byte_levels as levels_of_bytes
from mlx_kvq_plugin.kernels.dispatch import prepared_call
from mlx_kvq_plugin.kernels.launch import Launch
from mlx_kvq_plugin.rotary import Rotary, no_rotation, turn
from mlx_kvq_plugin.rotation import unrotate
from mlx_kvq_plugin.schemes import parse_scheme


def rotary_of(dim: int, pairs: int | None = None, layout: str = "half", magnitude: float = 1.0) -> Rotary:
    pairs = dim // 2 if pairs is None else pairs
    return Rotary(layout, tuple(10000.0 ** (-j / max(1, pairs)) for j in range(pairs)), magnitude)


@dataclass(frozen=True)
class Case:
    """One call: a scheme, shapes, and what else matters to kernels."""

    scheme: str = "tq4"
    tokens: int = 200
    dims: tuple[int, int] = (64, 64)
    heads: tuple[int, int] = (4, 2)
    queries: int = 1
    batch: int = 1
    pairs: int | None = None
    layout: str = "half"
    magnitude: float = 1.0
    mask: str = ""
    sinks: bool = False
    softcap: float | None = None
    dtype: Any = mx.float32
    first: int = 0
    norm: float = 1.0
    seed: int = 0
    launch: Launch = field(default_factory=lambda: Launch(warps=2, groups=8))


def filled(case: Case) -> KVQCache:
    """A cache of `case.tokens` tokens from position `case.first` on, most of them packed, the newest appended."""
    mx.random.seed(case.seed)
    (Dk, Dv), (_, Hkv), B = case.dims, case.heads, case.batch
    rotary = rotary_of(Dk, case.pairs, case.layout, case.magnitude) if case.pairs != 0 else no_rotation()
    cache = KVQCache(parse_scheme(case.scheme).layer_spec(), rotary)
    cache.offset = case.first

    def tokens(count: int) -> tuple[mx.array, mx.array]:
        keys = mx.random.normal((B, Hkv, count, Dk)) + 1.5 * mean
        keys = turn(rotary, keys, cache.offset, count) * case.norm
        return keys.astype(case.dtype), mx.random.normal((B, Hkv, count, Dv)).astype(case.dtype)

    mean = mx.random.normal((B, Hkv, 1, Dk))
    past = case.tokens - case.queries
    cache.update_and_fetch(*tokens(past))
    cache.observe_queries(mx.random.normal((B, case.heads[0], past, Dk)))
    cache.settle()
    cache.update_and_fetch(*tokens(case.queries))
    return cache


def arguments(case: Case, cache: KVQCache) -> AttendArgs:
    (Dk, _), (Hq, _), B, L = case.dims, case.heads, case.batch, case.queries
    queries = mx.random.normal((B, Hq, L, Dk)).astype(case.dtype)
    mask: Any = None
    if case.mask == "causal":
        mask = "causal"
    elif case.mask:
        shape = {"row": (cache.held,), "queries": (L, cache.held), "batch": (B, 1, L, cache.held)}
        shape["heads"] = (B, Hq, L, cache.held)
        kind, where = case.mask.split("-")
        mask = mx.random.uniform(shape=shape[where]) < 0.7
        if kind == "add":
            mask = mx.where(mask, mx.random.normal(mask.shape), -1e9)
    return AttendArgs(
        queries=queries,
        cache=cache,
        scale=Dk**-0.5 / case.norm,
        mask=mask,
        sinks=mx.random.normal((Hq,)).astype(case.dtype) if case.sinks else None,
        key_dtype=case.dtype,
        value_dtype=case.dtype,
        softcap=case.softcap,
    )


def run(args: AttendArgs, launch: Launch, on: str) -> mx.array:
    """The fused kernels on a backend."""
    caches, call, mask, codecs = prepared_call([args.cache], 0, args, args.mask)
    plan = FusedPlan(call, *codecs, launch, on)
    return plan(caches, mx.contiguous(args.queries), mask, args.sinks)


def decoded(codec: Codec, planes: Any, dim: int, statistics: Any, byte_levels: bool) -> mx.array:
    """Tokens of a codec's planes; with `byte_levels` at the levels that products of bytes have."""
    if not byte_levels:
        return codec.decode(planes, dim, mx.float32, statistics)
    integers, unit = levels_of_bytes(codec.book)
    levels = mx.array(np.array(integers, np.float32) * unit)
    return unrotate(levels[codec.codes(planes, dim)] * planes["scale"].astype(mx.float32), codec.seed)


def in_float64(args: AttendArgs, byte_levels: bool = False) -> Any:
    """Attention on the decoded tokens in float64: `(B, Hq, L, Dv)`."""
    cache = args.cache
    dense_keys, dense_values = (np.array(x.astype(mx.float32), np.float64) for x in cache.dense_tokens())
    key_planes, value_planes = cache.packed_planes()
    keys = decoded(cache.key_codec, key_planes, dense_keys.shape[-1], cache.key_statistics, byte_levels)
    if cache.frame is not None:
        keys = cache.frame.decode(keys, cache.packed_position)
    values = decoded(cache.value_codec, value_planes, dense_values.shape[-1], cache.value_statistics, byte_levels)
    if cache.value_scale is not None:
        values = values * cache.value_scale
    sinks = cache.sink_tokens
    k, v = (
        np.concatenate([dense[:, :, :sinks], np.array(past, np.float64), dense[:, :, sinks:]], axis=2)
        for dense, past in ((dense_keys, keys), (dense_values, values))
    )
    q = np.array(args.queries.astype(mx.float32), np.float64)
    B, Hq, L, _ = q.shape
    rep = Hq // k.shape[1]
    k, v = np.repeat(k, rep, axis=1), np.repeat(v, rep, axis=1)
    scores = q @ k.swapaxes(-1, -2) * args.scale
    if args.softcap is not None:
        scores = np.tanh(scores / args.softcap) * args.softcap
    total = scores.shape[-1]
    if isinstance(args.mask, str):
        scores = np.where(np.arange(total - L, total)[:, None] >= np.arange(total), scores, -np.inf)
    elif args.mask is not None:
        mask = np.array(args.mask)
        scores = np.where(mask, scores, -1e30) if mask.dtype == bool else scores + mask
    if args.sinks is not None:
        logits = np.array(args.sinks.astype(mx.float32), np.float64)[None, :, None, None]
        scores = np.concatenate([np.broadcast_to(logits, (B, Hq, L, 1)), scores], axis=-1)
        v = np.concatenate([np.zeros_like(v[:, :, :1]), v], axis=2)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def relative_error(got: Any, expected: Any) -> float:
    got = np.array(got.astype(mx.float32), np.float64) if isinstance(got, mx.array) else got
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    return float(error) if np.all(np.isfinite(got)) else float("inf")
