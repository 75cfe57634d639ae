"""What runs for a layer on this device, and why not something else: the table behind `kvq inspect --kernels`."""

from __future__ import annotations

from dataclasses import dataclass

from ..cache import KVQCache
from ..config import LayerSpec
from .attend import MAX_QUERIES, MAX_REPEAT, MAX_ROWS, why_not_fused
from .build import backend
from .lanes import why_not_lanes

NO_GPU = "MLX's default device is no GPU"
CONDITIONS = (
    f"Fused kernels take steps of at most {MAX_QUERIES} new tokens and {MAX_ROWS} query rows (new tokens times query\n"
    "heads) of a KV head. Longer calls, and calls before anything is packed, run MLX's own attention.\n"
    "Kernels of more than 4 query rows, 128 channels or 3 bits have at most 2 groups a core."
)


@dataclass(frozen=True)
class Choice:
    """What runs for one kind of work.

    Attributes:
        work: what is done.
        runs: what does it.
        reasons: why that is no kernel; empty if it is one.
    """

    work: str
    runs: str
    reasons: tuple[str, ...] = ()


def choices(spec: LayerSpec, key_dim: int, value_dim: int, repeat: int) -> tuple[Choice, ...]:
    """What runs for a compressed layer on MLX's default device.

    Args:
        key_dim, value_dim: head sizes.
        repeat: query heads of a KV head.
    """
    cache = KVQCache(spec)
    if cache.exact:
        return (Choice("attention", "MLX's own, on tokens as they are"),)
    device = "" if backend() else NO_GPU
    repeats = f"{repeat} query heads of a KV head are more than {MAX_REPEAT}" if repeat > MAX_REPEAT else ""
    lanes = [why_not_lanes(cache.key_codec, key_dim), why_not_lanes(cache.value_codec, value_dim)]

    def choice(work: str, kernel: str, plain: str, *reasons: str) -> Choice:
        found = tuple(dict.fromkeys(reason for reason in (device, *reasons) if reason))
        return Choice(work, plain if found else kernel, found)

    return (
        choice(
            "decode steps",
            "fused kernels on codes",
            "plain operations on codes",
            why_not_fused(cache, key_dim, value_dim),
            repeats,
        ),
        choice(
            "prefill chunks",
            "MLX's attention on tokens that a kernel decodes",
            "MLX's attention on tokens that plain operations decode",
            *lanes,
        ),
        choice("packing", "one kernel for keys and values", "plain operations", *lanes),
    )
