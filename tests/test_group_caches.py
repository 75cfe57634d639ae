"""Caches whose codecs encode groups of tokens, need statistics, differ by head, or store keys only.

Tokens and attention are watched (watched_caches.py). Windows, speculative decoding and batches are in
test_group_windows.py, random histories in test_cache_histories.py.
"""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from watched_caches import (
    GROUP,
    KIVI,
    KV_HEADS,
    ROUTED,
    SCALE,
    SCHEMES,
    SOME,
    WINDOW,
    D,
    Watched,
    arrays_of,
    cache_of,
    filled,
    restored,
    shared_rows,
    watched,
)

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.frame import MIN_TOKENS, SKIP_TOKENS
from mlx_kvq_plugin.growth import BLOCK

FITTED = ("tq2.5", "tq4o16", "tq4+tq2.5")


def go_on(one: Watched, *others: Watched) -> None:
    """The same tokens for all, in calls of all kinds: they must stay equal, bit for bit."""
    for L in (1, 5, 40, *[1] * 10, 16, 70, 1):
        qkv = one.new_tokens(L)
        outputs = [each.attend(qkv) for each in (one, *others)]
        for each, output in zip(others, outputs[1:], strict=True):
            np.testing.assert_array_equal(output, outputs[0])
            each.rng = copy.deepcopy(one.rng)
    for each in (one, *others):
        each.check()
        assert each.cache.nbytes == one.cache.nbytes
        assert each.cache.packed_tokens == one.cache.packed_tokens > 0
        for found, expected in zip(each.cache.decode_all(), one.cache.decode_all(), strict=True):
            assert mx.array_equal(found, expected)


# ---- appending ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*SCHEMES, "kivi2,frame=off", "tq2.5,frame=off", "qjl1,frame=off"])
def test_tokens_keep_their_values_however_they_come(scheme: str) -> None:
    seen = watched(scheme)
    for L in (90, 7, 17, 2, 64):
        seen.append(L)
        seen.steps(9)
        seen.check()
    assert seen.cache.packed_tokens >= seen.cache.held - 4 - 16 - max(BLOCK, seen.cache.block) + 1


@pytest.mark.parametrize("scheme", [*SOME, "qjl1", "turbo0v4"])
def test_without_sinks_and_recent_tokens(scheme: str) -> None:
    """A whole number of groups leaves no dense token at all."""
    seen = watched(scheme, sinks=0, recent=0)
    seen.append(4 * GROUP)
    assert seen.cache.packed_tokens == seen.cache.held == 4 * GROUP
    for restore in (False, True):
        seen.cache = restored(seen.cache) if restore else seen.cache
        seen.append(1)
        seen.append(33)
        seen.steps(30)
        seen.check()
    seen.trim(seen.total - 3 * GROUP)
    assert seen.cache.packed_tokens == seen.cache.held == 3 * GROUP
    seen.append(1)
    seen.check()


@pytest.mark.parametrize("scheme", KIVI)
def test_less_than_a_group_waits(scheme: str) -> None:
    seen = watched(scheme, sinks=3, recent=10)
    seen.append(3 + 10 + 4 * GROUP + 31)
    assert seen.cache.packed_tokens == 4 * GROUP
    seen.steps(1)
    assert seen.cache.packed_tokens == 5 * GROUP and seen.cache._dense == 13
    seen.steps(31)
    assert seen.cache.packed_tokens == 5 * GROUP
    seen.steps(1)
    assert seen.cache.packed_tokens == 6 * GROUP
    seen.check()


def test_nothing_is_fitted_before_there_is_a_whole_group_to_pack() -> None:
    seen = watched("kivi2", recent=60)
    seen.append(4 + 60 + 31)
    assert seen.cache.packed_tokens == 0 and seen.cache.frame is None
    seen.append(1)
    assert seen.cache.packed_tokens == GROUP and seen.cache.frame is not None


@pytest.mark.parametrize("chunk", [1, 13])
@pytest.mark.parametrize("scheme", FITTED)
def test_statistics_wait_for_enough_tokens(scheme: str, chunk: int) -> None:
    """Without the frame too: fed token by token a cache stays dense until there are enough to choose channels by."""
    seen = watched(scheme, frame=False)
    needed = MIN_TOKENS + SKIP_TOKENS
    for _ in range(-(-needed // chunk) - 1):
        seen.append(chunk)
        assert seen.cache.packed_tokens == 0 and not seen.cache.key_statistics and not seen.cache.value_statistics
    seen.append(chunk)
    seen.cache.compact()
    assert seen.cache.packed_tokens > 0
    first = [mx.array(side[:, :, SKIP_TOKENS:needed]) for side in seen.fed]
    statistics = seen.cache.key_statistics, seen.cache.value_statistics
    for found, codec, x in zip(statistics, (seen.cache.key_codec, seen.cache.value_codec), first, strict=True):
        expected = codec.fit(x)
        assert list(found) == list(expected) != []
        assert all(mx.array_equal(found[name], expected[name]) for name in expected)
    seen.steps(40)
    seen.check()
    assert (seen.cache.key_statistics, seen.cache.value_statistics) == statistics


def test_codecs_without_statistics_do_not_wait() -> None:
    for scheme, packed in (("polar4", BLOCK), ("kivi2", GROUP)):
        seen = watched(scheme, frame=False)
        seen.steps(20 + packed - 1)
        assert seen.cache.packed_tokens == 0
        seen.steps(1)
        assert seen.cache.packed_tokens == packed
        seen.check()


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("scheme", SOME)
def test_a_prompt_stays_dense_until_the_first_step(scheme: str, window: int | None) -> None:
    for first, rejected in ((1, 0), (2, 0), (16, 0), (5, 4)):
        seen = watched(scheme, window, compress_after="prefill")
        seen.append(100)
        seen.append(47)
        assert seen.cache.packed_tokens == 0
        seen.verify(first, rejected)  # attention of its first token is to a dense prompt
        seen.cache.compact()
        assert seen.cache.packed_tokens > 90
        seen.check()
        seen.verify(16, 3)
        seen.check()


# ---- trimming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trimming_is_exact_to_the_token(scheme: str) -> None:
    whole = filled(scheme)
    for cuts in ((5,), (20, 1, 1, 30), (100, 32, 31)):
        seen = whole.copied()
        for n in cuts:
            seen.trim(n)
            assert seen.cache.held == seen.total
            seen.check()
        assert shared_rows(seen.cache) == {len(lengths) for lengths in seen.cache._rows.values()}
        seen.append(70)
        seen.trim(60)
        seen.append(50)
        seen.steps(3)
        seen.check()
    whole.check()


@pytest.mark.parametrize("scheme", KIVI)
def test_rows_of_groups_that_were_cut(scheme: str) -> None:
    seen = watched(scheme, sinks=4, recent=0)
    seen.append(4 + 3 * GROUP)
    assert seen.cache._rows == {GROUP: (32, 32, 32)}
    seen.trim(7)
    assert seen.cache._rows == {GROUP: (32, 32, 25)} and seen.cache.packed_tokens == 89
    seen.append(GROUP)
    assert seen.cache._rows == {GROUP: (32, 32, 25, 32)}
    seen.trim(GROUP + 25 + 1)
    assert seen.cache._rows == {GROUP: (32, 31)} and shared_rows(seen.cache) == {2}
    seen.append(GROUP + 5)
    seen.steps(GROUP - 5)
    assert seen.cache._rows == {GROUP: (32, 31, 32, 32)} and seen.cache._dense == 4
    seen.check()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trimming_to_nothing_starts_over(scheme: str) -> None:
    """Also to sinks, and to one token more; statistics go with the last packed token."""
    whole = filled(scheme)
    for left in (0, 4, 5):
        seen = whole.copied()
        seen.trim(seen.total - left)
        assert seen.cache.packed_tokens == max(0, left - 4)
        cache = seen.cache
        assert bool(cache.key_planes) == bool(cache.value_planes) == (left == 5)
        if left < 5:
            assert not cache._rows and not cache.key_statistics and not cache.value_statistics and cache.frame is None
        seen.check()
        seen.append(100)
        seen.append(1)
        seen.check()
        assert cache.packed_tokens > 50


def test_trimming_to_nothing_forgets_the_queries_too() -> None:
    seen, fresh = watched("tq2.5"), watched("tq2.5", seed=1)
    seen.append(30)
    seen.trim(30)
    tokens = fresh.new_tokens(100)
    for each in (seen, fresh):
        each.attend(tokens)
    assert mx.array_equal(seen.cache.frame.scale, fresh.cache.frame.scale)


@pytest.mark.parametrize("scheme", SOME)
def test_trimming_what_a_step_of_several_tokens_has_not_packed_yet(scheme: str) -> None:
    whole = filled(scheme)
    for n in (3, 30, 80):
        seen = whole.copied()
        seen.append(16)
        seen.trim(n)
        seen.check()
        seen.append(9)
        seen.append(40)
        seen.check()


@pytest.mark.parametrize("scheme", SOME)
def test_sequences_in_one_cache_do_not_mix(scheme: str) -> None:
    """Two rows, of other sizes and so with other statistics; they are trimmed together."""
    alone = [watched(scheme, seed=seed) for seed in (1, 2)]
    both = cache_of(alone[0].cache.spec)
    for L, n in ((100, 0), (1, 0), (16, 41), (60, 0), *[(1, 0)] * 5):
        tokens = [each.new_tokens(L) for each in alone]
        tokens[1] = [tokens[1][0], *(4 * x for x in tokens[1][1:])]
        for each, qkv in zip(alone, tokens, strict=True):
            each.attend(qkv)
            each.trim(n)
        q, k, v = (mx.concatenate(parts) for parts in zip(*tokens, strict=True))
        mx.eval(ROUTED(q, *both.update_and_fetch(k, v), cache=both, scale=SCALE, mask="causal" if L > 1 else None))
        both.trim(n)
    for row, each in enumerate(alone):
        assert both.packed_tokens == each.cache.packed_tokens > 90 and both._rows == each.cache._rows
        for found, expected in zip(both.decode_all(), each.cache.decode_all(), strict=True):
            assert mx.array_equal(found[row : row + 1], expected)


# ---- copies and files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_and_restored_caches_go_on_alike(scheme: str, window: int | None) -> None:
    seen = filled(scheme, 140, window)
    seen.trim(33)
    again, other = seen.copied(), seen.copied()
    again.cache = restored(seen.cache)
    assert again.cache.spec == seen.cache.spec and again.cache._rows == seen.cache._rows
    kept = seen.copied()
    go_on(seen, other, again)
    kept.check()
    if window is not None:  # which has passed by now
        later = seen.copied()
        later.cache = restored(seen.cache)
        go_on(seen, later)


def test_restored_planes_have_the_same_room() -> None:
    """Planes of a row a token have slack in long caches; those of a row a group never have."""
    seen = watched("kivi2", frame=False)
    seen.append(5000, check=False)
    for _ in range(GROUP):
        seen.append(1, check=False)
    assert seen.cache.plane_rows > seen.cache.packed_tokens and shared_rows(seen.cache) == {156}
    again = seen.copied()
    again.cache = restored(seen.cache)
    assert again.cache.plane_rows == seen.cache.plane_rows and shared_rows(again.cache) == {156}
    go_on(seen, again)


@pytest.mark.parametrize("scheme", [*SCHEMES, "tq2+tq2.5", "kivi4,sinks=0,recent=0", "tq4,rotation=dense"])
def test_files_hold_caches_of_every_codec(scheme: str, tmp_path: Path) -> None:
    """Codecs with dots and pluses in their names, and rows that were cut."""
    kinds = ["full_attention", "sliding_attention"]
    model = tiny_models.llama(num_hidden_layers=2, layer_types=kinds, sliding_window=tiny_models.WINDOW)
    file = tmp_path / "prompt.safetensors"
    with kvq.compress(model, scheme):
        caches = kvq.make_prompt_cache(model)
        mx.eval(model(mx.arange(150)[None] % 64, cache=caches), [cache.state for cache in caches])
        assert kvq.cache_report(caches).compressed == len(caches)
        for cache in caches:
            assert cache.packed_tokens > 70 and cache.trim(41) == 41
        for count in (0, 90):  # after which windows have passed
            if count:
                mx.eval(model(mx.arange(count)[None] % 64, cache=caches))
            kvq.save_prompt_cache(file, caches, model=model)
            loaded, info = kvq.load_prompt_cache(file, model)
            assert info.nbytes == sum(cache.nbytes for cache in loaded)
            for found, cache in zip(loaded, caches, strict=True):
                assert found._rows == cache._rows and found.nbytes == cache.nbytes
                for a, b in zip(found.decode_all(), cache.decode_all(), strict=True):
                    assert mx.array_equal(a, b)
            for tokens in ([[3]], [[5] * 33], [[7]]):
                more = mx.array(tokens)
                assert mx.array_equal(model(more, cache=loaded), model(more, cache=caches))


# ---- bytes -------------------------------------------------------------------------------------------------------


def active() -> int:
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return int(mx.get_active_memory())


@pytest.mark.parametrize("window", [None, 6000])
def test_cut_rows_give_their_memory_back(window: int | None) -> None:
    """One KV head: there a slice is contiguous and could keep the whole plane alive."""
    limit = mx.set_cache_limit(0)
    try:
        before = active()
        cache = watched("kivi2", window, frame=False).cache
        sizes = [12_000] if window is None else [5_000] + [500] * 14
        for size in sizes:
            x = mx.random.normal((1, 1, size, 2 * D)).astype(mx.float16)
            cache.update_and_fetch(x, x)
            cache.compact()
            mx.eval(cache.state)
        if window is None:
            cache.trim(9_990)
            mx.eval(cache.state)
        del x
        held = active() - before
    finally:
        mx.set_cache_limit(limit)
    assert cache.nbytes == sum(array.nbytes for array in arrays_of(cache))
    assert shared_rows(cache) == {len(cache._rows[GROUP])} and cache.packed_tokens > 1900
    assert abs(held - cache.nbytes) <= 0.02 * cache.nbytes


def test_memory_of_a_group_is_that_of_its_codes_and_two_numbers_a_channel() -> None:
    seen = watched("kivi2", sinks=0, recent=0, frame=False)
    seen.append(4 * GROUP)
    keys = 4 * GROUP * D // 4 + 4 * 2 * 2 * D
    assert sum(plane.nbytes for plane in seen.cache.key_planes.values()) == KV_HEADS * keys
