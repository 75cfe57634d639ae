"""Decoding end to end on a GPU: a model of Qwen3-8B's shape with random 4-bit weights and filled caches.

    python benchmarks/decode_gpu.py [--tokens 1024 8192 32768 131072] [--schemes tq4 tq3 rvq1] [--batch 16384]

Steps run as mlx-lm's `generate_step` runs them: the next step is started before the last one's token is read. Schemes
alternate in rounds of 32 steps, of which one packs; a scheme's figure is the median of its rounds' means, after two
rounds that compile and grow the buffers; the ratio is the median of the rounds' ratios to fp16. The median of all steps
stands beside it, for what a step costs that does not pack. Caches are filled with random codes or keys, without a
prefill. `--batch N` decodes 8 sequences of uneven lengths around N together.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import mlx.core as mx
from attention import filled
from common import machine, print_table, store
from mlx import nn
from mlx.utils import tree_map_with_path
from mlx_lm.models import qwen3
from mlx_lm.models.cache import BatchKVCache, KVCache

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.kernels.launch import device_name
from mlx_kvq_plugin.rotary import Rotary

HEADS, DIM, BASE = 8, 128, 1e6
WARM_ROUNDS = 2
UNEVEN = (0.85, 0.92, 0.96, 1.0, 1.03, 1.04, 1.07, 1.10)


def build(layers: int, hidden: int = 4096, vocabulary: int = 151936) -> Any:
    """The model, bfloat16 activations."""
    model = qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=3 * hidden,
            num_attention_heads=hidden // DIM,
            rms_norm_eps=1e-6,
            vocab_size=vocabulary,
            num_key_value_heads=HEADS,
            max_position_embeddings=262144,
            rope_theta=BASE,
            head_dim=DIM,
            tie_word_embeddings=False,
        )
    )
    nn.quantize(model, group_size=64, bits=4)

    def initial(path: str, x: mx.array) -> mx.array:
        if path.endswith("norm.weight"):
            return mx.ones(x.shape, mx.bfloat16)
        if x.dtype == mx.uint32:
            return mx.random.randint(0, 2**31 - 1, x.shape).astype(mx.uint32)
        return (0.004 * mx.random.normal(x.shape)).astype(mx.bfloat16)

    model.update(tree_map_with_path(initial, model.parameters()))
    mx.eval(model.parameters())
    return model


def caches_of(scheme: str, layers: int, tokens: int) -> list[Any]:
    """One cache a layer with `tokens` random tokens."""
    rotary = Rotary("half", tuple(BASE ** (-2 * j / DIM) for j in range(DIM // 2)))
    found = []
    for _ in range(layers):
        if scheme == "fp16":
            cache: Any = KVCache()
            cache.update_and_fetch(*(mx.random.normal((1, HEADS, tokens, DIM)).astype(mx.bfloat16) for _ in range(2)))
            mx.eval(cache.state)
        else:
            cache = filled(scheme, tokens, HEADS, DIM, rotary)
        found.append(cache)
    return found


def merged(scheme: str, layers: int, lengths: list[int]) -> list[Any]:
    """Batches of sequences of these lengths, one a layer."""
    rows = [caches_of(scheme, layers, tokens) for tokens in lengths]
    kind: Any = BatchKVCache if scheme == "fp16" else type(rows[0][0])
    return [kind.merge([row[i] for row in rows]) for i in range(layers)]


def step_times(model: Any, caches: list[Any], batch: int, steps: int) -> list[float]:
    """Seconds of each step but the first."""

    def step(tokens: mx.array) -> mx.array:
        return mx.argmax(model(tokens, cache=caches)[:, -1], axis=-1)[:, None]

    tokens = step(mx.array([[5]] * batch))
    mx.async_eval(tokens)
    times, last = [], time.perf_counter()
    for _ in range(steps):
        following = step(tokens)
        mx.async_eval(following)
        mx.eval(tokens)
        tokens, now = following, time.perf_counter()
        times.append(now - last)
        last = now
    mx.eval(tokens)
    return times[1:]


def measure(
    model: Any, caches: dict[str, list[Any]], batch: int, rounds: int, steps: int
) -> dict[str, list[list[float]]]:
    """Seconds of the steps of every round, by scheme."""
    times: dict[str, list[list[float]]] = {scheme: [] for scheme in caches}
    for number in range(-WARM_ROUNDS, rounds):
        for scheme in caches:
            with kvq.compress(model, scheme):
                found = step_times(model, caches[scheme], batch, steps + 1)
            if number >= 0:
                times[scheme].append(found)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="*", type=int, default=[1024, 8192, 32768, 131072])
    parser.add_argument("--schemes", nargs="+", default=["tq4", "tq3", "rvq1"])
    parser.add_argument("--batch", nargs="*", type=int, default=[16384], help="8 sequences around so many tokens")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="of a round: as many as between two packings")
    parser.add_argument("--no-store", action="store_true", help="leave the stored results as they are")
    arguments = parser.parse_args()
    print(machine(), device_name(), flush=True)
    model = build(arguments.layers, arguments.hidden, arguments.vocabulary)
    schemes = ["fp16", *arguments.schemes]
    rows: list[dict[str, Any]] = []
    for tokens, batch in [(n, 1) for n in arguments.tokens] + [(n, len(UNEVEN)) for n in arguments.batch]:
        if batch == 1:
            caches = {scheme: caches_of(scheme, arguments.layers, tokens) for scheme in schemes}
        else:
            lengths = [int(tokens * share) for share in UNEVEN]
            caches = {scheme: merged(scheme, arguments.layers, lengths) for scheme in schemes}
        times = measure(model, caches, batch, arguments.rounds, arguments.steps)
        stock = [statistics.mean(found) for found in times["fp16"]]
        for scheme, found in times.items():
            means = [statistics.mean(steps) for steps in found]
            steps = [seconds for some in found for seconds in some]
            rows.append(
                {
                    "tokens": tokens,
                    "batch": batch,
                    "scheme": scheme,
                    "ms": round(1e3 * statistics.median(means), 3),
                    "median_ms": round(1e3 * statistics.median(steps), 3),
                    "ratio": round(statistics.median(a / b for a, b in zip(stock, means, strict=True)), 3),
                }
            )
            slowest = ", ".join(f"{1e3 * seconds:.1f}" for seconds in sorted(steps)[: -len(found) - 1 : -1])
            print(rows[-1], f"slowest steps {slowest}", flush=True)
        del caches
        mx.clear_cache()
    if not arguments.no_store:
        store("decode_gpu", [{"device": device_name(), **row} for row in rows])
    print_table(
        ["tokens", "batch", "scheme", "ms a step", "median step", "ratio to fp16"], [tuple(r.values()) for r in rows]
    )


if __name__ == "__main__":
    main()
