"""Planes with slack rows, as kernels need them: states are views without copies, restored planes are contiguous."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.config import LayerSpec
from mlx_kvq_plugin.growth import GPU_STEP, GPU_STEP_PER, TILE, Growth
from mlx_kvq_plugin.sliding import SlidingKVQCache


def prefilled(cache: KVQCache, tokens: int, chunk: int = 256) -> KVQCache:
    cache.growth = Growth(kernels=True)
    for start in range(0, tokens, chunk):
        shape = (1, 4, min(chunk, tokens - start), 64)
        cache.update_and_fetch(mx.random.normal(shape), mx.random.normal(shape))
        cache.settle()
    mx.eval(cache.key_planes, cache.value_planes, cache.dense_keys, cache.dense_values)
    return cache


def test_planes_of_kernels_hold_whole_tiles_and_grow_in_steps() -> None:
    cache = prefilled(KVQCache(LayerSpec("tq4", "tq4", frame=False)), 1000)
    assert cache.packed_tokens % TILE != 0
    assert cache.plane_rows == -(-cache.packed_tokens // TILE) * TILE
    for _ in range(100):
        cache.update_and_fetch(mx.zeros((1, 4, 1, 64)), mx.zeros((1, 4, 1, 64)))
        cache.settle()
    assert cache.plane_rows % GPU_STEP == 0
    assert cache.plane_rows >= cache.packed_tokens


def test_steps_of_growth_are_a_small_part_of_long_caches() -> None:
    growth = Growth(kernels=True)
    for tokens in (1, 256, 257, 16_383, 16_385, 131_073, 1_000_001):
        step = GPU_STEP * (1 + tokens // GPU_STEP_PER)
        capacity = growth.capacity(tokens)
        assert tokens <= capacity < tokens + step and capacity % step == 0
        assert step - GPU_STEP <= tokens / 64  # and no copy for at least a 128th more tokens
        assert growth.capacity(capacity) == capacity or tokens // GPU_STEP_PER != capacity // GPU_STEP_PER
        assert step >= tokens / 128
        assert growth.capacity(tokens, step=False) - tokens < TILE


def test_reading_a_state_copies_no_planes() -> None:
    cache = prefilled(KVQCache(LayerSpec("tq4", "tq4", frame=False)), 1000)
    planes = sum(x.nbytes for side in (cache.key_planes, cache.value_planes) for x in side.values())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(cache.state)
    assert mx.get_peak_memory() - before < planes / 4


@pytest.mark.parametrize("window", [None, 400])
def test_restored_planes_are_contiguous_and_equal(window: int | None) -> None:
    spec = LayerSpec("tq4", "rvq1", frame=False)
    cache = prefilled(KVQCache(spec) if window is None else SlidingKVQCache(spec, window), 1000)
    for _ in range(700):  # a window that has moved up to the last row: its planes are slices without slack
        if window is None or (cache._packed_start and cache.plane_rows == cache._packed_start + cache.packed_tokens):
            break
        cache.update_and_fetch(mx.ones((1, 4, 1, 64)), mx.ones((1, 4, 1, 64)))
        cache.settle()
    assert (cache._packed_start > 0) == (window is not None)
    restored = type(cache).from_state(cache.state)
    for own, other in ((cache.key_planes, restored.key_planes), (cache.value_planes, restored.value_planes)):
        for name, plane in other.items():
            mx.eval(plane)
            rows = slice(cache._packed_start, cache._packed_start + cache.packed_tokens)
            assert mx.array_equal(plane[..., : cache.packed_tokens, :], own[name][..., rows, :])
            if plane.dtype == mx.uint8:
                assert np.array(plane, copy=False).flags.c_contiguous
