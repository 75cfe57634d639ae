"""How far golden inputs keep from every decision of a codec, in float64, by the codecs' texts.

Bytes hold on every platform when the last bits of float32 arithmetic decide nothing: those are 1e-6 of the numbers
that are compared, and every margin here is larger.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
from reference_codecs import float64, is_split, rotation_matrix, sketch_matrix, split_of

from mlx_kvq_plugin.codebooks import odd_codebook
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.codecs.polar import angle_codebook

LEVEL = 8e-6  # from a threshold, in units of the root mean square
STEP = 1e-3  # from the middle between two stored numbers, whose distance is 1
BYTE = 4e-3  # the same for a group's byte, of up to 255
RESIDUAL = 4e-5  # of a residual: what it lost to float32 is a larger part of it
ANGLE = 1e-5  # in radians, of a radius of at least 1
AFFINE = 5e-5  # from the middle between two of up to 255 steps


def far(x: np.ndarray, edges: np.ndarray | list[float], least: float) -> bool:
    return bool(np.min(np.abs(x[..., None] - np.array(edges))) > least)


def far_from_halves(steps: np.ndarray, least: float) -> bool:
    return bool(np.min(np.abs(steps % 1 - 0.5)) > least)


def rounds_clearly(numbers: np.ndarray, bits: int = 8) -> bool:
    """Whether rounding to `bits` significant ones, 8 of bfloat16 and 11 of float16, is clear."""
    return far_from_halves(np.frexp(numbers)[0] * 2**bits, STEP)


def bfloat16(numbers: np.ndarray) -> np.ndarray:
    return float64(mx.array(numbers.astype(np.float32)).astype(mx.bfloat16))


def scalar_is_clear(y: np.ndarray, bits: int) -> tuple[bool, np.ndarray]:
    """Of codes and scales of rotated tokens; and their residuals."""
    z = y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True))
    book = odd_codebook(bits)
    levels = np.array(book.levels)
    levels = levels[np.searchsorted(0.5 * (levels[1:] + levels[:-1]), z)]
    scale = np.sum(y * levels, axis=-1, keepdims=True) / np.sum(levels * levels, axis=-1, keepdims=True)
    clear = far(np.abs(z), [0.0, *book.thresholds], LEVEL) and rounds_clearly(scale)
    return clear, y - levels * bfloat16(scale)


def sketch_is_clear(x: np.ndarray, label: str, least: float) -> bool:
    dim = x.shape[-1]
    size = np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
    return far((x @ sketch_matrix(dim, 0, "hadamard", label)) / size, [0.0], least)


def norms(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1)


def affine_is_clear(name: str, x: np.ndarray) -> bool:
    codec, dim = get_codec(name), x.shape[-1]
    planes = codec.encode(mx.array(x.astype(np.float32)))
    padded = np.pad(x, [(0, 0), (0, 0), (0, 0), (0, -dim % 32)])
    padded = padded.reshape(*x.shape[:3], -1, codec.group_size(dim))
    steps = (padded - float64(planes["biases"])[..., None]) / float64(planes["scales"])[..., None]
    return far_from_halves(steps, AFFINE)


def polar_is_clear(y: np.ndarray, bits: int) -> bool:
    radii = y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True))
    found = []
    for level in (1, 2, 3, 4):
        first, second = radii[..., 0::2], radii[..., 1::2]
        angle, radii = np.arctan2(second, first), np.hypot(first, second)
        levels = np.array(angle_codebook(level)[0]) if level > 1 else None
        edges = (
            np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1) + 1) * (2 * math.pi / 2**bits)
            if levels is None
            else 0.5 * (levels[1:] + levels[:-1])
        )
        distance = np.min(np.abs(angle[..., None] - edges), axis=-1)
        found.append(np.min(distance * np.minimum(radii, 1)) > ANGLE)
    blocks = norms(y.reshape(*y.shape[:-1], -1, 16))
    return all(found) and rounds_clearly(blocks)


def grouped_is_clear(y: np.ndarray, bits: int) -> bool:
    groups = y.reshape(*y.shape[:-1], -1, 16)
    book = odd_codebook(bits)
    levels = np.array(book.levels)
    z = groups * (levels[-1] / np.max(np.abs(groups), axis=-1, keepdims=True))
    chosen = levels[np.searchsorted(0.5 * (levels[1:] + levels[:-1]), z)]
    matched = norms(groups) / norms(chosen)
    scale = matched.max(axis=-1, keepdims=True)
    share = matched * 255 / bfloat16(scale)
    return far(np.abs(z), [0.0, *book.thresholds], LEVEL) and rounds_clearly(scale) and far_from_halves(share, BYTE)


def kivi_is_clear(x: np.ndarray, bits: int) -> bool:
    clear = []
    for start in range(0, x.shape[2], 32):
        group = x[:, :, start : start + 32]
        least = group.min(axis=2, keepdims=True).astype(np.float16).astype(np.float64)
        exact = (group.max(axis=2, keepdims=True) - least) / (2**bits - 1)
        step = exact.astype(np.float16).astype(np.float64)
        clear += [rounds_clearly(group.min(axis=2), 11), rounds_clearly(exact, 11)]
        clear.append(far_from_halves((group - least) / step, AFFINE))
    return all(clear)


def split_is_clear(name: str, x: np.ndarray) -> bool:
    count, high, low = split_of(name, x.shape[-1])
    energy = np.sum(x * x, axis=2)
    ranked = np.sort(energy, axis=-1)[..., ::-1]
    clear = np.min(ranked[..., count - 1] / ranked[..., count]) > 1.0001
    order = np.argsort(-energy, axis=-1, kind="stable")
    parts = (np.sort(order[..., :count], axis=-1), high, 1), (np.sort(order[..., count:], axis=-1), low, 0)
    for channels, bits, seed in parts:
        part = np.take_along_axis(x, np.broadcast_to(channels[:, :, None], (*x.shape[:3], channels.shape[-1])), -1)
        clear &= scalar_is_clear(part @ rotation_matrix(part.shape[-1], seed), bits)[0]
    return bool(clear)


def is_clear(name: str, x: np.ndarray) -> bool:
    """Whether tokens `(B, H, L, D)` keep clear of every decision of a codec with seed 0."""
    y = x @ rotation_matrix(x.shape[-1], 0)
    if "+" in name:
        return all(is_clear(part, x[:, head : head + 1]) for head, part in enumerate(name.split("+")))
    if is_split(name):
        return split_is_clear(name, x)
    if name.startswith("affine"):
        return affine_is_clear(name, x)
    if name.startswith("kivi"):
        return kivi_is_clear(x, int(name[-1]))
    if name.startswith("polar"):
        return polar_is_clear(y, int(name[-1]))
    if name.startswith("grouped"):
        return grouped_is_clear(y, int(name[-1]))
    if name.startswith("qjl"):
        sketches = [sketch_is_clear(x, f" sketch {i}", LEVEL) for i in range(int(name[-1]))]
        return all(sketches) and rounds_clearly(norms(x))
    if name.startswith("tqprod"):
        clear, residual = scalar_is_clear(y, int(name[-1]) - 1)
        return clear and sketch_is_clear(residual, " residual", RESIDUAL) and rounds_clearly(norms(residual))
    if name.startswith(("tq", "rvq")):
        return scalar_is_clear(y, int(name[-1]) * (2 if name.startswith("rvq") else 1))[0]
    assert name == "identity"
    return True
