"""What automatic bits go by, kept between runs: files below the package's cache folder, made once and read back.

A file's name is a digest of all that its content depends on, this package's release among it. A file that cannot be
read, or is of something else, is made again; it appears by one rename, so that processes may make the same one at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

from .cache_folder import default_cache_dir, write_whole
from .errors import KVQError

log = logging.getLogger("mlx_kvq_plugin")

DISTRIBUTION = "mlx-kvq-plugin"
FOLDER = "auto"

T = TypeVar("T")
Identity = Mapping[str, Any]  # JSON

_known: dict[str, Any] = {}  # of this process, by file name
_warned: list[str] = []


@dataclass(frozen=True)
class Kept(Generic[T]):
    """A content and where it is kept; "" where it could not be."""

    content: T
    path: str


def keep(
    kind: str,
    suffix: str,
    identity: Identity,
    read: Callable[[Path], T | None],
    make: Callable[[], T],
    write: Callable[[Path, T], None],
) -> Kept[T]:
    """The content of a kept file, read once a process; made and written where there is none.

    Args:
        kind, suffix: of the file.
        identity: all that the content depends on.
        read: called with the path of a file; `None`, or a `KVQError`, says that it must be made again.
        make: makes the content.
        write: raises `OSError` or `KVQError` where it cannot write: then one warning says what to do.
    """
    of_release = [version(DISTRIBUTION), identity]  # whose caches and gradients were measured
    digest = hashlib.blake2b(json.dumps(of_release, sort_keys=True).encode(), digest_size=16).hexdigest()
    name = f"{kind}-{digest}{suffix}"
    if name not in _known:
        _known[name] = _kept(name, read, make, write)
    found: Kept[T] = _known[name]
    return found


def _kept(
    name: str, read: Callable[[Path], T | None], make: Callable[[], T], write: Callable[[Path, T], None]
) -> Kept[T]:
    try:
        path = default_cache_dir() / FOLDER / name
    except RuntimeError as error:  # there is no home directory
        _warn(error)
        return Kept(make(), "")
    found = _read(path, read)
    if found is not None:
        log.info("kvq: read %s", path)
        return Kept(found, str(path))
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, made)
    except (OSError, KVQError) as error:
        _warn(error)
        return Kept(made, "")
    log.info("kvq: kept %s", path)
    return Kept(made, str(path))


def _read(path: Path, read: Callable[[Path], T | None]) -> T | None:
    try:
        return read(path) if path.is_file() else None
    except (OSError, KVQError):
        return None


def _warn(error: Exception) -> None:
    """Once a process: what cannot be kept now cannot be kept a little later either."""
    if not _warned:
        _warned.append(str(error))
        log.warning(
            "kvq: what automatic bits go by is measured again in every process, as it cannot be kept: %s; set "
            "KVQ_CACHE_DIR to a folder that can be written",
            error,
        )


def keep_json(
    kind: str, identity: Identity, check: Callable[[Any], T], make: Callable[[], T], plain: Callable[[T], Any]
) -> Kept[T]:
    """`keep` in a JSON file, which names its identity.

    Args:
        kind, identity, make: as for `keep`.
        check: the content from JSON; raises `ValueError`, `TypeError` or `KeyError` for what is none.
        plain: its inverse.
    """
    expected = json.loads(json.dumps(identity))

    def read(path: Path) -> T | None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return check(found["content"]) if found["identity"] == expected else None
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def write(path: Path, content: T) -> None:
        write_whole(path, (json.dumps({"identity": expected, "content": plain(content)}) + "\n").encode())

    return keep(kind, ".json", identity, read, make, write)
