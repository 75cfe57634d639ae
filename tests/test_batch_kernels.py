"""Batches whose rows decode in one launch, on the kernel harness of the CPU: rows apart, rows with pending tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import fused_cases as cases
import kernel_cpu
import mlx.core as mx
import pytest

import mlx_kvq_plugin.batch as batch_module
import mlx_kvq_plugin.kernels.attend as attend_module
import mlx_kvq_plugin.kernels.dispatch as dispatch
from mlx_kvq_plugin.attention import AttendArgs, attend
from mlx_kvq_plugin.batch import BatchKVQCache
from mlx_kvq_plugin.cache import STEP_TOKENS, KVQCache
from mlx_kvq_plugin.kernels import build

pytestmark = pytest.mark.skipif(kernel_cpu.why_not() != "", reason=kernel_cpu.why_not() or "harness")

PENDING = 8  # as caches pack here: `cache.BLOCK`
DIM, HEADS = 64, (4, 2)
LENGTHS = (150, 333, 96)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Dispatch as on a CUDA device, with kernels that run on the CPU; gives the names of the kernels that ran."""
    ran: list[str] = []
    kernel_cpu.register_backends()

    def maker(**options: Any) -> Any:
        kernel = build._custom["cpu"][0](**options)

        def run(**call: Any) -> list[mx.array]:
            ran.append(options["name"].split("_")[1])
            return kernel(**call)

        return run

    monkeypatch.setitem(build._custom, build.CUDA, (maker, "cpu"))
    for module in (dispatch, attend_module):
        monkeypatch.setattr(module, "backend", lambda: build.CUDA)
    monkeypatch.setattr(dispatch, "_plan", dispatch._plan.__wrapped__)
    monkeypatch.setattr(batch_module, "PENDING", PENDING)
    mx.disable_compile()
    yield ran
    mx.enable_compile()


def caches() -> list[KVQCache]:
    found = [cases.filled(cases.Case("tq6", tokens, (DIM, DIM), HEADS, seed=i)) for i, tokens in enumerate(LENGTHS)]
    for cache in found:
        cache.compact()
    return found


def step(cache: Any, keys: mx.array, values: mx.array, queries: mx.array, mask: Any) -> mx.array:
    keys, _ = cache.update_and_fetch(keys, values)
    return attend(AttendArgs(queries, keys.cache, DIM**-0.5, mask, None, mx.float32, mx.float32))


def test_rows_of_a_batch_decode_in_one_launch_and_pack_as_alone(on_cuda: list[str]) -> None:
    alone = caches()
    batch = KVQCache.merge(alone)
    for i in range(2 * PENDING + 3):
        keys, values = (mx.random.normal((3, HEADS[1], 1, DIM)) for _ in range(2))
        queries = mx.random.normal((3, HEADS[0], 1, DIM))
        mask = batch.make_mask(1)
        on_cuda.clear()
        got = step(batch, keys, values, queries, mask)
        assert on_cuda == ["attend"]
        assert batch.pending == i % PENDING + 1
        for row, cache in enumerate(alone):
            own = slice(row, row + 1)
            expected = step(cache, keys[own], values[own], queries[own], None)
            error = mx.linalg.norm(got[own] - expected) / mx.linalg.norm(expected)
            assert error < 0.02  # rows pack some tokens later than alone: 6 bits
    assert batch.held == sum(cache.held for cache in alone)
    for row, cache in zip(batch.rows, alone, strict=True):
        assert row.offset == cache.offset and row.packed_tokens == cache.packed_tokens
        for name, plane in cache.live_planes()[0].items():
            assert mx.array_equal(row.live_planes()[0][name], plane)
        assert mx.array_equal(row.dense_tokens()[1], cache.dense_tokens()[1])


def test_many_pending_tokens_pack_as_single_steps(on_cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # More than a decode step has: still no prefill chunk, which would pack other tokens and leave no room.
    pending = STEP_TOKENS + 8
    monkeypatch.setattr(batch_module, "PENDING", pending)
    alone = caches()
    batch = KVQCache.merge(alone)
    for _ in range(2 * pending + 1):
        keys, values = (mx.random.normal((3, HEADS[1], 1, DIM)) for _ in range(2))
        batch.update_and_fetch(keys, values)
        for row, cache in enumerate(alone):
            cache.update_and_fetch(keys[row : row + 1], values[row : row + 1])
            cache.settle()
    assert batch.pending == 1
    for row, cache in zip(batch.rows, alone, strict=True):
        assert row.packed_tokens == cache.packed_tokens and row.held == cache.held


def test_a_missing_pending_token_would_be_noticed(on_cuda: list[str]) -> None:
    batch = KVQCache.merge(caches())
    for _ in range(3):
        keys, values = (mx.random.normal((3, HEADS[1], 1, DIM)) for _ in range(2))
        step(batch, keys, values, mx.random.normal((3, HEADS[0], 1, DIM)), batch.make_mask(1))
    queries = mx.random.normal((3, HEADS[0], 1, DIM))
    keys, values = 4 * queries[:, ::2], mx.random.normal((3, HEADS[1], 1, DIM))
    fewer = copy.deepcopy(batch)
    whole = step(batch, keys, values, queries, batch.make_mask(1))
    step(fewer, keys, values, queries, fewer.make_mask(1))
    fewer.pending -= 1
    fewer_args = AttendArgs(queries, fewer, DIM**-0.5, None, None, mx.float32, mx.float32)  # type: ignore[arg-type]
    missing = dispatch.pending_rows(fewer, fewer_args)
    assert mx.linalg.norm(whole - missing) / mx.linalg.norm(whole) > 0.1


def test_bytes_states_and_changes_of_a_batch_include_pending_tokens(on_cuda: list[str]) -> None:
    batch = KVQCache.merge(caches())
    before = batch.nbytes
    keys, values = (mx.random.normal((3, HEADS[1], 1, DIM)) for _ in range(2))
    step(batch, keys, values, mx.random.normal((3, HEADS[0], 1, DIM)), batch.make_mask(1))
    assert batch.pending == 1
    assert batch.nbytes - before >= 2 * 3 * HEADS[1] * PENDING * DIM * 4
    assert batch.extract(1).offset == LENGTHS[1] + 1
    assert batch.pending == 0
    step(batch, keys, values, mx.random.normal((3, HEADS[0], 1, DIM)), batch.make_mask(1))
    batch.filter([2, 0])
    assert [row.offset for row in batch.rows] == [LENGTHS[2] + 2, LENGTHS[0] + 2]
    two = keys[:2]
    step(batch, two, two, mx.random.normal((2, HEADS[0], 1, DIM)), batch.make_mask(1))
    assert BatchKVQCache.from_state(batch.state).rows[0].offset == LENGTHS[2] + 3
    assert batch.trim(2) == 2
    assert [row.offset for row in batch.rows] == [LENGTHS[2] + 1, LENGTHS[0] + 1]


def test_rows_with_masks_of_their_own_are_up_to_date(on_cuda: list[str]) -> None:
    batch = KVQCache.merge(caches())
    keys, values = (mx.random.normal((3, HEADS[1], 1, DIM)) for _ in range(2))
    mask = batch.make_mask(1) & mx.array(True)  # another array: it may say anything
    step(batch, keys, values, mx.random.normal((3, HEADS[0], 1, DIM)), mask)
    assert batch.pending == 0
    assert [row.offset for row in batch.own_rows] == [tokens + 1 for tokens in LENGTHS]


def test_batches_of_too_many_rows_and_of_windows_do_not_wait(on_cuda: list[str]) -> None:
    rows = caches()
    assert dispatch.why_not_pending(rows) == ""
    assert "more than" in dispatch.why_not_pending(rows * 6)
    rows[1].shared = True
    assert "shared layers" in dispatch.why_not_pending(rows)
