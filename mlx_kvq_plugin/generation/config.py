"""What one call of `generate` does, read from the fields of a `GenerationConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import GenerationError
from .fields import FIELDS, check_fields

PREFILL_CHUNK = 2048  # mlx-lm's own

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_CACHES = (None, "dynamic", "quantized")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature, then top-k, then top-p, then min-p, as in transformers."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclass(frozen=True)
class Settings:
    """What one call of `generate` does; fields of the same name as in `GenerationConfig` mean the same.

    Attributes:
        new_tokens, at_least: most and fewest new tokens, prompt lengths taken into account.
        ends: ids of end tokens.
        pad: id of the padding token, or `None`.
        scheme: the cache scheme of this call, or `None` for the model's own.
        drafted: tokens to draft at a time, or `None` for mlx-lm's own number.
        sampling: how tokens are drawn, or `None` for greedy decoding.
    """

    new_tokens: int
    at_least: int
    max_time: float | None
    stop_strings: tuple[str, ...]
    sampling: Sampling | None
    repetition_penalty: float
    no_repeat_ngram_size: int
    bad_words_ids: tuple[tuple[int, ...], ...]
    suppress_tokens: tuple[int, ...]
    begin_suppress_tokens: tuple[int, ...]
    renormalize_logits: bool
    num_return_sequences: int
    output_scores: bool
    output_logits: bool
    return_dict: bool
    ends: tuple[int, ...]
    pad: int | None
    scheme: str | None
    drafted: int | None
    prefill_chunk_size: int


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a call: what is set in a later mapping wins, `None` sets nothing."""
    values: dict[str, Any] = {}
    for layer in layers:
        values.update({name: value for name, value in layer.items() if value is not None})
    return values


def plain(value: Any) -> Any:
    """A value, and those in a collection, without NumPy: `np.int64(3)` is 3."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return type(value)(map(plain, value)) if type(value) in (list, tuple, set) else value


def read_settings(values: Mapping[str, Any], prompt: int) -> Settings:
    """Settings of a call.

    Args:
        values: fields by name, as from `merged`; those that are missing or `None` take their default.
        prompt: length of the prompt, padding included.

    Raises:
        GenerationError: for a field that is unknown, refused, or has an impossible value.
    """
    check_fields(values)

    def get(name: str) -> Any:
        value = values.get(name)
        return FIELDS[name].default if value is None else value

    return Settings(
        new_tokens=_new_tokens(values, prompt),
        at_least=_at_least(values, prompt),
        max_time=_number("max_time", values.get("max_time"), above=0.0),
        stop_strings=_strings(values.get("stop_strings")),
        sampling=_sampling(values) if values.get("do_sample") else None,
        repetition_penalty=_required("repetition_penalty", get("repetition_penalty"), above=0.0),
        no_repeat_ngram_size=_integer("no_repeat_ngram_size", get("no_repeat_ngram_size"), 0),
        bad_words_ids=tuple(_ids("bad_words_ids", word) for word in values.get("bad_words_ids") or ()),
        suppress_tokens=_ids("suppress_tokens", values.get("suppress_tokens") or ()),
        begin_suppress_tokens=_ids("begin_suppress_tokens", values.get("begin_suppress_tokens") or ()),
        renormalize_logits=bool(values.get("renormalize_logits")),
        num_return_sequences=_integer("num_return_sequences", get("num_return_sequences"), 1),
        output_scores=bool(get("output_scores")),
        output_logits=bool(values.get("output_logits")),
        return_dict=bool(get("return_dict_in_generate")),
        ends=end_tokens(values),
        pad=_pad(values),
        scheme=_scheme(values.get("cache_implementation"), values.get("cache_config")),
        drafted=_optional(values, "num_assistant_tokens"),
        prefill_chunk_size=_optional(values, "prefill_chunk_size") or PREFILL_CHUNK,
    )


def sampling_fields_without_sampling(given: Mapping[str, Any], do_sample: bool) -> list[str]:
    """Those of the `given` fields that greedy decoding does not read."""
    return [] if do_sample else [n for n in _SAMPLING if n in given and not FIELDS[n].asks_for_nothing(given[n])]


def end_tokens(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of the end tokens."""
    found = values.get("eos_token_id")
    if found is None:
        return ()
    return _ids("eos_token_id", found if isinstance(found, list | tuple | set) else [found])


def _optional(values: Mapping[str, Any], name: str) -> int | None:
    return None if values.get(name) is None else _integer(name, values[name], 1)


def _new_tokens(values: Mapping[str, Any], prompt: int) -> int:
    if values.get("max_new_tokens") is not None:
        return _integer("max_new_tokens", values["max_new_tokens"], 1)
    if values.get("max_length") is None:
        return int(FIELDS["max_length"].default)
    limit = _integer("max_length", values["max_length"], 1)
    if limit <= prompt:
        raise GenerationError(
            f"max_length must be above the length of the prompt, got {limit} for {prompt} tokens; set max_new_tokens "
            "instead"
        )
    return limit - prompt


def _at_least(values: Mapping[str, Any], prompt: int) -> int:
    if values.get("min_new_tokens") is not None:
        return _integer("min_new_tokens", values["min_new_tokens"], 0)
    return max(0, _integer("min_length", values.get("min_length") or 0, 0) - prompt)


def _sampling(values: Mapping[str, Any]) -> Sampling:
    def get(name: str) -> Any:
        value = values.get(name)
        return FIELDS[name].default if value is None else value

    return Sampling(
        temperature=_required("temperature", get("temperature"), above=0.0),
        top_k=_integer("top_k", get("top_k"), 0),
        top_p=_required("top_p", get("top_p"), above=0.0, most=1.0),
        min_p=_number("min_p", values.get("min_p"), least=0.0, most=1.0) or 0.0,
    )


def _pad(values: Mapping[str, Any]) -> int | None:
    if values.get("pad_token_id") is not None:
        return _integer("pad_token_id", values["pad_token_id"], 0)
    ends = end_tokens(values)
    return ends[0] if ends else None


def _scheme(implementation: Any, config: Any) -> str | None:
    if implementation == "hybrid":  # of older files of Gemma; transformers does not read it any more either
        implementation = None
    if implementation not in _CACHES:
        raise GenerationError(
            f'cache_implementation must be "dynamic" or "quantized", got {implementation!r}; leave it out for the '
            "scheme that the model was loaded with"
        )
    if implementation != "quantized":
        if config is not None:
            raise GenerationError(
                f'cache_config must come with cache_implementation="quantized", got {config!r} with '
                f"{implementation!r}; set both or neither"
            )
        return None
    if not isinstance(config, Mapping) or set(config) != {"backend", "scheme"} or config["backend"] != "mlx-kvq":
        raise GenerationError(
            'cache_config must be {"backend": "mlx-kvq", "scheme": SCHEME} for a quantized cache, got '
            f"{config!r}; name a scheme of `kvq schemes`"
        )
    return str(config["scheme"])


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise GenerationError(f"{name} must be an integer of at least {least}, got {value!r}; change it")
    return value


def _required(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> float:
    number = _number(name, value, least=least, above=above, most=most)
    assert number is not None
    return number


def _number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> float | None:
    if value is None:
        return None
    good = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if good:
        good = (
            (least is None or value >= least) and (above is None or value > above) and (most is None or value <= most)
        )
    if not good:
        bounds = [
            f"{words} {bound:g}"
            for words, bound in (("at least", least), ("above", above), ("at most", most))
            if bound is not None
        ]
        raise GenerationError(f"{name} must be a number {' and '.join(bounds)}, got {value!r}; change it")
    return float(value)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    good = isinstance(value, list | tuple | set)
    if not good or not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value):
        raise GenerationError(f"{name} must hold token ids, got {value!r}; give a list of integers")
    return tuple(value)


def _strings(value: Any) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(text, str) and text for text in found):
        raise GenerationError(
            f"stop_strings must be a string or a list of strings, got {value!r}; leave empty ones out"
        )
    return found
