"""`kvq schemes` and `kvq inspect`: what schemes cost, in general and on one model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from itertools import groupby
from typing import Any

from ..adapters import LayerGeometry
from ..config import FP16, KVQConfig
from ..errors import AllocationError, CodecError
from ..layouts import STEPS
from ..loading import LayerPlan, compress
from ..planning import SchemePlan, plan_caches
from ..progress import progress_bar
from ..rotary import read_rotary
from ..schemes import format_scheme, list_schemes, parse_scheme
from .arguments import MODEL_HELP, UsageError, add_arch_option, add_command, note, positive
from .calibrate import run_allocation
from .kernels import run_kernels
from .live import add_live_options, run_live
from .models import load_model

_MODIFIERS = {
    "k=NAME,v=NAME": "one codec for keys, another for values",
    "frame=on|off": "encode keys in the rotary frame",
    "edges=N": "leave the first and last N attention layers to mlx-lm",
    "sinks=N": "keep the first N tokens dense",
    "recent=N": "keep at least the last N tokens dense",
    "compress_after=chunk|prefill": "pack after each prefill chunk, or after the whole prompt",
    "seed=N": "of the rotations' signs",
    "calibration=PATH": "file, folder or repository for average bits (tq@2.5), if it is not next to the model",
    "sensitivity=gradient|activation": "what average bits are allocated by",
    "family=NAME": "codecs that auto chooses from",
    "per=layer|head": "what auto gives bits of its own",
    "context=N": "tokens that auto@BITS counts bytes at, with newest dense tokens chosen for them (0: none)",
}
_ALLOCATED = {
    "auto@3.25": "codecs chosen for each layer, at these all-in bits",
    '"auto:kl<=0.02"': "the fewest bits with this KL divergence, nats a token, measured on texts of its own",
    "tq@2.5": "average bits of codes over KV heads; takes kvq calibrate",
}
DEFAULT_SCHEMES = ("tq4", "rvq1")
DEFAULT_CONTEXTS = (1024, 8192, 32768, 131072)


def _default(modifier: str) -> str:
    value = getattr(KVQConfig(), modifier.partition("=")[0], None)
    return "" if value in (None, "") else f" (default: {'on' if value is True else value})"


def _run_schemes(options: argparse.Namespace) -> int:
    rows = list_schemes(options.head_dim)
    if options.json:
        schemes = [{**asdict(row), "ratio": row.ratio} for row in rows]
        modifiers = {name: text + _default(name) for name, text in _MODIFIERS.items()}
        print(json.dumps({"head_dim": options.head_dim, "schemes": schemes, "modifiers": modifiers}, indent=2))
        return 0
    print(f"scheme     bits/element   ratio   (head size {options.head_dim}; codes, scales, norms and padding counted)")
    for row in rows:
        rate = f"{'-':>12s} {'-':>7s}" if row.bits is None else f"{row.bits:12.3f} {row.ratio:6.2f}x"
        print(f"{row.name:10s} {rate}   {row.note}".rstrip())
    config = KVQConfig()
    for text, about in _ALLOCATED.items():
        print(f"{text:26s} {about}")
    print(
        f"\nThese are the rates of packed tokens; on top come the tokens kept dense (sinks={config.sinks} first and "
        f"recent={config.recent} last ones)\nand some statistics per layer: kvq inspect MODEL adds it up.\n\n"
        'modifiers, after commas ("rvq1,edges=2,recent=64"):'
    )
    for name, text in _MODIFIERS.items():
        print(f"  {name:32s} {text}{_default(name)}")
    return 0


def _plan(model: Any, scheme: str, unknown_arch: str, source: str) -> SchemePlan:
    try:
        with progress_bar() as progress:
            compression = compress(model, scheme, unknown_arch=unknown_arch, source=source, progress=progress)
        with compression:
            return plan_caches(compression.maker)
    except (CodecError, AllocationError) as error:  # a head size, bits or a divergence that codecs cannot do
        return SchemePlan(scheme, (), error=str(error))


def _rope(geometry: LayerGeometry) -> dict[str, Any]:
    """The layer's rope module and the rotation read off it."""
    if geometry.rope is None:
        return {"class": None}
    found: dict[str, Any] = {"class": type(geometry.rope).__name__, "base": getattr(geometry.rope, "base", None)}
    rotary, reason = read_rotary(geometry.rope, geometry.key_dim)
    if rotary is None:
        return {**found, "note": reason}
    return {**found, "pairs": rotary.pairs, "layout": rotary.layout, "magnitude": rotary.magnitude}


def _rope_text(rope: dict[str, Any]) -> str:
    if rope["class"] is None:
        return "none"
    base = f", base {rope['base']:.10g}" if rope["base"] else ""
    if "note" in rope:
        return f"{rope['class']}{base} ({rope['note']})"
    return f"{rope['class']}{base}, {rope['pairs']} pairs, {rope['layout']}"


def _bases(parameters: dict[str, Any]) -> list[float]:
    """Rotary bases in a config's `rope_parameters`, which may be nested by layer type."""
    if "rope_theta" in parameters:
        return [float(parameters["rope_theta"])]
    return [base for value in parameters.values() if isinstance(value, dict) for base in _bases(value)]


def _kinds(parameters: dict[str, Any]) -> list[str]:
    if "rope_theta" in parameters or "rope_type" in parameters:
        return [str(parameters.get("rope_type", "default"))]
    return [kind for value in parameters.values() if isinstance(value, dict) for kind in _kinds(value)]


def _listed(bases: list[float]) -> str:
    return " and ".join(f"{base:.10g}" for base in bases) or "unknown"


def rope_warning(model: Any, config: dict[str, Any], ropes: Sequence[dict[str, Any]]) -> str | None:
    """A warning if config.json has `rope_parameters` that mlx-lm's model class does not read and that matter."""
    if isinstance(config.get("text_config"), dict):
        config = {**config, **config["text_config"]}
    wanted = config.get("rope_parameters")
    arguments = getattr(model, "language_model", model).args
    if not isinstance(wanted, dict) or "rope_parameters" in {field.name for field in fields(arguments)}:
        return None
    bases = sorted(set(_bases(wanted)))
    kinds = sorted(set(_kinds(wanted)) - {"default"})
    used = sorted({float(rope["base"]) for rope in ropes if rope.get("base")})
    if bases == used and (not kinds or config.get("rope_scaling")):
        return None
    asked = f"base {_listed(bases)}" + (f", type {' and '.join(kinds)}" if kinds else "")
    return (
        f"config.json has rope_parameters ({asked}), but mlx-lm {version('mlx-lm')} does not read them for model type "
        f"{model.model_type}: it turns keys with base {_listed(used)}, so the model's text may be wrong with or "
        "without compression; put rope_theta (and rope_scaling) into config.json"
    )


def _layer_facts(plan: LayerPlan, rope: dict[str, Any]) -> dict[str, Any]:
    geometry = plan.geometry
    names = ("kind", "heads", "kv_heads", "key_dim", "value_dim", "window", "shared", "member", "note")
    return {"index": plan.index, **{name: getattr(geometry, name) for name in names}, "rope": rope}


def _ranges(plans: Sequence[LayerPlan]) -> list[str]:
    """Consecutive layers with equal treatment, a line each."""
    lines = []
    for (label, reason), group in groupby(plans, lambda p: (p.spec.label if p.spec else FP16, p.reason)):
        indices = [plan.index for plan in group]
        span = f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else f"{indices[0]}"
        lines.append(f"layers {span}: {label}" + (f" ({reason})" if reason else ""))
    return lines


def _kept(plans: Sequence[LayerPlan]) -> list[str]:
    """What an `auto` scheme's choice does not say: layers that stay as they are, and remarks."""
    return [line for plan in plans if plan.reason or plan.spec is None for line in _ranges([plan])]


def _run_inspect(options: argparse.Namespace) -> int:
    if options.allocation is not None:
        return run_allocation(options)
    if options.plot is not None:
        raise UsageError("--plot must go with --allocation, got it alone; add --allocation FILE or leave it out")
    if options.model is None:
        raise UsageError("a model must be named, got none; only --allocation FILE works without one")
    if options.live:
        return run_live(options)
    if options.prompt is not None:
        raise UsageError("--prompt must go with --live, got it alone; add --live or leave it out")
    configs = [parse_scheme(scheme) for scheme in options.kv_scheme or DEFAULT_SCHEMES]
    schemes = [format_scheme(config) for config in configs]
    runs = any(config.target is not None for config in configs)  # to see what needs bits
    loaded = load_model(options.model, None if runs else False, lazy=True)
    if options.kernels:
        return run_kernels(options, loaded.model, loaded.source, list(dict.fromkeys(schemes)))
    plans = [
        _plan(loaded.model, scheme, options.unknown_arch, loaded.source) for scheme in dict.fromkeys((FP16, *schemes))
    ]
    stock = plans[0].layers
    ropes = [_rope(plan.geometry) for plan in stock]
    warning = rope_warning(loaded.model, loaded.config, ropes)
    if warning is not None:
        note(f"kvq: warning: {warning}")
    layers = [_layer_facts(plan, rope) for plan, rope in zip(stock, ropes, strict=True)]
    if options.json:
        report = {
            "model": loaded.source,
            "model_type": loaded.model.model_type,
            "layers": layers,
            "schemes": [_scheme_facts(plan, options.contexts) for plan in plans],
            "warnings": [warning] if warning else [],
        }
        print(json.dumps(report, indent=2))
        return 0
    total = len(loaded.model.layers)
    of_layers = "" if total == len(layers) else f" for {total} layers (the others have no keys and values of their own)"
    print(f"{loaded.source}: model type {loaded.model.model_type}, {len(layers)} cache entries{of_layers}\n")
    _print_layers(layers)
    for plan in plans[1:]:
        print(f"\nscheme {plan.scheme}" + (f": not possible, {plan.error}" if plan.error else ""))
        if plan.choice is not None:
            print("\n".join(f"  {line}" for line in plan.choice.lines()))
        for line in _ranges(plan.layers) if plan.choice is None else _kept(plan.layers):
            print(f"  {line}")
    _print_memory(plans, options.contexts)
    return 0


def _scheme_facts(plan: SchemePlan, contexts: Sequence[int]) -> dict[str, Any]:
    return {
        "scheme": plan.scheme,
        "error": plan.error,
        "layers": [
            {"index": p.index, "applied": p.spec.label if p.spec else None, "reason": p.reason} for p in plan.layers
        ],
        **({"choice": plan.choice.to_dict()} if plan.choice is not None else {}),
        "nbytes": {str(tokens): plan.nbytes(tokens) for tokens in contexts} if not plan.error else {},
    }


def _print_layers(layers: Sequence[dict[str, Any]]) -> None:
    print("layer kind      query/KV heads  key/value dim  window  rope")
    for layer in layers:
        heads, dims = f"{layer['heads']}/{layer['kv_heads']}", f"{layer['key_dim']}/{layer['value_dim']}"
        window = "-" if layer["window"] is None else str(layer["window"])
        if not layer["kv_heads"]:
            heads = dims = "-"
        notes = [
            _rope_text(layer["rope"]) if layer["kv_heads"] else "-",
            f"member {layer['member']} of its entry" if layer["member"] is not None else "",
            "later layers attend to it too" if layer["shared"] else "",
            layer["note"],
        ]
        rope = "; ".join(note for note in notes if note)
        print(f"{layer['index']:5d} {layer['kind']:9s} {heads:>14s} {dims:>14s} {window:>7s}  {rope}")


def _print_memory(plans: Sequence[SchemePlan], contexts: Sequence[int]) -> None:
    print(
        "\nMiB of KV cache per sequence (and ratio to fp16) at so many tokens, the last "
        f"{STEPS} of them generated, for 16-bit keys and values"
    )
    width = max(20, *(len(plan.scheme) for plan in plans))
    print(f"{'scheme':{width}s}" + "".join(f"{tokens:>18d}" for tokens in contexts))
    for plan in plans:
        cells = []
        for tokens in contexts:
            nbytes, dense = plan.nbytes(tokens), plans[0].nbytes(tokens)
            cells.append("-" if plan.error else f"{nbytes / 2**20:.2f} ({dense / max(nbytes, 1):.2f}x)")
        print(f"{plan.scheme:{width}s}" + "".join(f"{cell:>18s}" for cell in cells))


def add_commands(commands: Any) -> None:
    """Add `schemes` and `inspect`."""
    schemes = add_command(
        commands,
        "schemes",
        _run_schemes,
        "List the schemes with their all-in bits per element. The ratio compares packed tokens with fp16.",
        "  kvq schemes\n  kvq schemes --head-dim 64\n  kvq schemes --json",
    )
    schemes.add_argument("--head-dim", type=positive, default=128, metavar="D", help="head size (default: 128)")
    schemes.add_argument("--json", action="store_true", help="one JSON object")

    inspect = add_command(
        commands,
        "inspect",
        _run_inspect,
        "Show a model's layers, what schemes do to each, and the memory of its KV cache. Weights are not read, but for "
        "--live and for auto schemes, which run the model.",
        "  kvq inspect demo:gemma3 --kernels\n"
        "  kvq inspect demo:smollm2 --live --kv-scheme rvq1 --prompt @text.txt\n"
        "  kvq inspect ./model --kv-scheme rvq1 --kv-scheme tq4,edges=2 --contexts 4096 65536 --json\n"
        "  kvq inspect --allocation kvq_calibration.safetensors --kv-scheme tq@2.5 --plot bits.png",
    )
    inspect.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    inspect.add_argument(
        "--kv-scheme",
        action="append",
        metavar="SCHEME",
        help=f"may be given several times (default: {' and '.join(DEFAULT_SCHEMES)})",
    )
    inspect.add_argument(
        "--contexts",
        type=positive,
        nargs="+",
        default=list(DEFAULT_CONTEXTS),
        metavar="N",
        help="tokens (default: " + " ".join(map(str, DEFAULT_CONTEXTS)) + ")",
    )
    inspect.add_argument(
        "--kernels",
        action="store_true",
        help="which kernels run on this device, and why not others, in place of memory",
    )
    add_live_options(inspect)
    inspect.add_argument(
        "--allocation",
        metavar="FILE",
        help="bits per layer and head from this calibration, with one --kv-scheme of average bits (default: tq@3); "
        "no MODEL",
    )
    inspect.add_argument("--plot", metavar="FILE.png", help="draw them too, with --allocation")
    add_arch_option(inspect)
    inspect.add_argument("--json", action="store_true", help="one JSON object")
