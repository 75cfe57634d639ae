"""The server's prompt caches: mlx-lm's LRU with true bytes, exact trims, and a disk tier behind it."""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, LRUPromptCache, RotatingKVCache, can_trim_prompt_cache

from .cache import KVQCache, flat_caches
from .errors import CacheStateError
from .prompt_store import MIN_GAIN, PromptStore, StoreWriter, group_of
from .report import cache_report
from .sliding import allow_speculation

log = logging.getLogger(__name__)


def trimmed_copy(caches: list[Any], count: int) -> list[Any] | None:
    """A copy without the last `count` tokens, or `None` unless every layer drops exactly as many."""
    if count and not can_trim_prompt_cache(caches):
        return None
    copied: list[Any] = copy.deepcopy(caches)
    if count == 0:
        return copied
    try:
        return copied if all(cache.trim(count) == count for cache in copied) else None
    except CacheStateError:
        return None


def _evaluate(caches: list[Any]) -> None:
    """Compute what is still lazy: a lazy slice keeps the whole batch alive that it was taken from."""
    mx.eval([cache._arrays() if isinstance(cache, KVQCache) else cache.state for cache in flat_caches(caches)])


def _settled(caches: list[Any], tokens: list[int]) -> list[int] | None:
    """The tokens that all caches hold, after trimming those that hold more; `None` if they hold others.

    After speculative decoding the last token is not in the caches, and a draft model's may be one behind.
    """
    sized = [cache for cache in flat_caches(caches) if isinstance(cache, (KVQCache, KVCache, RotatingKVCache))]
    offsets = [cache.offset for cache in sized]
    held = min(offsets, default=len(tokens))
    if max(offsets, default=held) > held and can_trim_prompt_cache(sized):
        for cache in sized:
            cache.trim(cache.offset - held)
    compressed = {cache.offset for cache in sized if isinstance(cache, KVQCache)}
    if len(compressed) == 1:
        held = compressed.pop()
    return tokens[:held] if not compressed and 0 < held <= len(tokens) else None


def _holds(caches: list[Any], tokens: int) -> bool:
    """Whether the compressed layers have seen as many tokens as the caches are to be filed under."""
    return all(cache.offset == tokens for cache in flat_caches(caches) if isinstance(cache, KVQCache))


def _drafts(key: Any) -> bool:
    """Whether mlx-lm's key of a loaded model names a draft model."""
    return isinstance(key, tuple) and len(key) == 3 and key[2] is not None


class _Order(LRUPromptCache.CacheOrder):
    """mlx-lm's order of eviction, which tells what it gives up."""

    def __init__(self, evicted: Callable[[Any, list[int]], None]):
        super().__init__()
        self._evicted = evicted

    def pop(self) -> tuple[Any, list[int]]:
        key, tokens = super().pop()
        self._evicted(key, tokens)
        return key, tokens


class ServedPromptCache(LRUPromptCache):
    """mlx-lm's LRU of prompt caches, for a server that must neither stop nor answer wrong.

    Caches go in evaluated and by their true size; a hit makes an entry the newest; a cache that cannot be trimmed
    exactly is not used; errors cost a hit, not the server. What is evicted goes to the disk tier, if there is one.
    """

    def __init__(self, max_size: int = 10, max_bytes: int | None = None, store: PromptStore | None = None):
        """
        Args:
            max_size: entries in memory.
            max_bytes: of these together with the requests in flight, as far as `live_nbytes` tells.
            store: the disk tier.
        """
        super().__init__(max_size, max_bytes if max_bytes is not None else 1 << 63)
        self._lru = _Order(self._evicted)
        self.budget = max_bytes
        self.live_nbytes: Callable[[], int] = lambda: 0
        self.store = store
        self.writer = StoreWriter(store) if store is not None else None
        self._loaded: tuple[Any, Any, str] | None = None  # key, model and group on disk of the loaded model
        self.hits = self.misses = self.failures = 0
        self.reused_tokens = 0

    # ---- which model -------------------------------------------------------------------------------------------

    def attach_model(self, key: Any, model: Any, storable: bool = True) -> None:
        """Name the model whose caches come from now on; `storable=False` keeps them off the disk."""
        self._loaded = (key, model, group_of(model)) if self.store is not None and storable else None

    def release_model(self, seconds: float) -> None:
        """Write what memory has of the loaded model to the disk and drop it, within about `seconds`; never raises.

        Newest first, so that the time goes to what is likeliest to be needed. Called in the generation thread when the
        model is unloaded and at the end.
        """
        if self._loaded is None or self.store is None or self.writer is None:
            return
        end = time.monotonic() + seconds
        (key, model, group), self._loaded = self._loaded, None
        written = []
        try:
            self.writer.flush(seconds)
            entries = [tokens for kind in self._lru._ordering for own, tokens in self._lru._lrus[kind] if own == key]
            for tokens in reversed(entries):
                entry = self._trie.get(key, tokens)
                left = end - time.monotonic()
                savable = left > 0 and self._savable(entry.prompt_cache)
                if savable and self.store.save(entry.prompt_cache, tokens, model, group, entry.cache_type, left):
                    written.append(self.store.name_of(group, tokens))
                self._drop(key, tokens)
            for name in reversed(written):
                self.store.touch(name)
            log.info("kvq: %d of %d prompt caches are on disk", len(written), len(entries))
        except Exception:
            log.exception("kvq: prompt caches were not written")

    def close(self, seconds: float) -> None:
        """End the writer thread, within `seconds`."""
        if self.writer is not None:
            self.writer.close(seconds)

    @property
    def waiting_nbytes(self) -> int:
        """Bytes of evicted caches that are not on the disk yet."""
        return self.writer.waiting if self.writer is not None else 0

    def _drop(self, key: Any, tokens: list[int]) -> None:
        entry = self._trie.pop(key, tokens)
        self._lru.remove(key, tokens)
        self._n_bytes -= entry.nbytes
        self._n_bytes_by_type[entry.cache_type] -= entry.nbytes

    def _savable(self, caches: list[Any]) -> bool:
        return bool(cache_report(caches).tokens)

    def _evicted(self, key: Any, tokens: list[int]) -> None:
        """Called before an entry leaves memory."""
        if self._loaded is None or self.writer is None or self._loaded[0] != key:
            return
        try:
            entry = self._trie.get(key, tokens)
            if self._savable(entry.prompt_cache):
                self.writer.put(entry.prompt_cache, tokens, self._loaded[1], self._loaded[2], entry.cache_type)
        except Exception:
            log.exception("kvq: an evicted prompt cache was not written")

    # ---- mlx-lm's calls ----------------------------------------------------------------------------------------

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        """Caches of the longest stored prefix, own copies, and the tokens that remain: at least one."""
        try:
            caches, used = self._fetch(model, list(tokens))
        except Exception:
            log.exception("kvq: looking for a prompt cache failed, the prompt is computed")
            self.failures += 1
            caches, used = None, 0
        if caches is not None and _drafts(model):
            allow_speculation(caches)
        self.hits += caches is not None
        self.misses += caches is None
        self.reused_tokens += used
        return caches, tokens[used:]

    def _fetch(self, key: Any, tokens: list[int]) -> tuple[list[Any] | None, int]:
        caches, used, held = None, 0, None
        for usable, candidate in self._candidates(key, tokens[:-1]):
            caches = trimmed_copy(self._trie.get(key, candidate).prompt_cache, len(candidate) - usable)
            if caches is not None:
                used, held = usable, candidate
                break
        stored = self._fetch_stored(key, tokens, used)
        if stored is not None:
            return stored
        if held is not None:
            entry = self._trie.get(key, held)
            self._lru.remove(key, held)
            self._lru.push(key, held, entry.cache_type)
        return caches, used

    def _candidates(self, key: Any, tokens: list[int]) -> list[tuple[int, list[int]]]:
        """Entries with how many tokens of the prompt they can stand for, best first."""
        found = self._trie.search(key, tokens)
        if found.exact is not None:
            return [(len(tokens), list(found.exact))] if tokens else []
        candidates = []
        if found.longer is not None and found.common_prefix >= MIN_GAIN:  # not for the head of a chat template
            candidates.append((found.common_prefix, list(found.longer)))
        if found.shorter is not None:
            candidates.append((len(found.shorter), list(found.shorter)))
        return sorted(candidates, key=lambda item: (-item[0], len(item[1])))

    def _fetch_stored(self, key: Any, tokens: list[int], have: int) -> tuple[list[Any], int] | None:
        """From the disk tier, if that saves clearly more than `have` tokens; the entry moves into memory."""
        if self.store is None or self._loaded is None or self._loaded[0] != key:
            return None
        _, model, group = self._loaded
        stored = self.store.fetch(tokens, model, group, have)
        if stored is None:
            return None
        caches, entry, usable = stored
        copied = trimmed_copy(caches, len(entry.tokens) - usable)
        if copied is None or not _holds(copied, usable):
            return None
        self.insert_cache(key, entry.tokens.tolist(), caches, cache_type=entry.kind)
        return copied, usable

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], *, cache_type: str = "assistant"
    ) -> None:
        """File caches under the tokens they hold; what does not fit leaves. A failure is logged and costs the entry.

        The list given is emptied: the server's loop keeps its last ones in variables, past their eviction.
        """
        if not tokens or not prompt_cache:
            return  # what a failed request leaves
        prompt_cache, given = list(prompt_cache), prompt_cache
        given.clear()
        try:
            held = _settled(prompt_cache, tokens)
            if held is None:
                log.warning("kvq: a prompt cache that does not hold its %d tokens was dropped", len(tokens))
                self.failures += 1
                return
            _evaluate(prompt_cache)
            super().insert_cache(model, held, prompt_cache, cache_type=cache_type)
            self.fit(self.live_nbytes())
        except Exception:
            log.exception("kvq: a prompt cache was not kept")
            self.failures += 1

    def fit(self, live: int) -> None:
        """Evict until the entries and `live` bytes of requests in flight are within the budget."""
        if self.budget is not None:
            self.trim_to(n_bytes=self.budget - live)

    # ---- report ------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Sequences, tokens and bytes per type, cache classes, hits; call it in the generation thread."""
        by_type: dict[str, dict[str, int]] = {}
        classes: Counter[str] = Counter()
        for kind in self._lru._ordering:
            total = by_type[kind] = {"sequences": 0, "tokens": 0, "nbytes": 0, "fp16_nbytes": 0}
            for key, tokens in self._lru._lrus[kind]:
                caches = self._trie.get(key, tokens).prompt_cache
                total["sequences"] += 1
                total["tokens"] += len(tokens)
                total["nbytes"] += sum(cache.nbytes for cache in caches)
                total["fp16_nbytes"] += cache_report(caches).fp16_nbytes
                classes.update(type(cache).__name__ for cache in flat_caches(caches))
        return {
            "sequences": len(self),
            **{name: sum(part[name] for part in by_type.values()) for name in ("tokens", "nbytes", "fp16_nbytes")},
            "accounted_nbytes": self.nbytes,
            "max_sequences": self.max_size,
            "max_nbytes": self.budget,
            "by_type": by_type,
            "classes": dict(classes),
            "hits": self.hits,
            "misses": self.misses,
            "reused_tokens": self.reused_tokens,
            "failures": self.failures,
        }
