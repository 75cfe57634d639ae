"""How much of a cache attention could leave unread: tokens, and tiles of 64 tokens, whose weights are negligible.

    python benchmarks/skippable.py [--model smollm2 gemma3] [--tokens 1024 4096]

A kernel that skips what cannot matter skips whole tiles: 64 tokens are decoded together. A value can be left out where
its weight is below 1e-6 for every query head of its KV head. A key can be left out if even a coarse score says so, at
best where its exact weight does: that is the bound which scoring with the first stage of `rvq` cannot beat. Weights are
those of the model's own attention at the last 32 positions of a text, dense first and last tokens left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from common import documentation, load, print_table, store
from mlx_lm.models import gemma3_text, llama
from mlx_lm.models.cache import make_prompt_cache

MODULES = {"smollm2": llama, "gemma3": gemma3_text}
QUERIES, TILE, SINKS, RECENT = 32, 64, 4, 16
LIMITS = (1e-4, 1e-6)


@contextmanager
def watched(module: Any, seen: list[mx.array], tokens: int) -> Iterator[None]:
    """Weights `(Hkv, queries of the group, tokens)` of calls that see all tokens, in `seen`."""
    original = module.scaled_dot_product_attention

    def attend(queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, **more: Any) -> mx.array:
        if keys.shape[2] == tokens and queries.shape[2] == QUERIES:
            grouped = queries.reshape(keys.shape[1], -1, QUERIES, queries.shape[3])
            scores = (grouped * scale) @ keys[0][:, None].swapaxes(-1, -2)
            ahead = mx.arange(tokens)[None] > mx.arange(tokens - QUERIES, tokens)[:, None]
            weights = mx.softmax(mx.where(ahead, -mx.inf, scores), axis=-1)
            seen.append(mx.max(weights, axis=1))  # of the group, position by position
            mx.eval(seen[-1])
        return original(queries, keys, values, cache=cache, scale=scale, **more)

    module.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        module.scaled_dot_product_attention = original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096])
    arguments = parser.parse_args()
    rows = []
    for name in arguments.model:
        model, tokenizer = load(name)
        ids = mx.array([tokenizer.encode(documentation())[: max(arguments.tokens)]])
        for tokens in arguments.tokens:
            seen: list[mx.array] = []
            caches = make_prompt_cache(model)
            for start in range(0, tokens - QUERIES, 256):
                mx.eval(model(ids[:, start : min(start + 256, tokens - QUERIES)], cache=caches))
            with watched(MODULES[name], seen, tokens):
                mx.eval(model(ids[:, tokens - QUERIES : tokens], cache=caches))
            weights = np.stack([np.array(x) for x in seen])[..., SINKS : tokens - QUERIES - RECENT]
            tiles = weights[..., : weights.shape[-1] // TILE * TILE].reshape(*weights.shape[:-1], -1, TILE).max(axis=-1)
            row = {"model": name, "tokens": tokens, "layers": len(seen)}
            for limit in LIMITS:
                row[f"tokens_{limit:g}"] = float((weights < limit).mean())
                row[f"tiles_{limit:g}"] = float((tiles < limit).mean())
            rows.append(row)
            print(row, flush=True)
    store("skippable", rows)
    print_table(list(rows[0]), [tuple(row.values()) for row in rows])


if __name__ == "__main__":
    main()
