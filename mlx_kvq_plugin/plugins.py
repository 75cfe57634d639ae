"""Discovery by entry points: a pure function of what is installed; a plugin is loaded when it is asked for."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import PluginError


def _describe(entry: EntryPoint) -> str:
    origin = entry.dist.name if entry.dist is not None else "an unknown distribution"
    return f"{entry.value} from {origin}"


@cache
def _entries(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        same = found.setdefault(entry.name, [])
        if all(_describe(entry) != _describe(other) for other in same):  # one install seen twice on sys.path
            same.append(entry)
    return {name: tuple(entries) for name, entries in found.items()}


def refresh() -> None:
    """Forget what was discovered, e.g. after installing a plugin into the running process."""
    _entries.cache_clear()


def plugin_names(group: str) -> list[str]:
    """Names that entry points of `group` offer, sorted; nothing is loaded."""
    return sorted(_entries(group))


def plugin_entries(group: str, name: str) -> tuple[EntryPoint, ...]:
    """The entry points of a name; several where distributions claim it together."""
    return _entries(group).get(name, ())


def plugin_origin(group: str, name: str) -> str:
    """`module:attribute from distribution` of an entry point, for reports."""
    return " and ".join(_describe(entry) for entry in _entries(group)[name])


def load_plugin(group: str, name: str) -> Any:
    """Load one entry point.

    Raises:
        PluginError: when the name is unknown, offered twice, or its import fails.
    """
    entries = _entries(group).get(name, ())
    if not entries:
        known = ", ".join(plugin_names(group)) or "none (is mlx-kvq-plugin installed, not only on the path?)"
        raise PluginError(f"entry point {name!r} must exist in group {group}; installed are {known}")
    if len(entries) > 1:
        raise PluginError(
            f"entry point {name!r} in group {group} must have one owner, got "
            + " and ".join(_describe(entry) for entry in entries)
            + "; uninstall one of them"
        )
    try:
        return entries[0].load()
    except Exception as error:
        raise PluginError(
            f"entry point {name!r} ({_describe(entries[0])}) must import, got "
            f"{type(error).__name__}: {error}; fix or uninstall that plugin"
        ) from error
