"""Prefill on a GPU: time and memory of caches and attention, against mlx-lm's fp16 KVCache.

    python benchmarks/prefill_memory.py [--tokens 32768] [--layers 36] [--schemes tq4 tq3 rvq1]

The model is that of decode_gpu.py. Chunks of 2,048 tokens, as mlx-lm's; schemes alternate, the best of the rounds after
a first one counts. Memory is MLX's peak during the prefill less what is active before it (the weights) and less the
peak of the same prefill without any past (a fresh cache for every chunk), which is what a chunk takes by itself.

How much of the time is packing is measured apart: layers that hold half of the tokens pack a chunk each, without
waiting in between, as a prefill does; the median time of a layer times chunks and layers, as a share of the prefill's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import mlx.core as mx
from common import machine, print_table, store
from decode_gpu import DIM, HEADS, build, caches_of

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.kernels.launch import device_name

CHUNK = 2048


def prefill(model: Any, ids: mx.array, scheme: str, keep: bool = True) -> tuple[float, int]:
    """Seconds, and peak bytes above what was active before; `keep`: the caches go on from chunk to chunk."""
    with kvq.compress(model, scheme):
        caches = kvq.make_prompt_cache(model)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        begin = time.perf_counter()
        for start in range(0, ids.shape[1], CHUNK):
            model.model(ids[:, start : start + CHUNK], cache=caches)
            mx.eval([cache.state for cache in caches])
            if not keep:
                caches = kvq.make_prompt_cache(model)
        return time.perf_counter() - begin, mx.get_peak_memory() - before


def packing_seconds(scheme: str, tokens: int, layers: int = 16) -> float:
    """What appending and packing a chunk takes in a layer that holds `tokens` tokens."""
    times = []
    for _ in range(5):
        caches = caches_of(scheme, layers, max(tokens, 64))
        keys, values = (mx.random.normal((1, HEADS, CHUNK, DIM)).astype(mx.bfloat16) for _ in range(2))
        mx.eval(keys, values)
        begin = time.perf_counter()
        for cache in caches:
            cache.update_and_fetch(keys, values)
            cache.settle()
        mx.eval([[c.dense_keys, c.dense_values, c.key_planes, c.value_planes] for c in caches])
        times.append((time.perf_counter() - begin) / layers)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--schemes", nargs="+", default=["tq4", "tq3", "rvq1"])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-store", action="store_true", help="leave the stored results as they are")
    arguments = parser.parse_args()
    print(machine(), device_name(), flush=True)
    model = build(arguments.layers, arguments.hidden, arguments.vocabulary)
    ids = mx.random.randint(0, arguments.vocabulary, (1, arguments.tokens))
    mx.eval(ids)
    schemes = ["fp16", *arguments.schemes]
    _, alone = prefill(model, ids[:, : 2 * CHUNK], "fp16", keep=False)
    found: dict[str, list[tuple[float, int]]] = {scheme: [] for scheme in schemes}
    for _ in range(arguments.rounds + 1):
        for scheme in schemes:
            found[scheme].append(prefill(model, ids, scheme))
            print(f"{scheme}: {found[scheme][-1][0]:.3f} s", flush=True)
    times = arguments.layers * -(-arguments.tokens // CHUNK)
    packing = {s: times * packing_seconds(s, arguments.tokens // 2) if s != "fp16" else 0.0 for s in schemes}
    rows = []
    stock_time = min(seconds for seconds, _ in found["fp16"][1:])
    stock_peak = found["fp16"][-1][1] - alone
    for scheme in schemes:
        seconds, peak = min(s for s, _ in found[scheme][1:]), found[scheme][-1][1] - alone
        rows.append(
            {
                "tokens": arguments.tokens,
                "scheme": scheme,
                "seconds": round(seconds, 3),
                "time_ratio": round(seconds / stock_time, 3),
                "peak_mib": round(peak / 2**20, 1),
                "peak_ratio": round(peak / stock_peak, 3),
                "packing_share": round(packing[scheme] / seconds, 3),
            }
        )
    if not arguments.no_store:
        store("prefill_memory", [{"device": device_name(), **row} for row in rows])
    print_table(
        [
            "tokens",
            "scheme",
            "seconds",
            "of fp16's time",
            "MiB of caches and attention",
            "of fp16's",
            "time of packing",
        ],
        [tuple(row.values()) for row in rows],
    )


if __name__ == "__main__":
    main()
