"""Prompt caches in a folder, found again by their tokens: the disk tier of the server.

One prompt-cache file (prompt_cache.py) per entry, named `<group>-<content>.safetensors`: the group stands for model and
scheme, the content for the tokens. The files are all there is: an index lives in memory only and is read off their
headers. The time of a file's last change is the time of its last use; the least recently used ones go first.

Writers take turns (a lock file, released by the system when a process dies), so what an earlier one left half-written
can be removed by the next, and the folder never exceeds its bound. Readers take no lock: files appear complete under
their name and are checked entirely before use; one that vanishes meanwhile was not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from filelock import FileLock, Timeout
from mlx_lm.models.cache import can_trim_prompt_cache

from .errors import PromptCacheCorruptError, PromptCacheError, PromptCacheFormatError
from .loading import compression_of
from .prompt_cache import load_prompt_cache, model_fingerprint, read_prompt_cache_info, save_prompt_cache

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
LOCK_SECONDS = 60.0  # the longest wait for another process that writes
PENDING_BYTES = 1 << 30  # caches that wait for the writer thread; more are dropped rather than kept in memory
MIN_GAIN = 16  # tokens that must be saved for a file to be worth reading, or a longer cache to be worth trimming
MAX_EXCESS = 16  # times as many tokens may be read as are used


@dataclass
class StoreCounters:
    """What happened since the start.

    Attributes:
        hits, misses: lookups that used a file, and that found none worth using.
        writes, touched: caches written, and found to be there already.
        skipped: caches not written: too large, too many waiting, lock or disk not available.
        evicted: files removed for want of room.
        corrupt: damaged files removed; none was ever used.
    """

    hits: int = 0
    misses: int = 0
    writes: int = 0
    touched: int = 0
    skipped: int = 0
    evicted: int = 0
    corrupt: int = 0


@dataclass(frozen=True)
class StoredPrompt:
    """One entry of the index.

    Attributes:
        name: of the file.
        tokens: the tokens held, int64.
        trimmable: whether its end can be dropped exactly.
        kind: `assistant`, `user` or `system`.
    """

    name: str
    tokens: np.ndarray[Any, np.dtype[np.int64]]
    trimmable: bool
    kind: str

    def usable(self, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> int:
        """How many tokens of a prompt this entry can stand for."""
        length = min(len(tokens), len(self.tokens))
        differing = np.flatnonzero(self.tokens[:length] != tokens[:length])
        common = int(differing[0]) if differing.size else length
        return common if common == len(self.tokens) or self.trimmable else 0


def group_of(model: Any) -> str:
    """The part of file names that stands for a model and what is done to its layers; reads 64 values a parameter."""
    maker = compression_of(model)
    text = f"{model_fingerprint(model)} {maker.scheme if maker else 'fp16'}"
    if maker is not None and maker.choice is not None:  # the same scheme chooses otherwise by another calibration
        text += " ".join(f" {layer.key} {layer.value}" for layer in maker.choice.layers)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class PromptStore:
    """A folder of prompt caches, at most `max_bytes` large; shared by any number of processes."""

    def __init__(self, folder: str | Path, max_bytes: int):
        """
        Args:
            folder: made if it is not there; belongs to the store: other prompt-cache files in it count and are evicted.
            max_bytes: of all files together, half-written ones included.

        Raises:
            PromptCacheFormatError: when the folder cannot be written.
        """
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.counters = StoreCounters()
        self._index: dict[str, StoredPrompt] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._make_room(0)
        except OSError as error:
            raise PromptCacheFormatError(
                f"the folder of prompt caches must be writable, got {error} for {str(folder)!r}; choose another one"
            ) from error

    def _locked(self, seconds: float = LOCK_SECONDS) -> contextlib.AbstractContextManager[Any]:
        return FileLock(self.folder / ".lock", timeout=max(0.0, seconds))

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, bytes and path of every file, half-written ones too; oldest first."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.name.endswith(SUFFIX) and entry.is_file(follow_symlinks=False):
                        status = entry.stat()
                        found.append((status.st_mtime, status.st_size, Path(entry.path)))
        return sorted(found)

    def usage(self) -> tuple[int, int]:
        """Complete files, of all models and schemes, and bytes of all files."""
        files = self._files()
        return sum(not path.name.startswith(".") for _, _, path in files), sum(size for _, size, _ in files)

    def report(self) -> dict[str, Any]:
        """Usage and counters, for people and JSON."""
        entries, nbytes = self.usage()
        return {
            "folder": str(self.folder),
            "entries": entries,
            "nbytes": nbytes,
            "max_nbytes": self.max_bytes,
            **asdict(self.counters),
        }

    # ---- writing -----------------------------------------------------------------------------------------------

    def _make_room(self, needed: int) -> None:
        """With the lock held: remove what dead writers left, then the oldest files until `needed` bytes are free."""
        files = self._files()
        for _, _, path in files:
            if path.name.startswith("."):  # complete files have no dot, and no writer but the lock's holder is alive
                path.unlink(missing_ok=True)
        complete = [item for item in files if not item[2].name.startswith(".")]
        total = sum(size for _, size, _ in complete)
        for _, size, path in complete:
            if total + needed <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            self.counters.evicted += 1
            total -= size

    def name_of(self, group: str, tokens: Sequence[int]) -> str:
        """The file name of an entry."""
        content = hashlib.blake2b(np.asarray(tokens, np.int64).tobytes(), digest_size=16).hexdigest()
        return f"{group}-{content}{SUFFIX}"

    def touch(self, name: str) -> bool:
        """Mark a file as just used; False if there is none."""
        try:
            os.utime(self.folder / name)
        except FileNotFoundError:
            return False
        return True

    def save(
        self,
        caches: list[Any],
        tokens: Sequence[int],
        model: Any,
        group: str,
        kind: str = "assistant",
        seconds: float = LOCK_SECONDS,
    ) -> bool:
        """Write an entry unless it is there, waiting `seconds` for other writers; returns whether it is there then.

        Never raises. Costs one write, one read (the digest) and one fsync of the packed size.
        """
        name = self.name_of(group, tokens)
        if self.touch(name):
            self.counters.touched += 1
            return True
        needed = _file_nbytes(caches, tokens)
        try:
            if needed > self.max_bytes:
                log.info("kvq: a prompt cache of %d bytes is larger than the disk tier and was dropped", needed)
                self.counters.skipped += 1
                return False
            with self._locked(seconds):
                self._make_room(needed)
                metadata = {"kind": kind, "trimmable": "1" if can_trim_prompt_cache(caches) else ""}
                save_prompt_cache(self.folder / name, caches, model=model, token_ids=tokens, metadata=metadata)
                self._make_room(0)
        except (OSError, PromptCacheError, Timeout, RuntimeError) as error:
            log.warning("kvq: a prompt cache was not written to %s: %s", self.folder, error)
            self.counters.skipped += 1
            return False
        self.counters.writes += 1
        return True

    # ---- reading -----------------------------------------------------------------------------------------------

    def _refresh(self, group: str) -> Iterator[StoredPrompt]:
        """The entries of a group that are there now; reads the headers of new files."""
        try:
            names = {name for name in os.listdir(self.folder) if name.startswith(f"{group}-") and name.endswith(SUFFIX)}
        except OSError as error:
            log.warning("kvq: the disk tier cannot be read: %s", error)
            names = set()
        for name in [name for name in self._index if name.startswith(f"{group}-") and name not in names]:
            del self._index[name]
        for name in names:
            if name not in self._index:
                try:
                    info = read_prompt_cache_info(self.folder / name)
                except PromptCacheError as error:
                    self._discard(name, error)
                    continue
                tokens = np.asarray(info.token_ids, np.int64)
                trimmable, kind = bool(info.metadata.get("trimmable")), info.metadata.get("kind", "assistant")
                self._index[name] = StoredPrompt(name, tokens, trimmable, kind)
            yield self._index[name]

    def _discard(self, name: str, error: Exception) -> None:
        """A file that cannot be used: removed if it is damaged, ignored if it is gone or of a newer format."""
        self._index.pop(name, None)
        path = self.folder / name
        if isinstance(error, PromptCacheFormatError | PromptCacheCorruptError) and path.exists():
            log.warning("kvq: removed a damaged prompt cache: %s", error)
            self.counters.corrupt += 1
            path.unlink(missing_ok=True)

    def fetch(
        self, tokens: Sequence[int], model: Any, group: str, have: int = 0
    ) -> tuple[list[Any], StoredPrompt, int] | None:
        """The caches of the entry that saves most, read and checked, or `None`; never raises.

        Args:
            tokens: the prompt; at most all but the last token are used.
            model: the model that goes on with it.
            group: of the model.
            have: tokens that are in memory anyway.

        Returns:
            Caches, their entry, and how many of its tokens the prompt shares: beyond these they must be trimmed.
        """
        wanted = np.asarray(tokens, np.int64)[:-1]
        candidates = [(entry.usable(wanted), entry) for entry in self._refresh(group)]
        useful = [
            (count, entry)
            for count, entry in candidates
            if count - have >= MIN_GAIN and count * MAX_EXCESS >= len(entry.tokens)
        ]
        for count, entry in sorted(useful, key=lambda item: (-item[0], len(item[1].tokens))):
            try:
                caches, info = load_prompt_cache(self.folder / entry.name, model)
            except (OSError, PromptCacheError, RuntimeError, ValueError, KeyError) as error:
                self._discard(entry.name, error)
                continue
            if not np.array_equal(np.asarray(info.token_ids, np.int64), entry.tokens):
                continue
            self.touch(entry.name)
            self.counters.hits += 1
            return caches, entry, count
        self.counters.misses += 1
        return None


def _file_nbytes(caches: list[Any], tokens: Sequence[int]) -> int:
    """An upper bound of an entry's file: arrays, token ids, and the header's texts."""
    arrays: int = sum(cache.nbytes for cache in caches)
    return arrays + 16 * len(tokens) + (1 << 14) * (len(caches) + 4)


class StoreWriter:
    """A thread that writes to a store, so that generation does not wait for the disk."""

    def __init__(self, store: PromptStore, pending_bytes: int = PENDING_BYTES):
        self.store, self.pending_bytes = store, pending_bytes
        self._jobs: deque[tuple[int, Callable[[], bool]]] = deque()
        self._waiting = 0  # bytes of caches in _jobs and in the one being written
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="kvq-store", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Bytes of caches that are not written yet."""
        return self._waiting

    def put(self, caches: list[Any], tokens: Sequence[int], model: Any, group: str, kind: str) -> None:
        """Hand over caches that nobody changes any more; evaluates them here, in the thread they belong to."""
        nbytes = sum(cache.nbytes for cache in caches)
        if self._waiting and self._waiting + nbytes > self.pending_bytes:
            log.info("kvq: the disk is slow, a prompt cache of %d bytes was dropped", nbytes)
            self.store.counters.skipped += 1
            return
        mx.eval([cache.state for cache in caches])
        kept = list(tokens)
        with self._changed:
            self._waiting += nbytes
            self._jobs.append((nbytes, lambda: self.store.save(caches, kept, model, group, kind)))
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    if self._closing:
                        mx.clear_streams()
                        return
                    self._changed.wait()
                nbytes, job = self._jobs.popleft()
            try:
                job()
            except Exception:
                log.exception("kvq: a prompt cache was not written")
            del job
            with self._changed:
                self._waiting -= nbytes
                self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until everything is written; False when the time is over before."""
        end = time.monotonic() + seconds
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting == 0, max(0.0, end - time.monotonic()))

    def close(self, seconds: float) -> None:
        """End the thread after what is being written, at most `seconds`; what waits is dropped."""
        with self._changed:
            self._jobs.clear()
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=seconds)
