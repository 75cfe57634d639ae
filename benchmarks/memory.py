"""Memory really allocated for a prompt's KV cache, against mlx-lm's KVCache in float16.

    python benchmarks/memory.py [--model smollm2] [--tokens 1000 4096] [--schemes tq4 rvq1]

The model runs once in float32 over real text; its keys and values, rounded to float16 as a half-precision model would
hand them over, then go into mlx-lm's caches and into ours, chunk by chunk. `allocated` is MLX's active memory after
minus before; nothing else is alive in between.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from typing import Any

import mlx.core as mx
from common import TEXTS, load, machine, print_table, store

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.cache import KVQCache

SCHEMES = ("tq4", "tq3", "rvq2", "rvq1", "affine4")
CHUNK = 512


def real_tokens(model: Any, tokenizer: Any, count: int) -> list[tuple[mx.array, mx.array]]:
    """Float16 keys and values of every layer for `count` tokens of text."""
    ids = tokenizer.encode("\n\n".join(make() for make in TEXTS.values()))[:count]
    assert len(ids) == count, f"the texts have {len(ids)} tokens, {count} are needed"
    kept: list[list[tuple[mx.array, mx.array]]] = [[] for _ in model.layers]
    caches = kvq.make_prompt_cache(model)
    originals = [cache.update_and_fetch for cache in caches]
    for layer, cache in enumerate(caches):

        def record(keys: mx.array, values: mx.array, layer: int = layer) -> Any:
            kept[layer].append((keys.astype(mx.float16), values.astype(mx.float16)))
            return originals[layer](keys, values)

        cache.update_and_fetch = record
    for start in range(0, count, CHUNK):
        mx.eval(model(mx.array([ids[start : start + CHUNK]]), cache=caches)[:, -1], kept)
    joined = [tuple(mx.concatenate(side, axis=2) for side in zip(*layer, strict=True)) for layer in kept]
    mx.eval(joined)
    return joined


def fill(caches: list[Any], tokens: list[tuple[mx.array, mx.array]]) -> None:
    """All tokens but the last in chunks, the last as a step."""
    count = tokens[0][0].shape[2]
    cuts = [*range(0, count - 1, CHUNK), count - 1, count]
    for cache, (keys, values) in zip(caches, tokens, strict=True):
        for start, stop in itertools.pairwise(cuts):
            cache.update_and_fetch(keys[..., start:stop, :], values[..., start:stop, :])
            if isinstance(cache, KVQCache):
                cache.compact()
            mx.eval(cache.state)


def allocated(model: Any, tokens: list[tuple[mx.array, mx.array]]) -> tuple[int, int]:
    """Bytes allocated and bytes that `nbytes` reports."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    caches = kvq.make_prompt_cache(model)
    fill(caches, tokens)
    gc.collect()
    return mx.get_active_memory() - before, sum(cache.nbytes for cache in caches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1000, 4096])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.model:
        model, tokenizer = load(name)
        longest = real_tokens(model, tokenizer, max(arguments.tokens))
        for count in arguments.tokens:
            tokens = [tuple(side[..., :count, :] for side in layer) for layer in longest]
            stock, _ = allocated(model, tokens)
            rows.append({"model": name, "tokens": count, "scheme": "fp16", "allocated": stock, "ratio": 1.0})
            for scheme in arguments.schemes:
                with kvq.compress(model, scheme):
                    held, reported = allocated(model, tokens)
                rows.append(
                    {
                        "model": name,
                        "tokens": count,
                        "scheme": scheme,
                        "allocated": held,
                        "ratio": round(stock / held, 3),
                        "nbytes": reported,
                        "nbytes_error": round(reported / held - 1, 4),
                    }
                )
    store("memory", rows)
    print(machine())
    print_table(
        ["model", "tokens", "scheme", "allocated MiB", "times smaller than KVCache", "nbytes off by"],
        [
            (
                row["model"],
                row["tokens"],
                row["scheme"],
                row["allocated"] / 2**20,
                row["ratio"],
                f"{row.get('nbytes_error', 0):+.2%}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
