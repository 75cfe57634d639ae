"""Fused decode attention on packed codes: the kernel of attend.h for one layer's call, and merge.h at its end.

`FusedPlan` holds what does not change from step to step: compiled kernels, rotation signs, tables of the rotary. Groups
attend to a part of the tokens each; the last one to arrive merges what they have stored, where a backend lets it see
that (CUDA), else a second kernel does.
A call gives the kernels the cache's buffers whole, never slices, and its token counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..codecs import Codec
from ..rotary import BLOCK, Rotary
from .build import CUDA, METAL, Kernel, backend, build, has_byte_products, merges_at_the_end, numbers
from .byte_codes import has_bytes, key_bytes_text, value_bytes_text
from .codes import CodeLayout, code_layout, key_text, value_text, why_not_codes
from .lanes import frame_sizes
from .launch import Launch
from .tables import tables_of

if TYPE_CHECKING:
    from ..cache import KVQCache

MAX_QUERIES = 8  # new tokens of a step: a longer one is a prefill chunk
MAX_REPEAT = 16  # query heads of a KV head
SUMS_NBYTES = 9 * 1024  # of shared memory for the warps' sums
MAX_ROWS = 64  # query rows of a KV head
MERGE_NUMBERS = 64  # of splits' sums that a lane loads before it waits
DENSE_CHUNK = 64  # dense tokens whose scores are in shared memory at a time
COUNTERS = 64  # calls that share one array of zeros


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
        pending: room for dense tokens that all rows of a batch keep in one array (batch.py), 0 without.
        scales_values: whether channels of values have scales.
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
    pending: int = 0
    scales_values: bool = False


def why_not_fused(cache: KVQCache, dim: int, value_dim: int) -> str:
    """Why the fused kernels cannot attend to a cache with these head sizes; empty if they can."""
    return why_not_codes(cache.key_codec, dim) or why_not_codes(cache.value_codec, value_dim)


def by_bytes(key: CodeLayout, value: CodeLayout, on: str) -> bool:
    """Whether a backend multiplies these codes as 8-bit integers, not as half precision numbers."""
    return has_byte_products(on) and has_bytes(key) and has_bytes(value)


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


NUMBERS = (
    "packed",
    "start",
    "capacity",
    "position",
    "sinks",
    "dense",
    "dense_capacity",
    "pending",
    "splits",
    "columns",
)


def _integers(rows: int) -> str:
    """The integers of this group's sequence."""
    text = "".join(f"int {name} = KVQ_NUMBER(numbers_0_shape[{i}]);\n" for i, name in enumerate(NUMBERS))
    for row in range(1, rows):
        some = " ".join(f"{name} = KVQ_NUMBER(numbers_{row}_shape[{i}]);" for i, name in enumerate(NUMBERS[:-3]))
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
        self.wide = max(call.key_dim, call.value_dim) > 128
        self.bytes = by_bytes(self.key_layout, self.value_layout, on or backend())
        self.queries_at_a_time = 4 if self.bytes else 8  # by one product: of bytes, a query takes two columns
        most = 8 if self.bytes or self.wide else 16
        self.columns = self.queries_at_a_time if self.rows <= self.queries_at_a_time else most
        self.tiles = -(-self.rows // self.columns)
        self.tables = tables_of(key, call.key_dim, value, call.value_dim, rotary)
        self.dtype = {"float": mx.float32, "kvq_half": mx.float16, "kvq_bfloat": mx.bfloat16}[call.dtype]
        self.at_the_end = merges_at_the_end(on or backend())
        self.attend = self._attend_kernel(on)
        self.merge = None if self.at_the_end else self._merge_kernel(on)
        self._constant_sizes()
        self.traced = (on or backend()) in (CUDA, METAL)
        self._sizes: dict[tuple[int, tuple[tuple[int, ...], ...]], _Sizes] = {}

    def __deepcopy__(self, memo: object) -> FusedPlan:
        return self

    def _defines(self) -> dict[str, Any]:
        call = self.call
        pairs = self.rotary.pairs if self.rotary is not None else 0
        batches, heads, queries = call.mask or (1, 1, 1)
        return {
            "KVQ_DK": call.key_dim,
            "KVQ_DV": call.value_dim,
            "KVQ_PARTIAL": call.value_dim + 4,  # a peak and a total; rows of whole 16 bytes
            "KVQ_SHARED_DIM": max(call.key_dim, call.value_dim) + 4,
            "KVQ_HEADS": call.heads,
            "KVQ_ROWS": self.rows,
            "KVQ_QUERIES": call.queries,
            "KVQ_COLUMNS": self.columns,
            "KVQ_BYTES": self.bytes,
            "KVQ_NT": self.columns // self.queries_at_a_time,
            "KVQ_QUERY_TILES": self.tiles,
            "KVQ_WARPS": self.launch.warps,
            "KVQ_REGIONS": self.regions,
            "KVQ_AHEAD": self.columns == self.queries_at_a_time and not self.wide,
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
            **frame_sizes(self.rotary, call.key_dim, call.value_dim if call.scales_values else 0),
            "KVQ_PAIRS": pairs,
            "KVQ_PAIR_STEPS": -(-pairs // 8),
            "KVQ_SHARED_TURNS": 0 < pairs <= 64 and self.columns * max(call.key_dim, call.value_dim) <= 1024,
            "KVQ_MEAN_STRIDE": 16 * -(-pairs // 8) + 8,
            "KVQ_HALF_LAYOUT": self.rotary is None or self.rotary.layout == "half",
            "KVQ_MAGNITUDE": f"{self.rotary.magnitude if self.rotary is not None else 1.0!r}f",
            "KVQ_NUMBER(x)": "(((x) - 1) / 2)",
            "KVQ_DENSE_CHUNK": DENSE_CHUNK,
            "KVQ_PENDING": call.pending,
            "KVQ_MERGE_AHEAD": min(16, MERGE_NUMBERS * 32 // call.value_dim),
            "KVQ_MERGE_ROWS": self.columns if self.at_the_end else 1,
            "KVQ_MERGE_WARPS": self.launch.warps if self.at_the_end else 1,
        }

    def _attend_kernel(self, on: str) -> Kernel:
        call = self.call
        rows = max(1, call.rows)
        inputs = [f"numbers_{row}" for row in range(rows)] + ["tables", "queries"]
        for row in range(rows):
            inputs += _side_inputs("key", self.key_layout, row)
            inputs += _side_inputs("value", self.value_layout, row)
            if self.framed:
                inputs.append(f"frame_{row}")
            inputs += [f"dense_keys_{row}", f"dense_values_{row}"]
        if call.pending:
            inputs += ["pending_keys", "pending_values"]
        if call.mask:
            inputs.append("mask")
        if call.sinks:
            inputs.append("sink_logits")
        if self.at_the_end:
            inputs.append("counters")
        prologue = (
            "const int batch = KVQ_GROUP_Z, head = KVQ_GROUP_Y / KVQ_QUERY_TILES;\n"
            + _integers(call.rows)
            + _pointers("key", self.key_layout, call.rows)
            + _pointers("value", self.value_layout, call.rows)
            + _chosen(call.dense_dtype, "dense_keys", "dense_capacity * KVQ_DK", call.rows)
            + _chosen(call.dense_dtype, "dense_values", "dense_capacity * KVQ_DV", call.rows)
        )
        if call.pending:
            for name, size in (("keys", "KVQ_DK"), ("values", "KVQ_DV")):
                prologue += f"KVQ_DEVICE const {call.dense_dtype}* newest_{name} = "
                prologue += f"pending_{name} + (batch * KVQ_HEADS + head) * KVQ_PENDING * {size};\n"
        prologue += "KVQ_DEVICE const float* key_signs = tables;\n" + self._of_values()
        if self.rotary is not None:
            for name in ("inner", "block_turns"):
                prologue += f"KVQ_DEVICE const float* {name} = tables + {getattr(self.tables, name)};\n"
            prologue += "KVQ_DEVICE const kvq_byte* inner_turns = (KVQ_DEVICE const kvq_byte*)"
            prologue += f"(tables + {self.tables.inner_turns});\n"
            prologue += "KVQ_DEVICE const float* frame_mean = frame;\n"
            prologue += "KVQ_DEVICE const float* frame_steady = frame + KVQ_DK;\n"
            prologue += "KVQ_DEVICE const float* frame_scale = frame + 2 * KVQ_DK;\n"
        if self.bytes:
            products = "attend_bytes.h"
            codes = key_bytes_text(self.key_layout) + value_bytes_text(self.value_layout)
        else:
            products = "attend_halves.h"
            codes = key_text(self.key_layout) + value_text(self.value_layout)
        return build(
            "attend",
            inputs,
            ["output", "partial"] if self.at_the_end else ["partial"],
            ["attend.h", "dense.h", "attend_first.h", "attend_queries.h", products, "attend_end.h"]
            + (["last.h", "merge.h"] if self.at_the_end else []),
            ["common.h"],
            {
                **self._defines(),
                "KVQ_KEY_PLANES": ", ".join(f"key{i}" for i in range(len(self.key_layout.planes))),
                "KVQ_VALUE_PLANES": ", ".join(f"value{i}" for i in range(len(self.value_layout.planes))),
                "KVQ_GROUP_THREADS": 32 * self.launch.warps,
                "KVQ_GROUPS_PER_CORE": self.launch.groups_per_core,
            },
            on,
            extra=codes,
            prologue=prologue,
        )

    def _merge_kernel(self, on: str) -> Kernel:
        call = self.call
        frames = [f"frame_{row}" for row in range(max(1, call.rows))] if call.scales_values else []
        prologue = "const int batch = KVQ_GROUP_Z, head = KVQ_GROUP_Y, first_row = KVQ_GROUP_X;\n"
        prologue += f"const int splits = KVQ_NUMBER(numbers_0_shape[{NUMBERS.index('splits')}]);\n"
        return build(
            "merge",
            ["partial", "numbers_0", "tables", *frames],
            ["output"],
            ["merge.h"],
            ["common.h"],
            self._defines(),
            on,
            prologue=prologue + self._of_values(),
        )

    @property
    def framed(self) -> bool:
        """Whether caches have rows of a frame, `KVQCache.frame_rows`."""
        return self.rotary is not None or self.call.scales_values

    def _of_values(self) -> str:
        """Pointers to what turns sums of the transform domain into values, and to the frame if there is one."""
        text = f"KVQ_DEVICE const float* value_signs = tables + {self.tables.value_signs};\n"
        if self.framed:
            text += _chosen("float", "frame", "KVQ_FRAME_SIZE", self.call.rows)
        if self.call.scales_values:
            text += "KVQ_DEVICE const float* value_channels = frame + KVQ_KEY_FRAME_SIZE;\n"
        return text

    def _constant_sizes(self) -> None:
        call = self.call
        batch = max(1, call.batch)
        self._group, self._merge_grid = (32 * self.launch.warps, 1, 1), (self.rows * 32, call.heads, batch)
        self._output_shape = (batch, call.heads * call.repeat, call.queries, call.value_dim)
        self._attend_dtypes = [self.dtype, mx.float32] if self.at_the_end else [mx.float32]
        self.key_planes = (*self.key_layout.planes, "scale")
        self.value_planes = (*self.value_layout.planes, "scale")

    def splits(self, tiles: int) -> int:
        """Groups that share the tokens of one KV head: one for dense tokens, others for `tiles` tiles of 64."""
        groups = max(1, self.call.batch) * self.call.heads * self.tiles
        return 1 + max(1, min(-(-tiles // self.launch.warps), self.launch.groups // groups - 1))

    @property
    def regions(self) -> int:
        """Warps whose sums stand side by side in shared memory at the end of the first kernel."""
        size = 4 * self.columns * (max(self.call.key_dim, self.call.value_dim) + 4)
        return max(1, min(self.launch.warps, SUMS_NBYTES // size))

    def __call__(
        self,
        caches: Sequence[KVQCache],
        queries: mx.array,
        mask: mx.array | None,
        sinks: mx.array | None,
        pending: tuple[int, mx.array, mx.array] | None = None,
    ) -> mx.array:
        """Attention `(B, Hq, L, Dv)` of queries `(B, Hq, L, Dk)`, in their dtype.

        Args:
            caches: the one cache, or the caches of the rows of a batch; their planes have room for whole tiles.
            queries: with any strides.
            mask: `(batches, heads, L or 1, T)`, contiguous, bool or float32, or `None`.
            sinks: logits `(Hq,)`.
            pending: newer dense tokens of the rows of a batch: how many, and keys and values
                `(B, Hkv, call.pending, D)`.
        """
        newer = 0 if pending is None else pending[0]
        counts = [(*cache.counts(), newer) for cache in caches]
        sizes = self._sizes_of(tuple(counts))
        arrays = [*sizes.constants, queries]
        for own in caches:
            arrays += [own.key_planes[name] for name in self.key_planes]
            arrays += [own.value_planes[name] for name in self.value_planes]
            if self.framed:
                arrays.append(own.frame_rows())
            assert own.dense_keys is not None and own.dense_values is not None
            arrays += (own.dense_keys, own.dense_values)
        if pending is not None:
            arrays += pending[1:]
        if mask is not None:
            arrays.append(mask)
        if sinks is not None:
            arrays.append(sinks)
        if self.at_the_end:
            arrays.append(_counters(self._output_shape[0] * self.call.heads * self.tiles))
        return sizes.run(*arrays)

    def _run(self, sizes: _Sizes, arrays: Sequence[mx.array]) -> mx.array:
        """The kernels on the integers of every sequence, the tables and the arrays of `__call__`."""
        found = self.attend(
            inputs=arrays,
            grid=sizes.grid,
            threadgroup=self._group,
            output_shapes=sizes.attend_shapes,
            output_dtypes=self._attend_dtypes,
        )
        if self.merge is None:
            return found[0]
        count = len(sizes.constants)  # integers and tables, after which come queries, then the arrays of each sequence
        planes = len(self.key_planes) + len(self.value_planes)  # then a frame, and dense keys and values
        first, step = count + 1 + planes, planes + 3
        frames = [arrays[first + step * row] for row in range(count - 1)] if self.call.scales_values else []
        return self.merge(
            inputs=[*found, arrays[0], arrays[count - 1], *frames],
            grid=self._merge_grid,
            threadgroup=_WARP,
            output_shapes=[self._output_shape],
            output_dtypes=[self.dtype],
        )[0]

    def _sizes_of(self, counts: tuple[tuple[int, ...], ...]) -> _Sizes:
        """Launch sizes and the integers of kernels for `KVQCache.counts` of every sequence, kept for the other layers.

        By thread: arrays that are not evaluated cannot cross threads, and evaluating here would wait for the GPU.
        """
        key = threading.get_ident(), counts
        found = self._sizes.get(key)
        if found is None:
            if len(self._sizes) > 64:  # of steps long past
                self._sizes.clear()
            self._sizes[key] = found = self._new_sizes(counts)
        return found

    def _new_sizes(self, counts: tuple[tuple[int, ...], ...]) -> _Sizes:
        call = self.call
        tiles = max(-(-packed // BLOCK) for packed, *_ in counts)
        first = max(position for _, _, _, position, *_ in counts) // BLOCK + 1
        splits = self.splits(tiles)
        columns = max(packed + dense + newer for packed, _, _, _, _, dense, _, newer in counts)
        own = [numbers(*count, splits, columns) for count in counts]
        blocks = max(tiles, first) if self.rotary is not None else 1
        batch = max(1, call.batch)
        partial_shape = (batch, call.heads * self.rows, splits, call.value_dim + 4)
        sizes = _Sizes(
            constants=(*own, self.tables.array(blocks)),
            grid=(splits * 32 * self.launch.warps, call.heads * self.tiles, batch),
            attend_shapes=[self._output_shape, partial_shape] if self.at_the_end else [partial_shape],
        )
        # All layers make the same calls in a step: traced once, they are not put together again for each layer.
        run = partial(_run_plan, self, sizes)
        sizes.run = mx.compile(run) if self.traced else run
        return sizes


def _run_plan(plan: FusedPlan, sizes: _Sizes, *arrays: mx.array) -> mx.array:
    return plan._run(sizes, arrays)


@dataclass
class _Sizes:
    """What the counts of tokens of one step decide, the same in all layers."""

    constants: tuple[mx.array, ...]  # integers of every sequence, and the tables
    grid: tuple[int, int, int]
    attend_shapes: list[tuple[int, ...]]
    run: Callable[..., mx.array] = field(init=False)


_WARP = (32, 1, 1)


class _Zeros(threading.local):
    """Arrays of counters by size; by thread, since lazy arrays cannot cross threads."""

    def __init__(self) -> None:
        self.pools: dict[int, list[mx.array]] = {}


_zeros = _Zeros()


def _counters(size: int) -> mx.array:
    """Zeros `(size,)`, uint32, that no other call gets: groups count in them how many have arrived."""
    pool = _zeros.pools.setdefault(size, [])
    if not pool:
        pool += mx.split(mx.zeros((COUNTERS * size,), dtype=mx.uint32), COUNTERS)
    return pool.pop()
