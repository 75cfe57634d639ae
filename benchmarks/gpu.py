"""Step time, memory and peak memory on a GPU: a llama-shaped model with random bfloat16 weights.

    python benchmarks/gpu.py [--layers 8] [--tokens 1024 8192 32768] [--schemes tq4 rvq1 affine4] [--batch 1 8]

Steps are evaluated one by one, so launch and synchronization count in full for every scheme alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import mlx.core as mx
from common import machine
from mlx_lm.models import llama

import mlx_kvq_plugin as kvq

CHUNK, VOCABULARY = 2048, 32000


def build(layers: int) -> Any:
    """A model of Qwen3-8B's layer shape."""
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=4096,
            num_hidden_layers=layers,
            intermediate_size=12288,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            rms_norm_eps=1e-6,
            vocab_size=VOCABULARY,
            rope_theta=1e6,
        )
    )
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def milliseconds(model: Any, caches: list[Any], batch: int) -> float:
    """Median time of a step of `batch` sequences with copies of `caches`; one sequence continues `caches` itself."""
    used = caches if batch == 1 else [cache.merge([cache] * batch) for cache in caches]
    times = []
    for _ in range(23):
        begin = time.perf_counter()
        mx.eval(model(mx.array([[5]] * batch), cache=used))
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--schemes", nargs="+", default=["tq4", "rvq1", "affine4"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="sequences that decode together")
    arguments = parser.parse_args()
    print(machine())
    model = build(arguments.layers)
    for tokens in arguments.tokens:
        for scheme in ["fp16", *arguments.schemes]:
            with kvq.compress(model, scheme):
                caches = kvq.make_prompt_cache(model)
                mx.reset_peak_memory()
                for start in range(0, tokens, CHUNK):
                    length = min(CHUNK, tokens - start)
                    model.model(mx.random.randint(0, VOCABULARY, (1, length)), cache=caches)
                    mx.eval([cache.state for cache in caches])
                peak = mx.get_peak_memory() / 2**30
                for batch in arguments.batch:
                    step = milliseconds(model, caches, batch)
                    print(
                        f"{tokens} tokens, batch of {batch}, {scheme}: {step:.2f} ms a step, peak of the prefill "
                        f"{peak:.2f} GiB; {kvq.cache_report(caches).summary()}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
