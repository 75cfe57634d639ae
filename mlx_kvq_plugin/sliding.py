"""SlidingKVQCache: the compressed cache of a sliding-window layer, with the window itself packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import BatchRotatingKVCache

from .cache import KVQCache, flat_caches, owned
from .config import LayerSpec
from .errors import CacheStateError
from .frame import MIN_TOKENS, SKIP_TOKENS
from .planes import without_oldest
from .rotary import Rotary


def allow_speculation(caches: Sequence[Any]) -> None:
    """Let mlx-lm's speculative decoding begin with a prompt cache whose sliding windows are full.

    mlx-lm asks once, before its first step, whether caches can be trimmed. Full sliding caches say no: only the last
    tokens of a step of several can be given back, which is all that speculative decoding needs. After this call they
    say yes until the next token, so it must be followed by speculative decoding; a trim raises `CacheStateError`.
    """
    for cache in flat_caches(caches):
        if isinstance(cache, SlidingKVQCache):
            cache._speculates = True


def smallest_window(spec: LayerSpec) -> int:
    """Windows below this stay dense anyway: statistics, recent tokens and one block do not fit twice."""
    return 2 * max(MIN_TOKENS + SKIP_TOKENS, spec.recent + KVQCache(spec).block)


class SlidingKVQCache(KVQCache):
    """The last `max_size` tokens of one layer, older ones packed, `recent` ones dense; no sinks: they slide out."""

    def __init__(
        self, spec: LayerSpec, max_size: int, rotary: Rotary | None = None, route: str = "", shared: bool = False
    ):
        """
        Args:
            max_size: tokens a query sees, itself included.
            spec, rotary, route, shared: as for `KVQCache`; `spec.sinks` is taken as 0.
        """
        super().__init__(spec.with_(sinks=0), rotary, route, shared)
        self.max_size = max_size

    def _clear(self) -> None:
        super()._clear()
        self._ring = 0  # slots of mlx-lm's full ring that hold tokens newer than its slot 0
        self._rollback = 0  # newest tokens that can be trimmed although others have left the window
        self._speculates = False  # whether the next call is a step of several tokens

    @property
    def window(self) -> int | None:
        return self.max_size

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        L = keys.shape[2]
        self.compact()  # what an attention that never ran left behind
        self._evict(self.max_size - 1)
        self._ring = self._ring % self.max_size + 1 if L == 1 and self.offset >= self.max_size else 0
        handles = super().update_and_fetch(keys, values)
        self._rollback, self._speculates = L - 1 if self._step else 0, False
        return handles

    def compact(self) -> None:
        """Forget what left the window, then pack."""
        self._rollback = 0
        if self.spec.compress_after != "prefill" or self._step:
            self._freeze_before_eviction()
        if self._waits:  # single steps would have packed before the last tokens pushed out the first
            super().compact()
        self._evict(self.max_size)
        super().compact()

    def _freeze_before_eviction(self) -> None:
        """Statistics are read off the whole first chunk, also the part that has left the window."""
        if not self._frozen and self._dense > self.max_size:
            self._frozen = self._freeze()

    def _evict(self, keep: int) -> None:
        """Drop the oldest tokens beyond `keep`."""
        extra = self.held - keep
        if extra <= 0:
            return
        from_packed = min(extra, self._packed)
        self._packed -= from_packed
        self._packed_start += from_packed
        self._rows = without_oldest(self._rows, from_packed)
        if self._packed == 0:
            self.key_planes, self.value_planes, self._packed_start, self._rows = {}, {}, 0, {}
        elif self._rows:
            self._cut_shared_planes(oldest=True)
        extra -= from_packed
        if extra:
            assert self.dense_keys is not None and self.dense_values is not None
            self.dense_keys = owned(self.dense_keys[..., extra : self._dense, :])
            self.dense_values = owned(self.dense_values[..., extra : self._dense, :])
            self._dense -= extra

    def attention_tokens(self) -> tuple[mx.array, mx.array]:
        keys, values = self.decode_all()
        if self._ring == 0 or not self.exact:
            return keys, values
        return self._ring_order(keys), self._ring_order(values)

    def _ring_order(self, x: mx.array) -> mx.array:
        """Tokens in order of age to the order of mlx-lm's ring: equal sums, bit for bit, need equal order."""
        newest = self.max_size - self._ring
        return mx.concatenate([x[..., newest:, :], x[..., :newest, :]], axis=2)

    def mask_in_own_order(self, mask: mx.array) -> mx.array:
        if self._ring == 0 or not self.exact:
            return mask
        newest = self.max_size - self._ring
        return mx.concatenate([mask[..., newest:], mask[..., :newest]], axis=-1)

    def batch_ledger(self, left_padding: list[int]) -> Any:
        return BatchRotatingKVCache(self.max_size, left_padding)

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> Any:
        """The mask for N new tokens after the stored ones, as mlx-lm's rotating cache gives it."""
        past = min(self.max_size - 1, self.offset)
        window = window_size or self.max_size
        if N > 1:
            if past + N > window or return_array:
                return create_causal_mask(N, past, window_size=window)
            return "causal"
        if window >= self.max_size or past + 1 <= window:
            return None
        mask = mx.arange(past + 1) >= past + 1 - window
        full = self.exact and self.offset >= self.max_size
        return mx.roll(mask, self._ring % self.max_size + 1) if full else mask

    def size(self) -> int:
        """Tokens stored that a new one can see."""
        return min(self.held, self.max_size)

    def is_trimmable(self) -> bool:
        """While nothing has left the window, and right after a step of several tokens, which keeps what it pushed out.

        So speculative decoding is exact past the window: it verifies L tokens in one step and trims fewer than L.
        """
        return self.held == self.offset or self._rollback > 0 or self._speculates

    def trim(self, n: int) -> int:
        """As `KVQCache.trim`; drops nothing and returns 0 when the cache is not trimmable.

        Raises:
            CacheStateError: past the window, for more tokens than the newest step can give back.
        """
        if not self.is_trimmable():
            return 0
        if self.held != self.offset:
            if n > self._rollback:
                raise CacheStateError(
                    f"past its window a sliding cache must be trimmed by at most the {self._rollback} tokens that "
                    f"followed the first of the newest step, got {n}; verify more tokens in one step, or start afresh"
                )
            self._rollback = 0
        return super().trim(n)

    def _kind_meta(self) -> dict[str, Any]:
        return {"max_size": self.max_size, "ring": self._ring}

    def _restore_kind(self, meta: dict[str, Any]) -> None:
        self.max_size, self._ring = meta["max_size"], meta["ring"]
