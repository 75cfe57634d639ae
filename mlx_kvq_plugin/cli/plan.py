"""`kvq plan`: bytes of the KV cache by scheme and context, and which context fits, from config.json alone."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from mlx_lm.utils import load_config

from ..config import FP16
from ..layouts import STEPS
from ..planning import SchemePlan, adapter_of, longest_context, plan_scheme
from ..schemes import format_scheme, parse_scheme
from ..skeleton import Weights, estimate_weights, model_dtype, model_skeleton, trained_positions
from .arguments import MODEL_HELP, UsageError, add_arch_option, add_command, one_line, positive
from .models import resolve_model

CONFIG = "config.json"
MOST_TOKENS = 1 << 24  # no context is searched beyond: a model of sliding layers alone has no limit
DEFAULT_SCHEMES = ("tq4", "rvq1")
DEFAULT_CONTEXTS = ("8k", "32k", "128k")

MEMORY, POSITIONS, NONE = "memory", "positions", "none"  # what ends the longest context

_TOKENS = re.compile(r"(\d+)([kKmM]?)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", re.IGNORECASE)


@dataclass(frozen=True)
class Longest:
    """The longest context of a scheme.

    Attributes:
        tokens: of each sequence.
        limit: what ends it: `memory`, `positions` (those of the model), or `none` below `MOST_TOKENS`.
    """

    tokens: int
    limit: str

    def __str__(self) -> str:
        if not self.tokens:
            return "does not fit"
        return f"{self.tokens}" + {MEMORY: "", POSITIONS: " (all positions)", NONE: " or more"}[self.limit]


def token_count(text: str) -> int:
    """Tokens: `8192`, `8k` (times 1024) or `1M` (times 1024 * 1024)."""
    found = _TOKENS.fullmatch(text)
    count = int(found[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[found[2].lower()] if found else 0
    if not 1 <= count <= MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"must be 1 to 16M tokens such as 8192, 8k or 1M, got {text!r}")
    return count


def byte_size(text: str) -> int:
    """Bytes: `24GB` is 24 * 10^9, `24GiB` is 24 * 2^30; also with K, M and T."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"must be a size such as 24GB (10^9 bytes) or 24GiB (2^30), got {text!r}")
    power = "KMGT".index(found[2].upper()) + 1
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def read_config(name: str) -> tuple[str, dict[str, Any]]:
    """A model's source and config; of a repository nothing but config.json is downloaded."""
    source = resolve_model(name)
    try:
        folder = Path(source) if Path(source).is_dir() else Path(hf_hub_download(source, CONFIG)).parent
        config = load_config(folder)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{CONFIG} of the model {name!r} must be readable, got {type(error).__name__} ({one_line(error)}); "
            "check the name and the file"
        ) from error
    if not isinstance(config, dict):
        raise UsageError(f"{CONFIG} of the model {name!r} must be a JSON object, got another value; check the file")
    return source, config


def _longest(plan: SchemePlan, budget: int, positions: int | None, batch: int, steps: int) -> Longest:
    most = positions if positions is not None else MOST_TOKENS
    tokens = longest_context(lambda count: plan.peak_nbytes(count, batch=batch, steps=steps), budget, most)
    return Longest(tokens, MEMORY if tokens < most else POSITIONS if positions is not None else NONE)


def _run(options: argparse.Namespace) -> int:
    schemes = [parse_scheme(scheme) for scheme in options.kv_scheme or DEFAULT_SCHEMES]
    configs = {format_scheme(scheme): scheme for scheme in (parse_scheme(FP16), *schemes)}
    source, config = read_config(options.model)
    model = model_skeleton(config)
    adapter = adapter_of(model, options.unknown_arch)
    itemsize = model_dtype(config).size
    plans = [plan_scheme(model, scheme, adapter, itemsize) for scheme in configs.values()]
    weights = estimate_weights(model, config)  # after the plans: it quantizes the skeleton
    positions, batch, steps = trained_positions(config), options.batch, options.generated
    budget = options.cache_memory
    if options.memory is not None:
        budget = options.memory - weights.nbytes
    longest = [
        None if budget is None or plan.error else _longest(plan, budget, positions, batch, steps) for plan in plans
    ]
    if options.json:
        report = {
            "model": source,
            "model_type": model.model_type,
            "positions": positions,
            "weights": {**asdict(weights), "bits": weights.bits},
            "itemsize": itemsize,
            "batch": batch,
            "generated": steps,
            "memory": options.memory,
            "cache_memory": budget,
            "uncounted_entries": plans[0].uncounted,
            "schemes": [_facts(plan, found, options) for plan, found in zip(plans, longest, strict=True)],
        }
        print(json.dumps(report, indent=2))
        return 0
    print(f"{source}: model type {model.model_type}, {len(plans[0].layers)} cache entries, {_positions(positions)}")
    _print_budget(weights, options.memory, budget)
    _print_table(plans, longest, options, positions, itemsize)
    return 0


def _facts(plan: SchemePlan, longest: Longest | None, options: argparse.Namespace) -> dict[str, Any]:
    asked = {"batch": options.batch, "steps": options.generated}
    sizes = {str(tokens): plan.nbytes(tokens, **asked) for tokens in options.context} if not plan.error else {}
    peaks = {str(tokens): plan.peak_nbytes(tokens, **asked) for tokens in options.context} if not plan.error else {}
    return {
        "scheme": plan.scheme,
        "error": plan.error,
        "nbytes": sizes,
        "peak_nbytes": peaks,
        "longest": asdict(longest) if longest is not None else None,
    }


def _positions(positions: int | None) -> str:
    return f"{positions} positions" if positions else f"positions not said in {CONFIG}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def _print_budget(weights: Weights, memory: int | None, budget: int | None) -> None:
    kind = f", {weights.quantization}" if weights.quantization else ""
    print(
        f"weights: about {_size(weights.nbytes)} ({weights.parameters / 1e9:.2f} billion parameters of "
        f"{weights.bits:.2f} bits{kind}), estimated from {CONFIG}"
    )
    if memory is not None and budget is not None:
        left = f"{_size(budget)} of them for the cache" if budget > 0 else "too little for the weights"
        print(f"memory: {_size(memory)}, {left}; what the computation itself needs is not counted")
    elif budget is not None:
        print(f"memory: {_size(budget)} for the cache alone")


def _print_table(
    plans: Sequence[SchemePlan],
    longest: Sequence[Longest | None],
    options: argparse.Namespace,
    positions: int | None,
    itemsize: int,
) -> None:
    batch, steps = options.batch, options.generated
    whose = "one sequence" if batch == 1 else f"{batch} sequences, each of so many tokens"
    print(
        f"\nKV cache of {whose} (and ratio to fp16), the last {steps} tokens generated, "
        f"{8 * itemsize}-bit keys and values"
    )
    width = max(20, *(len(plan.scheme) for plan in plans))
    beyond = [positions is not None and tokens > positions for tokens in options.context]
    names = [f"{tokens}{'*' if far else ''}" for tokens, far in zip(options.context, beyond, strict=True)]
    last = [] if longest[0] is None else ["longest context"]
    print(f"{'scheme':{width}s}" + "".join(f"{name:>20s}" for name in names) + "".join(f"  {name}" for name in last))
    dense = [plans[0].nbytes(tokens, batch=batch, steps=steps) for tokens in options.context]
    for plan, found in zip(plans, longest, strict=True):
        cells = []
        for tokens, stock in zip(options.context, dense, strict=True):
            nbytes = 0 if plan.error else plan.nbytes(tokens, batch=batch, steps=steps)
            cells.append("-" if plan.error else f"{_size(nbytes)} ({stock / max(nbytes, 1):.2f}x)")
        end = f"  {found}" if found is not None else ""
        print(f"{plan.scheme:{width}s}" + "".join(f"{cell:>20s}" for cell in cells) + end)
    for plan in plans:
        if plan.error:
            print(f"scheme {plan.scheme} is not possible: {plan.error}")
    if any(beyond):
        print(f"* more than the {positions} positions of the model")
    if plans[0].uncounted:
        print(f"{plans[0].uncounted} entries have recurrent states, which do not grow; these are not counted")


def add_commands(commands: Any) -> None:
    """Add `plan`."""
    plan = add_command(
        commands,
        "plan",
        _run,
        "Say how large a model's KV cache gets and which context fits the memory. Needs config.json only: of a "
        "repository nothing else is downloaded. Bytes are those that the caches allocate; the longest context counts "
        "the most that they hold on the way there.",
        "  kvq plan mlx-community/Qwen3-8B-4bit --memory 16GB\n"
        "  kvq plan ./model --context 8k 32k 1M --kv-scheme tq4 --kv-scheme rvq1,edges=2 --batch 4\n"
        "  kvq plan demo:gemma3 --cache-memory 64MiB --json",
    )
    plan.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    plan.add_argument(
        "--context",
        type=token_count,
        nargs="+",
        default=[token_count(text) for text in DEFAULT_CONTEXTS],
        metavar="N",
        help=f"tokens of a sequence; k and M are 1024 and 1024 * 1024 (default: {' '.join(DEFAULT_CONTEXTS)})",
    )
    plan.add_argument(
        "--kv-scheme",
        action="append",
        metavar="SCHEME",
        help=f"may be given several times (default: {' and '.join(DEFAULT_SCHEMES)}); fp16 is always shown",
    )
    memory = plan.add_mutually_exclusive_group()
    memory.add_argument(
        "--memory",
        type=byte_size,
        metavar="SIZE",
        help="for weights and cache together: 24GB is 24 * 10^9 bytes, 24GiB is 24 * 2^30",
    )
    memory.add_argument("--cache-memory", type=byte_size, metavar="SIZE", help="for the cache alone")
    plan.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences at a time (default: 1)")
    plan.add_argument(
        "--generated",
        type=positive,
        default=STEPS,
        metavar="N",
        help=f"how many of the tokens come singly, after the prompt (default: {STEPS})",
    )
    add_arch_option(plan)
    plan.add_argument("--json", action="store_true", help="one JSON object")
