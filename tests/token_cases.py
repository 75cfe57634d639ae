"""Caches for the kernels that encode and decode tokens, and what they must give, in float64 NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from fused_cases import rotary_of

from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.codecs import LEAST_SQUARES, NORM, UNBIASED, Codec
from mlx_kvq_plugin.frame import KeyFrame
from mlx_kvq_plugin.kernels.build import backend
from mlx_kvq_plugin.rotary import Rotary, no_rotation
from mlx_kvq_plugin.rotation import signs
from mlx_kvq_plugin.schemes import parse_scheme

BACKENDS = [backend()] if backend() else ["cpu"]
PRELUDES = [backend()] if backend() else ["cpu-orders", "cpu-races", "cpu-metal"]


@dataclass(frozen=True)
class Kind:
    """What one compiled kernel serves.

    Attributes:
        pairs: rotary pairs; `None` for all channels.
        framed: whether keys are encoded in a frame.
        scaled: whether channels of values have scales.
        scaling: of both codecs, empty for that of the scheme.
    """

    scheme: str
    dims: tuple[int, int]
    pairs: int | None = None
    layout: str = "half"
    magnitude: float = 1.0
    framed: bool = True
    scaled: bool = True
    dtype: Any = mx.float32
    scaling: str = ""

    def __str__(self) -> str:
        rotary = f"{self.layout}{'' if self.pairs is None else self.pairs}" if self.framed else "unframed"
        return f"{self.scheme}-{self.scaling}-{self.dims[0]}-{self.dims[1]}-{rotary}-{str(self.dtype).split('.')[-1]}"

    @property
    def rotary(self) -> Rotary:
        if self.pairs == 0:
            return no_rotation()
        return rotary_of(self.dims[0], self.pairs, self.layout, self.magnitude)


KINDS = [
    Kind("tq4", (128, 128), dtype=mx.bfloat16),
    Kind("k=tq3,v=tq2", (64, 128)),
    Kind("rvq1,seed=3", (128, 64), layout="interleaved", dtype=mx.float16),
    Kind("k=tq1,v=rvq3", (32, 256), pairs=5, dtype=mx.float16),
    Kind("k=rvq3,v=tq1", (256, 32), pairs=32, layout="interleaved", magnitude=1.25, dtype=mx.bfloat16),
    Kind("k=tq6,v=tq5", (64, 64), pairs=16, magnitude=0.8),
    Kind("k=rvq2,v=tq3", (32, 32), dtype=mx.bfloat16, scaling=LEAST_SQUARES),
    Kind("k=tq2,v=rvq1", (256, 128), pairs=7, layout="interleaved", scaling=UNBIASED),
    Kind("k=tq5,v=tq6", (128, 32), pairs=0),
    Kind("k=tq4,v=rvq2", (64, 256), framed=False, scaled=False, dtype=mx.float16, scaling=NORM),
]
TRELLIS_KINDS = [
    Kind("k=tcq3,v=tcq2", (128, 128), dtype=mx.bfloat16),
    Kind("k=tcq4,v=tq3,seed=3", (64, 256), pairs=16, layout="interleaved", scaled=False),
    Kind("k=tcq1,v=tcq4", (32, 64), framed=False, dtype=mx.float16, scaling=NORM),
    Kind("k=tcq2,v=tcq3", (256, 256), pairs=7, scaling=LEAST_SQUARES),
    Kind("k=rvq1,v=tcq3", (128, 32), pairs=0, dtype=mx.float16),
]


@dataclass(frozen=True)
class Shape:
    """A cache's contents.

    Attributes:
        dense: tokens in the dense buffers, which have room for `room` more.
        packed: tokens in the planes, after `start` rows of others and before `slack` of others.
        position: of the first token held.
    """

    batch: int
    heads: int
    packed: int
    dense: int
    room: int
    start: int
    slack: int
    position: int
    norm: float
    seed: int


def shapes(kind: Kind, count: int) -> Iterator[Shape]:
    """`count` shapes, always the same for a kind."""
    draw = np.random.RandomState(sum(map(ord, str(kind))))
    for seed in range(count):
        yield Shape(
            batch=int(draw.choice([1, 1, 2, 3])),
            heads=int(draw.choice([1, 2, 3])),
            packed=int(draw.choice([1, 3, 8, draw.randint(1, 90), draw.randint(60, 200)])),
            dense=int(draw.choice([0, 3, draw.randint(1, 20), draw.randint(20, 100)])),
            room=int(draw.choice([0, draw.randint(1, 9)])),
            start=int(draw.choice([0, 0, draw.randint(1, 70)])),
            slack=int(draw.choice([0, 0, draw.randint(1, 70)])),
            position=int(draw.choice([0, 63, 64, draw.randint(0, 300), 100_000])),
            norm=float(draw.choice([1.0, 1.0, 280.0, 1e-3])),
            seed=seed,
        )


def cache_of(kind: Kind, shape: Shape) -> KVQCache:
    """A cache whose planes hold encoded tokens between rows of other bytes; the tokens are random."""
    mx.random.seed(shape.seed)
    spec = parse_scheme(kind.scheme).layer_spec().with_(frame=kind.framed)
    cache = KVQCache(spec.with_(scaling=kind.scaling) if kind.scaling else spec, kind.rotary)
    B, H, rows = shape.batch, shape.heads, shape.start + shape.packed + shape.slack
    capacity = shape.dense + shape.room
    if kind.framed:
        mean = shape.norm * mx.random.normal((B, H, 1, kind.dims[0]))
        scale = mx.exp(0.5 * mx.random.normal((B, H, 1, kind.dims[0] - kind.rotary.pairs)))
        constant = shape.norm * mx.random.normal(mean.shape, key=mx.random.key(shape.seed))
        constant = mx.where(mx.arange(kind.dims[0]) < 2 * kind.rotary.pairs, constant, 0.0)
        cache.frame = KeyFrame(kind.rotary, mean, scale, constant)
    if kind.scaled:
        drawn = mx.random.normal((B, H, 1, kind.dims[1]), key=mx.random.key(shape.seed + 1))
        cache.value_scale = 0.5 * mx.exp(0.5 * drawn)

    def tokens(count: int, dim: int) -> mx.array:
        sizes = mx.exp(mx.random.normal((B, H, count, 1)))
        return shape.norm * sizes * mx.random.normal((B, H, count, dim))

    def planes(codec: Codec, dim: int) -> dict[str, mx.array]:
        encoded = codec.encode(tokens(rows, dim)) if shape.packed else {}
        return {name: mx.contiguous(plane) for name, plane in encoded.items()}

    cache.key_planes = planes(cache.key_codec, kind.dims[0])
    cache.value_planes = planes(cache.value_codec, kind.dims[1])
    cache.dense_keys, cache.dense_values = (tokens(capacity, dim).astype(kind.dtype) for dim in kind.dims)
    cache._packed, cache._packed_start, cache._dense = shape.packed, shape.start, shape.dense
    cache.offset = shape.position + shape.packed + shape.dense
    arrays = [*cache.key_planes.values(), *cache.value_planes.values(), cache.dense_keys, cache.dense_values]
    mx.eval(arrays, [] if cache.frame is None else cache.frame.arrays())
    return cache


def in_float64(x: mx.array) -> Any:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def hadamard(dim: int) -> Any:
    """The orthonormal matrix in Sylvester's order, symmetric."""
    matrix = np.ones((1, 1))
    while matrix.shape[0] < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(dim)


def turned_mean(frame: KeyFrame, position: int, count: int) -> Any:
    """R_n mu + c `(B, H, count, D)`, from the angles themselves."""
    rotary, mean = frame.rotary, in_float64(frame.mean)
    angles = (position + np.arange(count))[:, None] * np.array(rotary.angles, np.float64)
    cos, sin = rotary.magnitude * np.cos(angles), rotary.magnitude * np.sin(angles)
    turned = np.repeat(mean, count, axis=2)
    P = rotary.pairs
    first, second = (slice(P), slice(P, 2 * P)) if rotary.layout == "half" else (slice(0, 2 * P, 2), slice(1, 2 * P, 2))
    turned[..., first] = mean[..., first] * cos - mean[..., second] * sin
    turned[..., second] = mean[..., first] * sin + mean[..., second] * cos
    return turned + in_float64(frame.constant)


def codes_of(codec: Any, planes: dict[str, mx.array], dim: int) -> Any:
    return np.array(codec.codes(planes, dim)).astype(np.int64)


def levels(codec: Any) -> Any:
    return np.array(codec.book.levels)


def rotated(codec: Any, x: Any) -> Any:
    """Tokens as the codebook sees them, before they are divided by their root mean square."""
    dim = x.shape[-1]
    return x * np.array(signs(dim, codec.seed)).astype(np.float64) @ hadamard(dim)


def decoded(codec: Any, planes: dict[str, mx.array], dim: int) -> Any:
    """Tokens of planes."""
    y = levels(codec)[codes_of(codec, planes, dim)] * in_float64(planes["scale"])
    return y @ hadamard(dim) * np.array(signs(dim, codec.seed)).astype(np.float64)


def best_scale(codec: Any, y: Any, codes: Any) -> Any:
    """The number of a token that the codec's scaling asks for, of rotated tokens and their codes."""
    c = levels(codec)[codes]
    energy, product, size = ((a * b).sum(axis=-1, keepdims=True) for a, b in ((y, y), (y, c), (c, c)))
    if codec.scaling == LEAST_SQUARES:
        return product / size
    return np.sqrt(energy / size) if codec.scaling == NORM else energy / np.maximum(product, 1e-37)
