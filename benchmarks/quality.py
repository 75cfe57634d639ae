"""What every scheme costs in quality on the demo models: the ruler of `kvq eval` over all schemes at once.

    python benchmarks/quality.py [--model smollm2 gemma3] [--schemes tq4 tq@3] [--needle]

Teacher-forced in float32: the first `--prefill` tokens of each text in one chunk, then `--steps` single-token steps
through the compressed caches. The texts are none of those that calibrations are made from. Results go to
`benchmarks/results/quality-MODEL.json`, the frontier to `docs/frontier-MODEL.png`; `python benchmarks/summary.py`
writes the tables of the docs from them. With `--schemes` nothing is stored unless `--name` says so.
"""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from common import RESULTS, TEXTS, load, machine, model_path, uncalibrated
from texts import NAMES, tokens_of

from mlx_kvq_plugin.calibration import calibrate
from mlx_kvq_plugin.calibration_files import FILE_NAME, save_calibration
from mlx_kvq_plugin.corpus import corpus_text
from mlx_kvq_plugin.needle import build_haystack
from mlx_kvq_plugin.plots import plot_frontier
from mlx_kvq_plugin.results import Measurement, table
from mlx_kvq_plugin.ruler import all_schemes, head_dim, measure

DOCS = Path(__file__).resolve().parent.parent / "docs"

AVERAGES = (  # bits allocated by calibration, against one codec for all heads
    *(f"tq@{bits}{kind}" for bits in ("2", "2.5", "3", "4") for kind in ("", ",sensitivity=activation")),
    "k=tq@3.5,v=tq@2.5",
    "rvq@1.5",
    "affine@3",
)
AUTOMATIC = (  # by the calibration that AVERAGES have
    *(f"auto@{bits}" for bits in ("2.25", "3.25", "4.25")),
    "auto@3.25,per=head",
    *(f"auto:kl<={kl}" for kl in ("0.05", "0.02", "0.005")),
)
VARIANTS = (  # what the settings are worth
    "tq4,frame=off",
    *(f"{codec},scaling=least_squares" for codec in ("tq2", "tq3", "rvq1")),
    *(f"rvq1,{setting}" for setting in ("sinks=0", "recent=0", "recent=64", "edges=2", "compress_after=prefill")),
    *(f"tq2,rotation={rotation}" for rotation in ("hadamard2", "hadamard3", "dense")),
    "tq2,outliers=16",
    "kivi2,frame=off,recent=128",  # KIVI as published
)


def calibrated(name: str, model: Any, tokenizer: Any, schemes: list[str]) -> None:
    """Makes the model's calibration file if it has none and a scheme needs it."""
    path = model_path(name) / FILE_NAME
    if not path.exists() and any("@" in scheme or scheme.startswith("auto") for scheme in schemes):
        start = time.perf_counter()
        save_calibration(path, calibrate(model, tokenizer, source=name))
        print(f"{name}: calibrated in {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=NAMES)
    parser.add_argument("--schemes", nargs="+")
    parser.add_argument("--prefill", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--needle", action="store_true", help="also retrieve a key from a text of 1,000 tokens")
    parser.add_argument(
        "--own-texts", action="store_true", help="auto goes by texts of the model's own, no calibration"
    )
    parser.add_argument("--name", help="results go to benchmarks/results/NAME-MODEL.json (default: quality)")
    arguments = parser.parse_args()
    for name in arguments.model:
        model, tokenizer = load(name)
        schemes = arguments.schemes or ["fp16", *all_schemes(head_dim(model)), *AVERAGES, *AUTOMATIC, *VARIANTS]
        source: AbstractContextManager[str] = uncalibrated(name)
        if not arguments.own_texts:
            calibrated(name, model, tokenizer, schemes)
            source = nullcontext(str(model_path(name)))
        haystack = build_haystack(tokenizer, corpus_text("prose"), (0.1, 0.5, 0.9), 1000) if arguments.needle else None
        rows = []
        start = time.perf_counter()
        texts = {text: tokens_of(text, tokenizer) for text in arguments.texts}
        with source as folder:
            for row in measure(
                model,
                texts,
                schemes,
                prefill=arguments.prefill,
                steps=arguments.steps,
                haystack=haystack,
                source=folder,
            ):
                rows.append(row)
                kl = f"KL {row.overall.kl_mean:.4f}" if row.overall is not None else row.error
                print(
                    f"{time.perf_counter() - start:5.0f} s {name} {row.scheme}: {row.bits:.2f} bits, {kl}", flush=True
                )
        title = Path(name).name
        found = Measurement(title, tuple(texts), arguments.prefill, arguments.steps, machine(), "float32", tuple(rows))
        for line in table(found.rows, texts=False):
            print("  ".join(line))
        if arguments.schemes and not arguments.name:
            continue
        label = f"{arguments.name or 'quality'}-{title}"
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{label}.json").write_text(found.to_json() + "\n")
        if not arguments.schemes:
            what = f"{name}: {len(texts)} texts, {arguments.prefill} tokens of prefill and {arguments.steps} steps"
            plot_frontier(
                [row for row in found.rows if row.scheme not in VARIANTS], DOCS / f"frontier-{name}.png", what
            )


if __name__ == "__main__":
    main()
