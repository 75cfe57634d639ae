"""What is installed: every entry point of the plugin groups, where it comes from, and whether it loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import adapters, codecs, schemes
from .errors import KVQError
from .plugins import plugin_entries, plugin_names


@dataclass(frozen=True)
class Plugin:
    """One entry point.

    Attributes:
        kind: `adapter`, `codec` or `schemes`.
        name: of the entry point: a model type, a family of codecs, what names of schemes begin with.
        value: `module:attribute`.
        distribution, version: that it was installed with; empty where that is not known.
        offers: names that users write: codecs or schemes.
        problem: why it cannot be used; empty if it can.
    """

    kind: str
    name: str
    value: str
    distribution: str
    version: str
    offers: tuple[str, ...] = ()
    problem: str = ""


def list_plugins() -> list[Plugin]:
    """Every entry point of the groups of adapters, codecs and schemes, each loaded now; sorted by group and name.

    A name that several distributions claim is listed once for each, with the problem.
    """
    found = []
    for kind, (group, load) in _GROUPS.items():
        for name in plugin_names(group):
            problem, offers = "", tuple[str, ...]()
            try:
                offers = load(name)
            except KVQError as error:
                problem = " ".join(str(error).split())
            for entry in plugin_entries(group, name):
                own = entry.dist
                origin = ("", "") if own is None else (own.name, own.version)
                found.append(Plugin(kind, name, entry.value, *origin, offers, problem))
    return found


def _adapter(name: str) -> tuple[str, ...]:
    adapters.load_adapter(name)
    return ()


def _codec(name: str) -> tuple[str, ...]:
    family = codecs.load_family(name)
    return tuple(family.family + suffix for suffix in family.suffixes)


def _schemes(name: str) -> tuple[str, ...]:
    named = schemes.named_schemes(name)
    for scheme in named:
        schemes.parse_scheme(scheme)
    return tuple(named)


_GROUPS: Mapping[str, tuple[str, Callable[[str], tuple[str, ...]]]] = {
    "adapter": (adapters.GROUP, _adapter),
    "codec": (codecs.GROUP, _codec),
    "schemes": (schemes.GROUP, _schemes),
}
