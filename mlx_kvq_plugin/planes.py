"""Planes with a row for several tokens (`Plane.tokens`): which they are, and what trimming leaves of their rows.

A row serves the tokens that were encoded together. Trimming and sliding windows remove single tokens, so a cache keeps
how many tokens of each row are left: `rows[t]` lists that for planes of `t` tokens a row. Nothing is encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import mlx.core as mx
import numpy as np

from .codecs import Codec

Rows = Mapping[int, tuple[int, ...]]


@cache
def shared_planes(codec: Codec, dim: int) -> Mapping[str, int]:
    """Names of the codec's planes with a row for several tokens, and how many; most codecs have none."""
    if codec.group == 1:
        return {}
    return {plane.name: plane.tokens for plane in codec.planes(dim, "float16") if plane.tokens > 1}


def with_new_rows(rows: Rows, tokens: set[int], count: int) -> Rows:
    """After `count` more tokens, a multiple of every row."""
    return {t: (*rows.get(t, ()), *(t,) * (count // t)) for t in tokens}


def without_newest(rows: Rows, count: int) -> Rows:
    """After the last `count` tokens are gone."""
    return {t: _shortened(lengths[::-1], count)[::-1] for t, lengths in rows.items()}


def without_oldest(rows: Rows, count: int) -> Rows:
    """After the first `count` tokens are gone."""
    return {t: _shortened(lengths, count) for t, lengths in rows.items()}


def _shortened(lengths: tuple[int, ...], count: int) -> tuple[int, ...]:
    for i, length in enumerate(lengths):
        if count < length:
            return (length - count, *lengths[i + 1 :])
        count -= length
    return ()


def expanded(planes: Mapping[str, mx.array], shared: Mapping[str, int], rows: Rows) -> dict[str, mx.array]:
    """Planes with a row for every token: those of `shared` repeated."""
    found = dict(planes)
    for name, tokens in shared.items():
        lengths = rows[tokens]
        found[name] = mx.take(planes[name], mx.array(np.repeat(np.arange(len(lengths)), lengths)), axis=2)
    return found
