"""What rotations make of directions with few channels, against random ones: the table of docs/codecs.md.

    python benchmarks/rotations.py

Unit vectors of 128 channels: random ones, and ones whose energy is, but for 1% of noise, in 1, 2 or 4 channels of equal
size. Errors are means over 256 vectors for each of 8 seeds of vectors and codec.
"""

from __future__ import annotations

import numpy as np
from common import print_table

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.rotation import ROTATIONS

DIM, VECTORS, SEEDS = 128, 256, 8
CODECS = ("tq2", "tq4", "grouped2", "polar4")
LARGE = {"any direction": 0, "1 channel": 1, "2 channels": 2, "4 channels": 4}


def unit_vectors(large: int, seed: int) -> np.ndarray:
    """`(VECTORS, DIM)` with `large` channels of equal size, 0 for random directions."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((VECTORS, DIM)) / DIM**0.5
    if large:
        where = np.argsort(draw.random((VECTORS, DIM)), axis=1)[:, :large]
        spikes = np.zeros((VECTORS, DIM))
        np.put_along_axis(spikes, where, draw.choice([-1.0, 1.0], (VECTORS, large)) / large**0.5, axis=1)
        x = spikes + 0.1 * x
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def mean_error(name: str, rotation: str, large: int) -> float:
    """Mean squared error of unit vectors."""
    errors = []
    for seed in range(SEEDS):
        codec = kvq.get_codec(name, seed, rotation)
        x = unit_vectors(large, seed)
        errors.append(np.mean(np.sum((codec.decode(codec.encode(x), DIM) - x) ** 2, axis=1)))
    return float(np.mean(errors))


def rows() -> list[list[str]]:
    """One row for each codec and kind of vectors."""
    return [
        [f"`{name}`", kind, *(f"{mean_error(name, rotation, large):.3g}" for rotation in ROTATIONS)]
        for name in CODECS
        for kind, large in LARGE.items()
    ]


if __name__ == "__main__":
    print_table(["codec", "energy in", *(f"`{rotation}`" for rotation in ROTATIONS)], rows())
