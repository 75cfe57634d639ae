"""Scheme strings: `tq4`, `rvq1,edges=2,sinks=4,recent=64`, `k=tq4,v=tq2`, `turbo4v2`, `tq@2.5`, `auto@3.25`, `fp16`.

Grammar: comma-separated parts; a part without `=` names the codec of both sides, or a codec for keys whose `partner`
stores the values, or a named scheme; `k=` and `v=` name one side each; `outliers=N` gives `tq` codecs outlier channels;
the rest set fields of `KVQConfig`: `frame=on|off`, `edges=N`, `sinks=N`, `recent=N`, `compress_after=chunk|prefill`,
`seed=N`, `rotation=NAME`, `calibration=FILE`, `sensitivity=gradient|activation`, `scaling=matched|least_squares`, and
for `auto@3.25` or `auto:kl<=0.02` `family=NAME`, `per=layer|head` and `context=N`. Every part at most once.

Named schemes are found through entry points, group `mlx_kvq_plugin.schemes`: mappings from names to scheme strings.
Parts beside a named scheme win over its own: `turbo4v2,v=tq3` is `k=grouped4,v=tq3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .allocation import AUTO, Budget, Target
from .codecs import GROUP as CODECS
from .codecs import get_codec, list_codecs
from .config import FP16, KVQConfig
from .errors import CodecError, PluginError, SchemeError
from .plugins import load_plugin, plugin_names

GROUP = "mlx_kvq_plugin.schemes"
_TEXTS = ("compress_after", "rotation", "calibration", "sensitivity", "scaling", "family", "per")
_INTS = ("edges", "sinks", "recent", "seed", "context")
_BOTH = "codec="  # no name before a "=" holds one
_BOUND = f"{AUTO}:"  # has an equals sign of its own
_EXAMPLE = 'write for example "tq4", "rvq1,edges=2,recent=64" or "k=tq4,v=tq2"'


def _parse_int(name: str, text: str) -> int:
    if not text.isdecimal():
        raise SchemeError(f"{name} in a scheme must be a non-negative integer, got {text!r}; {_EXAMPLE}")
    return int(text)


def named_schemes(entry: str) -> Mapping[str, str]:
    """Scheme strings by the names that an entry point gives them, which begin with its own; raises `PluginError`."""
    names = load_plugin(GROUP, entry)
    if not (isinstance(names, Mapping) and all(_is_named(entry, *item) for item in names.items())):
        raise PluginError(
            f"entry point {entry!r} in {GROUP} must be a mapping of names that begin with it to schemes, got {names!r}"
        )
    return names


def _is_named(entry: str, name: object, scheme: object) -> bool:
    return isinstance(name, str) and name.startswith(entry) and isinstance(scheme, str)


def _named(name: str) -> str:
    """The scheme string of a named scheme, or ""; only the entry points that its name begins with are loaded."""
    try:
        found = [named_schemes(entry) for entry in plugin_names(GROUP) if name.startswith(entry)]
    except PluginError as error:
        raise SchemeError(str(error)) from error
    owners = [names[name] for names in found if name in names]
    if len(owners) > 1:
        raise SchemeError(f"scheme {name} must be named by one plugin, got {' and '.join(owners)}; uninstall one")
    return owners[0] if owners else ""


def _partner(name: str) -> str:
    """The value codec of a scheme that names one codec."""
    if name == FP16 or Budget.parse(name) is not None or Target.parse(name) is not None:
        return name
    try:
        return get_codec(name).partner
    except (CodecError, PluginError) as error:
        raise SchemeError(str(error)) from error


def _with_outliers(name: str, count: int) -> str:
    if not (name[:2] == "tq" and name[2:].isdecimal()):
        raise SchemeError(f"outliers must be asked for with tq1 to tq6, got {name}; drop outliers= or use tq")
    return f"{name}o{count}" if count else name


def parse_scheme(scheme: str | KVQConfig) -> KVQConfig:
    """A `KVQConfig` from a scheme string (a config is returned as it is); raises `SchemeError`."""
    if isinstance(scheme, KVQConfig):
        return scheme
    if not isinstance(scheme, str) or not scheme.strip():
        raise SchemeError(f"kv_scheme must be a scheme string or a KVQConfig, got {scheme!r}; {_EXAMPLE}")
    found = _parts_of(scheme)
    both = found.get(_BOTH, "")
    if named := _named(both):
        del found[_BOTH]
        found = {**_parts_of(named), **found}
    known = (_BOTH, "k", "v", "outliers", "frame", *_TEXTS, *_INTS)
    for name in found:
        if name not in known:
            raise SchemeError(f"parts of a scheme must be a codec or one of {known[1:]}, got {name!r}; {_EXAMPLE}")
    if (_BOTH in found) == ("k" in found or "v" in found) or ("k" in found) != ("v" in found):
        raise SchemeError(f"a scheme must name one codec, or k= and v= both, got {scheme!r}; {_EXAMPLE}")
    if found.get("frame", "on") not in ("on", "off"):
        raise SchemeError(f"frame must be on or off, got {found['frame']!r}")
    key = found.get("k", found.get(_BOTH, ""))
    value = found["v"] if "v" in found else _partner(key)
    if "outliers" in found:
        count = _parse_int("outliers", found["outliers"])
        key, value = _with_outliers(key, count), _with_outliers(value, count)
    fields: dict[str, Any] = {name: _parse_int(name, found[name]) for name in _INTS if name in found}
    fields.update({name: found[name] for name in _TEXTS if name in found})
    return KVQConfig(key=key, value=value, frame=found.get("frame", "on") == "on", **fields)


def _parts_of(scheme: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in scheme.split(","):
        name, equals, value = split_part(part)
        if not equals:
            name, value = _BOTH, name
        if not value:
            raise SchemeError(f"every part of a scheme must have a value, got {part!r} in {scheme!r}; {_EXAMPLE}")
        if name in found:
            raise SchemeError(f"every part of a scheme must be given once, got {name} twice in {scheme!r}")
        found[name] = value
    return found


def split_part(part: str) -> tuple[str, str, str]:
    """Name, equals sign and value of a part of a scheme; a part that names a codec has its name only."""
    if part.strip().startswith(_BOUND):
        return part.strip(), "", ""
    name, equals, value = (piece.strip() for piece in part.partition("="))
    return name, equals, value


def format_scheme(config: KVQConfig) -> str:
    """The shortest scheme string that parses to `config`."""
    parts = [config.key] if config.value == _partner(config.key) else [f"k={config.key}", f"v={config.value}"]
    default = KVQConfig(key=config.key, value=config.value)
    if config.frame != default.frame:
        parts.append("frame=on" if config.frame else "frame=off")
    for name in ("edges", "sinks", "recent", "compress_after", "seed", *_TEXTS[1:], "context"):
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
    """Every scheme that names one codec, and the named schemes, with all-in bits per element at a head size."""
    rows = [SchemeRow(FP16, 16.0, "left to mlx-lm")]
    sources = [
        *((_codec_names, family) for family in list_codecs()),
        *((named_schemes, e) for e in plugin_names(GROUP)),
    ]
    for names_of, entry in sources:
        try:
            rows += [_row(name, head_dim, dtype) for name in names_of(entry)]
        except PluginError as error:
            rows.append(SchemeRow(entry, None, str(error)))
    return rows


def _codec_names(family: str) -> list[str]:
    return [family + suffix for suffix in load_plugin(CODECS, family).suffixes]


def _row(name: str, head_dim: int, dtype: str) -> SchemeRow:
    try:
        config = parse_scheme(name)
        sides = config.layer_spec().bits_per_element(head_dim, head_dim, dtype)
    except (CodecError, SchemeError) as error:
        return SchemeRow(name, None, str(error))
    note = "" if config.key == config.value else f"keys {config.key}, values {config.value}"
    return SchemeRow(name, sum(sides) / 2, note)
