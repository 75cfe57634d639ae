"""What the user asked for (`KVQConfig`) and what is done to one layer (`LayerSpec`); both frozen, JSON both ways."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .codecs import get_codec
from .errors import CodecError, PluginError, SchemeError

COMPRESS_AFTER = ("chunk", "prefill")
FP16 = "fp16"


def _check_int(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise SchemeError(f"{name} must be an integer of at least {low}, got {value!r}")


@dataclass(frozen=True)
class KVQConfig:
    """A whole scheme.

    Attributes:
        key, value: codec names (`tq4`, `rvq1`, `affine8`, `identity`, ...). `fp16` on one side means `identity`;
            on both sides it leaves every layer to mlx-lm.
        frame: encode keys in the rotary frame (frame.py); ignored by exact key codecs.
        edges: the first and last N attention layers stay as mlx-lm makes them.
        sinks: first tokens kept dense.
        recent: last tokens kept dense, at least.
        compress_after: `chunk` packs each prefill chunk right after use; `prefill` keeps the prompt dense until
            the first decode step: better quality, peak memory of an uncompressed prompt.
        seed: of the rotations' signs.
    """

    key: str = "tq4"
    value: str = "tq4"
    frame: bool = True
    edges: int = 0
    sinks: int = 4
    recent: int = 16
    compress_after: str = "chunk"
    seed: int = 0

    def __post_init__(self) -> None:
        for side in ("key", "value"):
            name = getattr(self, side)
            if not isinstance(name, str):
                raise SchemeError(f"{side} must be a codec name, got {name!r}")
            if name != FP16:
                try:
                    get_codec(name, self.seed if isinstance(self.seed, int) else 0)
                except (CodecError, PluginError) as error:
                    raise SchemeError(str(error)) from error
        if not isinstance(self.frame, bool):
            raise SchemeError(f"frame must be True or False, got {self.frame!r}")
        _check_int("edges", self.edges, 0)
        _check_int("sinks", self.sinks, 0)
        _check_int("recent", self.recent, 0)
        _check_int("seed", self.seed, 0)
        if self.compress_after not in COMPRESS_AFTER:
            raise SchemeError(f"compress_after must be one of {COMPRESS_AFTER}, got {self.compress_after!r}")

    @property
    def compresses(self) -> bool:
        """False for the scheme that leaves every layer to mlx-lm."""
        return not (self.key == FP16 and self.value == FP16)

    def to_json(self) -> str:
        """JSON object with every field."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> KVQConfig:
        """Inverse of `to_json`; raises `SchemeError` for unknown fields or values."""
        return KVQConfig(**_checked_fields(KVQConfig, text))

    def layer_spec(self) -> LayerSpec:
        """What a compressed layer of this scheme does."""
        return LayerSpec(
            key="identity" if self.key == FP16 else self.key,
            value="identity" if self.value == FP16 else self.value,
            frame=self.frame,
            sinks=self.sinks,
            recent=self.recent,
            compress_after=self.compress_after,
            seed=self.seed,
        )


@dataclass(frozen=True)
class LayerSpec:
    """What is done to the keys and values of one layer; the fields mean what they mean in `KVQConfig`."""

    key: str
    value: str
    frame: bool = True
    sinks: int = 4
    recent: int = 16
    compress_after: str = "chunk"
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def with_(self, **changes: Any) -> LayerSpec:
        """A copy with some fields changed."""
        return replace(self, **changes)

    @property
    def label(self) -> str:
        """The scheme's name if both sides agree, else both sides."""
        return self.key if self.key == self.value else f"k={self.key},v={self.value}"


def _checked_fields(kind: type[KVQConfig], text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise SchemeError(f"a config must be a JSON object, got invalid JSON: {error}") from error
    known = {field.name for field in fields(kind)}
    if not isinstance(data, dict) or not set(data) <= known:
        raise SchemeError(f"a config must be a JSON object with fields from {sorted(known)}, got {data!r}")
    return data
