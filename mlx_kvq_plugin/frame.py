"""Keys in the rotary frame: what is subtracted and scaled before a key is encoded.

After RoPE the key of token n is `k_n = R_n (mu + e_n)`: mu, the head's mean key before RoPE, is large, the same for
all tokens, and says nothing. The frame encodes `x_n = S (k_n - R_n mu - c)` and scores
`q . k^_n = (q / s) . x^_n + q . R_n mu + q . c`. S is equal within each rotary pair, so it commutes with R_n;
`s_j = (query energy / key energy)^(1/4)` minimizes the error of the scores for a codec whose error is
isotropic. c is what does not turn, nothing in most models (steady.py). All are frozen once, from the first tokens.

Related: SageAttention (a constant key mean is free under softmax), SmoothAttention in QServe (scales tied within
rotary pairs), KVQuant (keys before RoPE). Removing R_n mu instead of a constant stays valid at every later position.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .rotary import Rotary, pair_products, span_scores, turn
from .steady import steady_part

MIN_TOKENS = 64  # statistics from fewer tokens are worse, from more no better
SKIP_TOKENS = 4  # attention sinks are outliers: left out of the statistics
_FLOOR = 0.003  # of the mean energy, added against dead pairs


@dataclass
class KeyFrame:
    """Frozen statistics of one layer, float32: `mean` and `constant` `(B, Hkv, 1, D)`, `scale` `(B, Hkv, 1, D - P)`.

    `scale` has one number per rotary pair, then one per channel that does not turn. `constant` is 0 in these channels,
    whose mean does not turn anyway.
    """

    rotary: Rotary
    mean: mx.array
    scale: mx.array
    constant: mx.array

    def joined(self) -> mx.array:
        """`mean`, `constant`, `scale` and up to three zeros of every head, `(B, Hkv, 1, ...)`, for kernels.

        Rows are multiples of 16 bytes, as kernels load so many at a time.
        """
        filling = mx.zeros((*self.scale.shape[:3], -self.scale.shape[3] % 4))
        return mx.concatenate([self.mean, self.constant, self.scale, filling], axis=-1)

    def arrays(self) -> list[mx.array]:
        """All arrays that are held."""
        return [self.mean, self.scale, self.constant]

    @property
    def nbytes(self) -> int:
        """Bytes held: 2.5 D float32 per head at full rotation; a cache holds them once more where kernels read them."""
        return sum(array.nbytes for array in self.arrays())

    def channel_scale(self) -> mx.array:
        """`scale` spread to `(B, Hkv, 1, D)`."""
        pairs, rest = self.scale[..., : self.rotary.pairs], self.scale[..., self.rotary.pairs :]
        return self.rotary.join(pairs, pairs, rest)

    def encode(self, keys: mx.array, start: int) -> mx.array:
        """`S (k_n - R_n mu - c)` float32 of post-RoPE keys `(B, Hkv, L, D)` at positions from `start`."""
        mean = turn(self.rotary, self.mean, start, keys.shape[2]) + self.constant
        return (keys.astype(mx.float32) - mean) * self.channel_scale()

    def decode(self, x: mx.array, start: int) -> mx.array:
        """Inverse of `encode`, float32."""
        mean = turn(self.rotary, self.mean, start, x.shape[2]) + self.constant
        return x.astype(mx.float32) / self.channel_scale() + mean

    def scale_queries(self, queries: mx.array) -> mx.array:
        """`q / s` for queries `(B, Hkv, R, D)`."""
        return scaled_queries(self.rotary, queries, self.scale)

    def mean_scores(self, queries: mx.array, start: int, length: int) -> mx.array:
        """`q . (R_n mu + c)` `(B, Hkv, R, length)` float32 at positions from `start`."""
        products = mean_products(self.rotary, queries.astype(mx.float32), self.mean, self.constant)
        return span_scores(self.rotary, products, start, length)


def frame_size(dim: int, pairs: int) -> int:
    """Numbers of a head in `KeyFrame.joined`."""
    return 2 * dim + dim - pairs + -(dim - pairs) % 4


def scaled_queries(rotary: Rotary, queries: mx.array, scale: mx.array) -> mx.array:
    """Queries `(B, Hkv, R, D)` over the `scale` of a frame `(B, Hkv, 1, D - P)`."""
    pairs, rest = scale[..., : rotary.pairs], scale[..., rotary.pairs :]
    return queries / rotary.join(pairs, pairs, rest).astype(queries.dtype)


def mean_products(
    rotary: Rotary, queries: mx.array, mean: mx.array, constant: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """What `span_scores` needs to give `q . (R_n mu + c)` for queries `(B, Hkv, R, D)` float32, at any position."""
    along, across, rest = pair_products(rotary, queries, mean)
    steady = mx.sum(queries * constant, axis=-1, keepdims=True)
    return along, across, steady if rest is None else rest + steady


def query_energy(queries: mx.array, kv_heads: int, per_token: bool = False) -> mx.array:
    """Sum over the group's heads, and over tokens, of q^2: `(B, Hkv, 1 or L, D)` float32 from `(B, Hq, L, D)`."""
    B, Hq, L, D = queries.shape
    q = queries.astype(mx.float32).reshape(B, kv_heads, Hq // kv_heads, L, D)
    energy = mx.sum(q * q, axis=2)
    return energy if per_token else mx.sum(energy, axis=2, keepdims=True)


def _pair_energy(rotary: Rotary, energy: mx.array) -> mx.array:
    """Channel energies `(..., D)` to one number per pair and per unturned channel `(..., D - P)`, per channel."""
    first, second, rest = rotary.split(energy)
    pairs = 0.5 * (first + second)
    return mx.concatenate([pairs, rest], axis=-1) if rest.shape[-1] else pairs


def fit_frame(rotary: Rotary, keys: mx.array, start: int, energy: mx.array | None) -> KeyFrame:
    """Statistics from post-RoPE keys `(B, Hkv, L, D)` at positions from `start`.

    Args:
        energy: `query_energy` of the same tokens, or `None` to leave the scales at 1.
    """
    keys = keys.astype(mx.float32)
    length = keys.shape[2]
    mean = mx.mean(turn(rotary, keys, start, length, inverse=True), axis=2, keepdims=True)
    mean, constant = steady_part(rotary, mean, keys - turn(rotary, mean, start, length), start)
    if energy is None:
        scale = mx.ones_like(_pair_energy(rotary, mean))
    else:
        centred = keys - turn(rotary, mean, start, length) - constant
        v = _pair_energy(rotary, mx.mean(centred * centred, axis=2, keepdims=True))
        w = _pair_energy(rotary, energy)
        tiny = 1e-30
        v = v + _FLOOR * mx.mean(v, axis=-1, keepdims=True) + tiny
        w = w + _FLOOR * mx.mean(w, axis=-1, keepdims=True) + tiny
        log = 0.25 * (mx.log(w) - mx.log(v))
        scale = mx.exp(log - mx.mean(log, axis=-1, keepdims=True))
    return KeyFrame(rotary, mean, scale, constant)
