"""What the stored bytes of each codec mean, in float64 NumPy: written from the codecs' texts, with none of their code.

Constants that have tests of their own are shared with the codecs: signs, codebook levels, polar angles.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_kvq_plugin.codebooks import odd_codebook
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.codecs.polar import angle_codebook
from mlx_kvq_plugin.rotation import rotate, signs
from mlx_kvq_plugin.trellis import trellis

Arrays = dict[str, Any]
NONE: Arrays = {}


def float64(x: Any) -> np.ndarray:
    return np.array(x.astype(mx.float32) if isinstance(x, mx.array) else x).astype(np.float64)


@cache
def rotation_matrix(dim: int, seed: int, rounds: int = 1, label: str = "") -> np.ndarray:
    """`x @ rotation_matrix` is `rotate(x)`: rounds of signs times Hadamard, from the signs of MLX's transform alone."""
    hadamard = np.sign(np.array(mx.hadamard_transform(mx.eye(dim)), dtype=np.float64)) / math.sqrt(dim)
    np.testing.assert_allclose(hadamard @ hadamard.T, np.eye(dim), rtol=0, atol=1e-12)
    matrix = np.eye(dim)
    for i in range(rounds):
        text = label + (f" round {i}" if i else "")
        matrix = matrix @ (np.array(signs(dim, seed, text), dtype=np.float64)[:, None] * hadamard)
    return matrix


@cache
def matrix_of(dim: int, seed: int, rotation: str, label: str = "") -> np.ndarray:
    """The matrix of any rotation; that of `dense` to float32."""
    if rotation == "dense":
        return float64(rotate(mx.eye(dim), seed, rotation, label))
    return rotation_matrix(dim, seed, {"hadamard": 1, "hadamard2": 2, "hadamard3": 3}[rotation], label)


def sketch_matrix(dim: int, seed: int, rotation: str, label: str) -> np.ndarray:
    """Sketches take two rounds where rotations take one."""
    return matrix_of(dim, seed, "hadamard2" if rotation == "hadamard" else rotation, label)


@cache
def mean_coordinate(dim: int) -> float:
    """E|u| for a coordinate of a random unit vector: the integral of |u| (1 - u^2)^((D - 3) / 2) over that of 1."""
    t = (np.arange(400_000) + 0.5) * (math.pi / 2 / 400_000)  # u = sin t
    density = np.cos(t) ** (dim - 2)
    return float(np.sum(np.sin(t) * density) / np.sum(density))


def unpack_slowly(packed: Any, dim: int, bits: int) -> np.ndarray:
    """Codes from bytes by the text of packing.py, slot by slot of each field."""
    packed = np.array(packed)
    codes = np.zeros((*packed.shape[:-1], dim), dtype=np.int64)
    start = shift = 0
    for width in {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}[bits]:
        row = dim * width // 8
        field = packed[..., start : start + row].astype(np.int64)
        for slot in range(8 // width):
            codes[..., slot * row : (slot + 1) * row] |= ((field >> (slot * width)) & (2**width - 1)) << shift
        start, shift = start + row, shift + width
    return codes


def levels_of(codes: np.ndarray, bits: int) -> np.ndarray:
    return np.array(odd_codebook(bits).levels)[codes]


def polar_numbers(planes: Arrays, dim: int, bits: int) -> np.ndarray:
    """Rotated tokens of `polar`: channel c of a block of 16 is the radius times four cosines or sines, by its digits.

    The angle of level l is number c >> l of the block, and bit l - 1 of c tells the sine from the cosine.
    """
    angles = [(unpack_slowly(planes["angles"], dim // 2, bits) + 0.5) * (2 * math.pi / 2**bits)]
    stored = unpack_slowly(planes["uppers"], np.array(planes["uppers"]).shape[-1] * 4, 2)
    start = 0
    for level in (2, 3, 4):
        count = dim >> level
        angles.append(np.array(angle_codebook(level)[0])[stored[..., start : start + count]])
        start += count
    radii = float64(planes["radii"])
    numbers = np.zeros((*radii.shape[:-1], dim))
    for channel in range(dim):
        block, c = divmod(channel, 16)
        number = radii[..., block]
        for level, angle in enumerate(angles, start=1):
            own = angle[..., block * (16 >> level) + (c >> level)]
            number = number * (np.sin(own) if (c >> (level - 1)) & 1 else np.cos(own))
        numbers[..., channel] = number
    return numbers


def _rotated_tokens(name: str, planes: Arrays, dim: int, seed: int, rotation: str) -> np.ndarray | None:
    """Tokens in the rotated domain, for families whose only transform is the rotation."""
    if name.startswith("tqprod"):
        bits = int(name[-1]) - 1
        y = levels_of(unpack_slowly(planes["codes"], dim, bits), bits) * float64(planes["scale"])
        sketch = 2.0 * unpack_slowly(planes["signs"], dim, 1) - 1.0
        back = sketch @ sketch_matrix(dim, seed, rotation, " residual").T
        return np.asarray(y + back * float64(planes["norm"]) / (dim * mean_coordinate(dim)))
    if name.startswith("tq"):
        bits = int(name[2:])
        return np.asarray(levels_of(unpack_slowly(planes["codes"], dim, bits), bits) * float64(planes["scale"]))
    if name.startswith("rvq"):
        bits = int(name[3:])
        first, second = (unpack_slowly(planes[p], dim, bits) for p in ("stage1", "stage2"))
        return np.asarray(levels_of(first * 2**bits + second, 2 * bits) * float64(planes["scale"]))
    if name.startswith("polar"):
        return polar_numbers(planes, dim, int(name[-1]))
    if name.startswith("grouped"):
        bits = int(name[-1])
        scales = float64(planes["groups"]) / 255 * float64(planes["scale"])
        levels = levels_of(unpack_slowly(planes["codes"], dim, bits), bits)
        return np.asarray(levels * np.repeat(scales, 16, axis=-1)[..., :dim])
    return None


def split_of(name: str, dim: int) -> tuple[int, int, int]:
    """Of `tq2.5`, `tq2o16` or `tq2o16x4`: outlier channels, their bits, and the bits of the others."""
    text = name.removeprefix("tq")
    if text.endswith(".5"):
        return dim // 2, int(text[0]) + 1, int(text[0])
    low, count, high = (*text.replace("x", "o").split("o"), "")[:3]
    return int(count), int(high or min(6, int(low) + 1)), int(low)


def is_split(name: str) -> bool:
    return name.startswith("tq") and not name.startswith("tqprod") and ("." in name or "o" in name[2:])


def decode_slowly(
    name: str, planes: Arrays, dim: int, seed: int = 0, rotation: str = "hadamard", statistics: Arrays = NONE
) -> np.ndarray:
    """Reconstruction `(B, H, S, D)` in float64 from the stored bytes.

    Only `identity` and `affine`, whose bytes are MLX's, and outside codecs are decoded by themselves.
    """
    if "+" in name:
        names = name.split("+")
        heads = []
        for head, own in enumerate(names):
            place = names[:head].count(own)
            prefix = f"head{names.index(own)}_"
            part, fitted = (
                {
                    key.removeprefix(prefix): array[:, place : place + 1]
                    for key, array in arrays.items()
                    if key.startswith(prefix)
                }
                for arrays in (planes, statistics)
            )
            heads.append(decode_slowly(own, part, dim, seed, rotation, fitted))
        return np.concatenate(heads, axis=1)
    if is_split(name):
        count, high, low = split_of(name, dim)
        first = {key.removeprefix("outlier_"): array for key, array in planes.items() if key.startswith("outlier_")}
        second = {key: array for key, array in planes.items() if not key.startswith("outlier_")}
        parts = [
            decode_slowly(f"tq{high}", first, count, seed + 1, rotation),
            decode_slowly(f"tq{low}", second, dim - count, seed, rotation),
        ]
        joined = np.concatenate(parts, axis=-1)
        order = np.array(statistics["order"]).astype(np.int64)
        found = np.zeros_like(joined)
        np.put_along_axis(found, np.broadcast_to(order, joined.shape), joined, axis=-1)
        return found
    if name.startswith("tcq"):
        code, width = trellis(int(name[-1])), dim // 8
        bits, *stored = (
            unpack_slowly(planes["codes"][..., i * width : (i + 1) * width], dim, 1) for i in range(code.bits)
        )
        index = np.zeros_like(bits)
        for bit in stored:
            index = 2 * index + bit
        in_time = [i * width + j for j in range(width) for i in range(8)]  # channels
        coded = np.zeros_like(bits)
        for i, generator in enumerate(code.generators):
            for t, channel in enumerate(in_time):
                taps = [in_time[t - j] for j in range(9) if generator >> j & 1]
                coded[..., channel] |= bits[..., taps].sum(axis=-1) % 2 << i
        levels = np.array(code.book.levels)[index << len(code.generators) | coded]
        return levels * float64(planes["scale"]) @ matrix_of(dim, seed, rotation).T
    if name.startswith("qjl"):
        blocks = int(name[-1])
        sketch = 2.0 * unpack_slowly(planes["signs"], blocks * dim, 1) - 1.0
        total = np.zeros(())
        for i in range(blocks):
            total = total + sketch[..., i * dim : (i + 1) * dim] @ sketch_matrix(dim, seed, rotation, f" sketch {i}").T
        return np.asarray(total * float64(planes["norm"]) / (blocks * dim * mean_coordinate(dim)))
    if name.startswith("kivi"):
        codes = unpack_slowly(planes["codes"], dim, int(name[-1]))
        row = np.arange(codes.shape[2]) // 32
        return np.asarray(codes * float64(planes["step"])[:, :, row] + float64(planes["least"])[:, :, row])
    y = _rotated_tokens(name, planes, dim, seed, rotation)
    if y is None:
        return float64(get_codec(name, seed, rotation).decode(planes, dim))
    return np.asarray(y @ matrix_of(dim, seed, rotation).T)
