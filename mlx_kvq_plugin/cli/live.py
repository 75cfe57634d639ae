"""`kvq inspect --live`: a prompt through the model, and what the probes say about its caches."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import groupby

from ..corpus import corpus_text
from ..live import STEPS, LiveReport, probe_scheme
from ..probes import Distortion, Heads, KeyNorms, LayerTiming, Skipped
from ..schemes import format_scheme, parse_scheme
from .arguments import DEFAULT_SCHEME, UsageError, add_weight_options, read_prompt
from .models import LoadedModel, load_model

MOST_TOKENS = 1024  # of the text that serves without --prompt
REPEATS = 20


def _prompt_ids(loaded: LoadedModel, prompt: str | None) -> list[int]:
    text = corpus_text("prose") if prompt is None else read_prompt(prompt)
    ids = list(loaded.tokenizer.encode(text))[: MOST_TOKENS if prompt is None else None]
    if len(ids) <= STEPS:
        raise UsageError(f"the prompt must have more than {STEPS} tokens, got {len(ids)}; give a longer text")
    return ids


def run_live(options: argparse.Namespace) -> int:
    """Print the tables, one set for each scheme.

    Args:
        options: with `model`, `kv_scheme`, `prompt`, `unknown_arch`, `float32` and `json`.
    """
    schemes = [format_scheme(parse_scheme(scheme)) for scheme in options.kv_scheme or [DEFAULT_SCHEME]]
    loaded = load_model(options.model, options.float32)
    ids = _prompt_ids(loaded, options.prompt)
    reports = [
        probe_scheme(
            loaded.model, ids, scheme, unknown_arch=options.unknown_arch, source=loaded.source, repeats=REPEATS
        )
        for scheme in dict.fromkeys(schemes)
    ]
    if options.json:
        facts = [
            {
                "scheme": report.scheme,
                "tokens": report.tokens,
                "key_norms": [asdict(row) for row in report.norms],
                "distortion": [asdict(row) for row in report.distortions],
                "timing": [asdict(row) for row in report.timings],
            }
            for report in reports
        ]
        print(json.dumps({"model": loaded.source, "live": facts}, indent=2))
        return 0
    for i, report in enumerate(reports):
        print(("\n" if i else "") + f"{loaded.source}: {report.tokens} tokens, scheme {report.scheme}")
        _print_report(report)
    return 0


def _print_report(report: LiveReport) -> None:
    print(
        "\nnorms of keys, the mean key's share of their energy (means of KV heads; largest of all), and energy of the "
        "strongest\nchannel over the average one (the worst head)"
    )
    print("layer  heads       mean    largest  over median  share  after the frame  channel  after the frame")
    for norms in report.norms:
        if isinstance(norms, KeyNorms):
            after = "-" if norms.framed_mean_share is None else f"{_mean(norms.framed_mean_share):.1%}"
            framed = "-" if norms.framed_channel_peak is None else f"{max(norms.framed_channel_peak):.1f}x"
            print(
                f"{norms.index:5d} {len(norms.mean):6d} {_mean(norms.mean):10.2f} {max(norms.largest):10.2f} "
                f"{max(norms.largest_to_median):11.2f}x {_mean(norms.mean_share):6.1%} {after:>16s} "
                f"{max(norms.channel_peak):7.1f}x {framed:>16s}"
            )
    print(
        "\nrelative squared errors of the tokens that are packed next (means of KV heads; the worst head in brackets)"
    )
    print("layer tokens               keys             values             scores")
    for errors in report.distortions:
        if isinstance(errors, Distortion):
            cells = (errors.keys, errors.values, errors.scores)
            print(f"{errors.index:5d} {errors.tokens:6d}" + "".join(f"{_worst(cell):>19s}" for cell in cells))
    print(f"\nattention of one token (median of {REPEATS} runs)")
    print("layer  query heads  tokens  packed         us")
    for timing in report.timings:
        if isinstance(timing, LayerTiming):
            counts = f"{timing.heads:12d} {timing.tokens:7d} {timing.packed:7d}"
            print(f"{timing.index:5d} {counts} {timing.seconds * 1e6:10.1f}")
    _print_skipped(report)


def _print_skipped(report: LiveReport) -> None:
    """Entries that a probe left out, consecutive ones with one reason in a line."""
    rows = [*report.norms, *report.distortions, *report.timings]
    skipped = {row.index: row.reason for row in rows if isinstance(row, Skipped)}
    runs = groupby(enumerate(sorted(skipped.items())), lambda item: (item[1][1], item[1][0] - item[0]))
    for i, ((reason, _), run) in enumerate(runs):
        indices = [index for _, (index, _) in run]
        span = f"layers {indices[0]}-{indices[-1]}" if len(indices) > 1 else f"layer {indices[0]}"
        print(("" if i else "\n") + f"{span} left out: {reason}")


def _mean(numbers: Heads) -> float:
    return sum(numbers) / len(numbers)


def _worst(numbers: Heads | None) -> str:
    return "-" if numbers is None else f"{_mean(numbers):.5f} ({max(numbers):.5f})"


def add_live_options(parser: argparse.ArgumentParser) -> None:
    """`--live`, its prompt and how it holds the weights."""
    parser.add_argument(
        "--live",
        action="store_true",
        help="run a prompt, then show norms of keys, errors of encoding and times of attention by layer",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT|-|@FILE",
        help=f"for --live (default: the first {MOST_TOKENS} tokens of a text that comes with this package)",
    )
    add_weight_options(parser)
