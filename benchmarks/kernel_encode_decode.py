"""The kernels that encode blocks of tokens and decode stored ones, on a GPU: are they right, and how long do they take?

    python benchmarks/kernel_encode_decode.py [--schemes tq4 tq3 rvq1] [--heads 8] [--dim 128] [--tokens 32768]

First kernels are compared with the plain operations of codecs and frames for a list of schemes, head sizes, rotaries
and dtypes; a difference beyond rounding ends the run with status 1. Then chains of dependent calls are timed: blocks of
8 and 32 tokens as a decode step packs them (with new dense buffers), chunks of 2,048 tokens, and the decoding of all
tokens. Bytes are those that have to be read and written once; bandwidth is compared with a copy measured in the same
run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from attention import BEYOND_CACHE, chain_time, copy_bandwidth, filled
from common import machine, print_table, store

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.frame import KeyFrame
from mlx_kvq_plugin.kernels.decode import decode_heads, why_not_decode
from mlx_kvq_plugin.kernels.encode import encode_block, why_not_encode
from mlx_kvq_plugin.rotary import Rotary

STEP_CAPACITY = 28  # rows of dense buffers between decode steps: sinks, recent tokens, a block
SINKS = 4


def rotary_of(dim: int, pairs: int | None = None, layout: str = "half", magnitude: float = 1.0) -> Rotary:
    """A rotary of `pairs` pairs, `None` for all channels."""
    count = dim // 2 if pairs is None else pairs
    return Rotary(layout, tuple(1e6 ** (-j / max(1, count)) for j in range(count)), magnitude)


# Scheme, head sizes of keys and values, the rotary of the frame (`None` for no frame), dtype.
CHECKED: Sequence[tuple[str, tuple[int, int], Rotary | None, mx.Dtype]] = (
    ("tq4", (128, 128), rotary_of(128), mx.bfloat16),
    ("tq3", (128, 128), rotary_of(128), mx.float16),
    ("rvq1", (128, 128), rotary_of(128), mx.bfloat16),
    ("k=tq1,v=tq6", (64, 256), rotary_of(64, layout="interleaved"), mx.float16),
    ("k=tq5,v=tq2", (256, 64), rotary_of(256, 32), mx.bfloat16),
    ("k=rvq3,v=rvq2", (128, 32), rotary_of(128, 32, "interleaved", 1.2), mx.float32),
    ("k=rvq2,v=rvq3", (32, 128), rotary_of(32, 5), mx.float32),
    ("k=tq6,v=tq1", (64, 64), rotary_of(64, 0), mx.float16),
    ("k=tq2,v=tq5", (128, 128), None, mx.bfloat16),
)


def random_cache(
    scheme: str, dims: tuple[int, int], rotary: Rotary | None, dtype: mx.Dtype, batch: int, heads: int, tokens: int
) -> KVQCache:
    """A cache whose dense buffers hold `tokens` random tokens and two rows more, at a position that starts no block."""
    spec = kvq.parse_scheme(scheme).layer_spec().with_(frame=rotary is not None)
    cache = KVQCache(spec, rotary)
    keys, values = (3 * mx.random.normal((batch, heads, tokens + 2, dim)) for dim in dims)
    cache.dense_keys, cache.dense_values = keys.astype(dtype), values.astype(dtype)
    cache._dense, cache.offset = tokens, 1000 + tokens
    if rotary is not None:
        scale = mx.exp(0.5 * mx.random.normal((batch, heads, 1, dims[0] - rotary.pairs)))
        mean, constant = (5 * mx.random.normal((batch, heads, 1, dims[0])) for _ in range(2))
        cache.frame = KeyFrame(rotary, mean, scale, constant)
        cache.value_scale = mx.exp(0.5 * mx.random.normal((batch, heads, 1, dims[1])))
        mx.eval(cache.frame.arrays(), cache.value_scale)
    mx.eval(cache.dense_keys, cache.dense_values)
    return cache


def encoded_plainly(cache: KVQCache, start: int, count: int) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """What `encode_block` computes, by the operations of frame and codecs."""
    assert cache.dense_keys is not None and cache.dense_values is not None
    keys, values = (x[..., start : start + count, :] for x in (cache.dense_keys, cache.dense_values))
    if cache.frame is not None:
        keys = cache.frame.encode(keys, cache.offset - cache._dense + start)
    return cache.key_codec.encode(keys), cache.value_codec.encode(cache.scaled_values(values))


def compacted_plainly(x: mx.array, start: int, count: int, dense: int, capacity: int) -> mx.array:
    """The dense buffer without `count` tokens."""
    left = mx.concatenate([x[..., :start, :], x[..., start + count : dense, :]], axis=2)
    zeros = mx.zeros((*x.shape[:2], capacity - left.shape[2], x.shape[3]), x.dtype)
    return mx.concatenate([left, zeros], axis=2)


def difference(got: mx.array, expected: mx.array) -> float:
    """The largest difference, relative to the largest number of a token's row."""
    a, b = got.astype(mx.float32), expected.astype(mx.float32)
    size = mx.maximum(mx.max(mx.abs(b), axis=-1, keepdims=True), 1e-30)
    return float(mx.max(mx.abs(a - b) / size))


def check(case: tuple[str, tuple[int, int], Rotary | None, mx.Dtype]) -> tuple[list[Any], bool]:
    """A row of the table, and whether kernels do what plain operations do."""
    scheme, dims, rotary, dtype = case
    cache = random_cache(*case, batch=2, heads=3, tokens=777)
    reason = why_not_encode(cache) or why_not_decode(cache)
    if reason:
        raise SystemExit(f"{scheme} of {dims} channels must have kernels, got the reason: {reason}")
    start, count = SINKS, 750
    left = 777 - count + 5
    keys, values, new_keys, new_values = encode_block(cache, start, count, left)
    plain = encoded_plainly(cache, start, count)
    codes = scales = total = 0.0
    for codec, dim, got, expected in zip(
        (cache.key_codec, cache.value_codec), dims, (keys, values), plain, strict=True
    ):
        wrong = np.array(codec.codes(got, dim)) != np.array(codec.codes(expected, dim))
        codes, total = codes + float(wrong.sum()), total + wrong.size
        same = mx.array(~wrong.any(axis=-1, keepdims=True))  # another code of the outermost levels moves the scale
        scales = max(scales, difference(mx.where(same, got["scale"], expected["scale"]), expected["scale"]))
    kept = all(
        mx.array_equal(new, compacted_plainly(x, start, count, 777, left)).item()
        for new, x in ((new_keys, cache.dense_keys), (new_values, cache.dense_values))
        if new is not None and x is not None
    )
    cache.key_planes, cache.value_planes = (
        {name: mx.concatenate([x[..., :5, :], x, x[..., :9, :]], axis=2) for name, x in planes.items()}
        for planes in (keys, values)
    )
    cache._packed, cache._packed_start = count, 5
    cache.dense_keys, cache.dense_values = new_keys, new_values
    cache._dense -= count
    found, expected_tokens = decode_heads(cache, 1, 2), cache.decode_all()
    tokens = max(difference(got, whole[:, 1:3]) for got, whole in zip(found, expected_tokens, strict=True))
    allowed = {mx.float32: 1e-5, mx.float16: 1.1e-3, mx.bfloat16: 8e-3}[dtype]
    right = codes <= 1e-4 * total and scales <= 2.0**-7 and kept and tokens <= allowed
    layout = "none" if rotary is None else f"{rotary.layout} {rotary.pairs}"
    name = f"{scheme} {dims[0]}/{dims[1]} {str(dtype).rsplit('.', 1)[-1]}"
    return [name, layout, codes / total, scales, "yes" if kept else "NO", tokens, "yes" if right else "NO"], right


def after(x: mx.array, token: mx.array) -> mx.array:
    """`x`, not before `token` is computed."""
    return mx.depends([x], [token])[0]


def median_times(
    steps: dict[str, Callable[[int, mx.array], mx.array]], rounds: int, length: int
) -> dict[str, tuple[float, float]]:
    """Medians of `chain_time` by name; rounds alternate between the steps."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    token = mx.zeros((1,))
    mx.eval(token)
    for _ in range(rounds + 2):
        for name, step in steps.items():
            times[name].append(chain_time(step, token, length))
    return {
        name: (statistics.median(whole for whole, _ in found[2:]), statistics.median(host for _, host in found[2:]))
        for name, found in times.items()
    }


def plane_bytes(cache: KVQCache, dims: tuple[int, int]) -> int:
    """Bytes of a token of one head in the planes of both sides."""
    codecs = (cache.key_codec, cache.value_codec)
    return sum(plane.nbytes for codec, dim in zip(codecs, dims, strict=True) for plane in codec.planes(dim, "bfloat16"))


def time_encoding(
    scheme: str, heads: int, dim: int, tokens: int, rounds: int, plainly: bool
) -> tuple[dict[str, Any], int]:
    """Times of the kernel, and of plain operations, for a block of `tokens`, and the bytes of one."""
    step = tokens <= 32
    left = STEP_CAPACITY - 8 if step else SINKS + 16
    capacity = STEP_CAPACITY if step else 0
    copies = 1 if step else max(1, -(-BEYOND_CACHE // (4 * heads * dim * tokens)))
    case = (scheme, (dim, dim), rotary_of(dim), mx.bfloat16)
    caches = [random_cache(*case, batch=1, heads=heads, tokens=left + tokens) for _ in range(copies)]
    dense_keys = [cache.dense_keys for cache in caches]

    def kernel(i: int, token: mx.array) -> mx.array:
        cache = caches[i % copies]
        cache.dense_keys = after(dense_keys[i % copies], token)
        return encode_block(cache, SINKS, tokens, capacity or None)[0]["scale"]

    def plain(i: int, token: mx.array) -> mx.array:
        cache = caches[i % copies]
        cache.dense_keys = after(dense_keys[i % copies], token)
        keys, values = encoded_plainly(cache, SINKS, tokens)
        new = [*keys.values(), *values.values()]
        if capacity:
            dense = (cache.dense_keys, cache.dense_values)
            new += [compacted_plainly(x, SINKS, tokens, left + tokens, capacity) for x in dense]
        return mx.depends([keys["scale"]], new)[0]

    kept = left + capacity if capacity else 0  # rows of dense buffers that are copied, and written
    moved = heads * (tokens * (4 * dim + plane_bytes(caches[0], (dim, dim))) + 4 * dim * kept)
    found = median_times({"kernel": kernel}, rounds, 200 if step else 40)
    return {**found, **(median_times({"plain": plain}, 3, 10) if plainly else {})}, moved


def time_decoding(
    scheme: str, heads: int, dim: int, tokens: int, rounds: int, plainly: bool
) -> tuple[dict[str, Any], int]:
    """Times of the kernel, and of plain operations, for all tokens of a cache, and the bytes of one."""
    cache = filled(scheme, tokens, heads, dim, rotary_of(dim))
    cache.key_planes, cache.value_planes = (
        {name: mx.contiguous(x) for name, x in planes.items()} for planes in (cache.key_planes, cache.value_planes)
    )
    mx.eval(cache.key_planes, cache.value_planes)
    dense_keys = cache.dense_keys

    def kernel(i: int, token: mx.array) -> mx.array:
        cache.dense_keys = after(dense_keys, token)
        return decode_heads(cache, 0, heads)[0]

    def plain(i: int, token: mx.array) -> mx.array:
        cache.dense_keys = after(dense_keys, token)
        keys, values = cache.decode_all()
        return mx.depends([keys], [values])[0]

    moved = heads * (cache.packed_tokens * plane_bytes(cache, (dim, dim)) + 4 * dim * (cache.held + cache._dense))
    found = median_times({"kernel": kernel}, rounds, 12)
    return {**found, **(median_times({"plain": plain}, 3, 3) if plainly else {})}, moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", nargs="+", default=["tq4", "tq3", "rvq1"])
    parser.add_argument("--blocks", nargs="+", type=int, default=[8, 32, 2048], help="tokens that are encoded at once")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens that are decoded")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-plain", action="store_true", help="leave out plain operations, slow for trellis codes")
    parser.add_argument("--store", action="store_true", help="write results/kernel_encode_decode.json")
    arguments = parser.parse_args()
    if arguments.store and arguments.no_plain:
        parser.error("stored results must have all times, got --store with --no-plain; leave one of them out")
    checks = [check(case) for case in CHECKED]
    head = ["kernels", "rotary", "other codes", "other scales", "dense kept", "decoded tokens", "right"]
    print_table(head, [row for row, _ in checks])
    copied = copy_bandwidth()
    print(machine(), f"copy {copied / 1e12:.2f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []
    for scheme in arguments.schemes:
        for name, function, counts in (
            ("encode", time_encoding, arguments.blocks),
            ("decode", time_decoding, [arguments.tokens]),
        ):
            for tokens in counts:
                sizes = (arguments.heads, arguments.dim, tokens, arguments.rounds)
                times, moved = function(scheme, *sizes, not arguments.no_plain)
                seconds, host = times["kernel"]
                rows.append(
                    {
                        "kernel": name,
                        "scheme": scheme,
                        "tokens": tokens,
                        "us": round(1e6 * seconds, 1),
                        "host_us": round(1e6 * host, 1),
                        "plain_us": round(1e6 * times["plain"][0], 1) if "plain" in times else None,
                        "tb_s": round(moved / seconds / 1e12, 3),
                        "of_copy": round(moved / seconds / copied, 3),
                    }
                )
                mx.clear_cache()
    if arguments.store:
        store("kernel_encode_decode", rows)
    print_table(
        ["kernel", "scheme", "tokens", "us a call", "us of the host", "us of plain operations", "TB/s", "of copy"],
        [tuple(row.values()) for row in rows],
    )
    if not all(right for _, right in checks):
        sys.exit(1)


if __name__ == "__main__":
    main()
