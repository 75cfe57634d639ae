"""Golden bytes of every codec: `python tests/golden/make_codecs.py` writes codecs.json beside this file.

Run it when a codec is added, or after its `version` grew; bytes that change under an old version are a mistake.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_kvq_plugin.codecs import get_codec

PATH = Path(__file__).with_name("codecs.json")
NAMES = (
    "identity",
    *(f"affine{bits}" for bits in (2, 3, 4, 5, 6, 8)),
    *(f"tq{bits}" for bits in (1, 2, 3, 4, 5, 6)),
    *(f"rvq{bits}" for bits in (1, 2, 3)),
)
DIMS = (64, 80)
SALT = {64: 689, 80: 1167}  # chosen so that no number lies near a decision threshold: a test checks the margins


def golden_input(dim: int, salt: int | None = None) -> np.ndarray:
    """Integers, bell-shaped up to 510, `(2, 2, 3, dim)` float32: the same on every platform for ever."""
    salt = SALT[dim] if salt is None else salt
    count = 2 * 2 * 3 * dim
    noise = hashlib.shake_256(f"mlx-kvq golden {dim} {salt}".encode()).digest(4 * count)
    values = np.frombuffer(noise, dtype=np.uint8).reshape(count, 4).astype(np.int64).sum(axis=1) - 510
    return values.reshape(2, 2, 3, dim).astype(np.float32)


def digests(name: str, dim: int) -> dict[str, str]:
    """SHA-256 of the bytes of each plane, little-endian, tokens in order."""
    planes = get_codec(name).encode(mx.array(golden_input(dim)))
    return {
        plane: hashlib.sha256(np.array(mx.contiguous(array).view(mx.uint8)).tobytes()).hexdigest()
        for plane, array in sorted(planes.items())
    }


def golden() -> dict[str, dict[str, Any]]:
    """What codecs.json holds: byte version and digests of every codec."""
    return {
        name: {"version": get_codec(name).version, "sha256": {str(dim): digests(name, dim) for dim in DIMS}}
        for name in NAMES
    }


if __name__ == "__main__":
    mx.disable_compile()
    PATH.write_text(json.dumps(golden(), indent=1) + "\n")
