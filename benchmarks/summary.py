"""Rewrites the tables of README.md, docs/measurements.md and docs/serving.md from the stored results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCHEMES = ("tq4", "tq3", "rvq1")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def results(name: str) -> dict[str, Any]:
    """Machine and rows of one benchmark."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def one(name: str, **wanted: Any) -> dict[str, Any]:
    """The only row with the wanted values."""
    rows = (row for row in results(name)["rows"] if all(row[key] == value for key, value in wanted.items()))
    (found,) = rows
    return found


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def readme_table() -> str:
    """Memory, quality and speed of the main schemes on the two demo models."""
    rows = []
    for scheme in SCHEMES:
        small = [one("memory", model="smollm2", scheme=scheme, tokens=tokens)["ratio"] for tokens in (1000, 4096)]
        gemma = one("memory", model="gemma3", scheme=scheme, tokens=4096)["ratio"]
        quality = [one("quality", model=m, scheme=scheme, text="documentation") for m in ("smollm2", "gemma3")]
        speed = one("decode", model="smollm2", scheme=scheme)
        rows.append(
            [
                f"`{scheme}`",
                f"{small[0]:.2f}x / {small[1]:.2f}x",
                f"{gemma:.2f}x",
                " / ".join(f"{row['kl_mean']:.4f}" for row in quality),
                " / ".join(f"{row['top1']:.1%}" for row in quality),
                f"{speed['decode_ratio']:.2f}x",
                f"{speed['prefill_ratio']:.2f}x",
            ]
        )
    head = ["`kv_scheme`", "SmolLM2-135M, smaller at 1,000 / 4,096 tokens", "Gemma 3 270M, at 4,096"]
    head += ["KL to fp16, nats a token", "same top-1 token", "decode speed (CPU)", "prefill speed (CPU)"]
    return table(head, rows)


def measurements() -> str:
    """All stored tables."""
    parts = []
    memory = results("memory")
    rows = [
        [r["model"], f"{r['tokens']:,}", f"`{r['scheme']}`", f"{r['allocated'] / 2**20:.2f}", f"{r['ratio']:.2f}x"]
        + [f"{r['nbytes_error']:+.2%}" if "nbytes_error" in r else ""]
        for r in memory["rows"]
    ]
    head = ["model", "tokens", "scheme", "MiB allocated", "smaller than `KVCache`", "`nbytes` against allocated"]
    parts.append(f"## Memory\n\n`python benchmarks/memory.py`; {memory['machine']}.\n\n{table(head, rows)}")
    for name, title in (("quality", "Quality"), ("defaults", "What the defaults are worth")):
        quality = results(name)
        rows = [
            [r["model"], r["text"], f"`{r['scheme']}`", f"{r['kl_mean']:.4f}", f"{r['kl_median']:.4f}"]
            + [f"{r['kl_p99']:.3f}", f"{r['top1']:.1%}", f"{r['perplexity']:.2f} ({r['reference_perplexity']:.2f})"]
            for r in quality["rows"]
        ]
        head = ["model", "text", "scheme", "KL mean", "median", "p99", "top-1", "perplexity (fp16)"]
        schemes = " ".join(dict.fromkeys(r["scheme"] for r in quality["rows"]))
        texts = " ".join(dict.fromkeys(r["text"] for r in quality["rows"]))
        command = f"python benchmarks/quality.py --texts {texts} --schemes {schemes}"
        if name == "defaults":
            command += " --model smollm2 --name defaults"
        parts.append(f"## {title}\n\n`{command}`; {quality['machine']}.\n\n{table(head, rows)}")
    decode = results("decode")
    rows = [
        [r["model"], f"{r['tokens']:,}", f"`{r['scheme']}`", f"{r['step_ms']:.1f}"]
        + [f"{r['decode_ratio']:.2f}x", f"{r['prefill_ratio']:.2f}x"]
        for r in decode["rows"]
    ]
    head = ["model", "tokens", "scheme", "ms a step", "decode against `KVCache`", "prefill against `KVCache`"]
    parts.append(f"## Speed\n\n`python benchmarks/decode.py`; {decode['machine']}.\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def serving() -> str:
    """The two servers side by side."""
    found = results("serve")
    rows = [
        [f"`{r['server']}`", f"{r['requests']}", f"{r['errors']}", f"{r['requests/s']:.2f}"]
        + [f"{r.get('speed against mlx_lm.server', 1.0):.2f}x", f"{r['cached share of prompts']:.1%}"]
        + [f"{r['bytes per cached token']:,.0f} ({r['of 16 bits']:.3f})"]
        for r in found["rows"]
    ]
    head = ["server", "requests", "errors", "requests/s", "speed", "prompt tokens found cached"]
    head += ["bytes per cached token (of 16 bits)"]
    return f"`python benchmarks/serve.py`; {found['machine']}.\n\n{table(head, rows)}"


def inserted(text: str, content: str) -> str:
    """`text` with `content` between the markers."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{content}\n{END}", text, flags=re.DOTALL)


TABLES: dict[str, Callable[[], str]] = {
    "README.md": readme_table,
    "docs/measurements.md": measurements,
    "docs/serving.md": serving,
}


def main() -> None:
    for name, content in TABLES.items():
        path = ROOT / name
        path.write_text(inserted(path.read_text(), content()))


if __name__ == "__main__":
    main()
