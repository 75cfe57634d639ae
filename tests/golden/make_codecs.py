"""Golden bytes of every codec: `python tests/golden/make_codecs.py` adds what is missing in the files beside this one.

* codecs.json: byte version and digests of what each codec encodes `golden_input` to.
* planes.json: stored planes and what they decode to, by the codec's own JSON: old files, which decode for ever or are
  refused by name. Entries are added and never changed.

Run it when a codec is added, or after its `version` grew; bytes that change under an old version are a mistake, and
refused here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_kvq_plugin.codecs import Codec, get_codec

PATH = Path(__file__).with_name("codecs.json")
PLANES_PATH = Path(__file__).with_name("planes.json")
NAMES = (
    "identity",
    *(f"affine{bits}" for bits in (2, 3, 4, 5, 6, 8)),
    *(f"tq{bits}" for bits in (1, 2, 3, 4, 5, 6)),
    *(f"rvq{bits}" for bits in (1, 2, 3)),
    *(f"tcq{bits}" for bits in (2, 3)),
    "affine2g32",
    *(f"tqprod{bits}" for bits in (2, 3, 4)),
    *(f"qjl{blocks}" for blocks in (1, 2)),
    *("tq2.5", "tq3.5", "tq2o16"),
    *(f"polar{bits}" for bits in (3, 4)),
    *(f"grouped{bits}" for bits in (2, 3, 4)),
    *(f"kivi{bits}" for bits in (2, 4)),
    "tq3+tq2",
)
DIMS = (64, 80)
# Chosen so that no number lies near a decision threshold: a test checks the margins.
SALT = {64: 689, 80: 1167}
SALTS = {
    **{name: {64: 0, 80: 0} for name in ("polar3", "polar4", "grouped2")},
    "grouped4": {64: 0, 80: 1167},
    "kivi2": {64: 2, 80: 15},
    "kivi4": {64: 3, 80: 7},
}
# Of planes.json only: seeds, rotations and head sizes that codecs.json leaves out.
TURNED = (
    ("tq4", 7, "hadamard2", 64),
    ("tqprod3", 1, "hadamard3", 80),
    ("rvq1", 0, "dense", 72),
    ("qjl2", 3, "dense", 64),
)


def tokens_of(name: str) -> int:
    """Tokens of a codec's golden input: a whole group and a part of one where tokens are encoded together."""
    group = get_codec(name).group
    return 3 if group == 1 else group + 3


def golden_input(dim: int, salt: int | None = None, length: int = 3) -> np.ndarray:
    """Integers, bell-shaped up to 510, `(2, 2, length, dim)` float32: the same on every platform for ever."""
    salt = SALT[dim] if salt is None else salt
    count = 2 * 2 * length * dim
    noise = hashlib.shake_256(f"mlx-kvq golden {dim} {salt}".encode()).digest(4 * count)
    values = np.frombuffer(noise, dtype=np.uint8).reshape(count, 4).astype(np.int64).sum(axis=1) - 510
    return values.reshape(2, 2, length, dim).astype(np.float32)


def input_of(name: str, dim: int, salt: int | None = None) -> np.ndarray:
    """The golden input of a codec: sevenths where tokens are encoded together, as integers lie midway between steps."""
    x = golden_input(dim, SALTS.get(name, SALT)[dim] if salt is None else salt, tokens_of(name))
    return x if get_codec(name).group == 1 else x / np.float32(7)


def digests(name: str, dim: int) -> dict[str, str]:
    """SHA-256 of the bytes of each plane, and of what is fitted, little-endian, tokens in order."""
    codec, x = get_codec(name), mx.array(input_of(name, dim))
    statistics = codec.fit(x)
    arrays = {**codec.encode(x, statistics), **{f"statistics {key}": array for key, array in statistics.items()}}
    return {key: hashlib.sha256(_bytes(array)).hexdigest() for key, array in sorted(arrays.items())}


def version_of(codec: Codec) -> Any:
    """Its byte version, as in files."""
    return json.loads(codec.to_json())["version"]


def golden() -> dict[str, dict[str, Any]]:
    """What codecs.json holds: byte version and digests of every codec."""
    return {
        name: {"version": version_of(get_codec(name)), "sha256": {str(dim): digests(name, dim) for dim in DIMS}}
        for name in NAMES
    }


def _bytes(array: mx.array) -> bytes:
    return np.array(mx.contiguous(array).view(mx.uint8)).tobytes()


def write_arrays(arrays: dict[str, mx.array]) -> dict[str, list[Any]]:
    """Arrays as JSON: dtype, shape, bytes in base64."""
    return {
        name: [str(array.dtype).removeprefix("mlx.core."), list(array.shape), base64.b64encode(_bytes(array)).decode()]
        for name, array in arrays.items()
    }


def read_arrays(stored: dict[str, list[Any]]) -> dict[str, mx.array]:
    """Inverse of `write_arrays`."""
    found = {}
    for name, (dtype, shape, text) in stored.items():
        found[name] = mx.array(np.frombuffer(base64.b64decode(text), np.uint8)).view(getattr(mx, dtype)).reshape(shape)
    return found


def stored_file(codec: Codec, dim: int) -> dict[str, Any]:
    """An entry of planes.json: one token of two heads, or a group and one token of one head."""
    x = mx.array(golden_input(dim, 0, tokens_of(codec.name)))
    x = x[:1, :, :1] if codec.group == 1 else x[:1, :1, : codec.group + 1]
    statistics = codec.fit(x)
    planes = codec.encode(x, statistics)
    return {
        "codec": json.loads(codec.to_json()),
        "dim": dim,
        "planes": write_arrays(planes),
        "statistics": write_arrays(statistics),
        "decoded": write_arrays({"": codec.decode(planes, dim, mx.float32, statistics)})[""],
    }


def cases() -> list[tuple[Codec, int]]:
    """Codecs and head sizes of planes.json; small ones where there are many tokens."""
    plain = [(codec, dim) for codec in map(get_codec, NAMES) for dim in (DIMS if codec.group == 1 else (24,))]
    return plain + [(get_codec(name, seed, rotation), dim) for name, seed, rotation, dim in TURNED]


def with_missing(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of planes.json and those for codecs, byte versions and head sizes that it lacks."""
    have = [(entry["codec"], entry["dim"]) for entry in entries]
    return entries + [stored_file(c, dim) for c, dim in cases() if (json.loads(c.to_json()), dim) not in have]


def check_unchanged(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> None:
    """Exit where bytes changed under a version that codecs.json has."""
    changed = [name for name in old if old[name] != new[name] and old[name]["version"] == new[name]["version"]]
    if changed:
        raise SystemExit(f"bytes must not change under one version, got new ones of {changed}; raise their `version`")


if __name__ == "__main__":
    mx.disable_compile()
    digested = golden()
    check_unchanged(json.loads(PATH.read_text()), digested)
    PATH.write_text(json.dumps(digested, indent=1) + "\n")
    entries = with_missing(json.loads(PLANES_PATH.read_text()) if PLANES_PATH.exists() else [])
    PLANES_PATH.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")
