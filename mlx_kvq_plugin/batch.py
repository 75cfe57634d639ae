"""BatchKVQCache: the caches of several sequences as one, for mlx-lm's batched generation and its server.

Every sequence keeps a cache of its own (`rows`): its own offset, packed planes, statistics and packing schedule. So a
row computes what it would compute alone, no padding is stored, and joining, leaving and extracting move no tokens.
mlx-lm's convention of padded batches (prompts of other lengths are padded on the right, then rolled to the left, and
one mask serves all layers, ours or not) is followed by a *ledger*: mlx-lm's own batch cache over the same tokens with
head size zero. It holds no bytes, answers `offset` and `make_mask`, and tells which columns of a mask are which tokens.
"""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache

from .cache import KVQCache
from .config import LayerSpec
from .errors import CacheStateError
from .growth import GPU_BLOCK
from .handle import KVHandle
from .kernels.dispatch import why_not_pending

# Masks as made here that say no more than "causal" about the tokens of each row. A model that changes one makes another
# array; for one that does not, rows need no masks of their own.
_PLAIN: weakref.WeakValueDictionary[int, mx.array] = weakref.WeakValueDictionary()

PENDING = GPU_BLOCK  # tokens of a row that wait in the array of all rows, at most

Ledger = Any  # mlx_cache.BatchKVCache or mlx_cache.BatchRotatingKVCache; mlx-lm has no types


def _blank(rows: int, tokens: int) -> mx.array:
    """The keys, and the values, of a ledger: `tokens` tokens of no size."""
    return mx.zeros((rows, 1, tokens, 0), mx.uint8)


class BatchKVQCache(mlx_cache._BaseCache):
    """One layer of a batch; mlx-lm's batch-cache protocol. The rows are caches of one sequence each.

    On a GPU that decodes all rows in one launch, new tokens of a few steps wait in one array of all rows (`pending`):
    appending to every row at every step would cost more than attention. Whoever looks at `rows` finds them up to date.
    """

    batched: ClassVar[bool] = True

    def __init__(self, rows: Sequence[KVQCache], ledger: Ledger):
        """
        Args:
            rows: one cache a sequence, owned from now on.
            ledger: mlx-lm's batch cache of the layer's kind over the same tokens, with head size 0.
        """
        self.own_rows, self.ledger = list(rows), ledger  # rows may lag behind by the pending tokens
        self._forget_pending()
        self._clear_padding()
        self._spans = [(0, 0)] * len(self.rows)  # of the newest call, the tokens of each row that are not padding
        self._columns = 0  # of the newest mask

    def _clear_padding(self) -> None:
        self._left = [0] * len(self.rows)  # padding still to come before each row's first token
        self._to_come: list[int] | None = None  # real tokens still to come, when padding follows them
        self._pads = [0] * len(self.rows)  # columns after each row's last token, if the newest call brought it any

    @staticmethod
    def of(caches: Sequence[KVQCache]) -> BatchKVQCache:
        """A batch of copies of `caches`, which stay usable by themselves."""
        for cache in caches:
            if not isinstance(cache, KVQCache) or type(cache) is not type(caches[0]) or cache.spec != caches[0].spec:
                raise CacheStateError(
                    "caches must be of one class and scheme to form a batch, got "
                    + " and ".join(_describe(c) for c in (caches[0], cache))
                    + "; make all of them with the same model"
                )
        lengths = [cache.size() for cache in caches]
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        ledger = caches[0].batch_ledger(padding)
        if longest:
            blank = _blank(len(caches), longest)
            ledger.keys, ledger.values = blank, blank
            ledger.offset = mx.array([cache.offset for cache in caches])
            ledger._idx = longest
            if isinstance(ledger, mlx_cache.BatchRotatingKVCache):
                ledger._offset = longest
        return BatchKVQCache([_settled(cache) for cache in caches], ledger)

    @property
    def rows(self) -> list[KVQCache]:
        """The rows, with all their tokens."""
        if self.pending:
            self._append_pending()
        return self.own_rows

    @rows.setter
    def rows(self, rows: list[KVQCache]) -> None:
        self.own_rows = rows

    def _forget_pending(self) -> None:
        self.pending = 0
        self._pending_keys: mx.array | None = None
        self._pending_values: mx.array | None = None

    def _append_pending(self) -> None:
        """Give every row its pending tokens; they pack as after single steps."""
        count, keys, values = self.pending_tokens()
        self.pending = 0
        for i, row in enumerate(self.own_rows):
            row.update_and_fetch(keys[i : i + 1, :, :count], values[i : i + 1, :, :count])
            row.came_singly()
            row.compact()

    def pending_tokens(self) -> tuple[int, mx.array, mx.array]:
        """How many tokens of each row are pending, and the arrays `(B, Hkv, room, D)` of their keys and values."""
        assert self._pending_keys is not None and self._pending_values is not None
        return self.pending, self._pending_keys, self._pending_values

    def _leave_pending(self, keys: mx.array, values: mx.array) -> bool:
        """Leave one new token of every row pending, if the rows need not have it; whether that was possible."""
        if keys.shape[2] != 1 or any(self._left) or self._to_come is not None:
            return False
        if self.pending == PENDING:
            self._append_pending()
        if not self.pending and why_not_pending(self.own_rows):
            return False
        if self._pending_keys is None or self._pending_values is None or self._pending_keys.shape[0] != keys.shape[0]:
            self._pending_keys, self._pending_values = (
                mx.zeros((*x.shape[:2], PENDING, x.shape[3]), x.dtype) for x in (keys, values)
            )
        self._pending_keys[..., self.pending : self.pending + 1, :] = keys
        self._pending_values[..., self.pending : self.pending + 1, :] = values
        self.pending += 1
        return True

    # ---- facts -------------------------------------------------------------------------------------------------

    @property
    def offset(self) -> mx.array:
        """Position `(B,)` of each row's next token; rows still padded on the right count their padding."""
        offset: mx.array = self.ledger.offset
        return offset

    @property
    def left_padding(self) -> mx.array:
        """Columns `(B,)` before each row's first token in a mask."""
        padding: mx.array = self.ledger.left_padding
        return padding

    @property
    def _idx(self) -> int:
        index: int = self.ledger._idx
        return index

    @property
    def spec(self) -> LayerSpec:
        """What is done to the layer."""
        return self.own_rows[0].spec

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all rows, pending tokens included."""
        arrays = [x for x in (self._pending_keys, self._pending_values) if x is not None]
        return sum(row.nbytes for row in self.own_rows) + sum(x.nbytes for x in arrays)

    def dense_nbytes(self, itemsize: int = 2) -> int:
        """Bytes that the stored tokens would take dense, K and V, at `itemsize` bytes an element (2: fp16)."""
        return sum(row.dense_nbytes(itemsize) for row in self.rows)

    @property
    def held(self) -> int:
        """Tokens stored, of all rows."""
        return sum(row.held for row in self.rows)

    @property
    def packed_tokens(self) -> int:
        """Tokens stored as codes, of all rows."""
        return sum(row.packed_tokens for row in self.rows)

    def size(self) -> int:
        """Columns of a mask before new tokens."""
        return int(self.ledger.size())

    def empty(self) -> bool:
        """Whether nothing was ever stored."""
        return all(row.empty() for row in self.rows)

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> Any:
        """The mask `(B, 1, N, T)` for N new tokens, as mlx-lm's batch cache gives it."""
        mask = self._ledger_mask(N, window_size, return_array)
        limit = self.own_rows[0].window
        if window_size is None if limit is None else N == 1 and (window_size or limit) >= limit:
            _PLAIN[id(mask)] = mask
        return mask

    def _ledger_mask(self, N: int, window_size: int | None, return_array: bool) -> mx.array:
        last = self._last_of_padded(N)
        if N > 1 and self._rotates:
            self.ledger._temporal_order()  # or the mask of a full ring leaves out the oldest token of a padded row
        window = {} if window_size is None else {"window_size": window_size}
        mask: mx.array = self.ledger.make_mask(2 if last else N, return_array=return_array, **window)
        return mask[..., :1, :-1] if last else mask

    # ---- new tokens --------------------------------------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append post-RoPE keys `(B, Hkv, L, Dk)` and values `(B, Hkv, L, Dv)`, except padding; returns handles."""
        B, _, L, _ = keys.shape
        if len(self.own_rows) != B:
            raise CacheStateError(
                f"keys must have one row for each of the {len(self.own_rows)} sequences of the batch, got {B}; "
                "give every sequence a cache"
            )
        blank = _blank(B, L)
        update = self.ledger._update_concat if self._last_of_padded(L) else self.ledger.update_and_fetch
        self._columns = update(blank, blank)[0].shape[2]
        if self._leave_pending(keys, values):
            self._spans = [(0, 1)] * B
            return self._handles(keys, values)
        self._spans = [self._span(i, L) for i in range(B)]
        for i, (row, (start, stop)) in enumerate(zip(self.rows, self._spans, strict=True)):
            if stop > start:
                row.update_and_fetch(keys[i : i + 1, :, start:stop], values[i : i + 1, :, start:stop])
        return self._handles(keys, values)

    def _last_of_padded(self, L: int) -> bool:
        """Whether one token comes as the last chunk of padded prompts, which mlx-lm's ring takes for a decode step."""
        return L == 1 and self._to_come is not None and self._rotates

    @property
    def _rotates(self) -> bool:
        return isinstance(self.ledger, mlx_cache.BatchRotatingKVCache)

    def _span(self, row: int, L: int) -> tuple[int, int]:
        """Which of L new tokens of a row are real; keeps count of its padding."""
        start = min(L, self._left[row])
        self._left[row] -= start
        stop = L
        if self._to_come is not None:
            stop = min(L, start + self._to_come[row])
            self._to_come[row] -= stop - start
            self._pads[row] = L - stop
        return start, stop

    def keys_and_values(self) -> tuple[Any, Any]:
        """Handles of everything stored."""
        dense = next((row for row in self.rows if not row.empty()), None)
        if dense is None or dense.dense_keys is None or dense.dense_values is None:
            raise CacheStateError("a cache must hold tokens before they are read, got an empty one; run the model")
        return self._handles(dense.dense_keys, dense.dense_values)

    def _handles(self, keys: mx.array, values: mx.array) -> tuple[KVHandle, KVHandle]:
        shape = (len(self.own_rows), keys.shape[1], self._columns)
        cache = cast(KVQCache, self)  # attention treats a cache with rows as a batch
        return (
            KVHandle(cache, (*shape, keys.shape[3]), keys.dtype),
            KVHandle(cache, (*shape, values.shape[3]), values.dtype),
        )

    def says_causal(self, mask: mx.array | str | None) -> bool:
        """Whether a mask for the newest tokens says no more than that they do not see later ones."""
        if not isinstance(mask, mx.array):
            return True
        return _PLAIN.get(id(mask)) is mask and mask.shape[-1] == self._columns

    def row_calls(self, mask: mx.array | str | None) -> list[tuple[KVQCache, int, int, mx.array | str | None]]:
        """What each row attends with: its cache, its real new tokens `[start, stop)` and its own mask `(L, held)`."""
        calls = []
        if isinstance(mask, mx.array) and self.says_causal(mask):
            mask = None if mask.shape[-2] == 1 else "causal"
        in_order = self._in_order(mask) if isinstance(mask, mx.array) else mask
        for i, (row, (start, stop)) in enumerate(zip(self.rows, self._spans, strict=True)):
            own = in_order
            if isinstance(in_order, mx.array):
                last = self._columns - self._pads[i]
                own = in_order[i if in_order.shape[0] > 1 else 0, :, start:stop, last - row.held : last]
                own = row.mask_in_own_order(own)
            calls.append((row, start, stop, own))
        return calls

    def _in_order(self, mask: mx.array) -> mx.array:
        """A mask over the ledger's columns as `(B or 1, 1 or Hq, L, T)` over tokens in order of age."""
        while mask.ndim < 4:
            mask = mask[None]
        if mask.shape[-1] != self._columns:
            raise CacheStateError(
                f"a mask must have one column for each of the batch's {self._columns} columns, got {mask.shape}; "
                "make it with this cache's make_mask"
            )
        if self._rotates and self.ledger.rotated:
            return mx.roll(mask, -self.ledger._idx, -1)
        return mask

    @property
    def keys(self) -> list[mx.array]:
        """The dense keys of all rows, settable: pipeline-parallel models make them depend on what they send."""
        return [row.dense_keys for row in self.rows if row.dense_keys is not None]

    @keys.setter
    def keys(self, keys: list[mx.array]) -> None:
        for row, dense in zip((row for row in self.rows if row.dense_keys is not None), keys, strict=True):
            row.dense_keys = dense

    # ---- the batch ---------------------------------------------------------------------------------------------

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce padded prompts: `left_padding` before, or after `lengths` tokens `right_padding`, per row."""
        refused = self.rows[0].padding_refused
        if refused and any(max(padding, default=0) for padding in (left_padding or (), right_padding or ())):
            raise CacheStateError(
                f"prompts of a batch must have equal lengths for this model, got padding: {refused}; "
                "give prompts of other lengths a batch of their own"
            )
        self.ledger.prepare(left_padding=left_padding, lengths=lengths, right_padding=right_padding)
        if left_padding is not None:
            self._left = [pending + new for pending, new in zip(self._left, left_padding, strict=True)]
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise CacheStateError("right padding must come with the prompts' lengths, got none; pass lengths=")
            self._to_come = list(lengths)

    def finalize(self) -> None:
        """End of padded prompts: the ledger moves its padding from the right to the left."""
        self.ledger.finalize()
        self._clear_padding()

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        keep = [int(i) for i in batch_indices]
        self.ledger.filter(keep)
        self.rows, self._spans = [self.rows[i] for i in keep], [self._spans[i] for i in keep]
        self._left, self._pads = [self._left[i] for i in keep], [self._pads[i] for i in keep]
        if self._to_come is not None:
            self._to_come = [self._to_come[i] for i in keep]

    def extend(self, other: BatchKVQCache) -> None:
        """Append the rows of another batch, which must not be used afterwards."""
        if not isinstance(other, BatchKVQCache):
            raise CacheStateError(
                f"a batch of compressed caches must be extended by one of the same kind, got {type(other).__name__}; "
                "make both with the same model"
            )
        self.ledger.extend(other.ledger)
        self.rows += other.rows
        self._spans += other._spans
        self._clear_padding()

    def extract(self, idx: int) -> KVQCache:
        """The cache of one row, with its own bytes only; the batch goes on unaffected."""
        return _settled(self.rows[idx])

    @staticmethod
    def merge(caches: Sequence[KVQCache]) -> BatchKVQCache:
        """As `KVQCache.merge`."""
        return BatchKVQCache.of(caches)

    def is_trimmable(self) -> bool:
        """Whether every row is."""
        return bool(self.ledger.is_trimmable()) and all(row.is_trimmable() for row in self.rows)

    def trim(self, n: int) -> int:
        """Drop the last `n` tokens of every row (all of a row's, if it has fewer); returns how many."""
        if not self.is_trimmable():
            return 0
        n = int(self.ledger.trim(n))
        for row in self.rows:
            row.trim(n)
        return n

    # ---- state -------------------------------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, Any]:
        """The states of all rows and of the ledger."""
        names = [type(self.rows[0]).__name__, type(self.ledger).__name__] if self.rows else []
        padding = [self._left, self._to_come, self._pads, [list(span) for span in self._spans], self._columns]
        return {
            "meta": json.dumps({"classes": names, "padding": padding}),
            "rows": [row.state for row in self.rows],
            "ledger": list(self.ledger.state),
        }

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        meta = json.loads(state["meta"])
        row, ledger = (getattr(mlx_cache, name) for name in meta["classes"])
        self._forget_pending()
        self.rows = [row.from_state(part) for part in state["rows"]]
        self.ledger = ledger(*([0] if ledger is mlx_cache.BatchRotatingKVCache else []), left_padding=[])
        self.ledger.state = tuple(state["ledger"])
        self._left, self._to_come, self._pads, spans, self._columns = meta["padding"]
        self._spans = [(start, stop) for start, stop in spans]


def _settled(cache: KVQCache) -> KVQCache:
    """A copy that shares nothing with its source and has packed what it can."""
    copied = copy.deepcopy(cache)
    copied.compact()
    return copied


def _describe(cache: Any) -> str:
    return f"{type(cache).__name__} {cache.spec.label}" if isinstance(cache, KVQCache) else type(cache).__name__
