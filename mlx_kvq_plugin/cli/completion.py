"""`kvq completion`: what shells need to complete commands, options, schemes and paths."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from .arguments import add_command

SHELLS = ("bash", "zsh", "fish")
AUTO_EXAMPLES = ("auto@2.25", "auto@3.25", "auto@4.25")

EXAMPLES = """  source <(kvq completion bash)                       # for this shell
  kvq completion bash > ~/.local/share/bash-completion/completions/kvq
  kvq completion zsh > "${fpath[1]}/_kvq"
  kvq completion fish > ~/.config/fish/completions/kvq.fish"""


def add_commands(commands: Any, parser: argparse.ArgumentParser) -> None:
    """Add the command; `parser` is the whole, which is completed."""

    def run(arguments: argparse.Namespace) -> int:
        print(script(parser, arguments.shell))
        return 0

    summary = "Print a script with which a shell completes kvq's commands, options, schemes and paths"
    command = add_command(commands, "completion", run, summary, EXAMPLES)
    command.add_argument("shell", choices=SHELLS, metavar="SHELL", help=" or ".join(SHELLS))


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script of a shell. Schemes are those of all plugins that are installed now."""
    import shtab

    from ..schemes import list_schemes

    names = [row.name for row in list_schemes(128)] + list(AUTO_EXAMPLES)
    schemes = shtab.cmd(f"printf '%s\\n' {' '.join(names)}")
    completions: dict[Any, Any] = {
        "SCHEME": schemes,
        "FILE": shtab.FILE,
        "MODEL": shtab.DIRECTORY,
        "DIR": shtab.DIRECTORY,
    }
    for action in _actions(parser):
        found = completions.get(action.metavar)
        if found is not None:
            action.complete = found  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell=shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
