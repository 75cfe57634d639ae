"""`kvq run`: mlx-lm's own tools with compressed caches."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..demo_models import DEMO
from ..hook import LoadHook, compressed_loading
from .arguments import DEFAULT_SCHEME, UsageError, add_arch_option, add_command, add_weight_options
from .models import resolve_model

TOOLS = ("benchmark", "cache_prompt", "chat", "evaluate", "generate")

# What other tools, and options of these, would do to a promise of compressed caches.
_NO_CACHE = {
    "perplexity": "mlx_lm.perplexity feeds whole texts to the model and never uses a cache, so a scheme would change "
    "nothing; measure a scheme with benchmarks/quality.py or mlx_lm.evaluate",
    "server": "the server has a command of its own, with a report and a disk tier; use kvq serve",
}
_OPTIONS = {
    "--kv-bits": "mlx-lm's --kv-bits cannot work on compressed caches; choose the bits with --kv-scheme",
    "--max-kv-size": "mlx-lm ignores --max-kv-size for models that make their own caches, and compressed models do; "
    "leave it out",
}
_MODEL_OPTIONS = ("--model", "--draft-model")


def option_value(argv: list[str], name: str) -> str | None:
    """The last value of `--name value` or `--name=value`."""
    found = None
    for i, argument in enumerate(argv):
        if argument == name and i + 1 < len(argv):
            found = argv[i + 1]
        elif argument.startswith(f"{name}="):
            found = argument.partition("=")[2]
    return found


def refuse_options(argv: list[str], refused: dict[str, str]) -> None:
    """Raise `UsageError` for the first refused option, also where argparse would complete it."""
    for argument in argv:
        name = argument.partition("=")[0]
        for option, reason in refused.items():
            if name == option or (len(name) > 5 and option.startswith(name)):
                raise UsageError(f"{reason} (got {name})")


def with_demo_models(argv: list[str]) -> list[str]:
    """The arguments with `demo:` models as folders."""
    resolved = list(argv)
    for i, argument in enumerate(resolved):
        name, equals, value = argument.partition("=")
        if name not in _MODEL_OPTIONS:
            continue
        if equals and value.startswith(DEMO):
            resolved[i] = f"{name}={resolve_model(value)}"
        elif not equals and i + 1 < len(resolved) and resolved[i + 1].startswith(DEMO):
            resolved[i + 1] = resolve_model(resolved[i + 1])
    return resolved


@contextmanager
def program(name: str, argv: list[str]) -> Iterator[None]:
    """`sys.argv` of a program, for the time of the context."""
    before, sys.argv = sys.argv, [name, *argv]
    try:
        yield
    finally:
        sys.argv = before


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """The tool, without `mlx_lm.`, and its arguments."""
    if arguments[:1] == ["--"]:
        arguments = arguments[1:]
    if not arguments:
        raise UsageError(f"a tool must follow --, got nothing; write for example -- mlx_lm.{TOOLS[0]} --model MODEL")
    tool = arguments[0].removeprefix("mlx_lm.")
    if tool in _NO_CACHE:
        raise UsageError(_NO_CACHE[tool])
    if tool not in TOOLS:
        tools = ", ".join(f"mlx_lm.{name}" for name in TOOLS)
        raise UsageError(f"a tool must be one of {tools}, got {arguments[0]!r}; pick one of these")
    return tool, arguments[1:]


def _run(options: argparse.Namespace) -> int:
    tool, argv = _split(options.tool)
    refuse_options(argv, _OPTIONS)
    argv = with_demo_models(argv)
    hook = LoadHook(
        options.kv_scheme,
        unknown_arch=options.unknown_arch,
        float32=options.float32,
        draft=option_value(argv, "--draft-model"),
        source=option_value(argv, "--model") or "",
    )
    try:
        module = importlib.import_module(f"mlx_lm.{tool}")
    except ImportError as error:
        raise UsageError(f"mlx_lm.{tool} must be importable, got {error}; install what it needs") from error
    logger = logging.getLogger("mlx_kvq_plugin")
    handler = logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with program(f"mlx_lm.{tool}", argv), compressed_loading(hook):
            module.main()
    except SystemExit as end:  # argparse and the tools themselves end this way
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return 0


def add_commands(commands: Any) -> None:
    """Add `run`."""
    parser = add_command(
        commands,
        "run",
        _run,
        f"Run one of mlx-lm's tools ({', '.join(TOOLS)}) with compressed caches. What follows -- is the tool and its "
        "own arguments. Models may be demo:smollm2 or demo:gemma3 too. A draft model stays as it is.",
        "  kvq run --kv-scheme tq4 -- mlx_lm.generate --model mlx-community/Qwen3-8B-4bit --prompt hello\n"
        "  kvq run --kv-scheme rvq1 -- mlx_lm.cache_prompt --model demo:smollm2 --prompt-cache-file a.safetensors "
        "--prompt hello\n"
        "  kvq run -- mlx_lm.benchmark --model demo:smollm2 -p 512 -g 64 -b 4",
    )
    parser.add_argument("--kv-scheme", metavar="SCHEME", default=DEFAULT_SCHEME, help="see kvq schemes (default: tq4)")
    add_arch_option(parser)
    add_weight_options(parser)
    parser.add_argument("tool", nargs=argparse.REMAINDER, metavar="-- TOOL ...", help="the tool and its arguments")
