"""Bytes of a cache before it exists: what it allocates, counted without an array.

A cache is followed through the calls that mlx-lm makes: the prompt in prefill chunks, then single tokens. Only numbers
of tokens are kept; buffers, growth and packing follow cache.py and sliding.py, and mlx-lm's caches where layers stay.
What counts is `nbytes`: dense tokens, planes with their slack, statistics. The rotary tables that all layers share, and
memory of the computation itself, are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlx_lm.models import cache as mlx_cache

from .adapters import LayerGeometry
from .cache import STEP_TOKENS, KVQCache
from .codecs import Codec
from .frame import MIN_TOKENS, SKIP_TOKENS
from .growth import Growth
from .sliding import SlidingKVQCache

CHUNK = 2048  # tokens of a prefill chunk in mlx-lm
STEPS = 256  # of a context, the generated tokens unless asked otherwise: the most that `generate_step` gives by default

_DTYPES = {2: "float16", 4: "float32"}


@dataclass(frozen=True)
class PackedLayout:
    """What decides the bytes of a compressed cache; bytes are those of all KV heads of one sequence.

    Attributes:
        token: of a dense token, K and V.
        planes: of a row of each plane, with the tokens that share the row.
        group, block: tokens that are encoded together, and between two encodings of single tokens.
        growth: how buffers grow.
        energy, statistics: of the query energies before the statistics are frozen, and of these.
        sinks, recent: tokens kept dense.
        needed: tokens that the statistics need, 0 without any.
        prefill: whether the prompt stays dense until the first step.
        window: tokens a sliding layer keeps, or `None`.
        shared: packing waits for the next call.
    """

    token: int
    planes: tuple[tuple[int, int], ...]
    group: int
    block: int
    growth: Growth
    energy: int
    statistics: int
    sinks: int
    recent: int
    needed: int
    prefill: bool
    window: int | None
    shared: bool


@dataclass(frozen=True)
class DenseLayout:
    """What decides the bytes of one of mlx-lm's caches of keys and values.

    Attributes:
        kind: the cache's class.
        token: bytes of a token, K and V, of all KV heads of one sequence.
        limit: tokens of the window or of the chunk, 0 for a cache that grows.
        keep: first tokens that a rotating cache never drops.
    """

    kind: type[Any]
    token: int
    limit: int = 0
    keep: int = 0


Layout = PackedLayout | DenseLayout


def layer_layout(geometry: LayerGeometry, cache: Any, itemsize: int = 2) -> Layout | None:
    """The layout of one entry of a prompt cache.

    Args:
        geometry: of the entry.
        cache: as made for it, without tokens. Of a `CacheList` the member with keys and values counts.
        itemsize: bytes of an element of the model's keys and values, 2 or 4.

    Returns:
        The layout, or `None` for a cache without keys and values: a recurrent state, which does not grow.
    """
    if isinstance(cache, mlx_cache.CacheList):
        if geometry.member is None:
            return None
        cache = cache.caches[geometry.member]
    token = geometry.kv_heads * (geometry.key_dim + geometry.value_dim) * itemsize
    if isinstance(cache, KVQCache):
        return _packed_layout(geometry, cache, token, _DTYPES[itemsize])
    if type(cache) is mlx_cache.RotatingKVCache:
        return DenseLayout(type(cache), token, cache.max_size, cache.keep)
    if type(cache) is mlx_cache.ChunkedKVCache:
        return DenseLayout(type(cache), token, cache.chunk_size)
    return DenseLayout(type(cache), token) if type(cache) is mlx_cache.KVCache else None


def _packed_layout(geometry: LayerGeometry, cache: KVQCache, token: int, dtype: str) -> PackedLayout:
    heads, dim = geometry.kv_heads, geometry.key_dim
    keys, values = cache.key_codec, cache.value_codec

    def rows(codec: Codec, size: int, dtype: str) -> tuple[tuple[int, int], ...]:
        return tuple(
            (round(plane.row_nbytes * plane.share * heads), plane.tokens) for plane in codec.planes(size, dtype)
        )

    statistics = keys.statistics_nbytes(dim) + values.statistics_nbytes(geometry.value_dim)
    if cache.uses_frame:  # float32: the mean key, what of it does not turn, and a scale per rotary pair
        statistics += 4 * (3 * dim - cache.rotary.pairs)
    if cache.scales_values:
        statistics += 4 * geometry.value_dim
    return PackedLayout(
        token=token,
        planes=rows(keys, dim, "float32" if cache.uses_frame else dtype) + rows(values, geometry.value_dim, dtype),
        group=math.lcm(keys.group, values.group),
        block=cache.block,
        growth=cache.growth,
        energy=4 * heads * dim if cache.uses_frame else 0,
        statistics=round(heads * statistics),
        sinks=cache.spec.sinks,
        recent=cache.spec.recent,
        needed=MIN_TOKENS if cache.uses_frame or cache.scales_values or keys.fitted or values.fitted else 0,
        prefill=cache.spec.compress_after == "prefill",
        window=cache.max_size if isinstance(cache, SlidingKVQCache) else None,
        shared=cache.shared,
    )


@dataclass
class _Packed:
    """Numbers of tokens of a `KVQCache` or `SlidingKVQCache`; the methods are those of the caches."""

    layout: PackedLayout
    offset: int = 0
    dense: int = 0
    capacity: int = 0  # of the dense buffers
    packed: int = 0
    start: int = 0  # first live token of the planes
    rows: int = 0  # tokens that the planes have room for
    gone: int = 0  # packed tokens that have left the window since the planes began
    frozen: bool = False
    newest: int = 0
    step: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence."""
        layout = self.layout
        packed = self.gone + self.packed
        planes = sum(
            nbytes * (self.rows if tokens == 1 else packed // tokens - self.gone // tokens)  # shared rows have no slack
            for nbytes, tokens in layout.planes
        )
        small = layout.statistics if self.frozen else layout.energy if self.offset else 0
        return self.capacity * layout.token + planes + small

    def call(self, count: int, read: bool) -> None:
        """Append `count` tokens and attend; `read`: mlx-lm then reads the state, which packs what has waited."""
        self._compact()
        if self.layout.window is not None:
            self._evict(self.layout.window - 1)
            self._compact()
        room = self.layout.growth.block if count <= STEP_TOKENS else 0
        if self.dense + count > self.capacity:
            self.capacity = self.dense + max(count, room)
        self.dense += count
        self.offset += count
        self.newest, self.step = count, count <= STEP_TOKENS
        if read or not self.layout.shared:
            self._compact()

    def _compact(self) -> None:
        layout = self.layout
        if layout.window is not None:
            if (self.step or not layout.prefill) and self.dense > layout.window:
                self._freeze()
            if self.step and self.newest > 1:
                self._pack_overflow()
            self._evict(layout.window)
        self._pack_overflow()

    def _pack_overflow(self) -> None:
        layout = self.layout
        overflow = self.dense - min(layout.sinks, self.dense) - layout.recent
        if overflow >= layout.block and (self.step or not layout.prefill):
            self._freeze()
            if self.frozen:
                unit = layout.block if self.step else layout.group
                self._pack(overflow // unit * unit)

    def _freeze(self) -> None:
        skipped = max(0, SKIP_TOKENS - (self.offset - self.packed - self.dense)) if self.layout.needed else 0
        self.frozen = self.frozen or self.dense >= self.layout.needed + skipped

    def _pack(self, count: int) -> None:
        stop = self.start + self.packed + count
        if not self.packed:
            self.start, self.gone, self.rows = 0, 0, self.layout.growth.capacity(count, self.step, first=True)
        elif stop > self.rows:
            self.start, self.rows = 0, self.layout.growth.capacity(self.packed + count, self.step)
        self.packed += count
        self.dense -= count
        self.capacity = max(self.dense, self.layout.sinks + self.layout.recent + self.layout.block)

    def _evict(self, keep: int) -> None:
        extra = self.packed + self.dense - keep
        if extra <= 0:
            return
        gone = min(extra, self.packed)
        self.packed -= gone
        self.start += gone
        self.gone += gone
        if not self.packed:
            self.start = self.rows = self.gone = 0
        if extra > gone:
            self.dense -= extra - gone
            self.capacity = self.dense


@dataclass
class _Dense:
    """Numbers of tokens of mlx-lm's `KVCache`, `RotatingKVCache` and `ChunkedKVCache`."""

    layout: DenseLayout
    offset: int = 0
    capacity: int = 0
    index: int = 0  # of a rotating cache: the next slot
    start: int = 0  # of a chunked cache: position of its first token

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence."""
        return self.capacity * self.layout.token

    def call(self, count: int, read: bool) -> None:
        """Append `count` tokens."""
        if self.layout.kind is not mlx_cache.RotatingKVCache:
            self._grow(count)
        elif count == 1:
            self._rotate()
        else:
            self._concatenate(count)
        self.offset += count

    def _grow(self, count: int) -> None:
        step, held = self.layout.kind.step, self.offset - self.start
        if self.layout.limit and held > self.layout.limit:
            self.start += held - self.layout.limit
            self.capacity = held = self.layout.limit
        if held + count > self.capacity:
            self.capacity = (held if held % step else self.capacity) + -(-count // step) * step

    def _concatenate(self, count: int) -> None:
        if self.index != self.capacity and self.index >= self.offset:
            self.capacity = self.index
        self.capacity = self.index = min(self.capacity, self.layout.limit - 1) + count

    def _rotate(self) -> None:
        limit = self.layout.limit
        if self.offset >= self.capacity and self.capacity < limit:
            self.capacity += min(self.layout.kind.step, limit - self.offset)
            self.index = self.offset
        if self.capacity > limit:
            self.capacity = self.index = limit
        if self.index == limit:
            self.index = self.layout.keep
        self.index += 1


def layouts_nbytes(layouts: Iterable[Layout], tokens: int, steps: int = STEPS) -> tuple[int, int]:
    """Bytes that the caches of one sequence allocate.

    Args:
        layouts: of the caches.
        tokens: that they hold, or have held if they have windows.
        steps: how many of them, at the end, came singly; at least 1, as mlx-lm feeds them. The ones before come in
            chunks of `CHUNK`.

    Returns:
        Bytes after the last token, and the most after any call on the way there: mlx-lm's rotating caches hold a
        chunk beside the window until the first step, and `compress_after=prefill` keeps prompts dense as long.
    """
    caches = [
        (_Packed(layout) if isinstance(layout, PackedLayout) else _Dense(layout), count)
        for layout, count in Counter(layouts).items()
    ]
    steps = min(max(1, steps), tokens)
    prompt, nbytes, most = tokens - steps, 0, 0
    chunks = [min(CHUNK, prompt - first) for first in range(0, prompt, CHUNK)]
    for position, size in enumerate(chunks + [1] * steps):
        for cache, _ in caches:
            cache.call(size, position < len(chunks))
        nbytes = sum(cache.nbytes * count for cache, count in caches)
        most = max(most, nbytes)
    return nbytes, most
