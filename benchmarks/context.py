"""Automatic bits for a context: what it is worth that newest dense tokens are chosen and bytes are counted there.

    python benchmarks/context.py [--model smollm2 gemma3] [--prefill 1800 3800] [--steps 200] [--kinds]

The ruler of `kvq eval` at the end of long texts, with `auto@3.25` and the same for a context of so many tokens, of both
families; choices go by texts that the model writes itself, as in automatic.py. Bytes are those of the caches of a text
at its end, in a model of 16 bits. Stored rows of models and contexts that are not measured stay.

With `--kinds`: what full and sliding layers cost apart, the others as mlx-lm makes them, after short and long prompts.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import mlx.core as mx
from common import RESULTS, load, machine, print_table, store, uncalibrated
from texts import tokens_of

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.adapters import FULL, SLIDING
from mlx_kvq_plugin.evaluation import divergence, step_logprobs
from mlx_kvq_plugin.loading import stock_caches
from mlx_kvq_plugin.ruler import measure

BITS = "3.25"
KINDS: dict[str, Any] = {"model": "gemma3", "scheme": "tq3", "prefill": (150, 1800), "steps": 100}
TEXTS = ("documentation", "code", "licence"), ("documentation", "code", "log")  # the last for contexts beyond 2,200


def kinds() -> list[dict[str, Any]]:
    """Mean and median KL of a scheme in layers of one kind alone, nats a token."""
    model, tokenizer = load(KINDS["model"])
    texts, rows = [tokens_of(text, tokenizer) for text in TEXTS[0]], []
    with kvq.compress(model, KINDS["scheme"]) as compression:
        plans = compression.maker.plan()
        for prefill in KINDS["prefill"]:
            found: dict[str, list[mx.array]] = {FULL: [], SLIDING: []}
            for text in texts:
                tokens = text[: prefill + KINDS["steps"]]
                expected = step_logprobs(model, stock_caches(model), tokens, prefill)
                for kind, parts in found.items():
                    both = zip(plans, compression.maker(), stock_caches(model), strict=True)
                    caches = [own if plan.geometry.kind == kind else stock for plan, own, stock in both]
                    parts.append(divergence(expected, step_logprobs(model, caches, tokens, prefill)))
                    mx.eval(parts[-1])
            for kind, parts in found.items():
                kl = mx.concatenate(parts)
                rows.append({**KINDS, "prefill": prefill, "kind": kind, "kl": mx.mean(kl).item()})
                rows[-1]["kl_median"] = mx.median(kl).item()
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--prefill", nargs="+", type=int, default=[1800, 3800])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kinds", action="store_true", help="full and sliding layers of Gemma 3 apart, nothing else")
    arguments = parser.parse_args()
    print(machine())
    if arguments.kinds:
        store("context-kinds", kinds())
        return
    rows: list[dict[str, Any]] = []
    for name in arguments.model:
        model, tokenizer = load(name)
        for prefill in arguments.prefill:
            context = prefill + arguments.steps
            texts = TEXTS[context > 2200]
            schemes = [
                f"auto@{BITS}{more}{family}" for family in ("", ",family=tcq") for more in ("", f",context={context}")
            ]
            with uncalibrated(name) as source:
                tokens = {text: tokens_of(text, tokenizer) for text in texts}
                for row in measure(model, tokens, schemes, prefill=prefill, steps=arguments.steps, source=source):
                    own = row.overall
                    assert own is not None, row.error
                    rows.append(
                        {
                            "model": name,
                            "context": context,
                            "texts": texts,
                            "scheme": row.scheme,
                            "kl": own.kl_mean,
                            "top1": own.top1,
                            "bits": row.bits,
                            "nbytes": row.nbytes_16bit / len(texts),
                            "fp16_nbytes": row.fp16_nbytes / len(texts),
                        }
                    )
                    print(rows[-1], row.note, flush=True)
    path = RESULTS / "context.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    measured = {(row["model"], row["context"]) for row in rows}
    store("context", [row for row in known if (row["model"], row["context"]) not in measured] + rows)
    print_table(list(rows[0]), [tuple(row.values()) for row in rows])


if __name__ == "__main__":
    main()
