"""Speed of decoding and of prefill, as a ratio to mlx-lm's KVCache in one run, alternating.

    python benchmarks/decode.py [--model smollm2 d128] [--tokens 1000 4000] [--schemes tq4 rvq1] [--rounds 6]

Every round runs a few steps with each scheme in turn, so that a busy machine slows all of them alike; the ratio is
that of median step times. Prefill alternates whole prompts. `d128` is a small random model of llama's shape with heads
of 128 channels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import mlx.core as mx
from common import TEXTS, load, machine, print_table, store
from mlx_lm.models import llama

import mlx_kvq_plugin as kvq

SCHEMES = ("tq4", "tq3", "rvq1", "affine4")
STEPS = 8
CHUNK = 1024  # tokens of a prompt that the model gets at once


def model_and_ids(name: str, tokens: int) -> tuple[Any, list[int]]:
    """A model in float32 and a prompt of at most `tokens` tokens."""
    if name != "d128":
        model, tokenizer = load(name)
        return model, tokenizer.encode("\n\n".join(make() for make in TEXTS.values()))[:tokens]
    mx.random.seed(0)
    shape = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
    sizes = {"num_hidden_layers": 6, "intermediate_size": 2816, "vocab_size": 8000}
    small = llama.Model(llama.ModelArgs(model_type="llama", rms_norm_eps=1e-6, rope_theta=1e6, **shape, **sizes))
    mx.eval(small.parameters())
    ids: list[int] = mx.random.randint(0, sizes["vocab_size"], (tokens,)).tolist()  # type: ignore[assignment]
    return small, ids


def prefill(model: Any, ids: list[int]) -> tuple[list[Any], float]:
    """Caches filled with `ids`, and the seconds it took."""
    caches = kvq.make_prompt_cache(model)
    start = time.perf_counter()
    for first in range(0, len(ids), CHUNK):
        mx.eval(model(mx.array([ids[first : first + CHUNK]]), cache=caches)[:, -1], [cache.state for cache in caches])
    return caches, time.perf_counter() - start


def step_times(model: Any, caches: list[Any]) -> list[float]:
    """Seconds of `STEPS` steps after one that warms up."""
    token, found = mx.array([[5]]), []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        mx.eval(model(token, cache=caches))
        found.append(time.perf_counter() - start)
    return found[1:]


def compare(name: str, tokens: int, schemes: list[str], rounds: int) -> list[dict[str, Any]]:
    """One row a scheme, the plain cache first."""
    model, ids = model_and_ids(name, tokens)
    schemes = ["fp16", *schemes]
    caches: dict[str, list[Any]] = {}
    prompts: dict[str, list[float]] = {scheme: [] for scheme in schemes}
    steps: dict[str, list[float]] = {scheme: [] for scheme in schemes}
    for _ in range(2):
        for scheme in schemes:
            with kvq.compress(model, scheme):
                caches[scheme], seconds = prefill(model, ids)
                prompts[scheme].append(seconds)
    for _ in range(rounds):
        for scheme in schemes:
            with kvq.compress(model, scheme):
                steps[scheme] += step_times(model, caches[scheme])
    stock = statistics.median(steps["fp16"])
    return [
        {
            "model": name,
            "tokens": len(ids),
            "scheme": scheme,
            "step_ms": round(1e3 * statistics.median(steps[scheme]), 2),
            "decode_ratio": round(stock / statistics.median(steps[scheme]), 3),
            "prefill_ratio": round(min(prompts["fp16"]) / min(prompts[scheme]), 3),
        }
        for scheme in schemes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1000])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--no-store", action="store_true", help="leave the stored results as they are")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.model:
        for tokens in arguments.tokens:
            rows += compare(name, tokens, arguments.schemes, arguments.rounds)
            if not arguments.no_store:
                store("decode", rows)
    print(machine())
    print_table(
        ["model", "tokens", "scheme", "ms a step", "decode vs KVCache", "prefill vs KVCache"],
        [tuple(row.values()) for row in rows],
    )


if __name__ == "__main__":
    main()
