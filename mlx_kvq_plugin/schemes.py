"""Scheme strings: `tq4`, `rvq1,edges=2,sinks=4,recent=64`, `k=tq4,v=tq2`, `fp16`.

Grammar: comma-separated parts; a part without `=` names the codec of both sides, `k=` and `v=` name one side each, the
rest set fields of `KVQConfig`: `frame=on|off`, `edges=N`, `sinks=N`, `recent=N`, `compress_after=chunk|prefill`,
`seed=N`. Every part at most once.
"""

from __future__ import annotations

from dataclasses import dataclass

from .codecs import get_codec, list_codecs
from .config import FP16, KVQConfig
from .errors import CodecError, PluginError, SchemeError
from .plugins import load_plugin

_INTS = ("edges", "sinks", "recent", "seed")
_BOTH = "codec="  # no name before a "=" holds one
_EXAMPLE = 'write for example "tq4", "rvq1,edges=2,recent=64" or "k=tq4,v=tq2"'


def _parse_int(name: str, text: str) -> int:
    if not text.isdecimal():
        raise SchemeError(f"{name} in a scheme must be a non-negative integer, got {text!r}; {_EXAMPLE}")
    return int(text)


def parse_scheme(scheme: str | KVQConfig) -> KVQConfig:
    """A `KVQConfig` from a scheme string (a config is returned as it is); raises `SchemeError`."""
    if isinstance(scheme, KVQConfig):
        return scheme
    if not isinstance(scheme, str) or not scheme.strip():
        raise SchemeError(f"kv_scheme must be a scheme string or a KVQConfig, got {scheme!r}; {_EXAMPLE}")
    found: dict[str, str] = {}
    for part in scheme.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            name, value = _BOTH, name
        if not value:
            raise SchemeError(f"every part of a scheme must have a value, got {part!r} in {scheme!r}; {_EXAMPLE}")
        if name in found:
            raise SchemeError(f"every part of a scheme must be given once, got {name} twice in {scheme!r}")
        found[name] = value
    known = (_BOTH, "k", "v", "frame", "compress_after", *_INTS)
    for name in found:
        if name not in known:
            raise SchemeError(f"parts of a scheme must be a codec or one of {known[1:]}, got {name!r}; {_EXAMPLE}")
    if (_BOTH in found) == ("k" in found or "v" in found) or ("k" in found) != ("v" in found):
        raise SchemeError(f"a scheme must name one codec, or k= and v= both, got {scheme!r}; {_EXAMPLE}")
    if found.get("frame", "on") not in ("on", "off"):
        raise SchemeError(f"frame must be on or off, got {found['frame']!r}")
    numbers = {name: _parse_int(name, found[name]) for name in _INTS if name in found}
    return KVQConfig(
        key=found.get("k", found.get(_BOTH, "")),
        value=found.get("v", found.get(_BOTH, "")),
        frame=found.get("frame", "on") == "on",
        compress_after=found.get("compress_after", "chunk"),
        **numbers,
    )


def format_scheme(config: KVQConfig) -> str:
    """The shortest scheme string that parses to `config`."""
    parts = [config.key] if config.key == config.value else [f"k={config.key}", f"v={config.value}"]
    default = KVQConfig(key=config.key, value=config.value)
    if config.frame != default.frame:
        parts.append("frame=on" if config.frame else "frame=off")
    for name in ("edges", "sinks", "recent", "compress_after", "seed"):
        if getattr(config, name) != getattr(default, name):
            parts.append(f"{name}={getattr(config, name)}")
    return ",".join(parts)


@dataclass(frozen=True)
class SchemeRow:
    """One line of `kvq schemes`: all-in bits per stored element and the ratio to fp16 of packed tokens.

    `bits` is `None` with the reason in `note` where the codec cannot do the head size.
    """

    name: str
    bits: float | None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """fp16 bytes over packed bytes of a token, sinks and recent tokens apart."""
        return None if self.bits is None else 16.0 / self.bits


def list_schemes(head_dim: int, dtype: str = "float16") -> list[SchemeRow]:
    """Every one-codec scheme with its all-in bits per element at a head size."""
    rows = [SchemeRow(FP16, 16.0, "left to mlx-lm")]
    for family in list_codecs():
        for suffix in load_plugin("mlx_kvq_plugin.codecs", family).suffixes:
            name = family + suffix
            try:
                rows.append(SchemeRow(name, get_codec(name).bits_per_element(head_dim, dtype)))
            except (CodecError, PluginError) as error:
                rows.append(SchemeRow(name, None, str(error)))
    return rows
