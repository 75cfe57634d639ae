"""`kvq calibrate`, `kvq push-calibration`, and what `kvq inspect --allocation` prints."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ..allocation import SENSITIVITIES, SIDES, Component, optimal_bits, predicted_gain
from ..calibration import FILE_NAME, Calibration, calibrate, load_calibration, push_calibration, save_calibration
from ..corpus import CORPUS
from ..plots import plot_allocation, require_matplotlib
from ..schemes import parse_scheme
from .arguments import MODEL_HELP, UsageError, add_command, add_weight_options, note, output_file, positive
from .models import load_model

DEFAULT_SCHEME = "tq@3"


def _texts(files: list[str]) -> list[str]:
    texts = []
    for name in files:
        try:
            texts.append(Path(name).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"a calibration text must be a readable UTF-8 file, got {name!r}: {error}") from error
    return texts


def _out(option: str | None, source: str) -> Path:
    if option is not None:
        return output_file(option)
    if not Path(source).is_dir():
        raise UsageError(
            f"--out must say where the calibration goes for a model of the hub, got none; for example --out {FILE_NAME}"
        )
    return Path(source) / FILE_NAME


def _run_calibrate(options: argparse.Namespace) -> int:
    texts = _texts(options.text)
    loaded = load_model(options.model, options.float32)
    out = _out(options.out, loaded.source)
    started = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("calibrating", total=None)
        calibration = calibrate(
            loaded.model,
            loaded.tokenizer,
            texts=texts,
            sequences=options.sequences,
            length=options.length,
            seed=options.seed,
            source=loaded.source,
            done=lambda step, steps: progress.update(task, completed=step, total=steps),
        )
    save_calibration(out, calibration)
    seconds = time.perf_counter() - started
    named = ", ".join(options.text or CORPUS)
    note(f"kvq: {options.sequences} sequences of {options.length} tokens ({named}) in {seconds:.0f} s")
    _print_weights(calibration)
    print(f"written to {out}")
    return 0


def _print_weights(calibration: Calibration) -> None:
    """What allocation can gain, by both kinds of sensitivity."""
    print("sensitivity   side    components   arithmetic over geometric mean of the weights")
    for kind in SENSITIVITIES:
        for side in SIDES:
            weights = [c.weight for c in calibration.components(kind) if c.side == side]
            print(f"{kind:12s}  {side:6s} {len(weights):11d}   {predicted_gain([max(w, 1e-30) for w in weights]):.2f}")


def _run_push(options: argparse.Namespace) -> int:
    print(push_calibration(options.file, options.repository))
    return 0


def run_allocation(options: argparse.Namespace) -> int:
    """`kvq inspect --allocation FILE`: bits of every layer and head for schemes with average bits."""
    schemes = [parse_scheme(scheme) for scheme in options.kv_scheme or [DEFAULT_SCHEME]]
    if len(schemes) != 1 or not any(schemes[0].budgets):
        raise UsageError(
            f"--allocation must go with one scheme of average bits, got {options.kv_scheme}; "
            f"for example --kv-scheme {DEFAULT_SCHEME}"
        )
    if options.plot is not None:
        require_matplotlib()
    (config,) = schemes
    calibration = load_calibration(options.allocation)
    allocation = calibration.allocate(config)
    components = [c for c in calibration.components(config.sensitivity) if c.side in allocation.names]
    bits = {
        side: {layer: [int("".join(filter(str.isdigit, name))) for name in heads] for layer, heads in layers.items()}
        for side, layers in allocation.names.items()
    }
    if options.plot is not None:
        plot_allocation(bits, Path(options.plot), f"{options.kv_scheme or [DEFAULT_SCHEME]} of {calibration.model}")
    if options.json:
        print(json.dumps({"model": calibration.model, "scheme": (options.kv_scheme or [DEFAULT_SCHEME])[0], **bits}))
        return 0
    print(f"calibration of {calibration.model}: {calibration.sequences} sequences of {calibration.length} tokens\n")
    for budget, side in zip(config.budgets, SIDES, strict=True):
        if budget is not None:
            curve = calibration.curves[budget.family, side]
            fit = f"{curve.alpha:.3f} * {curve.beta:.3f}^-b"
            print(f"{side}s: {budget.family} at {budget.bits:g} bits, distortion {fit}")
    print(f"predicted gain over equal bits: {allocation.gain:.2f}x of the distortion\n")
    _print_bits(bits, components, calibration, config)
    return 0


def _print_bits(
    bits: dict[str, dict[int, list[int]]], components: list[Component], calibration: Calibration, config: Any
) -> None:
    """A line a layer: whole bits of its heads, with the optimum of Theorem 2 in brackets."""
    sides = [side for side in SIDES if side in bits]
    optimum = _optimum(components, calibration, config)
    print("layer  " + "  ".join(f"{side + ' bits (optimum)':30s}" for side in sides))
    for layer in sorted(bits[sides[0]]):
        cells = []
        for side in sides:
            heads = zip(bits[side][layer], optimum[side, layer], strict=True)
            cells.append(" ".join(f"{whole}({real:.1f})" for whole, real in heads))
        print(f"{layer:5d}  " + "  ".join(f"{cell:30s}" for cell in cells).rstrip())
    for side in sides:
        counts = Counter(b for heads in bits[side].values() for b in heads)
        total = sum(counts.values())
        average = sum(b * n for b, n in counts.items()) / total
        print(f"{side}s: average {average:.3f}; " + ", ".join(f"{n} heads at {b}" for b, n in sorted(counts.items())))


def _optimum(components: list[Component], calibration: Calibration, config: Any) -> dict[tuple[str, int], list[float]]:
    found: dict[tuple[str, int], list[float]] = {}
    budgets = {side: budget for side, budget in zip(SIDES, config.budgets, strict=True) if budget is not None}
    pools = [tuple(budgets)] if len(set(budgets.values())) == 1 else [(side,) for side in budgets]
    for pool in pools:
        own = [c for c in components if c.side in pool]
        budget = budgets[pool[0]]
        curves = [calibration.curves[budget.family, c.side] for c in own]
        weights = [max(c.weight, 1e-30) * curve.alpha for c, curve in zip(own, curves, strict=True)]
        beta = sum(curve.beta for curve in curves) / len(curves)
        for component, real in zip(own, optimal_bits(weights, budget.bits, beta), strict=True):
            found.setdefault((component.side, component.layer), []).append(real)
    return found


def add_commands(commands: Any) -> None:
    """Add `calibrate` and `push-calibration`."""
    parser = add_command(
        commands,
        "calibrate",
        _run_calibrate,
        "Measure how sensitive a model is to errors in each layer and KV head, for schemes with average bits (tq@2.5). "
        "Takes a forward and a backward pass per sequence.",
        "  kvq calibrate demo:smollm2\n"
        "  kvq calibrate mlx-community/Qwen3-8B-4bit --out kvq_calibration.safetensors\n"
        "  kvq calibrate ./model --text notes.txt code.py --sequences 16 --length 512",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="UTF-8 (default: prose, code, chat of the package)",
    )
    parser.add_argument(
        "--out", metavar="FILE", help=f"a .safetensors file (default: {FILE_NAME} in the model's folder, found there)"
    )
    parser.add_argument("--sequences", type=positive, default=9, metavar="N", help="default: 9")
    parser.add_argument("--length", type=positive, default=256, metavar="N", help="tokens of a sequence (default: 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawn tokens (default: 0)")
    add_weight_options(parser)

    push = add_command(
        commands,
        "push-calibration",
        _run_push,
        f"Upload a calibration to a Hugging Face repository as {FILE_NAME}, where schemes with average bits find it.",
        "  kvq push-calibration kvq_calibration.safetensors me/Qwen3-8B-4bit",
    )
    push.add_argument("file", metavar="FILE", help="written by kvq calibrate")
    push.add_argument("repository", metavar="OWNER/NAME", help="a model repository that your token can write to")
