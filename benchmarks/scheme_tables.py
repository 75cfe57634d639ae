"""Tables of schemes from the stored measurements: what to use for what, and what every one costs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from stored import MODELS, TITLES, quality, results, table

import mlx_kvq_plugin as kvq

NAMES = " / ".join(TITLES[model] for model in MODELS)
DIMS = (64, 128, 256)
KERNELS = re.compile(r"(tq|rvq)\d")  # codecs with GPU kernels
KL_LIMITS = (0.001, 0.01, 0.1)
AGREEMENT = 0.9
LONG = 131072  # tokens
AVERAGES = ("tq@2", "tq@3", "tq@4")

Rows = dict[str, list[dict[str, Any]]]


def measured() -> Rows:
    """The rows of every scheme that was measured on all demo models, in the order of `MODELS`."""
    found = [quality(model)["rows"] for model in MODELS]
    return {name: [rows[name] for rows in found] for name in found[0] if all("bits" in rows[name] for rows in found)}


def _worst(rows: list[dict[str, Any]], figure: str) -> float:
    return max(float(row[figure]) for row in rows)


def _fewest_bits(rows: Rows) -> str:
    """Of equal bits the least KL to two digits, and of equal ones what has a measured speed."""

    def order(name: str) -> tuple[float, float, bool, str]:
        unmeasured = not _stored("decode", "decode_ratio", name, model="smollm2", tokens=1000)
        return _worst(rows[name], "bits"), float(f"{_worst(rows[name], 'kl_mean'):.2g}"), unmeasured, name

    return min(rows, key=order)


def _least_kl(rows: Rows) -> str:
    return min(rows, key=lambda name: _worst(rows[name], "kl_mean"))


def choices() -> str:
    """Needs, the scheme that the measurements name for each, and what it costs."""
    every = measured()
    fused = {name: rows for name, rows in every.items() if KERNELS.fullmatch(name)}
    wants = []
    for limit in KL_LIMITS:
        enough = {name: rows for name, rows in fused.items() if _worst(rows, "kl_mean") < limit}
        wants.append((f"a mean KL below {limit}, in the fewest bits", _fewest_bits(enough)))
    agreeing = {name: rows for name, rows in fused.items() if min(row["top1"] for row in rows) >= AGREEMENT}
    wants.append((f"the same top-1 token {AGREEMENT:.0%} of the time, in the fewest bits", _fewest_bits(agreeing)))
    speeds = {row["scheme"]: row["ratio"] for row in results("decode_gpu")["rows"] if row["tokens"] == LONG}
    wants.append(
        (f"the fastest steps on a GPU with {LONG:,} tokens stored", max(speeds, key=lambda name: speeds[name]))
    )
    for name in AVERAGES:
        same = name.replace("@", "")
        factor = _worst(every[same], "kl_mean") / _worst(every[name], "kl_mean")
        wants.append((f"the bits of `{same}` and its KL divided by {factor:.1f}, after `kvq calibrate`", name))
    codecs = {name: rows for name, rows in every.items() if re.fullmatch(r"[a-z]+\d(\.\d)?", name)}
    small = {name: rows for name, rows in codecs.items() if _worst(rows, "bits") <= 5}
    wants.append(("the least KL in at most 5 bits, where GPU kernels do not matter", _least_kl(small)))
    head = ["if you need", "use", "bits, all-in (head sizes 64 / 256)", "KL, nats a token", "same top-1 token"]
    head += ["smaller at 4,096 tokens", "decode speed (CPU)", "decode speed (GPU)"]
    about = (
        f"{NAMES}; the need holds on both. `python benchmarks/quality.py`, `memory.py`, `decode.py` "
        "(1,000 tokens) and `decode_gpu.py` (8,192 / 131,072 tokens); an empty cell was not measured. Where nothing "
        "else is said, the choice is among the codecs with GPU kernels and whole bits, `tq1` to `tq6` and `rvq1` to "
        "`rvq3`."
    )
    return f"{about}\n\n{table(head, ([want, f'`{name}`', *_costs(name, every[name])] for want, name in wants))}"


def _costs(scheme: str, rows: list[dict[str, Any]]) -> list[str]:
    """Bits, KL, agreement, memory and speeds; empty where not measured."""
    bits = " / ".join(f"{row['bits']:.2f}" for row in rows)
    memory = [_stored("memory", "ratio", scheme, model=model, tokens=4096) for model in MODELS]
    cpu = [_stored("decode", "decode_ratio", scheme, model="smollm2", tokens=1000)]
    gpu = [_stored("decode_gpu", "ratio", scheme, tokens=tokens, batch=1) for tokens in (8192, LONG)]
    return [bits, *_quality(rows), *(" / ".join(filter(None, cells)) for cells in (memory, cpu, gpu))]


def _quality(rows: Iterable[dict[str, Any]]) -> list[str]:
    found = list(rows)
    return [" / ".join(f"{r['kl_mean']:.4f}" for r in found), " / ".join(f"{r['top1']:.1%}" for r in found)]


def _stored(benchmark: str, figure: str, scheme: str, **wanted: Any) -> str:
    wanted["scheme"] = scheme
    rows = [row for row in results(benchmark)["rows"] if wanted.items() <= row.items()]
    return f"{rows[0][figure]:.2f}x" if rows else ""


def every_scheme() -> str:
    """Every named scheme with its bits at common head sizes and what was measured of it."""
    every = measured()
    bits = [{row.name: row.bits for row in kvq.list_schemes(dim)} for dim in DIMS]
    lines = []
    for name in sorted(bits[0], key=lambda name: (bits[0][name] or 0, name)):
        rates = ["" if found[name] is None else f"{found[name]:.3f}" for found in bits]
        speeds = [
            _stored("decode", "decode_ratio", name, model="smollm2", tokens=1000),
            _stored("decode_gpu", "ratio", name, tokens=8192, batch=1),
            "yes" if KERNELS.fullmatch(name) else "",
        ]
        lines.append([f"`{name}`", *rates, *(_quality(every[name]) if name in every else ["", ""]), *speeds])
    head = ["scheme", *(f"D {dim}" for dim in DIMS), "KL, nats a token", "same top-1 token"]
    head += ["decode (CPU)", "decode (GPU)", "GPU kernels"]
    about = (
        "Bits an element by `kvq schemes --head-dim D`, everything stored with the codes counted. Quality on "
        f"{NAMES} by `python benchmarks/quality.py`, speed against fp16 by `decode.py` (SmolLM2, 1,000 "
        "tokens) and `decode_gpu.py` (8,192 tokens). An empty cell was not measured, or is not possible."
    )
    return f"{about}\n\n{table(head, lines)}"
