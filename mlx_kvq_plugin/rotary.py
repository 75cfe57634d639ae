"""One layer's rotary embedding as data: read off its rope module, then usable without the model.

RoPE turns the pair j of channels of token n by the angle n * theta_j (and may scale it by a constant m). `read_rotary`
applies the layer's own module to basis vectors, reads layout, angles and magnitudes off the result and checks them
against the module at far positions; default, partial, linear, llama3, yarn, longrope, proportional and traditional
ropes all pass. A module that does not turn uniformly (dynamic NTK beyond its trained length) is refused with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

BLOCK = 64  # positions per block of the block-wise tables

_CHECKED_POSITIONS = (1, 2, 63, 1_000, 40_000, 1_100_000)


@dataclass(frozen=True)
class Rotary:
    """A uniform rotation of channel pairs.

    Attributes:
        layout: `half` pairs channel j with j + P, `interleaved` pairs 2 j with 2 j + 1, for j < P.
        angles: theta_j, radians a position, for the P pairs; channels from 2 P on do not turn.
        magnitude: the constant m that scales turned channels (1 unless the rope has an mscale).
    """

    layout: str
    angles: tuple[float, ...]
    magnitude: float = 1.0

    @property
    def pairs(self) -> int:
        """P, the number of channel pairs that turn."""
        return len(self.angles)

    def __deepcopy__(self, memo: object) -> Rotary:
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; floats keep every bit."""
        return {"layout": self.layout, "angles": list(self.angles), "magnitude": self.magnitude}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Rotary:
        """Inverse of `to_dict`."""
        return Rotary(data["layout"], tuple(data["angles"]), data["magnitude"])

    def split(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """First and second channels `(..., P)` of all pairs and the unturned rest `(..., D - 2 P)`."""
        turned = 2 * self.pairs
        if self.layout == "half":
            first, second = x[..., : self.pairs], x[..., self.pairs : turned]
        else:
            first, second = x[..., 0:turned:2], x[..., 1:turned:2]
        return first, second, x[..., turned:]

    def join(self, first: mx.array, second: mx.array, rest: mx.array) -> mx.array:
        """Inverse of `split`."""
        if self.layout == "half":
            parts = [first, second]
        else:
            parts = [mx.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)]
        return mx.concatenate([*parts, rest] if rest.shape[-1] else parts, axis=-1)


_NO_ROTATION = Rotary("half", ())


def no_rotation() -> Rotary:
    """The rotary of layers without position embedding: no channel turns."""
    return _NO_ROTATION


def _matrix(rope: Callable[..., mx.array], dim: int, position: int) -> npt.NDArray[np.float64]:
    """Row i is what `rope` makes of basis vector i at `position`."""
    basis = mx.eye(dim).reshape(1, dim, 1, dim)
    return np.array(rope(basis, offset=position).reshape(dim, dim)).astype(np.float64)


def _expected(rotary: Rotary, dim: int, position: int) -> npt.NDArray[np.float64]:
    matrix = np.eye(dim)
    angles = np.array(rotary.angles) * position
    pair = np.arange(rotary.pairs)
    first, second = (pair, pair + rotary.pairs) if rotary.layout == "half" else (2 * pair, 2 * pair + 1)
    cos, sin = rotary.magnitude * np.cos(angles), rotary.magnitude * np.sin(angles)
    matrix[first, first] = matrix[second, second] = cos
    matrix[first, second], matrix[second, first] = sin, -sin
    return matrix


def read_rotary(rope: Callable[..., mx.array] | None, dim: int) -> tuple[Rotary | None, str]:
    """Read the rotation of head size `dim` off a rope module `rope(x, offset=n)`; `None` means no rope.

    Returns:
        The rotary and an empty string, or `None` and the reason why the module is not a uniform rotation of pairs.
    """
    if rope is None:
        return no_rotation(), ""
    start, turned = _matrix(rope, dim, 0), _matrix(rope, dim, 1)
    partner = np.abs(turned - np.diag(np.diag(turned)))
    moved = np.flatnonzero(partner.max(axis=1) > 0)
    if moved.size == 0:
        return _checked(rope, dim, no_rotation())
    step = int(np.argmax(partner[moved[0]])) - int(moved[0])
    if step == 1 and moved.size > 2:
        layout, pairs = "interleaved", (int(moved[-1]) + 1) // 2
        first = 2 * np.arange(pairs)
        second = first + 1
    else:
        layout, pairs = "half", step
        first = np.arange(pairs)
        second = first + pairs
    if pairs <= 0 or 2 * pairs > dim:
        return None, "its rope does not turn channels in half-split or interleaved pairs"
    magnitude = float(start[first[0], first[0]])
    angles = np.arctan2(turned[first, second], turned[first, first])
    rotary = Rotary(layout, tuple(float(a) for a in angles), magnitude)
    return _checked(rope, dim, rotary)


def _checked(rope: Callable[..., mx.array], dim: int, rotary: Rotary) -> tuple[Rotary | None, str]:
    for position in _CHECKED_POSITIONS:
        error = np.max(np.abs(_matrix(rope, dim, position) - _expected(rotary, dim, position)))
        if error > rotary.magnitude * (1e-4 + 3e-7 * position):  # float32 angles lose about 1e-7 a position
            return None, f"its rope is not one rotation for all positions (position {position} is off by {error:.2g})"
    return rotary, ""


_tables: dict[Rotary, tuple[mx.array, mx.array, mx.array]] = {}


def block_tables(rotary: Rotary, blocks: int, whole: bool = False) -> tuple[mx.array, mx.array, mx.array]:
    """Tables to turn by any position `n = BLOCK * b + i`, shared by all layers with this rotary.

    Args:
        whole: give the tables as they are kept, with at least `blocks` rows, not cut to them.

    Returns:
        cos and sin `(blocks, P)` at the block starts, and cos beside sin `(BLOCK, 2 P)` inside a block, float32,
        without the magnitude. Their size is counted in `tables_nbytes`.
    """
    known = _tables.get(rotary)
    if known is None or known[0].shape[0] < blocks:
        capacity = max(16, math.ceil(blocks / 16) * 16)
        angles = np.array(rotary.angles, dtype=np.float64)
        starts = np.arange(capacity)[:, None] * BLOCK * angles
        inner = np.arange(BLOCK)[:, None] * angles
        known = (
            mx.array(np.cos(starts).astype(np.float32)),
            mx.array(np.sin(starts).astype(np.float32)),
            mx.array(np.concatenate([np.cos(inner), np.sin(inner)], axis=1).astype(np.float32)),
        )
        mx.eval(*known)  # lazy arrays cannot cross threads
        _tables[rotary] = known
    if whole:
        return known
    return known[0][:blocks], known[1][:blocks], known[2]


def tables_nbytes() -> int:
    """Bytes of the tables of all rotaries in the process."""
    return sum(table.nbytes for tables in (_tables, _span_tables) for known in tables.values() for table in known)


def turn(rotary: Rotary, x: mx.array, start: int, length: int, inverse: bool = False) -> mx.array:
    """`R_n x` for n in `[start, start + length)`, or `R_n^-1 x`.

    Args:
        x: `(..., length, D)`, or `(..., 1, D)` to turn one vector to every position. float32.
    """
    if not rotary.pairs:
        return mx.broadcast_to(x, (*x.shape[:-2], length, x.shape[-1]))
    first_block, last_block = start // BLOCK, (start + length - 1) // BLOCK + 1
    block_cos, block_sin, inner = block_tables(rotary, last_block)
    cb, sb = block_cos[first_block:, None], block_sin[first_block:, None]
    ci, si = mx.split(inner, 2, axis=-1)
    skip = start - first_block * BLOCK
    cos = (cb * ci - sb * si).reshape(-1, rotary.pairs)[skip : skip + length]
    sin = (sb * ci + cb * si).reshape(-1, rotary.pairs)[skip : skip + length]
    first, second, rest = rotary.split(x)
    if inverse:
        scale = 1.0 / rotary.magnitude
        turned = (first * cos + second * sin) * scale, (second * cos - first * sin) * scale
    else:
        scale = rotary.magnitude
        turned = (first * cos - second * sin) * scale, (first * sin + second * cos) * scale
    return rotary.join(*turned, mx.broadcast_to(rest, (*rest.shape[:-2], length, rest.shape[-1])))


SPAN = 256  # positions per block of `span_scores`: as many that its small product is fast, and the tables small

_span_tables: dict[Rotary, tuple[mx.array, mx.array, mx.array]] = {}


def span_tables(rotary: Rotary, spans: int) -> tuple[mx.array, mx.array, mx.array]:
    """Tables of `span_scores`, shared by all layers with this rotary and counted in `tables_nbytes`.

    Returns:
        cos and sin `(spans or more, 2 P)` at the starts of spans, each twice, and cos above sin `(2 P, SPAN)` inside a
        span times the magnitude, float32.
    """
    known = _span_tables.get(rotary)
    if known is None or known[0].shape[0] < spans:
        angles = np.array(rotary.angles, dtype=np.float64)
        starts = np.tile(np.arange(math.ceil(spans / 8) * 8)[:, None] * SPAN * angles, 2)
        inner = angles[:, None] * np.arange(SPAN)
        both = rotary.magnitude * np.concatenate([np.cos(inner), np.sin(inner)])
        cos, sin, table = (mx.array(x.astype(np.float32)) for x in (np.cos(starts), np.sin(starts), both))
        known = cos, sin, table
        mx.eval(*known)  # lazy arrays cannot cross threads
        _span_tables[rotary] = known
    return known


Pairs = tuple[mx.array, mx.array, mx.array | None]


def pair_products(rotary: Rotary, queries: mx.array, vector: mx.array) -> Pairs:
    """What `span_scores` needs of queries `(B, Hkv, R, D)` and a vector `(B, Hkv, 1, D)`, at any position.

    Returns:
        The products of pairs along and across, `(B, Hkv, R, 2 P)`: even, odd and odd, minus even parts; and the product
        of the channels that do not turn `(B, Hkv, R, 1)`, or `None` if all do.
    """
    q1, q2, q_rest = rotary.split(queries)
    v1, v2, v_rest = rotary.split(vector)
    even, odd = q1 * v1 + q2 * v2, q2 * v1 - q1 * v2
    rest = mx.sum(q_rest * v_rest, axis=-1, keepdims=True) if q_rest.shape[-1] else None
    return mx.concatenate([even, odd], axis=-1), mx.concatenate([odd, -even], axis=-1), rest


def turned_scores(rotary: Rotary, queries: mx.array, vector: mx.array, start: int, length: int) -> mx.array:
    """`q . R_n x` `(B, Hkv, R, length)` float32 for n in `[start, start + length)`.

    Args:
        queries: `(B, Hkv, R, D)` float32.
        vector: x, `(B, Hkv, 1, D)` float32.
    """
    return span_scores(rotary, pair_products(rotary, queries, vector), start, length)


def span_scores(rotary: Rotary, pairs: Pairs, start: int, length: int) -> mx.array:
    """`turned_scores` without a table entry per position.

    Queries are turned back to the start of each span of `SPAN` positions and multiplied with one small table:
    `length / SPAN * D` intermediate numbers per query.

    Args:
        pairs: `pair_products` of q and x.

    Returns:
        `(B, Hkv, R, length)` float32.
    """
    along, across, rest = pairs
    if not rotary.pairs:
        assert rest is not None
        return mx.broadcast_to(rest, (*rest.shape[:-1], length))
    first, last = start // SPAN, (start + length - 1) // SPAN + 1
    cos, sin, inner = span_tables(rotary, last)
    turned = _turned_back(along[..., None, :], across[..., None, :], cos[first:last], sin[first:last])
    skip = start - first * SPAN
    scores = (turned @ inner).reshape(*along.shape[:-1], -1)[..., skip : skip + length]
    return scores if rest is None else scores + rest


def _turned_back_plain(along: mx.array, across: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return along * cos + across * sin


_turned_back = mx.compile(_turned_back_plain, shapeless=True)
