"""What the user asked for (`KVQConfig`) and what is done to one layer (`LayerSpec`); both frozen, JSON both ways."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .allocation import (
    AUTO_FAMILY,
    GRADIENT,
    GRANULARITIES,
    KEY,
    PER_LAYER,
    SENSITIVITIES,
    VALUE,
    Budget,
    Target,
    whole_bits,
)
from .codecs import LEAST_SQUARES, NORM, UNBIASED, Codec, get_codec
from .errors import CodecError, PluginError, SchemeError
from .rates import auto_codecs
from .rotation import HADAMARD, ROTATIONS

COMPRESS_AFTER = ("chunk", "prefill")
MATCHED = "matched"
CONFIG_SCALINGS = (MATCHED, LEAST_SQUARES)
SIDE_SCALING = {KEY: NORM, VALUE: UNBIASED}  # of `matched`: what each side's scales make right (scalar.quantize)
FP16 = "fp16"
LEAST_CONTEXT = 256  # that dense tokens are chosen for


def _check_int(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise SchemeError(f"{name} must be an integer of at least {low}, got {value!r}")


@dataclass(frozen=True)
class KVQConfig:
    """A whole scheme.

    Attributes:
        key, value: codec names (`tq4`, `rvq1`, `affine8`, `identity`, ...). `fp16` on one side means `identity`;
            on both sides it leaves every layer to mlx-lm. `tq@2.5` gives every layer and KV head a codec of the
            family so that they have 2.5 bits on average (allocation.py), which takes a calibration. `auto@3.25` and
            `auto:kl<=0.02`, on both sides alike, choose codecs for the layers by themselves (auto.py).
        frame: encode keys in the rotary frame (frame.py); ignored by exact key codecs.
        edges: the first and last N attention layers stay as mlx-lm makes them.
        sinks: first tokens kept dense.
        recent: last tokens kept dense, at least.
        compress_after: `chunk` packs each prefill chunk right after use; `prefill` keeps the prompt dense until
            the first decode step: better quality, peak memory of an uncompressed prompt.
        seed: of the rotations' signs.
        rotation: of codecs that rotate, one of `rotation.ROTATIONS`.
        calibration: for average bits: a `.safetensors` file, or a folder or repository that has one; "" looks next to
            the model.
        sensitivity: what average bits are allocated by, one of `allocation.SENSITIVITIES`.
        scaling: of `tq` and `rvq` codecs. `matched`: scales keep the norms of keys and leave values unbiased;
            `least_squares`: they make the squared error least, which shrinks both.
        family: of codecs that `auto` chooses from; any with several whole rates. Above them come those of the family
            that goes on above it (`Codec.continued_by`), and 16 bits.
        per: what gets bits of its own from `auto`, the keys or values of a `layer` or of every `head`, whose codecs
            have no GPU kernels.
        context: the length in tokens that the bits of `auto` are counted at, at least `LEAST_CONTEXT`: over all tokens
            that layers hold there, and the newest dense tokens of every layer are chosen too (dense_tokens.py). With 0
            they are those of packed tokens, whatever the length.
    """

    key: str = "tq4"
    value: str = "tq4"
    frame: bool = True
    edges: int = 0
    sinks: int = 4
    recent: int = 16
    compress_after: str = "chunk"
    seed: int = 0
    rotation: str = HADAMARD
    calibration: str = ""
    sensitivity: str = GRADIENT
    scaling: str = MATCHED
    family: str = AUTO_FAMILY
    per: str = PER_LAYER
    context: int = 0

    def __post_init__(self) -> None:
        if self.rotation not in ROTATIONS:
            raise SchemeError(f"rotation must be one of {', '.join(ROTATIONS)}, got {self.rotation!r}")
        if self.scaling not in CONFIG_SCALINGS:
            raise SchemeError(f"scaling must be one of {', '.join(CONFIG_SCALINGS)}, got {self.scaling!r}")
        for side in ("key", "value"):
            name = getattr(self, side)
            if not isinstance(name, str):
                raise SchemeError(f"{side} must be a codec name, got {name!r}")
            if name != FP16:
                try:
                    codecs = self._codecs(name)
                except (CodecError, PluginError) as error:
                    raise SchemeError(str(error)) from error
                if side == "value" and not all(codec.values for codec in codecs):
                    raise SchemeError(
                        f"values must be stored by a codec that can do them, got {name}, which is for keys only; "
                        f'write for example "k={name},v={codecs[0].partner}"'
                    )
        if self.sensitivity not in SENSITIVITIES:
            raise SchemeError(f"sensitivity must be one of {', '.join(SENSITIVITIES)}, got {self.sensitivity!r}")
        self._check_target()
        path = self.calibration
        if not isinstance(path, str) or "," in path or path != path.strip():  # a scheme string must hold it
            raise SchemeError(f"calibration must be empty or a path without commas and outer spaces, got {path!r}")
        if not isinstance(self.frame, bool):
            raise SchemeError(f"frame must be True or False, got {self.frame!r}")
        _check_int("edges", self.edges, 0)
        _check_int("sinks", self.sinks, 0)
        _check_int("recent", self.recent, 0)
        _check_int("seed", self.seed, 0)
        _check_int("context", self.context, 0)
        self._check_context()
        if self.compress_after not in COMPRESS_AFTER:
            raise SchemeError(f"compress_after must be one of {COMPRESS_AFTER}, got {self.compress_after!r}")

    def _check_target(self) -> None:
        """That what goes with `auto` only goes with it, and the other way round; that its family has a choice."""
        automatic = [Target.parse(name) is not None for name in (self.key, self.value)]
        if self.per not in GRANULARITIES:
            raise SchemeError(f"per must be one of {', '.join(GRANULARITIES)}, got {self.per!r}")
        if any(automatic) and self.key != self.value:
            raise SchemeError(
                f"auto must be the scheme of keys and values together, got k={self.key},v={self.value}; write for "
                'example "auto@3.25"'
            )
        if any(automatic) and self.sensitivity != GRADIENT:
            raise SchemeError(
                f"auto must go by gradients, which predict a KL divergence, got sensitivity={self.sensitivity}; drop it"
            )
        if not any(automatic) and (self.family, self.per) != (AUTO_FAMILY, PER_LAYER):
            raise SchemeError(
                f"family and per must go with auto, got family={self.family} and per={self.per} with k={self.key},"
                f'v={self.value}; write for example "auto@3.25,family=tq"'
            )

    def _check_context(self) -> None:
        if not self.context:
            return
        if self.target is None or self.target.bits is None:
            raise SchemeError(
                f"context must go with bits of auto, got context={self.context} with k={self.key},v={self.value}; "
                'write for example "auto@3.25,context=8192"'
            )
        if self.context < LEAST_CONTEXT:
            raise SchemeError(
                f"context must be at least {LEAST_CONTEXT} tokens, got {self.context}; name a longer one or drop it"
            )
        if (self.sinks, self.recent) != (KVQConfig.sinks, KVQConfig.recent):
            raise SchemeError(
                f"dense tokens must be left to auto where it has a context, got sinks={self.sinks} and recent="
                f"{self.recent} with context={self.context}; drop either these or the context"
            )

    def _codecs(self, name: str) -> list[Codec]:
        """The codecs that a side may use."""
        seed = self.seed if isinstance(self.seed, int) else 0
        budget, names = Budget.parse(name), [name]
        if budget is not None:
            names = [budget.family + str(bits) for bits in budget.choices()]
        elif Target.parse(name) is not None:
            rates = whole_bits(self.family)
            if len(rates) < 2:
                raise SchemeError(f"a family to choose from must have two or more whole rates, got {self.family!r}")
            names = list(auto_codecs(self.family, self.per).values())
        return [get_codec(name, seed, self.rotation) for name in names]

    @property
    def budgets(self) -> tuple[Budget | None, Budget | None]:
        """Average bits of keys and of values, for sides that have them."""
        return Budget.parse(self.key), Budget.parse(self.value)

    @property
    def target(self) -> Target | None:
        """What an `auto` scheme is to meet."""
        return Target.parse(self.key)

    @property
    def allocated(self) -> bool:
        """Whether layers get codecs of their own from an allocation, so that no codec is named."""
        return self.target is not None or any(budget is not None for budget in self.budgets)

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

    def layer_spec(self, key: str = "", value: str = "") -> LayerSpec:
        """What a compressed layer of this scheme does; `key` and `value` are what an allocation gives it."""
        return LayerSpec(
            key=key or ("identity" if self.key == FP16 else self.key),
            value=value or ("identity" if self.value == FP16 else self.value),
            frame=self.frame,
            sinks=self.sinks,
            recent=self.recent,
            compress_after=self.compress_after,
            seed=self.seed,
            rotation=self.rotation,
            scaling=self.scaling,
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
    rotation: str = HADAMARD
    scaling: str = MATCHED

    @property
    def key_codec(self) -> Codec:
        """The codec of keys; raises `CodecError`."""
        return self._codec(self.key, KEY)

    @property
    def value_codec(self) -> Codec:
        """The codec of values; raises `CodecError`."""
        return self._codec(self.value, VALUE)

    def _codec(self, name: str, side: str) -> Codec:
        scaling = SIDE_SCALING[side] if self.scaling == MATCHED else self.scaling
        return get_codec(name, self.seed, self.rotation, scaling)

    @property
    def framed(self) -> bool:
        """Whether keys are encoded in the rotary frame, from which they come as float32; raises `CodecError`."""
        return self.frame and not self.key_codec.exact

    @property
    def scales_values(self) -> bool:
        """Whether values are divided by scales of their channels (value_scale.py); raises `CodecError`."""
        return self.frame and self.value_codec.mixes_channels

    def bits_per_element(self, key_dim: int, value_dim: int, dtype: str = "float16") -> tuple[float, float]:
        """All-in bits of packed keys and of values, for keys and values of `dtype`; raises `CodecError`."""
        keys = self.key_codec.bits_per_element(key_dim, "float32" if self.framed else dtype)
        return keys, self.value_codec.bits_per_element(value_dim, dtype)

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
