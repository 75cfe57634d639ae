"""Rotaries, random arrays and the rotation in float64, for tests of key frames."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_kvq_plugin.rotary import Rotary, read_rotary

DIM = 64
ROTARIES = {
    "half": read_rotary(nn.RoPE(DIM), DIM)[0],
    "interleaved": read_rotary(nn.RoPE(DIM, traditional=True), DIM)[0],
    "partial": read_rotary(nn.RoPE(32), DIM)[0],
    "scaled": replace(read_rotary(nn.RoPE(DIM), DIM)[0], magnitude=1.19),
}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def float32(x: np.ndarray) -> mx.array:
    return mx.array(x.astype(np.float32))


def pair_channels(rotary: Rotary) -> tuple[np.ndarray, np.ndarray]:
    pair = np.arange(rotary.pairs)
    return (pair, pair + rotary.pairs) if rotary.layout == "half" else (2 * pair, 2 * pair + 1)


def turned(rotary: Rotary, x: np.ndarray, start: int) -> np.ndarray:
    """R_n x in float64, `x` `(..., n, D)`."""
    first, second = pair_channels(rotary)
    positions = np.arange(start, start + x.shape[-2])[:, None]
    spun = (x[..., first] + 1j * x[..., second]) * np.exp(1j * positions * np.array(rotary.angles))
    x = x.copy()
    x[..., first], x[..., second] = rotary.magnitude * spun.real, rotary.magnitude * spun.imag
    return x
