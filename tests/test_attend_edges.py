"""Fused decode attention by kernels where it might go wrong: what matters, what must not, and numbers of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import kernel_cpu
import mlx.core as mx
import numpy as np
import pytest
from attend_cases import (
    LIMITS,
    MASKED,
    ROUNDED,
    Config,
    Contents,
    as_float64,
    call_on,
    case_of,
    check,
    compare,
    compare_with_twin,
    contents,
    errors,
    errors_of_rows,
    exactly,
    fused,
    rounds,
    twin,
)
from token_cases import BACKENDS, PRELUDES, Kind, Shape, cache_of

from mlx_kvq_plugin.attention import AttendArgs, attend
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.kernels.build import backend
from mlx_kvq_plugin.kernels.codes import CodeField, code_layout
from mlx_kvq_plugin.rotary import turn
from mlx_kvq_plugin.schemes import parse_scheme
from mlx_kvq_plugin.sliding import SlidingKVQCache

if not backend() and kernel_cpu.why_not():
    pytest.skip(kernel_cpu.why_not(), allow_module_level=True)
kernel_cpu.register_backends()

CONFIGS = [
    Config(Kind("tq4", (128, 128), dtype=mx.bfloat16), heads=2, repeat=4),
    Config(Kind("k=tq3,v=rvq1", (64, 128), pairs=13, layout="interleaved"), 1, 6, 3, "causal", sinks=True, warps=3),
    Config(Kind("k=rvq2,v=tq6", (256, 64), framed=False, dtype=mx.float16), 1, 3, 4, "bool-bq", softcap=5.0, warps=4),
]
PLAIN = Config(Kind("k=tq3,v=tq4", (64, 64)), heads=1, repeat=2, queries=2, mask="causal")
EVERYWHERE = BACKENDS if backend() else [*BACKENDS, *PRELUDES]

Planes = dict[str, mx.array]


def one_code(planes: Planes, codec: Any, dim: int, token: int) -> Planes:
    """The planes with one code of a token, the lowest of them, changed to the complement in its widest field."""
    layout = code_layout(codec, dim)
    wide: CodeField = layout.fields[0]
    name = layout.planes[wide.plane]
    rows = np.array(planes[name])
    slot, byte = divmod(int(np.array(codec.codes(planes, dim))[0, 0, token].argmin()), layout.run)
    rows[0, 0, token, wide.start + byte] ^= ((1 << wide.width) - 1) << (slot * wide.width)
    return {**planes, name: mx.array(rows)}


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("config", [*CONFIGS, PLAIN], ids=str)
def test_one_code_matters(config: Config, on: str) -> None:
    for token in range(3):
        held = Contents(Shape(2, config.heads, 3, config.queries, 0, 3, 0, 10, 1.0, token), 0)
        args = replace(case_of(config, held), mask="causal")
        args, cache = replace(args, queries=args.queries * 2), args.cache
        for planes in (cache.key_planes, cache.value_planes):
            planes["scale"] = mx.ones_like(planes["scale"])  # no token is too small to see, and no channel
        cache.value_scale = None if cache.value_scale is None else mx.ones_like(cache.value_scale)
        expected = exactly(args, on)
        compare(config, fused(config, args, on), expected)
        keys, values, row = cache.key_planes, cache.value_planes, cache._packed_start + token
        cache.key_planes = one_code(keys, cache.key_codec, config.kind.dims[0], row)
        with pytest.raises(AssertionError, match="errors"):
            compare(config, fused(config, args, on), expected)
        compare(config, fused(config, args, on), exactly(args, on))
        cache.key_planes = keys
        cache.value_planes = one_code(values, cache.value_codec, config.kind.dims[1], row)
        with pytest.raises(AssertionError, match="errors"):
            compare(config, fused(config, args, on), expected)
        compare(config, fused(config, args, on), exactly(args, on))


@pytest.mark.parametrize("on", BACKENDS)
def test_a_key_larger_by_a_hundredth_matters(on: str) -> None:
    for held in contents(PLAIN, 6):
        args = case_of(PLAIN, held)
        expected = exactly(args, on)
        assert args.cache.frame is not None
        args.cache.key_planes = {**args.cache.key_planes, "scale": args.cache.key_planes["scale"] * 1.02}
        args.cache.frame.mean = args.cache.frame.mean * 1.02
        if held.shape.packed > 8:
            with pytest.raises(AssertionError):
                compare(PLAIN, fused(PLAIN, args, on), expected)


def spoiled(cache: KVQCache) -> None:
    """NaN and ones in all rows that hold no token."""
    first, last = cache._packed_start, cache._packed_start + cache.packed_tokens
    for planes in (cache.key_planes, cache.value_planes):
        for name, plane in planes.items():
            worst = mx.full(plane.shape, 255 if plane.dtype == mx.uint8 else mx.nan, plane.dtype)
            row = mx.arange(plane.shape[2])[:, None]
            planes[name] = mx.contiguous(mx.where((row >= first) & (row < last), plane, worst))
    assert cache.dense_keys is not None and cache.dense_values is not None
    live = mx.arange(cache.dense_keys.shape[2])[:, None] < cache._dense
    cache.dense_keys = mx.where(live, cache.dense_keys, mx.array(mx.nan, cache.dense_keys.dtype))
    cache.dense_values = mx.where(live, cache.dense_values, mx.array(mx.nan, cache.dense_values.dtype))


@pytest.mark.parametrize("on", EVERYWHERE)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_queries_may_have_any_strides(config: Config, on: str) -> None:
    args = case_of(config, Contents(Shape(2, config.heads, 70, config.queries + 5, 4, 9, 30, 20, 1.0, 3), 2))
    expected = fused(config, args, on)
    tokens_first = mx.contiguous(args.queries.swapaxes(1, 2)).swapaxes(1, 2)
    wide = mx.repeat(args.queries, 2, axis=-1)[..., ::2]
    part = mx.concatenate([args.queries, args.queries * mx.nan], axis=1)[:, : args.queries.shape[1]]
    for queries in (tokens_first, wide, part):
        mx.eval(queries)
        assert mx.array_equal(fused(config, replace(args, queries=queries), on), expected)


@pytest.mark.parametrize("on", EVERYWHERE)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_rows_without_a_token_do_not_matter(config: Config, on: str) -> None:
    for packed, slack in ((1, 63), (63, 1), (64, 64), (70, 58), (129, 100)):
        shape = Shape(2, config.heads, packed, config.queries + 5, 4, 9, slack, 20, 1.0, packed)
        args = case_of(config, Contents(shape, 2))
        args.cache.reserve_tiles()
        clean = fused(config, args, on)
        spoiled(args.cache)
        assert mx.array_equal(fused(config, args, on), clean)


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "hidden"), [("bool-bq", False), ("add-bq", MASKED), ("add-bq", float(mx.finfo(mx.float32).min))]
)
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_of_which_all_tokens_are_masked(kind: str, hidden: Any, sinks: bool, on: str) -> None:
    # Without attention sinks they average all tokens, as plain operations do; with sinks they are zeros.
    config = Config(Kind("k=tq3,v=tq4", (64, 64)), 2, 2, 3, kind, sinks)
    for packed in (5, 64, 100, 200):
        args = case_of(config, Contents(Shape(2, 2, packed, 9, 2, 0, 20, 0, 1.0, packed), 2))
        rows = mx.array([[True, False, False], [True, False, True]])[:, None, :, None]
        args = replace(args, mask=mx.where(rows, mx.array(hidden), args.mask))
        got, plain = as_float64(fused(config, args, on)), as_float64(twin(args))
        lost, limit = np.linalg.norm(got - plain, axis=-1), (ROUNDED if rounds(args, on) else LIMITS[mx.float32])[1]
        assert np.all(lost <= limit * np.maximum(np.linalg.norm(plain, axis=-1), 1e-3))
        if sinks:
            assert np.abs(got[:, :, 0]).max() <= 1e-6
        else:
            _, values = (as_float64(x) for x in args.cache.decode_all())
            mean = np.repeat(values.mean(axis=2), 2, axis=1)
            assert errors(got[:, :, 0], mean)[1] <= limit


@pytest.mark.parametrize("on", BACKENDS)
def test_a_mask_that_shows_one_token(on: str) -> None:
    # Each token in turn, packed or dense: the output is its value.
    config = Config(Kind("k=tq3,v=tq4", (64, 64)), 2, 2, 3, "bool-bq")
    args = case_of(config, Contents(Shape(2, 2, 68, 9, 2, 3, 0, 0, 1.0, 0), 2))
    _, values = (as_float64(x) for x in args.cache.decode_all())
    tokens = args.cache.held
    for token in (0, 1, 2, 3, 17, 18, 33, 34, 64, 65, 66, 68, 69, 70, tokens - 2, tokens - 1):
        chosen = [[token, (token + 1) % tokens, 0], [(token + 5) % tokens, token, tokens - 1]]
        mask = mx.array(chosen)[:, None, :, None] == mx.arange(tokens)
        expected = np.stack([np.repeat(values[b][:, chosen[b]], 2, axis=0) for b in range(2)])
        compare(config, fused(config, replace(args, mask=mask), on), expected)


@pytest.mark.parametrize("norm", [1e-15, 1e-6, 280.0, 1e15])
@pytest.mark.parametrize("on", BACKENDS)
def test_keys_and_values_of_any_size(norm: float, on: str) -> None:
    for config in (PLAIN, replace(PLAIN, kind=replace(PLAIN.kind, dtype=mx.bfloat16), sinks=True)):
        for packed in (10, 150):
            check(config, Contents(Shape(1, 1, packed, 12, 0, 0, 0, 40, norm, packed), 4), on)


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("order", ["rising", "falling", "zeros first", "zeros", "a large one"])
def test_values_of_different_sizes(order: str, on: str) -> None:
    # Sums are kept relative to the largest value so far, of the tiles that one warp goes through.
    sizes: dict[str, Callable[[Any], Any]] = {
        "rising": lambda i: 10.0 ** (i / 100 - 3),
        "falling": lambda i: 10.0 ** (-i / 100),
        "zeros first": lambda i: 1.0 * (i >= 130),
        "zeros": lambda i: 0.0 * i,
        "a large one": lambda i: np.where(i == 140, 300.0, 1.0),
    }
    for groups in (1, 8):
        args = case_of(PLAIN, Contents(Shape(1, 1, 300, 2, 0, 0, 0, 0, 1.0, 3), 0))
        factors = mx.array(sizes[order](np.arange(300)).astype(np.float32))[:, None]
        planes = args.cache.value_planes
        args.cache.value_planes = {**planes, "scale": (planes["scale"] * factors).astype(mx.bfloat16)}
        compare(PLAIN, fused(PLAIN, args, on, groups), exactly(args, on))


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_scores_far_apart(size: float, on: str) -> None:
    # One token takes nearly all weight, of tiles in any order; the others must not become NaN.
    for seed in range(6):
        held = Contents(Shape(1, 1, 200, 12, 0, 0, 0, 0, 1.0, seed), 4)
        args = case_of(PLAIN, held)
        args = replace(args, queries=args.queries * size)
        got = as_float64(fused(PLAIN, args, on, 1))
        assert np.all(np.isfinite(got))
        expected, settled = exactly(args, on), np.array(True)
        for _ in range(3):  # rows that rounded queries change are left out
            noise = 1 + 2e-3 * mx.random.normal(args.queries.shape)
            shaken = exactly(replace(args, queries=args.queries * noise), on)
            settled = settled & (errors_of_rows(shaken, expected) <= 1e-3)
        assert settled.any()
        assert errors(got[settled], expected[settled])[1] <= LIMITS[mx.float32][1]


@pytest.mark.parametrize("on", BACKENDS)
def test_queries_and_keys_of_zeros(on: str) -> None:
    for config in CONFIGS:
        args = case_of(config, Contents(Shape(2, config.heads, 70, 12, 0, 0, 0, 0, 1.0, 0), 4))
        still = replace(args, queries=args.queries * 0)
        compare(config, fused(config, still, on), exactly(still, on))
        args.cache.key_planes = {**args.cache.key_planes, "scale": args.cache.key_planes["scale"] * 0}
        compare(config, fused(config, args, on), exactly(args, on))


@pytest.mark.parametrize("on", BACKENDS)
def test_rows_of_a_batch_compute_what_they_compute_alone(on: str) -> None:
    config = CONFIGS[0]
    shapes = [
        Shape(1, 2, packed, 9 + 3 * seed, seed, 7 * seed, slack, position, 1.0, seed)
        for seed, (packed, slack, position) in enumerate(
            ((1, 0, 0), (64, 0, 63), (130, 70, 5), (63, 1, 100_000), (260, 9, 64))
        )
    ]
    rows = [cache_of(config.kind, shape) for shape in shapes]
    args = call_on(config, rows[0], batch=len(rows))
    together = fused(config, args, on, rows=rows)
    assert together.shape == args.queries.shape
    for i, row in enumerate(rows):
        alone = replace(args, queries=args.queries[i : i + 1], cache=row)
        compare(config, together[i : i + 1], exactly(alone, on))
        assert errors(together[i : i + 1], as_float64(fused(config, alone, on)))[1] <= LIMITS[mx.bfloat16][1]


def tokens_after(config: Config, cache: KVQCache, count: int) -> tuple[mx.array, mx.array]:
    (Dk, Dv), H = config.kind.dims, config.heads
    keys = turn(config.kind.rotary, mx.random.normal((2, H, count, Dk)) + 0.7, cache.offset, count)
    return keys.astype(config.kind.dtype), mx.random.normal((2, H, count, Dv)).astype(config.kind.dtype)


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("window", [0, 160])
def test_histories_of_caches(window: int, on: str) -> None:
    # As a model runs: a prompt, then single tokens and steps of two; windows slide over many packed rows.
    mx.random.seed(1)
    single = Config(Kind("k=tq4,v=tq3", (64, 64)), heads=1, repeat=2)
    pair = replace(single, queries=2, mask="causal")
    spec = parse_scheme(single.kind.scheme).layer_spec()
    cache = SlidingKVQCache(spec, window, single.kind.rotary) if window else KVQCache(spec, single.kind.rotary)
    cache.update_and_fetch(*tokens_after(single, cache, 150))
    cache.observe_queries(mx.random.normal((2, 2, 150, 64)))
    cache.settle()
    starts = set()
    for step in range(60):
        config = pair if step % 7 == 6 else single
        cache.update_and_fetch(*tokens_after(config, cache, config.queries))
        starts.add(cache._packed_start)
        if step % 3 == 0 or config is pair:
            args = call_on(config, cache)
            got = fused(config, args, on)
            compare(config, got, exactly(args, on))
            compare_with_twin(config, got, args, on)
        cache.settle()
    assert cache.packed_tokens > 0
    assert (len(starts) > 1) == bool(window)


@pytest.mark.skipif(not backend(), reason="the kernels serve models on a GPU")
def test_attention_takes_the_kernels() -> None:
    for config in CONFIGS:
        for held in contents(config, 3):
            args: AttendArgs = case_of(config, held)
            expected = exactly(args, backend())
            compare(config, attend(args), expected)
            assert args.cache.plans or isinstance(args.mask, mx.array)
