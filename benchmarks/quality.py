"""What schemes cost in quality: KL divergence, top-1 agreement, perplexity against mlx-lm's KVCache.

    python benchmarks/quality.py [--model smollm2 gemma3] [--texts documentation] [--schemes tq4 rvq1]

Teacher-forced on real text, in float32: the first `--prefill` tokens in one chunk, then `--steps` single-token steps
that read the compressed cache. KL is in nats a token.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from common import TEXTS, load, machine, print_table, store

import mlx_kvq_plugin as kvq

SCHEMES = ("tq4", "rvq2", "tq3", "rvq1", "tq4,frame=off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--texts", nargs="+", default=["documentation", "code"], choices=list(TEXTS))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--prefill", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--name", default="quality", help="results go to benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.model:
        model, tokenizer = load(name)
        for text in arguments.texts:
            ids = tokenizer.encode(TEXTS[text]())[: arguments.prefill + arguments.steps]
            reference = kvq.step_logprobs(model, kvq.make_prompt_cache(model), ids, arguments.prefill)
            for scheme in arguments.schemes:
                with kvq.compress(model, scheme):
                    caches = kvq.make_prompt_cache(model)
                    run = kvq.step_logprobs(model, caches, ids, arguments.prefill)
                fidelity = kvq.compare(reference, run, ids[arguments.prefill :])
                rows.append(
                    {
                        "model": name,
                        "text": text,
                        "scheme": scheme,
                        **{key: round(value, 5) for key, value in asdict(fidelity).items()},
                    }
                )
                print(f"{name} {text} {scheme}: KL {fidelity.kl_mean:.4f}", flush=True)
    store(arguments.name, rows)
    print(machine())
    print_table(
        ["model", "text", "scheme", "KL mean", "median", "p99", "top-1", "perplexity (fp16)"],
        [
            (
                row["model"],
                row["text"],
                row["scheme"],
                row["kl_mean"],
                row["kl_median"],
                row["kl_p99"],
                f"{row['top1']:.1%}",
                f"{row['perplexity']:.2f} ({row['reference_perplexity']:.2f})",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
