"""The table of the README, from the stored results: `python benchmarks/summary.py` prints it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
SCHEMES = ("tq4", "tq3", "rvq1")


def rows(name: str) -> list[dict[str, Any]]:
    """Rows of one benchmark's results."""
    return list(json.loads((RESULTS / f"{name}.json").read_text())["rows"])


def one(name: str, **wanted: Any) -> dict[str, Any]:
    """The only row with the wanted values."""
    (found,) = (row for row in rows(name) if all(row[key] == value for key, value in wanted.items()))
    return found


def readme_table() -> str:
    """Memory, quality and speed of the main schemes on the two demo models, as Markdown."""
    lines = [
        "| `kv_scheme` | SmolLM2: times smaller at 1,000 / 4,096 tokens | Gemma 3: at 4,096 | KL to fp16, nats/token "
        "(SmolLM2 / Gemma 3) | same top-1 token | decode speed (1,000 tokens) | prefill |",
        "|---|---|---|---|---|---|---|",
    ]
    for scheme in SCHEMES:
        small = [one("memory", model="smollm2", scheme=scheme, tokens=tokens)["ratio"] for tokens in (1000, 4096)]
        gemma = one("memory", model="gemma3", scheme=scheme, tokens=4096)["ratio"]
        quality = [one("quality", model=m, scheme=scheme, text="documentation") for m in ("smollm2", "gemma3")]
        speed = one("decode", model="smollm2", scheme=scheme)
        lines.append(
            f"| `{scheme}` | {small[0]:.2f}x / {small[1]:.2f}x | {gemma:.2f}x "
            f"| {quality[0]['kl_mean']:.4f} / {quality[1]['kl_mean']:.4f} "
            f"| {quality[0]['top1']:.1%} / {quality[1]['top1']:.1%} "
            f"| {speed['decode_ratio']:.2f}x of `KVCache` | {speed['prefill_ratio']:.2f}x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(readme_table())
