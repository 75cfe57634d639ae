"""The `kvq` command: one file per group of commands, each with an `add_commands(commands)`.

Exit codes: 0, 2 for wrong input (one sentence on stderr), 1 for a prompt-cache file that fails `kvq cache verify`, a
model that fails `kvq check` or a codec that fails `kvq validate`, 130 after an interrupt, 141 when the reader of stdout
is gone.
"""

from __future__ import annotations

import os
import shlex
import sys
from importlib.metadata import version

from ..errors import KVQError
from . import (
    calibrate,
    check,
    completion,
    evaluate,
    generate,
    models,
    plan,
    prompts,
    report,
    run,
    schemes,
    serve,
    theory,
)
from .arguments import Parser, complain

INTERRUPTED, BROKEN_PIPE = 130, 141  # as shells count signals: 128 + SIGINT, 128 + SIGPIPE


def _parser() -> Parser:
    parser = Parser(
        prog="kvq",
        description="KV-cache compression for mlx-lm.",
        epilog="kvq COMMAND --help describes a command and shows examples.",
        allow_abbrev=False,
    )
    versions = f"kvq {version('mlx-kvq-plugin')} (mlx-lm {version('mlx-lm')}, mlx {version('mlx')})"
    parser.add_argument("--version", action="version", version=versions)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    groups = (generate, prompts, schemes, plan, report, models, run, serve, check, evaluate, calibrate, theory)
    for group in groups:
        group.add_commands(commands)
    completion.add_commands(commands, parser)
    return parser


def _run(argv: list[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
        arguments.command_line = shlex.join(["kvq", *(sys.argv[1:] if argv is None else argv)])
        code: int = arguments.run(arguments)
        return code
    except KVQError as error:
        complain(error)
        return 2
    finally:
        if sys.stdout is not None:  # it is when closed by the caller
            sys.stdout.flush()  # here a broken pipe can still be caught


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. `--help` and `--version` raise `SystemExit(0)` as argparse does."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
        return BROKEN_PIPE
