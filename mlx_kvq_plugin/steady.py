"""The part of keys that does not turn: a constant c beside the turning mean, `k_n = R_n mu + c + e_n`.

Softmax does not see a vector that is added to all keys of a head after RoPE; models have none by themselves, weights
can be made to. Least squares would tell it from mu, but on pairs of channels that hardly turn within the tokens of the
statistics both look the same, and keys that drift with the text look like either. So both are a ridge regression, and
what c is expected to be is learnt from the head: where its fast pairs show no constant beyond noise, c is 0 and mu the
plain mean, exactly. Where they do, its energy in a pair is expected to be their median, or what the pair itself shows
beyond doubt, so that pairs which cannot tell follow those which can.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .rotary import Rotary

DRIFT = 0.01  # of the energy of e_n, beside 1/N: what more tokens do not average away, as texts change slowly
FAST = 0.5  # a pair is fast if no turning vector explains more than this part of a constant
LEAST_FAST = 4  # fast pairs that a head must have to be judged by them
OF_HEAD = 4.0  # times its variance the squared constant of fast pairs must be, by median; 2 at most on real models
OF_PAIR = 100.0  # the same of one pair by itself; 70 at most on real models
LARGEST = 9.0  # times the energy that is expected of c, what it may have before mu is taken to have the rest
ROUNDING = 1e-3  # of the energy of the mean: the least energy of e_n, or float32 sums would be taken for c
_TINY = 1e-30

Array = npt.NDArray[np.float64]
Complex = tuple[mx.array, mx.array]  # real and imaginary parts


def _mean_turn(rotary: Rotary, start: int, count: int) -> tuple[Array, Array, Array]:
    """Real and imaginary part of the mean of `e^(i n theta)` over `count` tokens, and 1 - its squared size; float64."""
    half = 0.5 * np.array(rotary.angles, np.float64)
    sines = np.sin(half)
    still = np.abs(sines) < 1e-12
    size = np.where(still, 1.0, np.sin(count * half) / (count * np.where(still, 1.0, sines)))
    middle = 2 * half * (start + 0.5 * (count - 1))
    return size * np.cos(middle), size * np.sin(middle), np.maximum(1 - size * size, 0)


def _median(x: mx.array, chosen: npt.NDArray[np.int64]) -> mx.array:
    """Over the chosen places of the last axis, which stays."""
    return mx.median(mx.take(x, mx.array(chosen), axis=-1), axis=-1, keepdims=True)


def steady_part(rotary: Rotary, mean: mx.array, left: mx.array, start: int) -> tuple[mx.array, mx.array]:
    """Split the means of keys into what turns and what does not.

    Args:
        mean: `(B, Hkv, 1, D)` float32, the mean of the keys turned back: all of it taken to turn.
        left: `(B, Hkv, L, D)` float32, what that leaves of the keys at positions from `start`.

    Returns:
        mu and c `(B, Hkv, 1, D)`; c is 0 where nothing shows one.
    """
    nothing, count = mx.zeros_like(mean), left.shape[2]
    if not rotary.pairs:
        return mean, nothing
    cos, sin, apart = _mean_turn(rotary, start, count)
    fast = np.flatnonzero(apart > FAST)
    r, i, d = (mx.array(x.astype(np.float32)) for x in (cos, sin, np.maximum(apart, _TINY)))
    first, second, rest = rotary.split(rotary.magnitude * mean)
    y1, y2, _ = rotary.split(mx.mean(left, axis=2, keepdims=True))
    e1, e2, _ = rotary.split(mx.mean(left * left, axis=2, keepdims=True))

    shown = (y1 * y1 + y2 * y2) / d  # energy that a constant explains beyond mu
    least = mx.maximum(ROUNDING * (first * first + second * second), 1e-5 * (e1 + e2))
    noise = mx.maximum(e1 + e2 - shown, least) * (1 / count + DRIFT) + _TINY
    own = shown / d  # its squared size by least squares
    evidence = shown / noise
    constant = mx.where(evidence > OF_PAIR, own, 0.0)
    turning = mx.zeros_like(own)
    if fast.size >= LEAST_FAST:
        # mu - conj(r) y / d, of fast pairs by least squares
        m1, m2 = first - (r * y1 + i * y2) / d, second - (r * y2 - i * y1) / d
        common = mx.where(_median(evidence, fast) > OF_HEAD, _median(own, fast), 0.0)
        constant, turning = mx.maximum(constant, common), turning + _median(m1 * m1 + m2 * m2, fast)
    turning = mx.maximum(turning, first * first + second * second - LARGEST * constant)

    found = constant > 0
    of_constant = noise / mx.where(found, constant, 1.0)
    of_turning = noise / (turning + _TINY)
    whole = d + of_constant + of_turning + of_constant * of_turning

    def solved(y: mx.array, turned: mx.array, plain: mx.array, back: mx.array) -> Complex:
        """c and mu of one part: `turned` of r mu, `back` of conj(r) y."""
        c = ((1 + of_turning) * y + of_turning * turned) / whole
        mu = ((d + of_constant) * plain - back) / whole
        return mx.where(found, c, 0.0), mx.where(found, mu, plain)

    c1, mu1 = solved(y1, r * first - i * second, first, r * y1 + i * y2)
    c2, mu2 = solved(y2, r * second + i * first, second, r * y2 - i * y1)
    turned = rotary.join(mu1 / rotary.magnitude, mu2 / rotary.magnitude, rest)
    some = mx.any(found, axis=-1, keepdims=True)
    return mx.where(some, turned, mean), rotary.join(c1, c2, mx.zeros_like(rest))
