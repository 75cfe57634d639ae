"""`kvq report`: one HTML page on a model's cache: memory, quality, bits, keys and values, attention."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..calibration_files import SUFFIX, find_calibration, load_calibration
from ..config import KVQConfig
from ..page import PageFacts, gather, render_page
from ..page.facts import Request
from ..plots import require_matplotlib
from ..progress import progress_bar
from ..results import Measurement
from ..schemes import format_scheme, parse_scheme
from ..skeleton import model_dtype, trained_positions
from .arguments import (
    MODEL_HELP,
    UsageError,
    add_arch_option,
    add_command,
    add_progress_option,
    add_weight_options,
    note,
    output_file,
    positive,
)
from .evaluate import cache_dtype, now, read_texts
from .models import LoadedModel, load_model, resolve_model
from .plan import token_count

DEFAULT_SCHEMES = ("tq4", "tq3", "rvq1")
AVERAGE_SCHEME = "tq@3"  # joins them where there is a calibration
COMPARED = ("mlx-affine4",)
FIRST_CONTEXT, LAST_CONTEXT = 1024, 131072
SHORTEST, LONGEST = 96, 4096  # tokens: less would not be packed, and scores take the square of them
TOKENS, QUICK_TOKENS = 384, 160
STEPS = 6  # one token in so many is fed singly, for the quality


def _schemes(options: argparse.Namespace, found: Path | None) -> list[str]:
    """The schemes, with the calibration that was named or found written into those with average bits."""
    asked = options.kv_scheme or [*DEFAULT_SCHEMES, *([AVERAGE_SCHEME] if found else [])]
    configs = [parse_scheme(scheme) for scheme in asked]
    return list(dict.fromkeys(format_scheme(_calibrated(config, options.calibration)) for config in configs))


def _calibrated(config: KVQConfig, path: str | None) -> KVQConfig:
    if path is None or config.calibration or not config.allocated:
        return config
    return replace(config, calibration=path)


def _calibration(options: argparse.Namespace) -> Path | None:
    """The calibration that was named, or that is next to the model."""
    if options.calibration is None:
        return find_calibration(resolve_model(options.model))
    if not options.calibration.endswith(SUFFIX):
        raise UsageError(f"a calibration must be a {SUFFIX} file, got {options.calibration!r}; check the name")
    load_calibration(options.calibration)  # a wrong file fails before the weights are read
    return Path(options.calibration)


def _used(schemes: Sequence[str], found: Path | None) -> str:
    """The calibrations of the schemes with average bits."""
    configs = [config for config in map(parse_scheme, schemes) if config.allocated]
    return ", ".join(dict.fromkeys(config.calibration or str(found or "") for config in configs))


def _contexts(asked: Sequence[int] | None, positions: int | None) -> list[int]:
    """Ascending; by default powers of two up to the model's positions, at least three."""
    if asked:
        return sorted(set(asked))
    last = max(4 * FIRST_CONTEXT, min(positions or LAST_CONTEXT, LAST_CONTEXT))
    return [FIRST_CONTEXT << i for i in range((last // FIRST_CONTEXT).bit_length())]


def _read_measurement(path: str) -> Measurement:
    try:
        return Measurement.from_json(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"a measurement must be readable, got {error.strerror} for {path!r}; check the path"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UsageError(
            f"a measurement must be a file that kvq eval --json or kvq frontier --json wrote, got {path!r} with "
            f"{type(error).__name__}; make it again"
        ) from error


def _tokens(options: argparse.Namespace) -> int:
    tokens: int = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    if not SHORTEST <= tokens <= LONGEST:
        raise UsageError(f"--tokens must be {SHORTEST} to {LONGEST}, got {tokens}; choose another number")
    return tokens


def _request(
    options: argparse.Namespace, loaded: LoadedModel, schemes: Sequence[str], texts: dict[str, str], tokens: int
) -> Request:
    ids = {name: list(loaded.tokenizer.encode(text)) for name, text in texts.items()}
    if options.quick:
        ids = dict(list(ids.items())[:1])
    for name, found in ids.items():
        if len(found) < tokens:
            raise UsageError(
                f"a text must have the {tokens} tokens of the report, got {len(found)} in {name}; give a longer text "
                "or fewer --tokens"
            )
    steps = tokens // STEPS
    return Request(
        schemes=schemes,
        compared=COMPARED,
        contexts=_contexts(options.context, trained_positions(loaded.config)),
        tokens=tokens,
        texts=ids,
        prefill=tokens - steps,
        steps=steps,
        unknown_arch=options.unknown_arch,
        source=loaded.source,
    )


def _facts(options: argparse.Namespace) -> PageFacts:
    calibration = _calibration(options)
    schemes, tokens, texts = _schemes(options, calibration), _tokens(options), read_texts(options.text)
    measurement = None if options.frontier is None else _read_measurement(options.frontier)
    with progress_bar(options.progress) as progress:
        progress("loading the model", 0, 1)
        loaded = load_model(options.model, options.float32)
        about = {
            "model": options.model,
            "model_type": loaded.config.get("model_type", "unknown"),
            "positions": trained_positions(loaded.config),
            "float32": loaded.float32,
            "dtype": cache_dtype(loaded.model),
            "itemsize": model_dtype(loaded.config).size,
            "measured_file": options.frontier or "",
            "calibration": _used(schemes, calibration),
            "command": options.command_line,
            "made": now(),
        }
        return gather(loaded.model, _request(options, loaded, schemes, texts, tokens), about, measurement, progress)


def _run(options: argparse.Namespace) -> int:
    out = output_file(options.out, "report", (".html", ".htm"))
    require_matplotlib()
    facts = _facts(options)
    out.write_text(render_page(facts), encoding="utf-8")
    note(", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in facts.seconds.items()))
    print(out)
    return 0


def add_commands(commands: Any) -> None:
    """Add `report`."""
    report = add_command(
        commands,
        "report",
        _run,
        "Write one HTML page on a model's cache. It shows the memory over context, quality against bits, bits of "
        "layers and heads, norms and errors of keys and values, and the error of attention by position, all measured "
        "now. The page loads nothing from elsewhere. Takes matplotlib.",
        "  kvq report demo:smollm2\n"
        "  kvq report demo:smollm2 --quick --kv-scheme tq4 --out smollm2.html\n"
        "  kvq report ./model --calibration kvq_calibration.safetensors --kv-scheme tq@3 --kv-scheme tq3\n"
        "  kvq report ./model --frontier frontier.json --context 8k 32k 128k",
    )
    report.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    report.add_argument(
        "--kv-scheme",
        action="append",
        metavar="SCHEME",
        help=f"may be given several times (default: {', '.join(DEFAULT_SCHEMES)}, and {AVERAGE_SCHEME} with a "
        "calibration)",
    )
    report.add_argument("--out", default="report.html", metavar="FILE", help="default: report.html")
    report.add_argument(
        "--context",
        type=token_count,
        nargs="+",
        metavar="N",
        help="tokens that bytes are given for; k and M are 1024 and 1024 * 1024 (default: powers of two from 1k to the "
        "model's positions, at most 128k)",
    )
    report.add_argument(
        "--calibration", metavar="FILE", help="for average bits (default: the one next to the model, if there is one)"
    )
    report.add_argument(
        "--frontier",
        metavar="FILE",
        help="show the quality that kvq frontier --json or kvq eval --json wrote there, instead of measuring it",
    )
    report.add_argument(
        "--text",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="UTF-8 texts instead of the built-in ones",
    )
    report.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help=f"that are read of each text, the last sixth one by one for the quality (default: {TOKENS})",
    )
    report.add_argument(
        "--quick", action="store_true", help=f"one text, and {QUICK_TOKENS} tokens of it unless --tokens says otherwise"
    )
    add_arch_option(report)
    add_weight_options(report)
    add_progress_option(report)
