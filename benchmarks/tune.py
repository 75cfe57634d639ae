"""Launch sizes of fused attention: tries some on this device and prints, or writes, the best.

    python benchmarks/tune.py [--write] [--tokens 4096 32768 131072] [--schemes tq4 tq3 rvq1]

A size's score is the geometric mean of its times over schemes and token counts, each divided by the best at that place.
Times are the GPU's: the calls of a chain are queued while the GPU is busy with something else, since at few tokens it
would otherwise wait for the host, whatever the size. `--write` puts the winner into mlx_kvq_plugin/kernels/launch.json
under the device's name.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from attention import BEYOND_CACHE, Step, busy_array, copies, filled, gpu_times, packed_nbytes

import mlx_kvq_plugin.kernels as kernels
from mlx_kvq_plugin.attention import AttendArgs
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.kernels.attend import FusedPlan
from mlx_kvq_plugin.kernels.build import backend
from mlx_kvq_plugin.kernels.dispatch import prepared_call
from mlx_kvq_plugin.kernels.launch import FILE, Launch, device_name, table
from mlx_kvq_plugin.rotary import Rotary

HEADS, KV_HEADS, DIM = 32, 8, 128


def attention_step(plan: FusedPlan, layers: Sequence[KVQCache]) -> Step:
    """A call of a plan on one layer after the other."""

    def step(i: int, query: mx.array) -> mx.array:
        return plan([layers[i % len(layers)]], query, None, None)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 32768, 131072])
    parser.add_argument("--schemes", nargs="+", default=["tq4", "tq3", "rvq1"])
    parser.add_argument("--warps", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--per-core", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--cores", type=int, default=132, help="multiprocessors of the device")
    parser.add_argument("--length", type=int, default=48, help="calls of a chain")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if not backend():
        parser.error("launch sizes are tuned on a GPU, and MLX's default device is none")
    rotary = Rotary("half", tuple(1e6 ** (-2 * j / DIM) for j in range(DIM // 2)))
    sizes = [
        Launch(warps, per_core, per_core * arguments.cores)
        for warps, per_core in itertools.product(arguments.warps, arguments.per_core)
        if warps * per_core <= 16
    ]
    busy = busy_array()
    times: dict[tuple[str, int], dict[Launch, float]] = {}
    for scheme, tokens in itertools.product(arguments.schemes, arguments.tokens):
        cache = filled(scheme, tokens, KV_HEADS, DIM, rotary)
        layers = copies(cache, max(1, -(-BEYOND_CACHE // packed_nbytes(cache))))
        query = mx.random.normal((1, HEADS, 1, DIM)).astype(mx.bfloat16)
        arguments_ = AttendArgs(query, cache, DIM**-0.5, None, None, mx.bfloat16, mx.bfloat16)
        _, call, _, codecs = prepared_call([cache], 0, arguments_, None)
        steps = {launch: attention_step(FusedPlan(call, *codecs, launch), layers) for launch in sizes}
        times[scheme, tokens] = gpu_times(steps, query, arguments.length, arguments.rounds, busy)
        for launch, seconds in times[scheme, tokens].items():
            print(f"{scheme} {tokens} {launch}: {1e6 * seconds:.1f} us", flush=True)

    def score(launch: Launch) -> float:
        found = [math.log(own[launch] / min(own.values())) for own in times.values()]
        return math.exp(sum(found) / len(found))

    best = min(sizes, key=score)
    print(f"{device_name()}: {best}, {score(best):.3f} of the best at each place")
    if arguments.write:
        path = Path(next(iter(kernels.__path__))) / FILE
        path.write_text(json.dumps({**table(), device_name(): vars(best)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
