"""Bytes of every scheme at 4096 tokens: what is planned, what the cache says, and what MLX allocates."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
import tiny_models
from watched_caches import arrays_of

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.layouts import CHUNK
from mlx_kvq_plugin.planning import plan_caches

DIMS = (64, 128)
TOKENS, STEPS, WINDOW = 4096, 40, 1024
CLOSE = 0.03


def cases() -> list[tuple[int, str]]:
    """Every scheme that a head size allows, and some with modifiers."""
    named = [(dim, row.name) for dim in DIMS for row in kvq.list_schemes(dim) if row.bits is not None]
    return [*named, (64, "tq2,sinks=0,recent=0"), (64, "kivi2,recent=128"), (128, "tq3.5,frame=off")]


@cache
def model_of(dim: int) -> Any:
    """One full and one sliding layer."""
    return tiny_models.llama(
        num_hidden_layers=2,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=WINDOW,
        head_dim=dim,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


@pytest.fixture(scope="module")
def tokens() -> dict[int, list[mx.array]]:
    """Queries, keys and values by head size; what lives as long as the process (tables, codebooks) is made, too."""
    found = {dim: [mx.random.normal((1, heads, TOKENS, dim)).astype(mx.float16) for heads in (2, 1, 1)] for dim in DIMS}
    mx.eval(found)
    for dim in DIMS:
        with kvq.compress(model_of(dim), "tq4") as compression:
            fed(compression.maker()[0], found[dim])
    gc.collect()  # of other tests: here nothing is left to collect
    return found


@pytest.fixture(autouse=True)
def _buffers_as_asked_for() -> Iterator[None]:
    """MLX's pool may hand out larger buffers than were asked for."""
    limit = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(limit)


def active() -> int:
    mx.synchronize()
    mx.clear_cache()
    return int(mx.get_active_memory())


def fed(cache: Any, tokens: list[mx.array]) -> Any:
    """The cache after a prompt in chunks and some single tokens, as mlx-lm feeds it."""
    prompt = TOKENS - STEPS
    start = 0
    for size in [*(min(CHUNK, prompt - first) for first in range(0, prompt, CHUNK)), *[1] * STEPS]:
        q, k, v = (x[:, :, start : start + size] for x in tokens)
        cache.update_and_fetch(k, v)
        if isinstance(cache, KVQCache):
            cache.observe_queries(q)
            cache.settle()
        mx.eval(cache.state)
        start += size
    return cache


def by_codes(cache: Any, dim: int) -> float:
    """Bytes by the codecs' planes, the dense tokens with room for one block, and the statistics: no slack of planes."""
    spec, framed = cache.spec, cache.uses_frame
    keys, values = cache.key_codec, cache.value_codec
    planes = [*keys.planes(dim, "float32" if framed else "float16"), *values.planes(dim, "float16")]
    dense = spec.sinks + spec.recent + cache.block
    statistics = keys.statistics_nbytes(dim) + values.statistics_nbytes(dim) + framed * 10 * dim
    return cache.packed_tokens * sum(plane.nbytes for plane in planes) + dense * 4 * dim + statistics


@pytest.mark.parametrize(("dim", "scheme"), cases())
def test_bytes_are_those_planned_and_allocated(dim: int, scheme: str, tokens: dict[int, list[mx.array]]) -> None:
    with kvq.compress(model_of(dim), scheme) as compression:
        plan = plan_caches(compression.maker)
        before = active()
        caches = [fed(layer, tokens[dim]) for layer in compression.maker()]
        allocated = active() - before
    planned = plan.nbytes(TOKENS, steps=STEPS)
    assert planned == sum(layer.nbytes for layer in caches) == sum(x.nbytes for c in caches for x in arrays_of(c))
    assert allocated == pytest.approx(planned, rel=CLOSE)
    for layer in caches:
        if isinstance(layer, KVQCache):
            assert layer.offset == TOKENS and layer.packed_tokens > 0
            assert layer.nbytes == pytest.approx(by_codes(layer, dim), rel=CLOSE)
