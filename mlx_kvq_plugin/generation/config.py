"""Every field of transformers' `GenerationConfig`: supported, refused or harmless, and what a call makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import GenerationError

SUPPORTED = "supported"
REFUSED = "refused"
HARMLESS = "harmless"

_BEAMS = "acts on beam search only, which is refused"
_SPEED = "tells PyTorch how to compile; MLX needs no telling"
_DRAFTS = "drafts come from assistant_model, whose tokenizer is the model's own"


@dataclass(frozen=True)
class Field:
    """What `generate` does with one field of a `GenerationConfig`.

    Attributes:
        name: of the field.
        status: `supported`; `refused`, with an error when it is set to anything but `neutral`; `harmless`, where no
            value could change the result.
        default: the value of a field that nobody set.
        neutral: other values, besides `None` and the default, that ask for nothing.
        note: how it is read, or why it is refused or harmless.
    """

    name: str
    status: str
    default: Any = None
    neutral: tuple[Any, ...] = ()
    note: str = ""

    def asks_for_nothing(self, value: Any) -> bool:
        """Whether `value` leaves generation as it is by default."""
        return value is None or any(type(value) in (type(x), int, float) and value == x for x in self._nothing)

    @property
    def _nothing(self) -> tuple[Any, ...]:
        return (self.default, *self.neutral)


def _supported(name: str, note: str = "", default: Any = None) -> Field:
    return Field(name, SUPPORTED, default, (), note)


def _refused(name: str, note: str, default: Any = None, *neutral: Any) -> Field:
    return Field(name, REFUSED, default, neutral, note)


def _harmless(name: str, note: str, default: Any = None) -> Field:
    return Field(name, HARMLESS, default, (), note)


_TABLE = (
    # length
    _supported("max_length", "prompt (with its padding) and new tokens; max_new_tokens wins", 20),
    _supported("max_new_tokens", "20 where no length is set"),
    _supported("min_length", "prompt (with its padding) and new tokens; min_new_tokens wins", 0),
    _supported("min_new_tokens", "no end token before"),
    _harmless("early_stopping", _BEAMS, False),
    _supported("max_time", "seconds, looked at after every token"),
    _supported("stop_strings", "decoded with tokenizer=, else with the model's own; the string stays in the result"),
    # strategy
    _supported("do_sample", "", False),
    _refused("num_beams", "beam search would need as many caches as beams", 1),
    _refused("use_mtp", "mlx-lm has no multi-token prediction", None, False),
    # cache
    _refused("use_cache", "the cache is what this package is about", True),
    _supported("cache_implementation", '"dynamic" is the model\'s own scheme, "quantized" the one in cache_config'),
    _supported("cache_config", 'with "quantized": {"backend": "mlx-kvq", "scheme": "rvq1"}'),
    _refused("max_cache_len", "caches grow with the tokens, none is static"),
    # scores
    _supported("temperature", "read with do_sample", 1.0),
    _supported("top_k", "read with do_sample", 50),
    _supported("top_p", "read with do_sample", 1.0),
    _supported("min_p", "read with do_sample"),
    _refused("top_h", "mlx-lm has no such sampler"),
    _refused("typical_p", "mlx-lm has no such sampler", 1.0),
    _refused("epsilon_cutoff", "mlx-lm has no such sampler", 0.0),
    _refused("eta_cutoff", "mlx-lm has no such sampler", 0.0),
    _supported("repetition_penalty", "over the prompt and all new tokens", 1.0),
    _refused("encoder_repetition_penalty", "there is no encoder", 1.0),
    _harmless("length_penalty", _BEAMS, 1.0),
    _supported("no_repeat_ngram_size", "", 0),
    _supported("bad_words_ids"),
    _supported("renormalize_logits", "for scores; tokens are the same"),
    _refused("forced_bos_token_id", "put the token into the prompt instead"),
    _refused("forced_eos_token_id", "append the token to the result instead"),
    _refused("remove_invalid_values", "NaN and infinity show a broken model", False),
    _refused("exponential_decay_length_penalty", "write it as a logits_processor"),
    _supported("suppress_tokens"),
    _supported("begin_suppress_tokens"),
    _refused("sequence_bias", "write it as a logits_processor"),
    _refused("token_healing", "tokenize the prompt without its last token instead", None, False),
    _refused("guidance_scale", "it would run the model twice a token", None, 1.0),
    _refused("watermarking_config", "write it as a logits_processor"),
    # results
    _supported("num_return_sequences", "the prompt is read once", 1),
    _refused("output_attentions", "attention reads packed codes and keeps no weights", None, False),
    _refused("output_hidden_states", "mlx-lm's models return logits only", None, False),
    _supported("output_scores", "with return_dict_in_generate", False),
    _supported("output_logits", "with return_dict_in_generate"),
    _supported("return_dict_in_generate", "", False),
    # special tokens
    _supported("pad_token_id", "the first end token where it is not set"),
    _supported("bos_token_id", "the prompt where there is none"),
    _supported("eos_token_id", "one id or several"),
    # encoders
    _refused("encoder_no_repeat_ngram_size", "there is no encoder", 0),
    _harmless("decoder_start_token_id", "read by models with an encoder only"),
    # drafts
    _harmless("is_assistant", "marks a model as a draft, which changes nothing here"),
    _supported("num_assistant_tokens", "drafted at a time with assistant_model (mlx-lm's 2 where it is not set)", 20),
    _refused("num_assistant_tokens_schedule", "mlx-lm drafts the same number every time", "constant"),
    _refused("assistant_confidence_threshold", "mlx-lm drafts the same number every time", 0.4, 0.0),
    _refused("prompt_lookup_num_tokens", _DRAFTS),
    _refused("max_matching_ngram_size", _DRAFTS),
    _refused("assistant_early_exit", _DRAFTS),
    _refused("assistant_lookbehind", _DRAFTS, 10),
    _refused("target_lookbehind", _DRAFTS, 10),
    _refused("assistant_ensemble_weight", "drafts are checked exactly"),
    _refused("speculation_type", _DRAFTS),
    # performance and what transformers itself is about to drop
    _harmless("compile_config", _SPEED),
    _harmless("disable_compile", _SPEED),
    _refused("continuous_batching_config", "kvq serve does continuous batching"),
    _refused("low_memory", "it belongs to contrastive search, which is refused", None, False),
    _refused("penalty_alpha", "contrastive search is not done", None, 0.0),
    _refused("dola_layers", "decoding by contrasting layers is not done"),
    _refused("diversity_penalty", "it belongs to beam search, which is refused", 0.0),
    _refused("num_beam_groups", "it belongs to beam search, which is refused", 1),
    _refused("constraints", "they belong to beam search, which is refused"),
    _refused("force_words_ids", "they belong to beam search, which is refused"),
    _supported("prefill_chunk_size", "prompt tokens the model reads at a time (2048 where it is not set)"),
    _harmless("_from_model_config", "where the config came from"),
    _harmless("transformers_version", "who wrote the config"),
)

FIELDS: Mapping[str, Field] = {field.name: field for field in _TABLE}

PREFILL_CHUNK = 2048  # mlx-lm's own

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_CACHES = (None, "dynamic", "quantized")


def parity_table() -> str:
    """The fields as a Markdown table, as docs/generation.md shows them."""
    lines = ["| field | status | default | note |", "| --- | --- | --- | --- |"]
    for field in _TABLE:
        lines.append(f"| `{field.name}` | {field.status} | {field.default!r} | {field.note} |")
    return "\n".join(lines)


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


def check_fields(values: Mapping[str, Any]) -> None:
    """Raise `GenerationError` for a field that is unknown, or refused and set."""
    for name, value in values.items():
        field = FIELDS.get(name)
        if field is None:
            if value is not None:
                raise GenerationError(
                    f"a generation config must have fields known to mlx-kvq-plugin only, got {name}={shown(value)}; "
                    "set it to None"
                )
        elif field.status == REFUSED and not field.asks_for_nothing(value):
            raise GenerationError(
                f"{name} must be left at {field.default!r}, got {shown(value)} ({field.note}); leave it out or set "
                f"it to {field.default!r}"
            )


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


def shown(value: Any) -> str:
    """A value in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


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
