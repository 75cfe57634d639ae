"""The disk tier: entries are found by their tokens, bounded, and right or absent whatever happens to the processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import prompt_store
from mlx_kvq_plugin.errors import PromptCacheFormatError
from mlx_kvq_plugin.prompt_store import PromptStore, StoreWriter, group_of
from mlx_kvq_plugin.served_cache import ServedPromptCache, trimmed_copy

SCHEME = "tq4"
BIG = 1 << 30
KEY = ("model", None, None)

# No pipes to a parent: children are killed.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "mlx_kvq_plugin.served_cache", "mlx_lm.models.llama"])


def make_model(scheme: str = SCHEME, **changes: Any) -> Any:
    model = tiny_models.llama(num_hidden_layers=2, **changes)
    kvq.compress(model, scheme)
    return model


def filled(model: Any, tokens: list[int]) -> list[Any]:
    """Caches whose content follows from the tokens, without the cost of a model run."""
    caches = kvq.make_prompt_cache(model)
    for layer, cache in enumerate(caches):
        rng = np.random.default_rng([layer, *tokens])
        keys, values = (mx.array(rng.standard_normal((1, 2, len(tokens), 64)), mx.float32) for _ in range(2))
        cache.update_and_fetch(keys, values)
        if isinstance(cache, kvq.KVQCache):
            cache.settle()
    mx.eval([cache.state for cache in caches])
    return caches


def equal(a: list[Any], b: list[Any]) -> bool:
    """Equal states, bit for bit."""

    def flat(caches: list[Any]) -> list[tuple[str, Any]]:
        return sorted(tree_flatten([cache.state for cache in caches]), key=lambda item: item[0])

    pairs = zip(flat(a), flat(b), strict=True)
    return all(m == n and (mx.array_equal(x, y) if isinstance(x, mx.array) else x == y) for (m, x), (n, y) in pairs)


def tokens_of(seed: int, count: int = 200) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, count).tolist()


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture(scope="module")
def group(model: Any) -> str:
    return group_of(model)


@pytest.fixture
def store(tmp_path: Path) -> PromptStore:
    return PromptStore(tmp_path / "store", BIG)


def save(store: PromptStore, model: Any, tokens: list[int], **options: Any) -> bool:
    return store.save(filled(model, tokens), tokens, model, group_of(model), **options)


# ---- lookup --------------------------------------------------------------------------------------------------------


def test_prefix(store: PromptStore, model: Any, group: str) -> None:
    tokens = tokens_of(1)
    assert save(store, model, tokens, kind="system")
    fresh = PromptStore(store.folder, BIG)  # as after a restart
    found = fresh.fetch([*tokens, 5, 6], model, group)
    assert found is not None
    caches, entry, usable = found
    assert (usable, entry.kind, entry.tokens.tolist()) == (200, "system", tokens)
    assert equal(caches, filled(model, tokens))
    assert (fresh.counters.hits, fresh.counters.misses) == (1, 0)


def test_longest_prefix_wins(store: PromptStore, model: Any, group: str) -> None:
    tokens = tokens_of(1, 300)
    for count in (100, 300, 200):
        save(store, model, tokens[:count])
    save(store, model, tokens_of(2, 300))
    found = store.fetch([*tokens[:250], 1, 2], model, group)
    assert found is not None
    assert (len(found[1].tokens), found[2]) == (300, 250)  # trimmed
    found = store.fetch(tokens[:200] + [(tokens[200] + 1) % 97, 4], model, group)
    assert found is not None
    assert (len(found[1].tokens), found[2]) == (200, 200)  # as good as 300 trimmed, and smaller


def test_leaves_a_token_to_compute(store: PromptStore, model: Any, group: str) -> None:
    tokens = tokens_of(3)
    save(store, model, tokens)
    found = store.fetch(tokens, model, group)
    assert found is not None
    assert found[2] == 199


def test_misses(store: PromptStore, model: Any, group: str) -> None:
    tokens = tokens_of(4)
    save(store, model, tokens)
    assert store.fetch(tokens_of(5), model, group) is None
    assert store.fetch([*tokens, 1], model, group, have=190) is None  # memory has almost as much
    assert store.fetch(tokens[:10], model, group) is None  # 9 tokens are computed sooner than 200 are read
    assert store.counters.misses == 3


def test_untrimmable_entries_serve_whole_prefixes_only(store: PromptStore) -> None:
    model = tiny_models.llama_sliding()
    kvq.compress(model, SCHEME)
    tokens = tokens_of(6, 2 * tiny_models.WINDOW)
    caches = kvq.make_prompt_cache(model)
    mx.eval(model(mx.array([tokens]), cache=caches))
    assert store.save(caches, tokens, model, group_of(model))
    found = store.fetch([*tokens, 1], model, group_of(model))
    assert found is not None and found[2] == len(tokens)
    assert store.fetch([*tokens[:-20], 1], model, group_of(model)) is None


def test_other_schemes_and_models_are_ignored(store: PromptStore, model: Any, group: str) -> None:
    tokens = tokens_of(7)
    save(store, make_model("rvq1"), tokens)
    save(store, make_model(seed=1), tokens)
    assert store.fetch([*tokens, 1], model, group) is None
    assert store.usage()[0] == 2 and store.counters.corrupt == 0
    save(store, model, tokens)
    assert store.fetch([*tokens, 1], model, group) is not None


# ---- bounds --------------------------------------------------------------------------------------------------------


def test_bounded_and_least_recently_used(tmp_path: Path, model: Any, group: str) -> None:
    probe = PromptStore(tmp_path / "probe", BIG)
    save(probe, model, tokens_of(0))
    size = probe.usage()[1]
    needed = prompt_store._file_nbytes(filled(model, tokens_of(0)), tokens_of(0))
    assert size <= needed
    store = PromptStore(tmp_path / "store", 2 * size + needed + 1000)
    for seed in range(3):
        save(store, model, tokens_of(seed))
        os.utime(store.folder / store.name_of(group, tokens_of(seed)), (seed, seed))
    assert store.fetch([*tokens_of(0), 1], model, group) is not None  # now the newest
    save(store, model, tokens_of(3))
    held = [seed for seed in range(4) if (store.folder / store.name_of(group, tokens_of(seed))).exists()]
    assert held == [0, 2, 3]
    assert store.usage()[1] <= store.max_bytes and store.counters.evicted == 1


def test_too_large_an_entry_is_skipped(tmp_path: Path, model: Any) -> None:
    store = PromptStore(tmp_path, 1000)
    assert not save(store, model, tokens_of(1))
    assert store.usage() == (0, 0) and store.counters.skipped == 1


def test_saving_twice_writes_once(store: PromptStore, model: Any) -> None:
    assert save(store, model, tokens_of(1)) and save(store, model, tokens_of(1))
    assert (store.counters.writes, store.counters.touched, store.usage()[0]) == (1, 1, 1)


def test_leftovers_are_removed_and_count(store: PromptStore, model: Any) -> None:
    left = store.folder / ".x.123.abcd.tmp.safetensors"
    left.write_bytes(b"x" * 1000)
    assert store.usage() == (0, 1000)
    save(store, model, tokens_of(1))
    assert not left.exists()


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PromptCacheFormatError, match="must be writable"):
        PromptStore(tmp_path / "file", BIG)


def test_disk_full_is_not_an_error(store: PromptStore, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prompt_store, "save_prompt_cache", full)
    assert not save(store, model, tokens_of(1))
    assert store.counters.skipped == 1


# ---- damage and races ----------------------------------------------------------------------------------------------


def files(store: PromptStore) -> list[Path]:
    return sorted(store.folder.glob("[!.]*.safetensors"))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "header"])
def test_damaged_files_are_removed_not_served(store: PromptStore, model: Any, group: str, damage: str) -> None:
    tokens = tokens_of(1)
    save(store, model, tokens)
    save(store, model, tokens[:100])
    path = store.folder / store.name_of(group, tokens)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-100] ^= 1
    elif damage == "header":
        content[200] ^= 1
    else:
        del content[0 if damage == "empty" else len(content) // 2 :]
    path.write_bytes(content)
    fresh = PromptStore(store.folder, BIG)
    found = fresh.fetch([*tokens, 1], model, group)
    assert found is not None and found[2] == 100  # the next best
    assert not path.exists() and fresh.counters.corrupt == 1


def test_file_that_vanishes_is_a_miss(
    store: PromptStore, model: Any, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokens_of(1)
    save(store, model, tokens)
    original = prompt_store.load_prompt_cache

    def evicted(path: Path, model: Any) -> Any:
        path.unlink()
        return original(path, model)

    monkeypatch.setattr(prompt_store, "load_prompt_cache", evicted)
    assert store.fetch([*tokens, 1], model, group) is None
    assert store.counters.misses == 1 and store.counters.corrupt == 0


def test_stores_see_each_other(store: PromptStore, model: Any, group: str) -> None:
    other = PromptStore(store.folder, BIG)
    tokens = tokens_of(1)
    assert other.fetch([*tokens, 1], model, group) is None
    save(store, model, tokens)
    assert other.fetch([*tokens, 1], model, group) is not None
    files(store)[0].unlink()
    assert other.fetch([*tokens, 1], model, group) is None


def _write_for_ever(folder: str, seed: int, ready: Any) -> None:
    """A process that writes entries until it is killed."""
    model = make_model()
    group = group_of(model)
    rng = random.Random(seed)
    store = PromptStore(folder, 1 << 20)  # room for a few: it evicts all the time
    caches = [(filled(model, tokens_of(n, 60)), tokens_of(n, 60)) for n in rng.sample(range(40), 6)]
    ready.set()
    while True:
        held, tokens = rng.choice(caches)
        (Path(folder) / store.name_of(group, tokens)).unlink(missing_ok=True)  # so that it is written again
        store.save(held, tokens, model, group)


@pytest.fixture
def expected(model: Any) -> dict[int, list[Any]]:
    return {n: filled(model, tokens_of(n, 60)) for n in range(40)}


def test_killed_writers(tmp_path: Path, model: Any, group: str, expected: dict[int, list[Any]]) -> None:
    """50 rounds of two processes killed while they write: what is found is right, what is there is readable."""
    folder, rng = tmp_path / "store", random.Random(0)
    found = leftovers = 0
    for n in range(50):
        ready = [FORKS.Event() for _ in range(2)]
        writers = [FORKS.Process(target=_write_for_ever, args=(str(folder), 2 * n + i, ready[i])) for i in range(2)]
        for writer in writers:
            writer.start()
        assert all(event.wait(60) for event in ready)
        time.sleep(rng.uniform(0.0, 0.05))
        for writer in writers:
            assert writer.is_alive()
            os.kill(writer.pid, signal.SIGKILL)  # type: ignore[arg-type]
        for writer in writers:
            writer.join()
            writer.close()
        leftovers += len(list(folder.glob(".*.tmp.safetensors")))
        for path in sorted(folder.glob("[!.]*.safetensors")):
            kvq.verify_prompt_cache(path, model)  # raises for a damaged one
        store = PromptStore(folder, 1 << 20)
        assert store.usage()[1] <= store.max_bytes
        assert not list(folder.glob(".*.tmp.safetensors"))
        for seed in rng.sample(range(40), 10):
            hit = store.fetch([*tokens_of(seed, 60), 1], model, group)
            if hit is not None:
                found += 1
                assert hit[1].tokens.tolist() == tokens_of(seed, 60)
                assert equal(hit[0], expected[seed])
        assert store.counters.corrupt == 0
        assert save(store, model, tokens_of(n, 60))  # the lock is free
    assert found > 50 and leftovers > 0  # the rounds met what they are about


# ---- the writer ----------------------------------------------------------------------------------------------------


def test_writer_writes_behind(store: PromptStore, model: Any, group: str) -> None:
    writer = StoreWriter(store)
    for seed in range(3):
        writer.put(filled(model, tokens_of(seed)), tokens_of(seed), model, group, "user")
    assert writer.flush(30) and writer.waiting == 0
    assert store.usage()[0] == 3
    writer.close(30)


def test_writer_drops_rather_than_keeps(store: PromptStore, model: Any, group: str) -> None:
    caches = filled(model, tokens_of(0))
    writer = StoreWriter(store, pending_bytes=sum(cache.nbytes for cache in caches))
    with store._locked():  # another process writes
        for seed in range(3):
            writer.put(filled(model, tokens_of(seed)), tokens_of(seed), model, group, "user")
    assert writer.flush(30)
    assert (store.usage()[0], store.counters.skipped) == (1, 2)
    writer.close(30)


# ---- memory and disk together --------------------------------------------------------------------------------------


def served(store: PromptStore | None, model: Any, **options: Any) -> ServedPromptCache:
    cache = ServedPromptCache(store=store, **options)
    cache.attach_model(KEY, model)
    return cache


def test_evicted_entries_come_back(store: PromptStore, model: Any) -> None:
    memory = served(store, model, max_size=2)
    for seed in range(4):
        memory.insert_cache(KEY, tokens_of(seed), filled(model, tokens_of(seed)))
    assert len(memory) == 2
    assert memory.writer is not None and memory.writer.flush(30)
    caches, rest = memory.fetch_nearest_cache(KEY, [*tokens_of(0), 1, 2])
    assert rest == [1, 2] and caches is not None and equal(caches, filled(model, tokens_of(0)))
    assert len(memory) == 2 and memory.nbytes == memory.report()["nbytes"]
    memory.close(30)


def test_left_entries_are_written_at_the_end(store: PromptStore, model: Any) -> None:
    memory = served(store, model)
    for seed in range(3):
        memory.insert_cache(KEY, tokens_of(seed), filled(model, tokens_of(seed)), cache_type="user")
    memory.release_model(30)
    memory.close(30)
    assert len(memory) == 0 and memory.nbytes == 0
    again = served(PromptStore(store.folder, BIG), model)
    for seed in range(3):
        assert again.fetch_nearest_cache(KEY, [*tokens_of(seed), 1])[1] == [1]
    again.close(30)


def test_end_is_bounded(store: PromptStore, model: Any) -> None:
    memory = served(store, model)
    for seed in range(3):
        memory.insert_cache(KEY, tokens_of(seed), filled(model, tokens_of(seed)))
    release = threading.Event()

    def hold() -> None:
        with store._locked():
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    time.sleep(0.1)
    start = time.monotonic()
    memory.release_model(0.5)
    memory.close(0.5)
    assert time.monotonic() - start < 3
    release.set()
    holder.join()


def test_wrong_trims_are_not_used(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = filled(model, tokens_of(0))
    calls = iter(range(100))
    monkeypatch.setattr(kvq.KVQCache, "trim", lambda self, n: n - next(calls) % 2)  # the second layer trims less
    assert trimmed_copy(caches, 5) is None
    memory = served(None, model)
    memory.insert_cache(KEY, tokens_of(0), caches)
    assert memory.fetch_nearest_cache(KEY, [*tokens_of(0)[:150], 1]) == (None, [*tokens_of(0)[:150], 1])


def test_shorter_prefix_where_the_longer_cannot_be_trimmed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_of(0)
    memory = served(None, model)
    monkeypatch.setattr(kvq.KVQCache, "is_trimmable", lambda self: False)
    memory.insert_cache(KEY, tokens[:100], filled(model, tokens[:100]))
    memory.insert_cache(KEY, tokens, filled(model, tokens))
    caches, rest = memory.fetch_nearest_cache(KEY, [*tokens[:150], 1])
    assert rest == [*tokens[100:150], 1] and caches is not None
    assert equal(caches, filled(model, tokens[:100]))


def test_equal_prompt_leaves_a_token(model: Any) -> None:
    """mlx-lm's own LRU returns no token to compute here, which its batch generator refuses."""
    memory = served(None, model)
    memory.insert_cache(KEY, tokens_of(0), filled(model, tokens_of(0)))
    caches, rest = memory.fetch_nearest_cache(KEY, tokens_of(0))
    assert rest == tokens_of(0)[-1:] and caches is not None
    assert all(cache.offset == 199 for cache in caches)


def test_hits_make_entries_new(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = served(None, model, max_size=2)
    for seed in range(2):
        memory.insert_cache(KEY, tokens_of(seed), filled(model, tokens_of(seed)))
    memory.fetch_nearest_cache(KEY, [*tokens_of(0), 1])
    memory.insert_cache(KEY, tokens_of(2), filled(model, tokens_of(2)))
    assert memory.fetch_nearest_cache(KEY, [*tokens_of(0), 1])[0] is not None
    assert memory.fetch_nearest_cache(KEY, [*tokens_of(1), 1])[0] is None


def test_budget_counts_requests_in_flight(model: Any) -> None:
    size = sum(cache.nbytes for cache in filled(model, tokens_of(0)))
    memory = served(None, model, max_bytes=3 * size)
    for seed in range(3):
        memory.insert_cache(KEY, tokens_of(seed), filled(model, tokens_of(seed)))
    assert len(memory) == 3
    memory.live_nbytes = lambda: 2 * size
    memory.insert_cache(KEY, tokens_of(3), filled(model, tokens_of(3)))
    assert len(memory) == 1 and memory.nbytes <= size


def test_errors_cost_a_hit_not_the_server(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = served(None, model)
    memory.insert_cache(KEY, tokens_of(0), filled(model, tokens_of(0))[:1] + [object()])
    assert len(memory) == 0
    memory.insert_cache(KEY, tokens_of(0)[:-1], filled(model, tokens_of(0)))  # filed under other tokens than held
    assert len(memory) == 0
    memory.insert_cache(KEY, tokens_of(0), filled(model, tokens_of(0)))
    monkeypatch.setattr(memory._trie, "search", lambda *_: 1 / 0)
    assert memory.fetch_nearest_cache(KEY, [*tokens_of(0), 1]) == (None, [*tokens_of(0), 1])
    assert memory.failures == 3


def test_sizes_are_true(model: Any) -> None:
    memory = served(None, model)
    memory.insert_cache(KEY, tokens_of(0), filled(model, tokens_of(0)))
    report = memory.report()
    assert report["nbytes"] == report["accounted_nbytes"] == sum(c.nbytes for c in filled(model, tokens_of(0)))
    assert report["tokens"] == 200 and report["classes"] == {"KVQCache": 2}
    assert report["fp16_nbytes"] == 2 * 2 * 2 * 200 * 64 * 2


def test_stock_caches_are_kept_too() -> None:
    plain = tiny_models.llama(num_hidden_layers=2)
    caches: list[Any] = [KVCache() for _ in range(2)]
    for cache in caches:
        cache.update_and_fetch(mx.ones((1, 2, 20, 64)), mx.ones((1, 2, 20, 64)))
    memory = served(None, plain)
    memory.insert_cache(KEY, tokens_of(0, 20), caches)
    assert memory.report()["classes"] == {"KVCache": 2}
