"""How many tokens the statistics of key frames need, and how well they keep: far from them, and in another topic.

    python benchmarks/aging.py [--model smollm2 gemma3] [--schemes tcq3]

Statistics are those of the first chunk of a prompt and stay. So a prompt is read in a first chunk of as many tokens as
statistics are to be from, then in chunks of 512; with `all` the whole prompt is one chunk, which is what refreshing the
statistics at its end could give at best. Then single-token steps, KL against mlx-lm's own caches.

    tokens   documentation, 1,000 tokens: statistics of the first 68 (64 without attention sinks), 128, ..., all
    distance documentation: statistics of the first 256 tokens, steps after 500 to 8,000
    topic    256 tokens of the story, then code: steps after 1,000, statistics of the story, of the first 256 of code
             alone (without the story before them), and of all
"""

from __future__ import annotations

import argparse
from typing import Any

import mlx.core as mx
from common import documentation, load, print_table, source_code, store, story
from mlx_lm.models.cache import make_prompt_cache

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.evaluation import compare, step_logprobs

CHUNK, STEPS = 512, 64


def steps(model: Any, caches: list[Any], ids: list[int], prefill: int, first: int) -> mx.array:
    """Log probabilities `(STEPS, V)` after `prefill` tokens, of which the first chunk has `first`."""
    model(mx.array([ids[:first]]), cache=caches)
    mx.eval([cache.state for cache in caches])
    return step_logprobs(model, caches, ids[first : prefill + STEPS], prefill - first, chunk=CHUNK)


def measured(
    model: Any, scheme: str, ids: list[int], prefill: int, firsts: list[int]
) -> dict[int, tuple[float, float]]:
    """KL mean and top-1 agreement by the length of the first chunk."""
    exact = steps(model, make_prompt_cache(model), ids, prefill, min(CHUNK, prefill))
    found = {}
    with kvq.compress(model, scheme):
        for first in firsts:
            run = steps(model, kvq.make_prompt_cache(model), ids, prefill, first)
            own = compare(exact, run, ids[prefill : prefill + STEPS])
            found[first] = own.kl_mean, own.top1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--schemes", nargs="+", default=["tcq3"])
    parser.add_argument("--distances", nargs="*", type=int, default=[500, 1000, 2000, 4000, 8000])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.model:
        model, tokenizer = load(name)
        plain, code = tokenizer.encode(documentation()), tokenizer.encode(source_code())
        changed = tokenizer.encode(story())[:256] + code
        for scheme in arguments.schemes:
            cases = [("tokens", plain, 1000, {n: f"first {n}" for n in (68, 128, 256, 512)} | {1000: "all"})]
            cases += [("distance", plain, n, {256: "first 256", n: "all"}) for n in arguments.distances]
            cases += [("topic", changed, 1000, {256: "story", 1000: "all"}), ("topic", code, 744, {256: "code"})]
            for what, ids, prefill, firsts in cases:
                for first, (kl, top1) in measured(model, scheme, ids, prefill, list(firsts)).items():
                    row: dict[str, Any] = {"model": name, "scheme": scheme, "what": what, "steps_after": prefill}
                    rows.append({**row, "statistics_of": firsts[first], "kl": kl, "top1": top1})
                    print(rows[-1], flush=True)
    store("aging", rows)
    print_table(list(rows[0]), [tuple(row.values()) for row in rows])


if __name__ == "__main__":
    main()
