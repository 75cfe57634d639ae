"""`kvq inspect --kernels`: which attention, encoding and decoding run on this device, and why not others."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..kernels.choices import CONDITIONS, Choice, choices
from ..kernels.launch import device_name, launch_sizes, table
from ..loading import LayerPlan, compress


def layer_choices(plans: Sequence[LayerPlan]) -> list[tuple[list[int], str, list[Choice]]]:
    """Layers that run the same: their indices, what they are, and the choices (none for layers left to mlx-lm)."""
    found: dict[tuple[str, tuple[Choice, ...]], list[int]] = {}
    for plan in plans:
        geometry = plan.geometry
        own: tuple[Choice, ...] = ()
        what = f"left to mlx-lm ({plan.reason})"
        if plan.spec is not None:
            repeat = geometry.heads // max(1, geometry.kv_heads)
            own = choices(plan.spec, geometry.key_dim, geometry.value_dim, repeat)
            what = f"{plan.spec.label}, {geometry.heads}/{geometry.kv_heads} heads of {geometry.key_dim}"
            what += f"/{geometry.value_dim} channels"
        found.setdefault((what, own), []).append(plan.index)
    return [(indices, what, list(own)) for (what, own), indices in found.items()]


def _span(indices: Sequence[int]) -> str:
    """`0-3, 5` for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)


def run_kernels(options: argparse.Namespace, model: Any, source: str, schemes: Sequence[str]) -> int:
    """Print the table for a model and schemes."""
    device = device_name()
    sizes = launch_sizes(device)
    whose = "measured for this device" if device in table() else "the default, `python benchmarks/tune.py` finds better"
    found = {}
    for scheme in schemes:
        with compress(model, scheme, unknown_arch=options.unknown_arch, source=source) as compression:
            found[scheme] = layer_choices(compression.maker.plan())
    if options.json:
        rows = [
            {"scheme": scheme, "layers": indices, "what": what, "choices": [asdict(choice) for choice in own]}
            for scheme, groups in found.items()
            for indices, what, own in groups
        ]
        print(json.dumps({"device": device, "launch": asdict(sizes), "schemes": rows}, indent=2))
        return 0
    print(f"{source} on {device}\nlaunch sizes ({whose}): {', '.join(f'{k} {v}' for k, v in asdict(sizes).items())}")
    for scheme, groups in found.items():
        print(f"\nscheme {scheme}")
        for indices, what, own in groups:
            print(f"  layers {_span(indices)}: {what}")
            for choice in own:
                why = f" (no kernel: {'; '.join(choice.reasons)})" if choice.reasons else ""
                print(f"    {choice.work:15s} {choice.runs}{why}")
    print(f"\n{CONDITIONS}")
    return 0
