"""Where the most likely token changes: how sure mlx-lm's caches are of it, by text.

    python benchmarks/flips.py [--model smollm2 gemma3] [--texts story german poetry] [--scheme tcq3]

The lead of a position is how many nats its most likely token is ahead of the next one with mlx-lm's caches. 400 tokens
of prefill and 200 single-token steps, each text by itself.
"""

from __future__ import annotations

import argparse
from typing import Any

import mlx.core as mx
from common import load, machine, print_table, store
from mlx_lm.models.cache import make_prompt_cache
from texts import NAMES, tokens_of

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.evaluation import agreement, divergence, step_logprobs

CLOSE, SURE = 0.1, 0.5  # nats


def lead(found: mx.array) -> mx.array:
    """Nats `(P,)` between the two most likely tokens of `(P, V)`."""
    best = mx.topk(found, 2, axis=-1)
    return mx.abs(best[:, 0] - best[:, 1])


def share(chosen: mx.array, among: mx.array) -> float:
    """How many of some positions are chosen."""
    return float((mx.sum(chosen & among) / mx.maximum(mx.sum(among), 1)).item())


def steps(model: Any, scheme: str | None, ids: list[int], prefill: int) -> mx.array:
    """Log probabilities through a scheme's caches, or through mlx-lm's."""
    if scheme is None:
        return step_logprobs(model, make_prompt_cache(model), ids, prefill)
    with kvq.compress(model, scheme):
        return step_logprobs(model, kvq.make_prompt_cache(model), ids, prefill)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--texts", nargs="+", default=["story", "german", "poetry"], choices=NAMES)
    parser.add_argument("--scheme", default="tcq3")
    parser.add_argument("--prefill", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--no-store", action="store_true", help="leave the stored results as they are")
    arguments = parser.parse_args()
    scheme, rows = arguments.scheme, list[dict[str, Any]]()
    for name in arguments.model:
        model, tokenizer = load(name)
        for text in arguments.texts:
            ids = tokens_of(text, tokenizer)[: arguments.prefill + arguments.steps]
            exact = steps(model, None, ids, arguments.prefill)
            run = steps(model, scheme, ids, arguments.prefill)
            ahead, flipped, everywhere = lead(exact), ~agreement(exact, run), mx.ones(exact.shape[0], mx.bool_)
            row: dict[str, Any] = {"model": name, "text": text, "scheme": scheme}
            row["entropy"] = float(-mx.mean(mx.sum(mx.exp(exact) * exact, axis=-1)).item())
            row["kl_mean"] = float(mx.mean(divergence(exact, run)).item())
            row["close"] = share(ahead < CLOSE, everywhere)
            row["flips"] = share(flipped, everywhere)
            row["flips_close"] = share(flipped, ahead < CLOSE)
            row["flips_sure"] = share(flipped, ahead > SURE)
            rows.append(row)
            print(row, flush=True)
    print(machine())
    if not arguments.no_store:
        store("flips", rows)
    print_table(list(rows[0]), [tuple(row.values()) for row in rows])


if __name__ == "__main__":
    main()
