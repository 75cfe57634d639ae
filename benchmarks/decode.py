"""Speed of decoding and of prefill, as a ratio to mlx-lm's KVCache in one run, alternating.

    python benchmarks/decode.py [--model smollm2] [--tokens 1000] [--schemes tq4 rvq1] [--rounds 6]

Every round runs a few steps with each scheme in turn, so that a busy machine slows all of them alike; the ratio is
that of median step times. Prefill alternates whole prompts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import mlx.core as mx
from common import TEXTS, load, machine, print_table, store

import mlx_kvq_plugin as kvq

SCHEMES = ("tq4", "tq3", "rvq1", "affine4")
STEPS = 8


def prefill(model: Any, ids: list[int]) -> tuple[list[Any], float]:
    """Caches filled with `ids`, and the seconds it took."""
    caches = kvq.make_prompt_cache(model)
    start = time.perf_counter()
    mx.eval(model(mx.array([ids]), cache=caches)[:, -1], [cache.state for cache in caches])
    return caches, time.perf_counter() - start


def step_times(model: Any, caches: list[Any]) -> list[float]:
    """Seconds of `STEPS` steps after one that warms up."""
    token, found = mx.array([[5]]), []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        mx.eval(model(token, cache=caches))
        found.append(time.perf_counter() - start)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2"])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.model:
        model, tokenizer = load(name)
        ids = tokenizer.encode("\n\n".join(make() for make in TEXTS.values()))[: arguments.tokens]
        schemes = ["fp16", *arguments.schemes]
        caches: dict[str, list[Any]] = {}
        prompts: dict[str, list[float]] = {scheme: [] for scheme in schemes}
        steps: dict[str, list[float]] = {scheme: [] for scheme in schemes}
        for _ in range(2):
            for scheme in schemes:
                with kvq.compress(model, scheme):
                    caches[scheme], seconds = prefill(model, ids)
                    prompts[scheme].append(seconds)
        for _ in range(arguments.rounds):
            for scheme in schemes:
                with kvq.compress(model, scheme):
                    steps[scheme] += step_times(model, caches[scheme])
        for scheme in schemes:
            step, stock = statistics.median(steps[scheme]), statistics.median(steps["fp16"])
            rows.append(
                {
                    "model": name,
                    "tokens": len(ids),
                    "scheme": scheme,
                    "step_ms": round(1e3 * step, 2),
                    "decode_ratio": round(stock / step, 3),
                    "prefill_ratio": round(min(prompts["fp16"]) / min(prompts[scheme]), 3),
                }
            )
    store("decode", rows)
    print(machine())
    print_table(
        ["model", "tokens", "scheme", "ms a step", "decode vs KVCache", "prefill vs KVCache"],
        [tuple(row.values()) for row in rows],
    )


if __name__ == "__main__":
    main()
