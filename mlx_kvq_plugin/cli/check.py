"""`kvq check`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from ..checking import IDENTITY, LEAST_TOKENS, MAX_KL, Check, check_model
from ..progress import progress_bar
from ..schemes import format_scheme, parse_scheme
from .arguments import (
    DEFAULT_SCHEME,
    MODEL_HELP,
    UsageError,
    add_arch_option,
    add_command,
    add_progress_option,
    add_weight_options,
    positive,
)
from .models import load_model


def _run_check(options: argparse.Namespace) -> int:
    schemes = [format_scheme(parse_scheme(scheme)) for scheme in options.kv_scheme]  # before the weights are read
    if options.tokens < LEAST_TOKENS:
        raise UsageError(f"--tokens must be at least {LEAST_TOKENS}, got {options.tokens}; fewer would not be packed")
    width = max(len(scheme) for scheme in [IDENTITY, *schemes])

    def show(check: Check) -> None:
        if not options.json:
            print(check.row(width), flush=True)

    loaded = load_model(options.model, options.float32)
    with progress_bar(options.progress) as progress:
        report = check_model(
            loaded.model,
            loaded.tokenizer,
            schemes,
            tokens=options.tokens,
            unknown_arch=options.unknown_arch,
            source=loaded.source,
            max_kl=options.max_kl,
            done=show,
            progress=progress,
        )
    if options.json:
        found = {"model": loaded.source, "tokens": options.tokens, "passed": report.passed, **asdict(report)}
        print(json.dumps(found, indent=2))
    else:
        print(report.summary())
    return 0 if report.passed else 1


def _nats(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def add_commands(commands: Any) -> None:
    """Add `check`."""
    parser = add_command(
        commands,
        "check",
        _run_check,
        "Check compressed caches on a model. First the identity codec, whose logits must equal those of mlx-lm's own "
        "caches bit for bit: prefill, steps, batches, trimming, files, copies, threads. Then each scheme in the same "
        "ways, and what it costs. Exit code 1 says that something failed.",
        "  kvq check demo:smollm2\n"
        "  kvq check mlx-community/Qwen3-8B-4bit --kv-scheme tq4 rvq1,edges=2\n"
        "  kvq check demo:gemma3 --tokens 600 --json > report.json",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--kv-scheme",
        metavar="SCHEME",
        nargs="+",
        default=[DEFAULT_SCHEME],
        help=f"one or more, see kvq schemes (default: {DEFAULT_SCHEME})",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        default=256,
        metavar="N",
        help="how many are fed; more than a sliding window to check past it (default: 256)",
    )
    parser.add_argument(
        "--max-kl",
        type=_nats,
        default=MAX_KL,
        metavar="X",
        help=f"a scheme fails above this mean divergence from mlx-lm's caches, in nats a token (default: {MAX_KL:g})",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object at the end")
    add_arch_option(parser)
    add_weight_options(parser)
    add_progress_option(parser)
