"""Greedy tokens and cache bytes of SmolLM2 on this rank, to compare several ranks with one.

python benchmarks/ranks.py --scheme tq4
mlx.launch -n 3 --backend ring --python $(which python) -- benchmarks/ranks.py --scheme tq4
"""

from __future__ import annotations

import argparse

import mlx.core as mx
from mlx_lm.generate import generate_step

import mlx_kvq_plugin as kvq

TEXT = "The history of the compass begins in China, where lodestones were used. " * 8
STEPS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", default="tq4")
    scheme = parser.parse_args().scheme
    path = str(kvq.demo_model_path("smollm2"))
    several = mx.distributed.init().size() > 1
    model, tokenizer = kvq.sharded_load(path, scheme) if several else kvq.load(path, scheme)
    model.set_dtype(mx.float32)
    ids = tokenizer.encode(TEXT)
    cache = kvq.make_prompt_cache(model)
    tokens = [token for token, _ in generate_step(mx.array(ids), model, max_tokens=STEPS, prompt_cache=cache)]
    place = kvq.placement_of(model)
    nbytes = kvq.cache_report(cache).nbytes
    print(f"{scheme}, rank {place.rank} of {place.ranks}, {len(ids)} tokens: {nbytes:,} bytes, {tokens}", flush=True)


if __name__ == "__main__":
    main()
