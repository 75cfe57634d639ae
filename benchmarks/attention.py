"""Attention of a decode step alone, on a GPU: fused kernels against MLX's own attention on 16-bit keys and values.

    python benchmarks/attention.py [--tokens 4096 32768 131072] [--schemes tq4 tq3 rvq1] [--heads 32 8] [--dim 128]

Every measurement is a chain of dependent calls (the output is the next query) over the caches of several layers, more
bytes together than the GPU's second-level cache holds; as in a decode step, which is started before the last one is
done, eight calls are started together while the next ones are put together. Runs alternate between schemes; figures
are medians. Bytes are those of packed planes, or of 16-bit keys and values; bandwidth is compared with a copy (bytes
read plus bytes written) measured in the same run. That the outputs are right is tested in tests/test_attend_kernels.py.

The time of the GPU alone, in which the host and the starts of graphs do not count, is measured too: the chain is queued
while the GPU is busy with something else.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx
from common import machine, print_table, store

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.attention import AttendArgs, attend
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.codecs import Codec
from mlx_kvq_plugin.frame import KeyFrame
from mlx_kvq_plugin.growth import tile_rows
from mlx_kvq_plugin.kernels.launch import device_name
from mlx_kvq_plugin.rotary import Rotary

K = TypeVar("K")
Step = Callable[[int, mx.array], mx.array]

BEYOND_CACHE = 256 * 2**20  # bytes that a chain goes through before it comes back to the first


def copy_bandwidth() -> float:
    """Bytes read plus bytes written a second by an elementwise pass over 1 GiB."""
    x = mx.ones((2**28,), mx.float32)
    mx.eval(x)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        y = x
        for _ in range(4):
            y = -y
        mx.eval(y)
        times.append((time.perf_counter() - begin) / 4)
    return 2 * x.nbytes / statistics.median(times[2:])


def filled(scheme: str, tokens: int, heads: int, dim: int, rotary: Rotary) -> KVQCache:
    """A cache of random codes, with scales as of normal tokens and a frame whose mean is as large as they are."""
    cache = KVQCache(kvq.parse_scheme(scheme).layer_spec(), rotary)
    spec = cache.spec
    dense, packed = spec.sinks + spec.recent + 4, tokens - spec.sinks - spec.recent - 4

    def planes(codec: Codec) -> dict[str, mx.array]:
        found = {}
        for plane in codec.planes(dim, "bfloat16"):
            shape = (1, heads, tile_rows(packed), plane.width)
            if plane.dtype == "uint8":
                found[plane.name] = mx.random.randint(0, 256, shape).astype(mx.uint8)
            else:
                found[plane.name] = mx.random.uniform(0.9, 1.1, shape).astype(mx.bfloat16)
        return found

    cache.key_planes, cache.value_planes = planes(cache.key_codec), planes(cache.value_codec)
    cache.dense_keys = mx.random.normal((1, heads, spec.sinks + spec.recent + cache.block, dim)).astype(mx.bfloat16)
    cache.dense_values = mx.random.normal(cache.dense_keys.shape).astype(mx.bfloat16)
    mean = mx.random.normal((1, heads, 1, dim))
    cache.frame = KeyFrame(rotary, mean, mx.ones((1, heads, 1, dim - rotary.pairs)), mx.zeros_like(mean))
    cache.value_scale = mx.ones((1, heads, 1, dim))
    cache._frozen, cache._packed, cache._dense, cache.offset = True, packed, dense, tokens
    mx.eval(cache.key_planes, cache.value_planes, cache.dense_keys, cache.dense_values, cache.frame.arrays())
    return cache


def copies(cache: KVQCache, count: int) -> list[KVQCache]:
    """The cache and `count - 1` more of other memory."""
    found = [cache]
    for _ in range(count - 1):
        other = copy.copy(cache)
        other.key_planes = {name: x + mx.zeros_like(x) for name, x in cache.key_planes.items()}
        other.value_planes = {name: x + mx.zeros_like(x) for name, x in cache.value_planes.items()}
        mx.eval(other.key_planes, other.value_planes)
        found.append(other)
    return found


def packed_nbytes(cache: KVQCache) -> int:
    return sum(x.nbytes for planes in (cache.key_planes, cache.value_planes) for x in planes.values())


def chain_time(step: Step, query: mx.array, length: int) -> tuple[float, float]:
    """Seconds a call in a chain, and those that the host takes for it: to put it together, and to start it."""
    begin = time.perf_counter()
    for i in range(length):
        query = step(i, query)
        if i % 8 == 7:
            mx.async_eval(query)
    started = time.perf_counter()
    mx.eval(query)
    return (time.perf_counter() - begin) / length, (started - begin) / length


def after_busy(x: mx.array, passes: int, step: Step, query: mx.array, length: int) -> tuple[float, float]:
    """Seconds of `passes` elementwise passes over `x` and a chain of `length` calls; and until all that was queued."""
    begin = time.perf_counter()
    for _ in range(passes):
        x = -x
    mx.async_eval(x)
    for i in range(length):
        query = step(i, query)
    mx.async_eval(query)
    queued = time.perf_counter()
    mx.eval(x, query)
    return time.perf_counter() - begin, queued - begin


def busy_array() -> mx.array:
    """Of which elementwise passes keep a GPU busy: 512 MiB."""
    busy = mx.ones((2**27,), mx.float32)
    mx.eval(busy)
    return busy


def gpu_times(steps: dict[K, Step], query: mx.array, length: int, rounds: int, busy: mx.array) -> dict[K, float]:
    """Seconds that a call takes the GPU, by name; rounds alternate between the steps."""
    host = 0.0
    for step in steps.values():
        after_busy(busy, 0, step, query, length)  # compiles
        host = max(host, after_busy(busy, 0, step, query, length)[1])
    one = statistics.median(after_busy(busy, 1, step, query, 0)[0] for _ in range(3))
    passes = 2 + math.ceil(1.5 * host / one)
    alone: list[float] = []
    found: dict[K, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        alone.append(after_busy(busy, passes, step, query, 0)[0])
        for name, own in steps.items():
            found[name].append(after_busy(busy, passes, own, query, length)[0])
    before = statistics.median(alone)
    return {name: max(1e-9, statistics.median(times) - before) / length for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 32768, 131072])
    parser.add_argument("--schemes", nargs="+", default=["tq4", "tq3", "rvq1"])
    parser.add_argument("--heads", nargs=2, type=int, default=[32, 8], help="query heads and KV heads")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, default=192, help="calls of a chain")
    parser.add_argument("--store", action="store_true", help="write results/attention.json")
    arguments = parser.parse_args()
    Hq, Hkv, dim = *arguments.heads, arguments.dim
    rotary = Rotary("half", tuple(1e6 ** (-2 * j / dim) for j in range(dim // 2)))
    copied = copy_bandwidth()
    print(machine(), f"copy {copied / 1e12:.2f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []
    busy = busy_array()
    scale = dim**-0.5
    for tokens in arguments.tokens:
        query = mx.random.normal((1, Hq, 1, dim)).astype(mx.bfloat16)
        steps: dict[str, Any] = {}
        nbytes = {"fp16": 2 * 2 * Hkv * tokens * dim}
        dense = [
            tuple(mx.random.normal((1, Hkv, tokens, dim)).astype(mx.bfloat16) for _ in range(2))
            for _ in range(max(1, -(-BEYOND_CACHE // nbytes["fp16"])))
        ]
        mx.eval(dense, query)

        def stock(i: int, q: mx.array, dense: Any = dense) -> mx.array:
            return mx.fast.scaled_dot_product_attention(q, *dense[i % len(dense)], scale=scale, mask=None)

        steps["fp16"] = stock
        for scheme in arguments.schemes:
            cache = filled(scheme, tokens, Hkv, dim, rotary)
            nbytes[scheme] = packed_nbytes(cache)
            layers = copies(cache, max(1, -(-BEYOND_CACHE // nbytes[scheme])))

            def arguments_of(c: KVQCache, q: mx.array) -> AttendArgs:
                return AttendArgs(q, c, scale, None, None, mx.bfloat16, mx.bfloat16)

            def fused(i: int, q: mx.array, layers: Any = layers) -> mx.array:
                c = layers[i % len(layers)]
                return attend(arguments_of(c, q))

            steps[scheme] = fused
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for _ in range(arguments.rounds + 2):
            for name, step in steps.items():
                times[name].append(chain_time(step, query, arguments.length))
        alone = gpu_times(steps, query, arguments.length, 5, busy)
        medians = {name: statistics.median(whole for whole, _ in found[2:]) for name, found in times.items()}
        for name, seconds in medians.items():
            host = statistics.median(build for _, build in times[name][2:])
            bandwidth = nbytes[name] / alone[name]
            rows.append(
                {
                    "tokens": tokens,
                    "scheme": name,
                    "us": round(1e6 * seconds, 1),
                    "host_us": round(1e6 * host, 1),
                    "ratio": round(medians["fp16"] / seconds, 2),
                    "gpu_us": round(1e6 * alone[name], 1),
                    "gpu_ratio": round(alone["fp16"] / alone[name], 2),
                    "tb_s": round(bandwidth / 1e12, 2),
                    "of_copy": round(bandwidth / copied, 2),
                }
            )
        del steps, dense
        mx.clear_cache()
    if arguments.store:
        store("attention", [{"device": device_name(), "copy_tb_s": round(copied / 1e12, 2), **row} for row in rows])
    print_table(
        [
            "tokens",
            "scheme",
            "us a call",
            "us of the host",
            "ratio to fp16",
            "us of the GPU",
            "ratio",
            "TB/s",
            "of copy",
        ],
        [tuple(row.values()) for row in rows],
    )


if __name__ == "__main__":
    main()
