"""Fused decode attention on packed codes: the kernels of attend.h and merge.h for one layer's call.

`FusedPlan` holds what does not change from step to step: two compiled kernels, rotation signs, the tables of the rotary.
A call gives the kernels the cache's buffers whole, never slices, and its token counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..codecs import Codec
from ..rotary import BLOCK, Rotary, block_tables
from ..rotation import signs
from .build import Kernel, build, dtype_name, numbers
from .codes import CodeLayout, code_layout, key_text, value_text, why_not_codes
from .launch import Launch

if TYPE_CHECKING:
    from ..cache import KVQCache

MAX_QUERIES = 8  # new tokens of a step: a longer one is a prefill chunk
MAX_REPEAT = 16  # query heads of a KV head
MAX_ROWS = 64  # query rows of a KV head
DENSE_CHUNK = 128  # dense tokens whose scores are in shared memory at a time


@dataclass(frozen=True)
class Call:
    """What a kernel's text depends on, besides codecs: shapes, dtypes and the kind of mask.

    Attributes:
        batch: sequences in one cache's arrays; rows: caches of one sequence each, 0 for a single cache.
        heads, repeat: KV heads, and query heads of each.
        queries: new tokens, L.
        mask: the shape `(batches, heads, queries)` of an array mask without its columns, or `()`.
        mask_dtype: `bool` or `float`.
        sinks: dtype of attention-sink logits, or an empty string.
    """

    batch: int
    rows: int
    heads: int
    repeat: int
    queries: int
    key_dim: int
    value_dim: int
    dtype: str
    dense_dtype: str
    scale: float
    softcap: float
    causal: bool
    mask: tuple[int, ...]
    mask_dtype: str
    sinks: str


def why_not_fused(cache: KVQCache, dim: int, value_dim: int) -> str:
    """Why the fused kernels cannot attend to a cache with these head sizes; empty if they can."""
    reason = why_not_codes(cache.key_codec, dim) or why_not_codes(cache.value_codec, value_dim)
    return reason


@cache
def _inner_turns(rotary: Rotary) -> mx.array:
    """cos and sin of i theta_j for i < 64 as left operands of 16 x 16 products, half precision, 16 bytes a lane.

    Order: 4 x 16 tokens, steps of 8 rotary pairs, 32 places of a lane (row, then column), 4 pairs of numbers.
    """
    steps = -(-rotary.pairs // 8)
    angles = np.zeros(8 * steps)
    angles[: rotary.pairs] = rotary.angles
    turned = np.arange(BLOCK)[:, None] * angles
    used = np.arange(8 * steps) < rotary.pairs
    table = np.stack([np.cos(turned) * used, np.sin(turned) * used], axis=-1).astype(np.float16)
    # (token, pair, 2) -> (sub, near or far, row, step, first or second four pairs, column, 2)
    table = table.reshape(4, 2, 8, steps, 2, 4, 2).transpose(0, 3, 2, 5, 4, 1, 6)
    found = mx.array(np.ascontiguousarray(table).view(np.uint8).reshape(-1))
    mx.eval(found)
    return found


def fused_tables_nbytes() -> int:
    """Bytes of the tables of all rotaries whose layers were attended to."""
    return sum(table.nbytes for table in _TABLES.values())


_TABLES: dict[Rotary, mx.array] = {}


def _turns(rotary: Rotary) -> mx.array:
    if rotary not in _TABLES:
        _TABLES[rotary] = _inner_turns(rotary)
    return _TABLES[rotary]


def _side_inputs(side: str, layout: CodeLayout, row: int) -> list[str]:
    return [f"{side}{i}_{row}" for i in range(len(layout.planes))] + [f"{side}_scale_{row}"]


def _pointers(side: str, layout: CodeLayout, rows: int) -> str:
    """Statements that point at the planes of this group's sequence and KV head."""
    kinds = [("kvq_byte", f"{side}{i}", size) for i, size in enumerate(layout.row_bytes)]
    kinds.append(("kvq_bfloat", f"{side}_scale", 1))
    text = ""
    for kind, name, _ in kinds:
        text += f"KVQ_DEVICE const {kind}* {name} = (KVQ_DEVICE const {kind}*){name}_0;\n"
    for row in range(1, rows):
        text += f"if (batch == {row}) {{ " + " ".join(f"{name} = {name}_{row};" for _, name, _ in kinds) + " }\n"
    at = "head" if rows else "(batch * KVQ_HEADS + head)"
    return text + "".join(f"{name} += ((kvq_long){at} * capacity + start) * {size};\n" for _, name, size in kinds)


def _chosen(kind: str, name: str, size: str, rows: int) -> str:
    """A statement that points at one array of this group's sequence and KV head, `size` elements a head."""
    text = f"KVQ_DEVICE const {kind}* {name} = (KVQ_DEVICE const {kind}*){name}_0;\n"
    for row in range(1, rows):
        text += f"if (batch == {row}) {name} = {name}_{row};\n"
    at = "head" if rows else "(batch * KVQ_HEADS + head)"
    return text + f"{name} += (kvq_long){at} * {size};\n"


def _integers(names: Sequence[str], rows: int, first: int = 0) -> str:
    """Integers of this group's sequence."""
    text = "".join(f"int {name} = KVQ_NUMBER(numbers_0_shape[{first + i}]);\n" for i, name in enumerate(names))
    for row in range(1, rows):
        some = " ".join(f"{name} = KVQ_NUMBER(numbers_{row}_shape[{first + i}]);" for i, name in enumerate(names))
        text += f"if (batch == {row}) {{ {some} }}\n"
    return text


class FusedPlan:
    """Kernels and constant arrays for calls of one kind; made once, kept by the cache."""

    def __init__(self, call: Call, key: Codec, value: Codec, rotary: Rotary | None, launch: Launch, on: str = ""):
        """
        Args:
            rotary: of the key frame; `None` without a frame.
            on: a backend; empty takes that of the default device.
        """
        self.call, self.rotary, self.launch = call, rotary, launch
        self.key_layout, self.value_layout = code_layout(key, call.key_dim), code_layout(value, call.value_dim)
        self.rows = call.repeat * call.queries
        wide = max(call.key_dim, call.value_dim) > 128
        self.columns = 8 if self.rows <= 8 or wide else 16
        self.tiles = -(-self.rows // self.columns)
        self.key_signs, self.value_signs = signs(call.key_dim, key.seed), signs(call.value_dim, value.seed)
        self.dtype = {"float": mx.float32, "kvq_half": mx.float16, "kvq_bfloat": mx.bfloat16}[call.dtype]
        self.attend, self.merge = self._attend_kernel(on), self._merge_kernel(on)
        self.blocks = 0

    def __deepcopy__(self, memo: object) -> FusedPlan:
        return self

    def _defines(self) -> dict[str, Any]:
        call = self.call
        pairs = self.rotary.pairs if self.rotary is not None else 0
        batches, heads, queries = call.mask or (1, 1, 1)
        return {
            "KVQ_DK": call.key_dim,
            "KVQ_DV": call.value_dim,
            "KVQ_SHARED_DIM": max(call.key_dim, call.value_dim) + 4,
            "KVQ_HEADS": call.heads,
            "KVQ_ROWS": self.rows,
            "KVQ_QUERIES": call.queries,
            "KVQ_COLUMNS": self.columns,
            "KVQ_NT": self.columns // 8,
            "KVQ_QUERY_TILES": self.tiles,
            "KVQ_WARPS": self.launch.warps,
            "KVQ_SCALE": f"{call.scale!r}f",
            "KVQ_SOFTCAP_ON": call.softcap != 0,
            "KVQ_SOFTCAP": f"{float(call.softcap)!r}f",
            "KVQ_CAUSAL": call.causal and call.queries > 1,
            "KVQ_SINKS": call.sinks != "",
            "KVQ_MASK": 0 if not call.mask else 1 if call.mask_dtype == "bool" else 2,
            "KVQ_MASK_BATCHES": batches,
            "KVQ_MASK_HEADS": heads,
            "KVQ_MASK_QUERIES": queries,
            "KVQ_FRAME": self.rotary is not None,
            "KVQ_PAIRS": pairs,
            "KVQ_PAIR_STEPS": -(-pairs // 8),
            "KVQ_MEAN_STRIDE": 16 * -(-pairs // 8) + 8,
            "KVQ_HALF_LAYOUT": self.rotary is None or self.rotary.layout == "half",
            "KVQ_MAGNITUDE": f"{self.rotary.magnitude if self.rotary is not None else 1.0!r}f",
            "KVQ_NUMBER(x)": "(((x) - 1) / 2)",
        }

    def _attend_kernel(self, on: str) -> Kernel:
        call = self.call
        rows = max(1, call.rows)
        inputs = ["queries", "key_signs", "shared_numbers"]
        for row in range(rows):
            inputs += [f"numbers_{row}", *_side_inputs("key", self.key_layout, row)]
            inputs += _side_inputs("value", self.value_layout, row)
            if self.rotary is not None:
                inputs += [f"frame_mean_{row}", f"frame_scale_{row}"]
        if self.rotary is not None:
            inputs += ["block_cos", "block_sin", "inner", "inner_turns"]
        if call.mask:
            inputs.append("mask")
        prologue = (
            "const int batch = KVQ_GROUP_Z, head = KVQ_GROUP_Y / KVQ_QUERY_TILES;\n"
            "const int splits = KVQ_NUMBER(shared_numbers_shape[0]), columns = KVQ_NUMBER(shared_numbers_shape[1]);\n"
            + _integers(["packed", "start", "capacity", "position", "sinks"], call.rows)
            + _pointers("key", self.key_layout, call.rows)
            + _pointers("value", self.value_layout, call.rows)
        )
        if self.rotary is not None:
            prologue += _chosen("float", "frame_mean", "KVQ_DK", call.rows)
            prologue += _chosen("float", "frame_scale", "(KVQ_DK - KVQ_PAIRS)", call.rows)
        return build(
            "attend",
            inputs,
            ["partial", "statistics"],
            "attend.h",
            ["common.h"],
            {
                **self._defines(),
                "KVQ_KEY_PLANES": ", ".join(f"key{i}" for i in range(len(self.key_layout.planes))),
                "KVQ_VALUE_PLANES": ", ".join(f"value{i}" for i in range(len(self.value_layout.planes))),
                "KVQ_QUERY_TYPE": call.dtype,
                "KVQ_GROUP_THREADS": 32 * self.launch.warps,
                "KVQ_GROUPS_PER_CORE": self.launch.groups_per_core,
            },
            on,
            extra=key_text(self.key_layout) + value_text(self.value_layout),
            prologue=prologue,
        )

    def _merge_kernel(self, on: str) -> Kernel:
        call = self.call
        inputs = ["partial", "statistics", "queries", "value_signs", "shared_numbers"]
        for row in range(max(1, call.rows)):
            inputs += [f"numbers_{row}", f"dense_keys_{row}", f"dense_values_{row}"]
        if call.mask:
            inputs.append("mask")
        if call.sinks:
            inputs.append("sink_logits")
        prologue = (
            "const int batch = KVQ_GROUP_Z, head = KVQ_GROUP_Y, n = KVQ_GROUP_X;\n"
            "const int splits = KVQ_NUMBER(shared_numbers_shape[0]), columns = KVQ_NUMBER(shared_numbers_shape[1]);\n"
            + _integers(["packed", "sinks", "dense", "dense_capacity"], call.rows)
            + _chosen(call.dense_dtype, "dense_keys", "dense_capacity * KVQ_DK", call.rows)
            + _chosen(call.dense_dtype, "dense_values", "dense_capacity * KVQ_DV", call.rows)
        )
        return build(
            "merge",
            inputs,
            ["output"],
            "merge.h",
            ["common.h"],
            {
                **self._defines(),
                "KVQ_THREADS": self.merge_threads,
                "KVQ_DENSE_CHUNK": DENSE_CHUNK,
                "KVQ_QUERY_TYPE": call.dtype,
                "KVQ_SINK_TYPE": call.sinks or "float",
            },
            on,
            prologue=prologue,
        )

    @property
    def merge_threads(self) -> int:
        """Threads of a group of the second kernel."""
        return max(self.call.value_dim, self.launch.merge_threads)

    def splits(self, tiles: int) -> int:
        """Groups that share the tokens of one KV head, `tiles` tiles of 64."""
        groups = max(1, self.call.batch) * self.call.heads * self.tiles
        return max(1, min(-(-tiles // self.launch.warps), self.launch.groups // groups))

    def __call__(
        self, caches: Sequence[KVQCache], queries: mx.array, mask: mx.array | None, sinks: mx.array | None
    ) -> mx.array:
        """Attention `(B, Hq, L, Dv)` of queries `(B, Hq, L, Dk)`, in their dtype.

        Args:
            caches: the one cache, or the caches of the rows of a batch.
            mask: `(batches, heads, L or 1, T)`, contiguous, bool or float32, or `None`.
            sinks: logits `(Hq,)`.
        """
        call = self.call
        attend_inputs, merge_inputs = [queries, self.key_signs], []
        tiles = blocks = 1
        found: list[mx.array] = []
        for cache in caches:
            packed, position = cache.packed_tokens, cache.packed_position if self.rotary is not None else 0
            numbers_ = numbers(packed, cache._packed_start, cache.plane_rows, position, cache.sink_tokens)
            tiles = max(tiles, -(-packed // BLOCK))
            blocks = max(blocks, -(-packed // BLOCK), position // BLOCK + 1)
            found += [numbers_, *cache.key_planes.values(), *cache.value_planes.values()]
            if cache.frame is not None:
                found += [cache.frame.mean, cache.frame.scale]
            assert cache.dense_keys is not None and cache.dense_values is not None
            dense_numbers = numbers(packed, cache.sink_tokens, cache._dense, cache.dense_keys.shape[2])
            merge_inputs += [dense_numbers, cache.dense_keys, cache.dense_values]
        splits = self.splits(tiles)
        shared = numbers(splits, mask.shape[-1] if mask is not None else caches[0].held)
        attend_inputs += [shared, *found]
        if self.rotary is not None:
            attend_inputs += [*block_tables(self.rotary, blocks, whole=True), _turns(self.rotary)]
        masks = [] if mask is None else [mask]
        B, Hq, L, _ = queries.shape
        partial, statistics = self.attend(
            inputs=attend_inputs + masks,
            grid=(splits * 32 * self.launch.warps, call.heads * self.tiles, B),
            threadgroup=(32 * self.launch.warps, 1, 1),
            output_shapes=[(B, Hq * L, splits, call.value_dim), (B, Hq * L, splits, 2)],
            output_dtypes=[mx.float32, mx.float32],
        )
        threads = self.merge_threads
        (output,) = self.merge(
            inputs=[partial, statistics, queries, self.value_signs, shared, *merge_inputs, *masks]
            + ([] if sinks is None else [sinks]),
            grid=(self.rows * threads, call.heads, B),
            threadgroup=(threads, 1, 1),
            output_shapes=[(B, Hq, L, call.value_dim)],
            output_dtypes=[self.dtype],
        )
        return output
