"""`kvq calibrate`, `kvq push-calibration`, and what `kvq inspect --allocation` prints."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..allocation import GRADIENT, SENSITIVITIES, SIDES, Allocation, Budget, Component, predicted_gain, total_distortion
from ..calibration import Calibration, calibrate
from ..calibration_files import FILE_NAME, load_calibration, push_calibration, save_calibration
from ..corpus import CORPUS
from ..plots import plot_allocation, require_matplotlib
from ..progress import progress_bar
from ..schemes import format_scheme, parse_scheme
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
from .models import load_model, resolve_model

DEFAULT_SCHEME = "tq@3"
PLOTS = (".png", ".svg", ".pdf")


def _texts(files: list[str]) -> list[str]:
    texts = []
    for name in files:
        try:
            texts.append(Path(name).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"a calibration text must be a readable UTF-8 file, got {name!r}: {error}") from error
    return texts


def _out(option: str | None, source: str) -> Path:
    if option is None and not Path(source).is_dir():
        raise UsageError(
            f"--out must say where the calibration goes for a model of the hub, got none; for example --out {FILE_NAME}"
        )
    return output_file(option if option is not None else str(Path(source) / FILE_NAME), "calibration file")


def _run_calibrate(options: argparse.Namespace) -> int:
    texts = _texts(options.text)
    out = _out(options.out, resolve_model(options.model))
    loaded = load_model(options.model, options.float32)
    started = time.perf_counter()
    with progress_bar(options.progress) as progress:
        calibration = calibrate(
            loaded.model,
            loaded.tokenizer,
            texts=texts,
            sequences=options.sequences,
            length=options.length,
            seed=options.seed,
            source=loaded.source,
            unknown_arch=options.unknown_arch,
            progress=progress,
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
            weights = [c.weight for c in calibration.components(kind, calibration.layers()) if c.side == side]
            print(f"{kind:12s}  {side:6s} {len(weights):11d}   {predicted_gain(weights):.2f}")


def _run_push(options: argparse.Namespace) -> int:
    print(push_calibration(options.file, options.repository))
    return 0


# ---- kvq inspect --allocation --------------------------------------------------------------------------------------


def run_allocation(options: argparse.Namespace) -> int:
    """`kvq inspect --allocation FILE`: bits of every layer and head for a scheme with average bits."""
    if options.model is not None or options.live:
        raise UsageError("--allocation must come without a MODEL and --live, got one of them; leave it out")
    schemes = [parse_scheme(scheme) for scheme in options.kv_scheme or [DEFAULT_SCHEME]]
    if len(schemes) != 1 or not any(schemes[0].budgets):
        raise UsageError(
            f"--allocation must go with one scheme of average bits, got {' and '.join(options.kv_scheme)}; "
            f"for example --kv-scheme {DEFAULT_SCHEME}"
        )
    plot = None
    if options.plot is not None:
        plot = output_file(options.plot, "plot", PLOTS)
        require_matplotlib()
    (config,) = schemes
    calibration = load_calibration(options.allocation)
    allocation = calibration.allocate(config)
    components = calibration.components(GRADIENT, calibration.layers(config.edges))
    budgets = {side: budget for side, budget in zip(SIDES, config.budgets, strict=True) if budget is not None}
    kinds = {kind: calibration.allocate(replace(config, sensitivity=kind)) for kind in SENSITIVITIES}
    distortions = {kind: _distortion(calibration, components, budgets, found) for kind, found in kinds.items()}
    averages = {side: _average(components, allocation, [side]) for side in budgets}
    scheme = format_scheme(config)
    if plot is not None:
        plot_allocation(allocation.bits, plot, f"{scheme} on {calibration.model}: bits of each KV head")
    if options.json:
        found = {"model": calibration.model, "scheme": scheme, "average": averages, "distortion": distortions}
        print(json.dumps({**found, "bits": allocation.bits, "optimum": allocation.optimum}, indent=2))
        return 0
    print(
        f"{scheme} on {calibration.model}, calibrated on {calibration.sequences} sequences of {calibration.length} "
        f"tokens for sinks={calibration.sinks},recent={calibration.recent}\n"
    )
    for side, budget in budgets.items():
        curve = calibration.curves[budget.family, side]
        print(f"relative error of {side}s in b bits of {budget.family}: about {curve.alpha:.3f} * {curve.beta:.3f}^-b")
    print("\npredicted distortion, weighted by gradients (equal bits: 1)")
    for kind, distortion in distortions.items():
        print(f"  bits by {kind:12s} {distortion:6.3f}" + ("   these:" if kind == config.sensitivity else ""))
    print(f"  optimum, not whole   {1 / allocation.gain:6.3f}\n")
    _print_bits(allocation)
    print()
    for side, average in averages.items():
        counts = Counter(b for heads in allocation.bits[side].values() for b in heads)
        listed = ", ".join(f"{n} with {b}" for b, n in sorted(counts.items()))
        print(f"{side}s: {average:.3f} bits on average; heads: {listed}")
    if len(budgets) > 1:
        print(f"both: {_average(components, allocation, list(budgets)):.3f} bits on average")
    return 0


def _distortion(
    calibration: Calibration,
    components: Sequence[Component],
    budgets: Mapping[str, Budget],
    allocation: Allocation,
) -> float:
    """Total distortion of an allocation over that of equal bits."""
    found = equal = 0.0
    for side, budget in budgets.items():
        own = [c for c in components if c.side == side]
        curves = {side: calibration.curves[budget.family, side]}
        found += total_distortion(own, [allocation.bits[side][c.layer][c.head] for c in own], curves)
        equal += total_distortion(own, [budget.bits] * len(own), curves)
    return found / equal


def _average(components: Sequence[Component], allocation: Allocation, sides: Sequence[str]) -> float:
    """Bits an element of some sides."""
    own = [c for c in components if c.side in sides]
    bits = sum(c.elements * allocation.bits[c.side][c.layer][c.head] for c in own)
    return bits / sum(c.elements for c in own)


def _print_bits(allocation: Allocation) -> None:
    """A line a layer: whole bits of its heads, with the optimum in brackets."""
    cells = {
        side: {
            layer: " ".join(f"{whole}({real:.1f})" for whole, real in zip(heads, real_heads, strict=True))
            for (layer, heads), real_heads in zip(layers.items(), allocation.optimum[side].values(), strict=True)
        }
        for side, layers in allocation.bits.items()
    }
    heads = {side: f"bits of {side} heads (optimum)" for side in cells}
    widths = {side: max(len(heads[side]), *map(len, column.values())) for side, column in cells.items()}
    print("layer  " + "  ".join(f"{heads[side]:{width}s}" for side, width in widths.items()).rstrip())
    for layer in next(iter(cells.values())):
        line = "  ".join(f"{cells[side][layer]:{width}s}" for side, width in widths.items())
        print(f"{layer:5d}  {line}".rstrip())


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
    parser.add_argument(
        "--length",
        type=positive,
        default=256,
        metavar="N",
        help="tokens of a sequence; memory grows with its square (default: 256)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawn tokens (default: 0)")
    add_arch_option(parser)
    add_weight_options(parser)
    add_progress_option(parser)

    push = add_command(
        commands,
        "push-calibration",
        _run_push,
        f"Upload a calibration to a Hugging Face repository as {FILE_NAME}, where schemes with average bits find it.",
        "  kvq push-calibration kvq_calibration.safetensors me/Qwen3-8B-4bit",
    )
    push.add_argument("file", metavar="FILE", help="written by kvq calibrate")
    push.add_argument("repository", metavar="OWNER/NAME", help="a model repository that your token can write to")
