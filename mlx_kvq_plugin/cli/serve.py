"""`kvq serve`: mlx-lm's server on compressed caches."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from mlx_lm import server
from mlx_lm.utils import _parse_size

from ..hook import LoadHook
from ..prompt_store import PromptStore
from ..serving import serve
from .arguments import DEFAULT_SCHEME, MODEL_HELP, UsageError, add_arch_option, add_command, add_weight_options
from .models import resolve_model
from .run import option_value, program, refuse_options, with_demo_models

DISK_BYTES = "10GB"

_REFUSED = {
    "--kv-bits": "mlx-lm's --kv-bits cannot work on compressed caches; choose the bits with --kv-scheme",
    "--kv-group-size": "mlx-lm's --kv-group-size goes with its --kv-bits; choose a codec with --kv-scheme",
    "--quantized-kv-start": "mlx-lm's --quantized-kv-start goes with its --kv-bits; choose with --kv-scheme",
}


def _size(text: str) -> int:
    """Bytes, as mlx_lm.server's --prompt-cache-bytes reads them: 500MB, 10G."""
    try:
        return int(_parse_size(text))
    except (ArithmeticError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"must be a size as 500MB or 10G, got {text!r}") from error


def _print_server_help() -> None:
    print("\noptions of mlx_lm.server, which work here too (except --kv-bits and its companions):\n", flush=True)
    with program("kvq serve MODEL", ["--help"]), contextlib.suppress(SystemExit):
        server.main()


def _model_arguments(rest: list[str]) -> list[str]:
    """mlx_lm.server's arguments, with MODEL as --model."""
    refuse_options(rest, _REFUSED)
    if rest and not rest[0].startswith("-"):
        if option_value(rest, "--model") is not None:
            raise UsageError(f"the model must be given once, got {rest[0]!r} and --model; leave one of them out")
        return ["--model", resolve_model(rest[0]), *with_demo_models(rest[1:])]
    return with_demo_models(rest)


def _run(options: argparse.Namespace) -> int:
    argv = _model_arguments(options.rest)
    if options.prompt_cache_disk_bytes is not None and options.prompt_cache_dir is None:
        raise UsageError("--prompt-cache-disk-bytes must go with --prompt-cache-dir, got no folder; name one")
    hook = LoadHook(options.kv_scheme, unknown_arch=options.unknown_arch, float32=options.float32)
    store = None
    if options.prompt_cache_dir is not None:
        limit = options.prompt_cache_disk_bytes
        folder = Path(options.prompt_cache_dir).expanduser()
        store = PromptStore(folder, _size(DISK_BYTES) if limit is None else limit)
    try:
        serve(argv, hook, store)
    except SystemExit as end:  # mlx-lm's parser
        return end.code if isinstance(end.code, int) else 2
    return 0


def add_commands(commands: Any) -> None:
    """Add `serve`."""
    parser = add_command(
        commands,
        "serve",
        _run,
        "Serve a model over HTTP (OpenAI's API) with compressed KV caches. This is mlx_lm.server with continuous "
        "batching and prefix reuse; all of its options work. GET /v1/kvq tells what the caches hold. SIGTERM and "
        "Ctrl-C stop it in order.",
        "  kvq serve mlx-community/Qwen3-8B-4bit --kv-scheme tq4 --port 8080\n"
        "  kvq serve demo:smollm2 --kv-scheme rvq1 --prompt-cache-bytes 2GB\n"
        "  kvq serve demo:smollm2 --prompt-cache-dir ~/.cache/kvq-prompts --prompt-cache-disk-bytes 20GB\n"
        "  curl localhost:8080/v1/kvq",
    )
    parser.usage = "kvq serve [MODEL] [options] [options of mlx_lm.server]"
    parser.add_argument_group("model", f"MODEL comes before all options of mlx_lm.server: {MODEL_HELP}")
    parser.add_argument("--kv-scheme", metavar="SCHEME", default=DEFAULT_SCHEME, help="see kvq schemes (default: tq4)")
    add_arch_option(parser)
    add_weight_options(parser)
    parser.add_argument(
        "--prompt-cache-dir",
        metavar="DIR",
        help="keep prompt caches that leave memory in this folder, and find them again after a restart",
    )
    parser.add_argument(
        "--prompt-cache-disk-bytes",
        type=_size,
        metavar="N",
        help=f"size of that folder, as 500MB or 10G; the least recently used go (default: {DISK_BYTES})",
    )
    known = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        found, rest = known(args, namespace)
        found.rest = rest  # mlx-lm's parser judges these
        return found, []

    print_own = parser.print_help

    def print_help(file: Any = None) -> None:
        print_own(file)
        _print_server_help()

    setattr(parser, "parse_known_args", parse_known_args)  # noqa: B010
    setattr(parser, "print_help", print_help)  # noqa: B010
