"""Trellis codes: their error on normal numbers, and how their levels are found.

    python benchmarks/trellis.py [--tokens 2000] [--train] [--losses]

The error is that of N(0, 1) coordinates with the scale of least squares, scale included, at several head sizes, against
the scalar code of as many bits and the distortion-rate bound 4^-b; beside it the least time of five that the encoder
takes for a token of a head, rotation and packing left out. `--train` makes the levels anew: centroids of what
the encoder chooses, fitted by an odd polynomial of as many terms as the package's, from the quantiles of N(0, 1.8) on.
`--losses`: how much more squared error the encoder's path has than the best one, which begins with any state, and how
much more still with the costs of half precision that kernels sum up.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import NormalDist

import mlx.core as mx
import numpy as np
from common import machine, print_table, store

from mlx_kvq_plugin.codebooks import level_book, odd_codebook
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.trellis import (
    STATES,
    Trellis,
    coded_bits,
    distances,
    encode,
    subsets_of,
    trellis,
    trellis_bits,
)

DIMS, RATES = (64, 80, 128, 256), (1, 2, 3, 4)
ROUNDS = 12


def normal(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def measured(name: str, dim: int, tokens: int) -> float:
    x = normal(1, 1, tokens, dim, seed=dim)
    codec = get_codec(name)
    lost = x - codec.decode(codec.encode(x), dim)
    return float((mx.sum(lost * lost) / mx.sum(x * x)).item())


def microseconds(bits: int, dim: int, tokens: int) -> float:
    """Of the encoder, a token and head."""
    z, times = normal(tokens, dim, seed=dim), []
    for _ in range(5):
        begin = time.perf_counter()
        mx.eval(encode(z, trellis(bits)))
        times.append(time.perf_counter() - begin)
    return 1e6 * min(times) / tokens


def path_error(bits: mx.array, distance: mx.array, code: Trellis) -> float:
    """Squared error of the path with these trellis bits `(D, N)`, summed."""
    coded = coded_bits(bits.T, code).T.astype(mx.int32)
    return float(mx.sum(mx.take_along_axis(distance, coded[:, None], axis=1)).item())


def least_error(distance: mx.array, code: Trellis) -> float:
    """Squared error of the best paths from any state back to it, summed."""
    (length, _, count), subsets = distance.shape, subsets_of(code)
    best = mx.full((count,), mx.inf)
    for start in range(STATES):
        cost = mx.where(mx.arange(STATES)[:, None] == start, 0.0, mx.full((1, count), mx.inf))
        for t in range(length):
            steps = mx.take(distance[t], subsets, axis=0).reshape(2, STATES // 2, 2, count)
            zero, one = cost.reshape(2, STATES // 2, 1, count) + steps
            cost = mx.minimum(zero, one).reshape(STATES, count)
        best = mx.minimum(best, cost[start])
        mx.eval(best)
    return float(mx.sum(best).item())


def losses(tokens: int) -> None:
    """Prints them."""
    rows = []
    for bits in RATES:
        for dim in (64, 128):
            code = trellis(bits)
            distance = distances(normal(tokens, dim, seed=dim).T, code)
            own, least = path_error(trellis_bits(distance, code), distance, code), least_error(distance, code)
            above = (distance - mx.min(distance, axis=1, keepdims=True)).astype(mx.float16)
            half = path_error(trellis_bits(above, code), distance, code)
            rows.append((bits, dim, f"{own / least - 1:.2%}", f"{half / own - 1:.3%}"))
    print_table(["bits", "head size", "above the best path", "half precision costs"], rows)


def fitted(code: Trellis, levels: np.ndarray, counts: np.ndarray) -> Trellis:
    """The code with the odd polynomial nearest to `levels`, by how often they are used."""
    t = (2 * np.arange(levels.size) + 1) / levels.size - 1
    powers = np.stack([t ** (2 * k + 1) for k in range(len(code.book.coefficients))], axis=1)
    weight = np.sqrt(counts + counts[::-1])[:, None]
    found = np.linalg.lstsq(powers * weight, levels * weight[:, 0], rcond=None)[0]
    return replace(code, book=level_book(code.book.bits, tuple(float(c) for c in found)))


def trained(code: Trellis, tokens: int) -> Trellis:
    size = len(code.book.levels)
    start = np.array([NormalDist(0, 1.8**0.5).inv_cdf((i + 0.5) / size) for i in range(size)])
    code, x = fitted(code, start, np.ones(size)), normal(tokens, 128, seed=1)
    for _ in range(ROUNDS):
        index = np.array(encode(x, code)[1]).reshape(-1)
        counts = np.bincount(index, minlength=size).astype(float)
        sums = np.bincount(index, weights=np.array(x).reshape(-1).astype(float), minlength=size)
        centroids = (sums - sums[::-1]) / np.maximum(counts + counts[::-1], 1)
        code = fitted(code, centroids, counts)
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--train", action="store_true", help="print levels made anew instead, as coefficients")
    parser.add_argument("--losses", action="store_true", help="print what the encoder's shortcuts cost instead")
    arguments = parser.parse_args()
    if arguments.losses:
        print(machine())
        losses(arguments.tokens)
        return
    if arguments.train:
        for bits in RATES:
            code = trained(trellis(bits), arguments.tokens)
            print(f"{bits} bits: {', '.join(f'{c:.9g}' for c in code.book.coefficients)}", flush=True)
        return
    print(machine())
    rows = []
    for bits in RATES:
        for dim in DIMS:
            own, scalar = (measured(f"{family}{bits}", dim, arguments.tokens) for family in ("tcq", "tq"))
            rows.append(
                {
                    "bits": bits,
                    "dim": dim,
                    "tcq": own,
                    "tq": scalar,
                    "lloyd_max": odd_codebook(bits).mse,
                    "bound": 4.0**-bits,
                    "us": microseconds(bits, dim, arguments.tokens),
                }
            )
    store("trellis", rows)
    print_table(list(rows[0]), [tuple(row.values()) for row in rows])


if __name__ == "__main__":
    main()
