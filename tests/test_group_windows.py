"""As test_group_caches.py: sliding windows, steps of several tokens, and batches."""

from __future__ import annotations

import copy

import pytest
from watched_caches import (
    GROUP,
    KIVI,
    SCHEMES,
    SOME,
    WINDOW,
    Watched,
    attend_together,
    filled,
    layer_spec,
    prompt_together,
    restored,
    shared_rows,
    watched,
)

from mlx_kvq_plugin.sliding import smallest_window

# ---- windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_leave_a_window_one_by_one(scheme: str) -> None:
    seen = filled(scheme, WINDOW, WINDOW)
    for step in range(GROUP + 5):
        seen.append(1, check=False)
        assert seen.cache.held == WINDOW
        if scheme == "kivi2" or step % 8 == 0:
            seen.check()
    seen.append(1)
    seen.append(7)  # attends to what the first of them pushes out
    seen.check()
    seen.append(WINDOW + 9)
    seen.check()
    seen.steps(3)
    seen.append(20)
    seen.check()


@pytest.mark.parametrize("scheme", KIVI)
def test_rows_leave_a_window_with_their_last_token(scheme: str) -> None:
    seen = watched(scheme, WINDOW, recent=0)
    seen.append(4 * GROUP)
    seen.steps(WINDOW - 4 * GROUP + 31)
    assert seen.cache._rows[GROUP][0] == 1 and shared_rows(seen.cache) == {5}
    seen.steps(1)
    assert seen.cache._rows[GROUP] == (32,) * 4 and shared_rows(seen.cache) == {4}
    seen.steps(1)
    assert seen.cache._rows[GROUP] == (31, 32, 32, 32) and shared_rows(seen.cache) == {4}
    seen.check()
    seen.append(1)


def test_the_smallest_window_has_room_for_a_group() -> None:
    spec = layer_spec("kivi2").with_(recent=60)
    window = smallest_window(spec)
    assert window == 2 * (60 + GROUP)
    seen = Watched(spec, window)
    seen.steps(3 * window)
    assert seen.cache.packed_tokens >= window - 60 - GROUP
    seen.check()


@pytest.mark.parametrize("compress_after", ["chunk", "prefill"])
@pytest.mark.parametrize("scheme", ["kivi2", "kivi2+tq2.5", "tq2.5", "qjl1"])
def test_a_full_window_packs_the_same_groups_in_steps_of_several_tokens(scheme: str, compress_after: str) -> None:
    """The first pack, too, when the prompt alone has filled the window: not what the last tokens leave of it."""
    seen = watched(scheme, WINDOW, recent=0, frame=False, compress_after=compress_after)
    seen.append(WINDOW + 20)
    seen.verify(6, 0)
    seen.check()


@pytest.mark.parametrize("scheme", ["kivi2", "tq2.5"])
def test_statistics_outlive_the_packed_tokens_of_a_window(scheme: str) -> None:
    """A long prompt pushes them out; rejected tokens of the next step are no reason to fit others."""
    seen = watched(scheme, WINDOW, recent=0, compress_after="prefill")
    seen.append(100)
    seen.append(1)
    assert seen.cache.packed_tokens > 90
    frame = seen.cache.frame
    seen.append(WINDOW)
    assert seen.cache.packed_tokens == 0
    seen.verify(2, 1)
    seen.cache.compact()
    assert seen.cache.packed_tokens > 90 and seen.cache.frame is frame
    seen.check()


# ---- speculative decoding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "shared"), [(None, False), (None, True), (WINDOW, True)])
@pytest.mark.parametrize("scheme", SOME)
def test_steps_of_several_tokens_are_single_steps(scheme: str, shared: bool, window: int | None) -> None:
    """With rollback, from the first tokens on: attention and what is packed are those of the accepted tokens alone."""
    seen = watched(scheme, window)
    seen.cache.shared = shared
    for L, rejected in [(2, 1), (16, 15), *[(16, 0), (13, 5), (16, 3), (5, 4), (16, 0)] * 3]:
        seen.verify(L, rejected)
        seen.check()
    assert seen.total > WINDOW and seen.cache.packed_tokens > 90


# ---- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("scheme", [*SOME, "tqprod3", "turbo0v4"])
def test_rows_of_a_batch_are_their_own_caches(scheme: str, window: int | None) -> None:
    """Other lengths, other remainders of groups, other statistics; joining, leaving and going on alone."""
    members = [filled(scheme, tokens, window, seed) for seed, tokens in enumerate((140, 61, 97))]
    members[0].trim(41)
    sources = [member.copied() for member in members]
    for member, source in zip(members, sources, strict=True):
        source.cache = member.cache
    batch = members[0].cache.merge([member.cache for member in members[:2]])
    batch.extend(members[2].cache.merge([members[2].cache]))
    assert batch.nbytes == sum(member.cache.nbytes for member in members)
    attend_together(batch, members, GROUP - 9)
    prompt_together(batch, members, [70, 3, 40])
    attend_together(batch, members)
    alone = members.pop(1)
    alone.cache = batch.extract(1)
    batch.filter([0, 2])
    alone.append(17)
    alone.append(1)
    attend_together(batch, members, 3)
    for each in (alone, *members, *sources):
        each.check()
    copied = restored(batch)
    assert [row._rows for row in copied.rows] == [row._rows for row in batch.rows]
    attend_together(copied, members)
    for member in members:
        member.check()


@pytest.mark.parametrize("scheme", KIVI)
def test_a_batch_is_trimmed_into_groups(scheme: str) -> None:
    members = [filled(scheme, tokens, None, seed) for seed, tokens in enumerate((140, 121))]
    batch = members[0].cache.merge([member.cache for member in members])
    for member, row in zip(members, batch.rows, strict=True):
        member.cache = copy.deepcopy(row)
        member.trim(45)
    assert batch.trim(45) == 45
    attend_together(batch, members, GROUP + 9)
    for member in members:
        member.check()
