"""Every field of transformers' `GenerationConfig`: supported, refused or harmless."""

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


def parity_table() -> str:
    """The fields as a Markdown table, as docs/generation.md shows them."""
    lines = ["| field | status | default | note |", "| --- | --- | --- | --- |"]
    for field in _TABLE:
        lines.append(f"| `{field.name}` | {field.status} | {field.default!r} | {field.note} |")
    return "\n".join(lines)


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
                f"{name} must be left at {field.default!r}, got {shown(value)} ({field.note}); leave it out or set it "
                f"to {field.default!r}"
            )


def shown(value: Any) -> str:
    """A value in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
