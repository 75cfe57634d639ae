"""Calls of the fused decode attention: configurations, each compiled once, and the shapes that one of them serves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from fused_cases import in_float64
from token_cases import Kind, Shape, cache_of

from mlx_kvq_plugin.attention import AttendArgs, attend_packed
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.codecs import Codec
from mlx_kvq_plugin.kernels.attend import Call, FusedPlan, by_bytes
from mlx_kvq_plugin.kernels.codes import code_layout
from mlx_kvq_plugin.kernels.dispatch import prepared_call
from mlx_kvq_plugin.kernels.launch import Launch
from mlx_kvq_plugin.rotary import Rotary

# Relative errors of the whole output, and of a row of it, by dtype of queries.
LIMITS = {mx.float32: (4e-3, 1.2e-2), mx.float16: (4e-3, 1.2e-2), mx.bfloat16: (5e-3, 1.3e-2)}
ROUNDED = (2e-2, 8e-2)  # of what levels of bytes differ from those of codebooks
MASKED = -1e9  # what mlx-lm's models add to a masked score


@dataclass(frozen=True)
class Config:
    """What one pair of compiled kernels serves.

    Attributes:
        kind: codecs, head sizes, rotary and dtype of dense tokens.
        heads, repeat: KV heads, and query heads of each.
        queries: new tokens, L.
        mask: empty, `causal`, or a dtype and the axes along which an array mask varies besides its columns, of
            batches, heads and queries: `bool-bhq`, `add-q`, `bool-`.
        dtype: of queries; `None` for that of dense tokens.
    """

    kind: Kind
    heads: int = 1
    repeat: int = 1
    queries: int = 1
    mask: str = ""
    sinks: bool = False
    softcap: float | None = None
    dtype: Any = None
    warps: int = 2

    def __str__(self) -> str:
        words = [str(self.kind), f"{self.heads}x{self.repeat}x{self.queries}", self.mask]
        words += ["sinks" if self.sinks else "", "capped" if self.softcap else ""]
        return "-".join(word for word in words if word).replace("--", "-")

    @property
    def query_dtype(self) -> Any:
        return self.dtype or self.kind.dtype


@dataclass(frozen=True)
class Contents:
    """What varies without a new kernel: `shape` without its heads, the dense tokens that are sinks, launch groups."""

    shape: Shape
    sinks: int = 0
    groups: int = 8


def contents(config: Config, count: int) -> Iterator[Contents]:
    """`count` contents of caches, always the same for a configuration."""
    draw = np.random.RandomState(sum(map(ord, str(config))))
    for seed in range(count):
        sinks, kept = int(draw.choice([0, 0, 1, 4])), int(draw.choice([0, draw.randint(0, 12), draw.randint(12, 60)]))
        packed = int(draw.choice([1, 63, 64, 65, draw.randint(1, 64), draw.randint(65, 140), draw.randint(140, 400)]))
        shape = Shape(
            batch=2 if "b" in mask_axes(config) else int(draw.choice([1, 1, 2, 3])),
            heads=config.heads,
            packed=packed,
            dense=sinks + config.queries + kept,
            room=int(draw.choice([0, draw.randint(1, 9)])),
            start=int(draw.choice([0, 0, draw.randint(1, 70)])),
            slack=int(draw.choice([0, draw.randint(1, 64), 64 + draw.randint(1, 64)])),
            position=int(draw.choice([0, 63, 64, draw.randint(0, 300), 100_000])),
            norm=float(draw.choice([1.0, 1.0, 280.0, 1e-3])),
            seed=seed,
        )
        yield Contents(shape, sinks, int(draw.choice([1, 3, 8, 40])))


def mask_axes(config: Config) -> str:
    """The axes of an array mask, else nothing."""
    return config.mask.partition("-")[2]


def mask_of(config: Config, batch: int, tokens: int) -> Any:
    """A mask that hides about a third of the tokens, never the newest one."""
    if "-" not in config.mask:
        return config.mask or None
    axes, Hq = mask_axes(config), config.heads * config.repeat
    sizes = {"b": batch, "h": Hq, "q": config.queries}
    shape = [sizes[axis] if axis in axes else 1 for axis in "bhq"]
    if axes in ("", "q"):  # as models make them: without the axes of batches and heads
        shape = shape[2:] if axes else []
    seen = (mx.random.uniform(shape=(*shape, tokens)) < 0.7) | (mx.arange(tokens) == tokens - 1)
    if config.mask.startswith("bool"):
        return seen
    return mx.where(seen, mx.random.normal(seen.shape), mx.where(mx.arange(tokens) % 2 == 0, MASKED, -mx.inf))


def case_of(config: Config, held: Contents) -> AttendArgs:
    """A call on a cache of these contents."""
    own = cache_of(config.kind, replace(held.shape, heads=config.heads))
    own.spec = own.spec.with_(sinks=held.sinks)
    return call_on(config, own, held.shape.norm)


def call_on(config: Config, own: KVQCache, norm: float = 1.0, batch: int = 0) -> AttendArgs:
    """A call on a cache whose keys have about this norm: most scores lie between -5 and 5, few beyond."""
    assert own.dense_keys is not None
    B, Hq, Dk = batch or own.dense_keys.shape[0], config.heads * config.repeat, config.kind.dims[0]
    queries = mx.random.normal((B, Hq, config.queries, Dk)) / (3 * norm)
    return AttendArgs(
        queries=queries.astype(config.query_dtype),
        cache=own,
        scale=Dk**-0.5,
        mask=mask_of(config, B, own.held),
        sinks=(2 * mx.random.normal((Hq,))).astype(config.query_dtype) if config.sinks else None,
        key_dtype=config.query_dtype,
        value_dtype=config.query_dtype,
        softcap=config.softcap,
    )


@cache
def _plan(call: Call, codecs: tuple[Codec, Codec, Rotary | None], launch: Launch, on: str) -> FusedPlan:
    return FusedPlan(call, *codecs, launch, on)


def fused(config: Config, args: AttendArgs, on: str, groups: int = 8, rows: Sequence[KVQCache] = ()) -> mx.array:
    """The kernels' output, of the one cache of `args` or of the rows of a batch."""
    caches, call, mask, codecs = prepared_call(rows or [args.cache], len(rows), args, args.mask)
    launch = Launch(warps=config.warps, groups=groups)
    return _plan(call, codecs, launch, on)(caches, args.queries, mask, args.sinks)


def twin(args: AttendArgs) -> mx.array:
    """Plain operations, in float32."""
    return attend_packed(replace(args, queries=args.queries.astype(mx.float32)))


def as_float64(x: Any) -> Any:
    return np.array(x.astype(mx.float32), np.float64) if isinstance(x, mx.array) else x


def errors_of_rows(got: Any, expected: Any) -> Any:
    """Relative errors `(B, Hq, L)` of the outputs of queries."""
    lost, sizes = (np.linalg.norm(x, axis=-1) for x in (got - expected, expected))
    return lost / np.maximum(sizes, 1e-30)


def errors(got: Any, expected: Any) -> tuple[float, float]:
    """Relative errors: of the output as a whole, and the largest of a row (one query of one head).

    Infinite if shapes differ or a number is none.
    """
    got, expected = as_float64(got), as_float64(expected)
    if got.shape != expected.shape or not np.all(np.isfinite(got)):
        return float("inf"), float("inf")
    whole = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)
    return float(whole), float(errors_of_rows(got, expected).max())


def compare(config: Config, got: mx.array, expected: Any) -> None:
    """Within what half precision products, and the output's own dtype, lose."""
    whole, row = errors(got, expected)
    limits = LIMITS[config.query_dtype]
    assert got.dtype == config.query_dtype
    assert whole <= limits[0] and row <= limits[1], f"errors {whole:.2e} and, of a row, {row:.2e}"


def rounds(args: AttendArgs, on: str) -> bool:
    """Whether kernels have levels of bytes."""
    cache, dims = args.cache, (args.cache.dense_keys.shape[-1], args.cache.dense_values.shape[-1])
    return by_bytes(code_layout(cache.key_codec, dims[0]), code_layout(cache.value_codec, dims[1]), on)


def exactly(args: AttendArgs, on: str) -> Any:
    """In float64, at the levels that kernels have."""
    return in_float64(args, rounds(args, on))


def compare_with_twin(config: Config, got: mx.array, args: AttendArgs, on: str) -> None:
    """With plain operations, whose levels are those of codebooks."""
    if rounds(args, on):
        whole, row = errors(got, twin(args))
        assert whole <= ROUNDED[0] and row <= ROUNDED[1], f"levels of bytes: {whole:.2e} and, of a row, {row:.2e}"
    else:
        compare(config, got, as_float64(twin(args)))


def check(config: Config, held: Contents, on: str) -> None:
    """The kernels' output against float64, at the levels that they decode, and against plain operations."""
    args = case_of(config, held)
    got = fused(config, args, on, held.groups)
    compare(config, got, exactly(args, on))
    compare_with_twin(config, got, args, on)
