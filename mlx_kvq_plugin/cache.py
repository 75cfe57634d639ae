"""KVQCache: one layer's tokens, a few of them dense, the rest packed.

Token order is `sinks | packed | recent`. The first `sinks` tokens and the last `recent` (up to a block more between
two encodings) live in one dense buffer of the model's dtype; everything between is stored as the codecs' planes. A
token is encoded once, never again. `update_and_fetch` returns a `KVHandle` instead of arrays; the routed attention
(attention.py) computes on it and then lets the cache pack what overflows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, CacheList, _BaseCache, create_attention_mask

from .cache_state import meta_of, pad_tokens, restore, state_of
from .config import LayerSpec
from .errors import CacheStateError
from .frame import MIN_TOKENS, SKIP_TOKENS, KeyFrame, fit_frame, query_energy
from .growth import Growth, tile_rows
from .handle import KVHandle
from .kernels.encode import encode_block, why_not_encode
from .planes import Rows, expanded, shared_planes, with_new_rows, without_newest
from .rotary import Rotary, no_rotation
from .routing import RouteLease
from .value_scale import fit_value_scale

if TYPE_CHECKING:
    from .attention import AttendArgs
    from .batch import BatchKVQCache
    from .kernels.attend import FusedPlan

STEP_TOKENS = 16  # a call with at most this many new tokens is a decode (or verification) step, not prefill

Planes = dict[str, mx.array]


def owned(x: mx.array) -> mx.array:
    """A copy, so that a slice or a split does not keep a larger buffer alive."""
    return mx.concatenate([x[..., :1, :], x[..., 1:, :]], axis=2) if x.shape[2] > 1 else mx.contiguous(x)


def flat_caches(caches: Sequence[Any]) -> Iterator[Any]:
    """Every cache of a list, those inside a `CacheList` too."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from flat_caches(cache.caches)
        else:
            yield cache


class _Plans(dict[object, "FusedPlan"]):
    """Kept by a cache and its copies; no part of its state."""

    def __deepcopy__(self, memo: object) -> _Plans:
        return _Plans(self)


class KVQCache(_BaseCache):
    """The compressed cache of one full-attention layer; mlx-lm's single-sequence cache protocol, B >= 1."""

    rows: ClassVar[Sequence[KVQCache]] = ()  # only a batch (batch.py) has caches inside
    batched: ClassVar[bool] = False
    probe: Callable[[AttendArgs], mx.array] | None = None  # in place of attention, while sensitivities are measured

    def __init__(self, spec: LayerSpec, rotary: Rotary | None = None, route: str = "", shared: bool = False):
        """
        Args:
            spec: codecs, frame, sinks, recent.
            rotary: the layer's rotation (rotary.py); `None` removes a plain mean in the key frame.
            route: name of the module whose attention is routed, so that a saved cache works after loading.
            shared: later layers attend to the same tokens after this one: packing waits until they have.
        """
        self.spec = spec
        self.key_codec, self.value_codec = spec.key_codec, spec.value_codec
        self.exact = self.key_codec.exact and self.value_codec.exact  # decoding gives back the input bit for bit
        self.uses_frame = spec.framed  # whether keys are encoded in the rotary frame
        self.scales_values = spec.scales_values
        self._group = math.lcm(self.key_codec.group, self.value_codec.group)
        self.growth = Growth.of(self.key_codec, self.value_codec)
        self.block = math.lcm(self.growth.block, self._group)  # tokens between two encodings during decoding
        self.rotary = rotary if rotary is not None else no_rotation()
        self.route = route
        self.shared = shared
        self.padding_refused = ""  # why the model cannot process padded prompts (Adapter)
        self.plans = _Plans()  # of fused attention, by kind of call
        self._clear()

    def _clear(self) -> None:
        self.offset = 0  # tokens seen, the next token's position
        self._packed = 0  # tokens in the planes
        self._packed_start = 0  # first live token row of the planes (sliding windows only)
        self._rows: Rows = {}  # of planes with a row for several tokens (planes.py)
        self._dense = 0  # tokens in the dense buffers
        self.dense_keys: mx.array | None = None
        self.dense_values: mx.array | None = None
        self.key_planes: Planes = {}
        self.value_planes: Planes = {}
        self.key_statistics: Planes = {}
        self.value_statistics: Planes = {}
        self.frame: KeyFrame | None = None
        self.value_scale: mx.array | None = None
        self._frame_rows: mx.array | None = None
        self._frozen = False  # whether frame, scales and codec statistics are fitted
        self._query_energy: mx.array | None = None
        self._step_energy: mx.array | None = None  # the same per token, of a step whose tokens may be trimmed
        self._newest = 0  # tokens of the newest call
        self._step = True  # whether they came in a step, not in a prefill chunk

    # ---- facts -------------------------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """Tokens stored."""
        return self._packed + self._dense

    @property
    def packed_tokens(self) -> int:
        """Tokens stored as codes."""
        return self._packed

    @property
    def sink_tokens(self) -> int:
        """Dense tokens that precede the packed ones; without packed tokens all dense ones are in order."""
        return min(self.spec.sinks, self._dense)

    @property
    def packed_position(self) -> int:
        """Position of the first packed token."""
        return self.offset - self.held + self.sink_tokens

    def _arrays(self) -> list[mx.array]:
        found = [self.dense_keys, self.dense_values, self._query_energy, self._step_energy]
        found += [self.value_scale, self._frame_rows]
        for planes in (self.key_planes, self.value_planes, self.key_statistics, self.value_statistics):
            found += planes.values()
        if self.frame is not None:
            found += self.frame.arrays()
        return [array for array in found if array is not None]

    @property
    def nbytes(self) -> int:
        """Bytes allocated: dense tokens, planes with their slack, statistics."""
        return sum(array.nbytes for array in self._arrays())

    def dense_nbytes(self, itemsize: int = 2) -> int:
        """Bytes that the stored tokens would take dense, K and V, at `itemsize` bytes an element (2: fp16)."""
        if self.dense_keys is None or self.dense_values is None:
            return 0
        B, H, _, Dk = self.dense_keys.shape
        return B * H * self.held * (Dk + self.dense_values.shape[-1]) * itemsize

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, itself included; `None` for all."""
        return None

    def size(self) -> int:
        """Tokens stored."""
        return self.held

    def empty(self) -> bool:
        """Whether nothing was ever stored."""
        return self.dense_keys is None

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> Any:
        """The mask for N new tokens after the stored ones, in mlx-lm's forms."""
        return create_attention_mask(N, self.offset, return_array, window_size)

    # ---- new tokens --------------------------------------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append post-RoPE keys `(B, Hkv, L, Dk)` and values `(B, Hkv, L, Dv)`; returns their handles."""
        self.compact()  # what an attention that never ran left behind
        L = keys.shape[2]
        self._append_dense(keys, values)
        self.offset += L
        self._newest, self._step = L, L <= STEP_TOKENS
        return self._handles(keys.dtype, values.dtype)

    def keys_and_values(self) -> tuple[Any, Any]:
        """Handles of everything stored."""
        if self.dense_keys is None or self.dense_values is None:
            raise CacheStateError("a cache must hold tokens before they are read, got an empty one; run the model")
        return self._handles(self.dense_keys.dtype, self.dense_values.dtype)

    def _handles(self, key_dtype: mx.Dtype, value_dtype: mx.Dtype) -> tuple[KVHandle, KVHandle]:
        assert self.dense_keys is not None and self.dense_values is not None
        B, H, _, Dk = self.dense_keys.shape
        Dv = self.dense_values.shape[-1]
        return (
            KVHandle(self, (B, H, self.held, Dk), key_dtype),
            KVHandle(self, (B, H, self.held, Dv), value_dtype),
        )

    def _append_dense(self, keys: mx.array, values: mx.array) -> None:
        start, stop = self._dense, self._dense + keys.shape[2]
        if self.dense_keys is None or self.dense_values is None:
            room = self.growth.block if keys.shape[2] <= STEP_TOKENS else 0
            self.dense_keys = pad_tokens(owned(keys), room - keys.shape[2])
            self.dense_values = pad_tokens(owned(values), room - values.shape[2])
        elif stop > self.dense_keys.shape[2]:
            room = self.growth.block if keys.shape[2] <= STEP_TOKENS else 0
            self.dense_keys = self._grown(self.dense_keys, keys, room)
            self.dense_values = self._grown(self.dense_values, values, room)
        else:
            self.dense_keys[..., start:stop, :] = keys
            self.dense_values[..., start:stop, :] = values
        self._dense = stop

    def _grown(self, dense: mx.array, new: mx.array, room: int) -> mx.array:
        joined = mx.concatenate([dense[..., : self._dense, :], new], axis=2)
        return pad_tokens(joined, room - new.shape[2])

    def observe_queries(self, queries: mx.array) -> None:
        """Add the queries `(B, Hq, L, Dk)` of the newest tokens to the statistics, until the frame is frozen."""
        if self._frozen or not self.uses_frame or self.dense_keys is None:
            return
        energy = query_energy(queries, self.dense_keys.shape[1], per_token=self._waits)
        if self._waits:
            self._step_energy = energy if self._step_energy is None else self._step_energy + energy
        else:
            self._query_energy = energy if self._query_energy is None else self._query_energy + energy

    @property
    def keys(self) -> mx.array | None:
        """The dense keys, settable: pipeline-parallel models make them depend on what they send (`mx.depends`)."""
        return self.dense_keys

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self.dense_keys = keys

    # ---- packing -----------------------------------------------------------------------------------------------

    @property
    def _waits(self) -> bool:
        """Whether the newest tokens came in a step of several: speculative decoding, which may trim some of them."""
        return self._step and self._newest > 1

    def came_singly(self) -> None:
        """Says that the newest tokens came in steps of one, though they were appended together."""
        self._newest, self._step = min(1, self._newest), True

    def settle(self) -> None:
        """Called when the attention of the newest tokens is done: pack, unless that has to wait for the next call.

        It waits while other layers still read these tokens, and while the last of them may be trimmed, so that a
        rejected token never moves the packed ones.
        """
        if not self.shared and not self._waits:
            self.compact()

    def compact(self) -> None:
        """Pack the dense tokens beyond `recent` if there are enough of them; a token is packed once.

        After a step of several tokens this gives what single steps of the same tokens would have given.
        """
        overflow = self._dense - self.sink_tokens - self.spec.recent
        if overflow >= self.block and (self._step or self.spec.compress_after == "chunk"):
            self._frozen = self._frozen or self._freeze()
            if self._frozen:
                unit = self.block if self._step else self._group
                self._pack(overflow // unit * unit)
        if self._step_energy is not None:
            if not self._frozen:
                energy = mx.sum(self._step_energy, axis=2, keepdims=True)
                self._query_energy = energy if self._query_energy is None else self._query_energy + energy
            self._step_energy = None

    def step_parts(self, L: int) -> list[tuple[int, int]]:
        """Ranges of the newest L tokens between which single steps would pack; empty if they would not."""
        if not self._waits or self.exact:
            return []
        parts, start, frozen = [], 0, self._frozen
        dense, block = self._dense - L, self.block
        for stop in range(1, L):
            dense += 1
            overflow = dense - min(self.spec.sinks, dense) - self.spec.recent
            if overflow >= block and (frozen or dense >= self._tokens_to_freeze()):
                parts.append((start, stop))
                start, frozen = stop, True
                dense -= overflow // block * block
        return [*parts, (start, L)] if parts else []

    def before_newest(self) -> tuple[KVQCache, mx.array, mx.array]:
        """A view of this cache before its newest tokens, to be used up before this cache changes, and those tokens.

        The view shares the arrays. What it appends lands where this cache has the same tokens, or in unused rows.
        """
        assert self.dense_keys is not None and self.dense_values is not None
        view = copy.copy(self)
        rest = self._dense - self._newest
        view._dense, view.offset, view.shared, view._step_energy = rest, self.offset - self._newest, False, None
        view._newest, view._step = 0, False  # what could be packed before these tokens was
        keys, values = (x[..., rest : self._dense, :] for x in (self.dense_keys, self.dense_values))
        return view, keys, values

    def _tokens_to_freeze(self) -> int:
        """Dense tokens that the statistics of frame, scales and codecs need."""
        if not (self.uses_frame or self.scales_values or self.key_codec.fitted or self.value_codec.fitted):
            return 0
        return MIN_TOKENS + max(0, SKIP_TOKENS - (self.offset - self.held))

    def _freeze(self) -> bool:
        """Fit frame, scales and codec statistics from the dense tokens; False while there are too few for them."""
        assert self.dense_keys is not None and self.dense_values is not None
        needed = self._tokens_to_freeze()
        if self._dense < needed:
            return False
        count, energy, before = self._dense, self._query_energy, self._dense - self._newest
        if self._waits:  # as many as when single steps would have frozen them
            count = max(needed, self.spec.sinks + self.spec.recent + self.block, before + 1)
        if self._step_energy is not None:  # also of the one token that is left when the others were trimmed
            own = mx.sum(self._step_energy[..., : count - before, :], axis=2, keepdims=True)
            energy = own if energy is None else energy + own
        keys, values = (x[..., :count, :] for x in (self.dense_keys, self.dense_values))
        first = self.offset - self._dense
        skip = max(0, SKIP_TOKENS - first)
        if self.uses_frame:
            self.frame = fit_frame(self.rotary, keys[..., skip:, :], first + skip, energy)
            self._query_energy = None
            body = self.frame.encode(keys[..., skip:, :], first + skip)
        else:
            body = keys[..., skip:, :]
        self.key_statistics = self.key_codec.fit(body)
        values = values[..., skip:, :]
        self.value_scale = fit_value_scale(values) if self.scales_values else None
        self.value_statistics = self.value_codec.fit(self.scaled_values(values))
        self._frame_rows = None
        return True

    def scaled_values(self, values: mx.array) -> mx.array:
        """Values `(B, Hkv, L, D)` as the codec gets them: float32 where their channels have scales."""
        return values if self.value_scale is None else values.astype(mx.float32) / self.value_scale

    def frame_rows(self) -> mx.array:
        """For kernels, of every head: what `KeyFrame.joined` gives, then the scales of values; float32, kept."""
        if self._frame_rows is None:
            parts = [] if self.frame is None else [self.frame.joined()]
            parts += [] if self.value_scale is None else [self.value_scale]
            self._frame_rows = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        return self._frame_rows

    def _pack(self, count: int) -> None:
        """Encode the `count` dense tokens after the sinks and drop them from the dense buffers."""
        left = self._dense - count
        room = max(left, self.spec.sinks + self.spec.recent + self.block)
        encode = encode_block if self.growth.kernels and not why_not_encode(self) else self._encoded
        new_keys, new_values, keys, values = encode(self, self.sink_tokens, count, room)
        self._append_planes(new_keys, new_values, count)
        self.dense_keys, self.dense_values, self._dense = keys, values, left

    @staticmethod
    def _encoded(
        cache: KVQCache, start: int, count: int, room: int
    ) -> tuple[Planes, Planes, mx.array | None, mx.array | None]:
        """The plain twin of the encoding kernel, `kernels.encode.encode_block`."""
        assert cache.dense_keys is not None and cache.dense_values is not None
        stop = start + count
        keys, values = (x[..., start:stop, :] for x in (cache.dense_keys, cache.dense_values))
        if cache.frame is not None:
            keys = cache.frame.encode(keys, cache.packed_position + cache._packed)
        dense_keys, dense_values = (
            pad_tokens(
                mx.concatenate([x[..., :start, :], x[..., stop : cache._dense, :]], axis=2),
                room - (cache._dense - count),
            )
            for x in (cache.dense_keys, cache.dense_values)
        )
        return (
            cache.key_codec.encode(keys, cache.key_statistics),
            cache.value_codec.encode(cache.scaled_values(values), cache.value_statistics),
            dense_keys,
            dense_values,
        )

    def _shared_planes(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Key planes and value planes with a row for several tokens."""
        assert self.dense_keys is not None and self.dense_values is not None
        keys = shared_planes(self.key_codec, self.dense_keys.shape[-1])
        return keys, shared_planes(self.value_codec, self.dense_values.shape[-1])

    @property
    def plane_rows(self) -> int:
        """Tokens that the planes have room for, slack and slid-out ones included."""
        if not self.key_planes:
            return 0
        shared = self._shared_planes()[0]
        return next(plane.shape[2] for name, plane in self.key_planes.items() if name not in shared)

    def _append_planes(self, new_keys: Planes, new_values: Planes, count: int) -> None:
        """Add `count` tokens after the live ones: in place where they fit, else in one copy of the planes."""
        start, stop = self._packed_start, self._packed_start + self._packed
        fits = self._packed > 0 and stop + count <= self.plane_rows
        room = self.growth.capacity(self._packed + count, self._step, not self._packed) - self._packed - count

        def appended(planes: Planes, new: Planes, shared: Mapping[str, int]) -> Planes:
            if not self._packed:
                return {n: owned(x) if n in shared else pad_tokens(owned(x), room) for n, x in new.items()}
            found = dict(planes)
            for name, rows in new.items():
                if name in shared:
                    found[name] = mx.concatenate([planes[name], rows], axis=2)
                elif fits:
                    found[name][..., stop : stop + count, :] = rows
                else:
                    found[name] = pad_tokens(mx.concatenate([planes[name][..., start:stop, :], rows], axis=2), room)
            return found

        shared = self._shared_planes()
        self.key_planes = appended(self.key_planes, new_keys, shared[0])
        self.value_planes = appended(self.value_planes, new_values, shared[1])
        self._rows = with_new_rows(self._rows, {t for side in shared for t in side.values()}, count)
        self._packed += count
        if not fits:
            self._packed_start = 0

    @property
    def _kernel_rows(self) -> int:
        """`plane_rows` of codecs that kernels serve, whose planes all have a row for every token: once a step."""
        return next(iter(self.key_planes.values())).shape[2]

    def counts(self) -> tuple[int, ...]:
        """For kernels: packed tokens, first row and rows of the planes, position; sinks, dense tokens, dense rows."""
        assert self.dense_keys is not None
        sinks = min(self.spec.sinks, self._dense)
        position = self.offset - self._packed - self._dense + sinks
        dense_rows = self.dense_keys.shape[2]
        return self._packed, self._packed_start, self._kernel_rows, position, sinks, self._dense, dense_rows

    def reserve_tiles(self) -> None:
        """Room in the planes for whole tiles of tokens, which kernels read to their end."""
        start, stop = self._packed_start, self._packed_start + tile_rows(self._packed)
        if self._kernel_rows >= stop:
            return
        room, shared = stop - start - self._packed, self._shared_planes()
        keys, values = self.live_planes()

        def padded(planes: Planes, shared: Mapping[str, int]) -> Planes:
            return {name: rows if name in shared else pad_tokens(rows, room) for name, rows in planes.items()}

        self.key_planes, self.value_planes = padded(keys, shared[0]), padded(values, shared[1])
        self._packed_start = 0

    # ---- stored tokens, for attention --------------------------------------------------------------------------

    def packed_planes(self) -> tuple[Planes, Planes]:
        """Key and value planes of the packed tokens, a row for each token, without slack; views."""
        keys, values = self.live_planes()
        if not self._rows:
            return keys, values
        shared = self._shared_planes()
        return expanded(keys, shared[0], self._rows), expanded(values, shared[1], self._rows)

    def live_planes(self, views: bool = False) -> tuple[Planes, Planes]:
        """Key and value planes of the packed tokens as they are stored, without slack.

        Args:
            views: give views of planes that have slack, not contiguous copies.
        """
        start, stop = self._packed_start, self._packed_start + self._packed
        whole = not self._packed or (start == 0 and self.plane_rows == stop)

        def live(planes: Planes, shared: Mapping[str, int]) -> Planes:
            found = {n: x if whole or n in shared else x[..., start:stop, :] for n, x in planes.items()}
            return found if views else {name: mx.contiguous(rows) for name, rows in found.items()}

        if not self.key_planes:
            return {}, {}
        shared = self._shared_planes()
        return live(self.key_planes, shared[0]), live(self.value_planes, shared[1])

    def dense_tokens(self) -> tuple[mx.array, mx.array]:
        """Dense keys and values `(B, Hkv, dense, D)`: sinks, then recent tokens; views."""
        assert self.dense_keys is not None and self.dense_values is not None
        if self.dense_keys.shape[2] == self._dense:
            return self.dense_keys, self.dense_values
        return self.dense_keys[..., : self._dense, :], self.dense_values[..., : self._dense, :]

    def decode_all(self) -> tuple[mx.array, mx.array]:
        """All stored keys and values `(B, Hkv, held, D)` in order, dense, in the model's dtype: one layer's worth."""
        keys, values = self.dense_tokens()
        if self._packed == 0:
            return keys, values
        key_planes, value_planes = self.packed_planes()
        exact = self.key_codec.exact
        past_keys = self.key_codec.decode(
            key_planes, keys.shape[-1], keys.dtype if exact else mx.float32, self.key_statistics
        )
        if self.frame is not None:
            past_keys = self.frame.decode(past_keys, self.packed_position)
        past_values = self.decoded_values(value_planes, values.shape[-1], values.dtype)
        sinks = self.sink_tokens

        def joined(dense: mx.array, past: mx.array) -> mx.array:
            parts = [dense[..., :sinks, :], past.astype(dense.dtype), dense[..., sinks:, :]]
            return mx.concatenate(parts[1:] if sinks == 0 else parts, axis=2)

        return joined(keys, past_keys), joined(values, past_values)

    def decoded_values(self, planes: Planes, dim: int, dtype: mx.Dtype) -> mx.array:
        """Values `(B, Hkv, S, dim)` of planes in a dtype."""
        scale = self.value_scale
        found: mx.array = self.value_codec.decode(
            planes, dim, dtype if scale is None else mx.float32, self.value_statistics
        )
        return found if scale is None else (found * scale).astype(dtype)

    def attention_tokens(self) -> tuple[mx.array, mx.array]:
        """`decode_all`, in the order in which mlx-lm's own cache would return the tokens."""
        return self.decode_all()

    def mask_in_own_order(self, mask: mx.array) -> mx.array:
        """A mask over tokens in order of age, in the order that this cache's own `make_mask` uses."""
        return mask

    # ---- batches -----------------------------------------------------------------------------------------------

    @staticmethod
    def merge(caches: Sequence[KVQCache]) -> BatchKVQCache:
        """One batch of the caches of several sequences, which stay usable by themselves."""
        from .batch import BatchKVQCache

        return BatchKVQCache.of(caches)

    def batch_ledger(self, left_padding: list[int]) -> Any:
        """mlx-lm's batch cache of this kind, without tokens (batch.py)."""
        return BatchKVCache(left_padding)

    # ---- trimming ----------------------------------------------------------------------------------------------

    def is_trimmable(self) -> bool:
        """Always: trimming is token-exact at any length."""
        return True

    def trim(self, n: int) -> int:
        """Drop the last `n` tokens (all of them if there are fewer); returns how many were dropped."""
        n = min(n, self.offset)
        if n <= 0:
            return 0
        recent = self._dense - self.sink_tokens if self._packed else self._dense
        from_packed = min(max(0, n - recent), self._packed)
        from_sinks = max(0, n - recent - from_packed)
        self._dense -= min(n, recent) + from_sinks
        self._packed -= from_packed
        self._rows = without_newest(self._rows, from_packed)
        self.offset -= n
        self._newest = max(0, self._newest - n)
        if self._step_energy is not None:
            self._step_energy = self._step_energy[..., : self._newest, :] if self._newest else None
        if self._packed == 0 and (from_packed or self._dense == 0):
            self._forget_packed()
        elif from_packed:
            self._fit_planes()
        return n

    def _forget_packed(self) -> None:
        """Without packed tokens nothing depends on the statistics: the next ones are fitted afresh."""
        self.key_planes, self.value_planes = {}, {}
        self.key_statistics, self.value_statistics = {}, {}
        self.frame, self.value_scale, self._frame_rows = None, None, None
        self._frozen, self._packed_start, self._rows = False, 0, {}
        if self._dense == 0:
            self._query_energy = self._step_energy = None

    def _fit_planes(self) -> None:
        """Give back the rows of trimmed tokens when they are more than growth would allocate."""
        self._cut_shared_planes(oldest=False)
        if self.plane_rows > self.growth.capacity(self._packed):
            self.key_planes, self.value_planes = self.live_planes()
            self._packed_start = 0

    def _cut_shared_planes(self, oldest: bool) -> None:
        """Cut planes with a row for several tokens to the rows that are left after the oldest or the newest went."""

        def cut(planes: Planes, shared: Mapping[str, int]) -> Planes:
            found = dict(planes)
            for name, tokens in shared.items():
                count = len(self._rows[tokens])
                if planes[name].shape[2] > count:
                    rows = planes[name][..., -count:, :] if oldest else planes[name][..., :count, :]
                    found[name] = mx.contiguous(rows)
            return found

        shared = self._shared_planes()
        self.key_planes, self.value_planes = cut(self.key_planes, shared[0]), cut(self.value_planes, shared[1])

    # ---- state -------------------------------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, Any]:
        """Everything needed to go on, self-describing: arrays without slack and one JSON string; packs first."""
        self.compact()
        return state_of(self)

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        meta = meta_of(state)
        KVQCache.__init__(self, LayerSpec(**meta["spec"]), Rotary.from_dict(meta["rotary"]), meta["route"])
        restore(self, meta, state)
        self._restore_kind(meta)
        if self.route:
            self._lease = RouteLease(self.route)

    def _kind_meta(self) -> dict[str, Any]:
        """What only this kind of cache saves; JSON-ready."""
        return {}

    def _restore_kind(self, meta: dict[str, Any]) -> None:
        """Inverse of `_kind_meta`."""
