"""Fused decode attention by kernels, over configurations and shapes: against float64 and against plain operations."""

from __future__ import annotations

from itertools import product

import kernel_cpu
import mlx.core as mx
import pytest
from attend_cases import Config, Contents, check, contents
from token_cases import BACKENDS, PRELUDES, Kind, Shape

from mlx_kvq_plugin.kernels.build import backend

if not backend() and kernel_cpu.why_not():
    pytest.skip(kernel_cpu.why_not(), allow_module_level=True)
kernel_cpu.register_backends()

SHAPES = 8
CODECS = ("tq1", "tq2", "tq3", "tq4", "tq5", "tq6", "rvq1", "rvq2", "rvq3")
TRELLIS = ("tcq1", "tcq2", "tcq3", "tcq4")
DIMS = (64, 128, 256)
# What is not about codes goes through these lists, whose lengths have no common factors.
GROUPS = ((1, 1), (4, 1), (16, 1), (7, 2), (2, 8), (16, 4), (3, 3), (8, 1), (5, 5), (1, 6), (12, 4), (6, 7), (2, 1))
DTYPES = ((mx.float32, None), (mx.bfloat16, None), (mx.float16, None), (mx.bfloat16, mx.float32))
MASKS = ("causal", "", "add-q", "causal", "bool-h")
# Layout, divisor of the channels that turn (0: none of them), magnitude, whether there is a frame.
ROTARIES = (
    ("half", 1, 1.0, True),
    ("interleaved", 1, 1.0, True),
    ("half", 4, 1.25, True),
    ("interleaved", 10, 0.8, True),
    ("half", 0, 1.0, True),
    ("half", 1, 1.0, False),
    ("half", 2, 1.0, True),
)


def code_configs(codecs: tuple[str, ...] = CODECS) -> list[Config]:
    """Every codec at every head size, once for keys and once for values."""
    found = []
    for n, (i, j) in enumerate(product(range(len(codecs)), range(len(DIMS)))):
        key, value = codecs[i], codecs[(i + 2 * j + 1) % len(codecs)]
        dims = DIMS[j], DIMS[(i + j) % len(DIMS)]
        layout, part, magnitude, framed = ROTARIES[n % len(ROTARIES)]
        dense, queries = DTYPES[n % len(DTYPES)]
        repeat, L = GROUPS[n % len(GROUPS)]
        scheme = f"k={key},v={value}" + (",seed=5" if n % 6 == 4 else "")
        pairs = dims[0] // (2 * part) if part else 0
        found.append(
            Config(
                Kind(scheme, dims, pairs, layout, magnitude, framed, dense),
                heads=2 if repeat * L <= 8 else 1,
                repeat=repeat,
                queries=L,
                mask=MASKS[n % len(MASKS)],
                sinks=n % 3 == 1,
                softcap=4.0 if n % 8 == 2 else None,
                dtype=queries,
                warps=(2, 1, 4, 3, 2)[n % 5],
            )
        )
    return found


def mask_configs() -> list[Config]:
    """Array masks of both dtypes that vary along any of the axes of batches, heads and queries."""
    kind = Kind("k=tq4,v=tq3", (64, 64))
    axes = ("", "b", "h", "q", "bh", "bq", "hq", "bhq")
    masks = [f"{dtype}-{some}" for dtype in ("bool", "add") for some in axes]
    found = [Config(kind, 2, 2, 3, mask, softcap=3.0 if mask.endswith("q") else None) for mask in masks]
    # Query rows that do not fit one group, of which none begins with the first query of a head.
    return [*found, Config(kind, 1, 5, 5, "bool-hq"), Config(kind, 1, 7, 3, "add-bq")]


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("config", code_configs() + code_configs(TRELLIS), ids=str)
def test_every_codec_and_head_size(config: Config, on: str) -> None:
    for held in contents(config, SHAPES):
        check(config, held, on)


@pytest.mark.skipif(backend() != "", reason="a GPU has one kind of products")
@pytest.mark.parametrize("config", code_configs() + code_configs(TRELLIS), ids=str)
def test_every_codec_by_products_of_half_precision(config: Config) -> None:
    # Which Metal runs for all codecs, and CUDA for those of more than four bits.
    for held in contents(config, 2):
        check(config, held, "cpu-metal")


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("config", mask_configs(), ids=str)
def test_masks(config: Config, on: str) -> None:
    for held in contents(config, SHAPES):
        check(config, held, on)


# Little text, all features: without a frame or with one, one query tile or several, masks, attention sinks.
FEW = [
    Config(Kind("tq4", (128, 128), dtype=mx.bfloat16), heads=2, repeat=4),
    Config(Kind("k=tq3,v=rvq1", (64, 128), pairs=13, layout="interleaved"), 1, 6, 3, "causal", sinks=True, warps=3),
    Config(Kind("k=rvq2,v=tq6", (256, 64), framed=False, dtype=mx.float16), 1, 3, 4, "bool-bq", softcap=5.0, warps=4),
]


@pytest.mark.parametrize("on", PRELUDES if backend() else [*PRELUDES, "cpu-metal-layout"])
@pytest.mark.parametrize("config", FEW, ids=str)
def test_every_prelude(config: Config, on: str) -> None:
    for held in contents(config, 4):
        check(config, held, on)
    check(config, Contents(Shape(2, config.heads, 300, 140, 3, 5, 60, 1000, 1.0, 9), 4, 4), on)


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("config", FEW, ids=str)
def test_long_caches(config: Config, on: str) -> None:
    for packed, groups in ((4000, 6), (2049, 64)):
        check(config, Contents(Shape(1, config.heads, packed, 20, 0, 0, 0, 77, 1.0, 3), 4, groups), on)
    check(config, Contents(Shape(2, config.heads, 150, 20, 0, 0, 0, 1_000_003, 1.0, 4), 4), on)


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("config", FEW, ids=str)
def test_many_dense_tokens(config: Config, on: str) -> None:
    for dense in (127, 128, 129, 256, 304, 700):
        check(config, Contents(Shape(1, config.heads, 90, dense, 3, 0, 0, 0, 1.0, dense), 4), on)
