"""`kvq plugins`: what is installed, and whether it loads."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from itertools import groupby
from typing import Any

from ..inventory import Plugin, list_plugins
from .arguments import add_command

OWN = "mlx-kvq-plugin"
_NAMES = {
    "adapter": ("adapter", "adapters"),
    "codec": ("codec family", "codec families"),
    "schemes": ("table of schemes", "tables of schemes"),
}

EXAMPLES = """  kvq plugins
  kvq plugins --json"""


def add_commands(commands: Any) -> None:
    """Add the command."""
    summary = (
        "List adapters, codecs and schemes, where they come from and whether they load. Exit code 1 says that one of "
        "them cannot be used."
    )
    command = add_command(commands, "plugins", run_plugins, summary, EXAMPLES)
    command.add_argument("--json", action="store_true", help="all of them as JSON")


def run_plugins(options: argparse.Namespace) -> int:
    """Print the table."""
    found = list_plugins()
    if options.json:
        print(json.dumps([asdict(plugin) for plugin in found], indent=2))
    else:
        for (name, version), group in groupby(
            sorted(found, key=_place), key=lambda own: (own.distribution, own.version)
        ):
            print("\n".join(_section(f"{name} {version}".strip() or "unknown distribution", list(group))))
    return 1 if any(plugin.problem for plugin in found) else 0


def _place(plugin: Plugin) -> tuple[bool, str, str, str]:
    return plugin.distribution != OWN, plugin.distribution, plugin.kind, plugin.name


def _section(title: str, plugins: list[Plugin]) -> list[str]:
    """The lines of one distribution; of this package's own entry points only those that do not load."""
    counts = Counter(plugin.kind for plugin in plugins)
    sums = ", ".join(f"{count} {_NAMES[kind][count > 1]}" for kind, count in counts.items())
    shown = [plugin for plugin in plugins if plugin.problem or plugin.distribution != OWN]
    broken = sum(bool(plugin.problem) for plugin in plugins)
    lines = [f"{title}: {sums}; {f'{broken} cannot be used' if broken else 'all load'}"]
    widths = [max((len(getattr(plugin, field)) for plugin in shown), default=0) for field in ("name", "value")]
    for plugin in shown:
        what = f"  {plugin.kind:8s} {plugin.name:{widths[0]}s}  {plugin.value:{widths[1]}s}"
        lines.append(f"{what}  {plugin.problem or ', '.join(plugin.offers) or 'ok'}")
    return lines
