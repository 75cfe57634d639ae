"""Scales of value channels: what values are divided by before a codec that mixes channels encodes them.

A rotation spreads the error of a token over all its channels alike, so a loud channel costs the quiet ones; what a
channel weighs is up to the output projection: v_c times 50 and its column over 50 is the same model. With scales s_c
the error of a token is in proportion to `sum_c (v_c / s_c)^2`, and a channel gets `s_c^2` of it. Channels beyond `LOUD`
times the typical root mean square are brought down to it. Even where all channels weigh alike that makes the sum of
squared errors less, as any s_c between 1 and the root of what a channel has over the others does. Scales are frozen
once, from the first tokens, as the frame of keys is (frame.py).

No mean is taken away, though values have one: tokens that are attended to for want of others have values near 0, which
would become as large as the mean, and their errors with them.
"""

from __future__ import annotations

import mlx.core as mx

LOUD = 2.0  # times the typical root mean square of a channel
_FLOOR = 1e-3  # of the mean energy, added to the typical one: most channels may be dead
_TINY = 1e-30


def fit_value_scale(values: mx.array) -> mx.array:
    """Scales `(B, Hkv, 1, D)` float32, at least 1, from values `(B, Hkv, L, D)`."""
    values = values.astype(mx.float32)
    energy = mx.mean(values * values, axis=2, keepdims=True)
    typical = mx.median(energy, axis=-1, keepdims=True) + _FLOOR * mx.mean(energy, axis=-1, keepdims=True) + _TINY
    return mx.maximum(mx.sqrt(energy / typical) / LOUD, 1.0)
