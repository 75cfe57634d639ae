"""CausalLM: a model of mlx-lm with transformers' `generate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream, wired_limit

from ..config import KVQConfig
from ..errors import GenerationError
from ..loading import compress, compression_of, make_prompt_cache
from ..schemes import format_scheme, parse_scheme
from . import decoding
from .config import PREFILL_CHUNK, Settings, end_tokens, merged, plain, read_settings, sampling_fields_without_sampling
from .decoding import Row
from .endings import Ending
from .fields import FIELDS, shown
from .inputs import check_callables, check_draft, check_seed, check_vocabulary, encode_text, read_prompts
from .processors import make_processors
from .prompts import PromptCache


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns with `return_dict_in_generate=True`; also by name, as in `output["sequences"]`.

    Attributes:
        sequences: ids `(B, T)` int32, prompts included, padded on the right.
        scores, logits: of every step `(B, V)`, processed and as the model gave them, in the model's dtype; rows that
            ended earlier are NaN. `None` where they were not asked for.
        past_key_values: the prompt cache of the sequence, or a tuple of them for several.
    """

    sequences: mx.array
    scores: tuple[mx.array, ...] | None
    logits: tuple[mx.array, ...] | None
    past_key_values: PromptCache | tuple[PromptCache, ...]

    def __getitem__(self, name: str) -> Any:
        return vars(self)[name]


class CausalLM:
    """A language model that generates as transformers' models do.

    Attributes:
        model: mlx-lm's model.
        tokenizer: mlx-lm's tokenizer, or `None`.
        generation_config: transformers' `GenerationConfig`, the defaults of `generate`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        kv_scheme: str | KVQConfig | None = None,
        *,
        generation_config: Any = None,
        unknown_arch: str = "error",
        source: str = "",
    ):
        """
        Args:
            model: loaded by mlx-lm or `kvq.load`.
            tokenizer: loaded with it; needed for text only.
            kv_scheme: compress the model so; `None` leaves it as it is.
            generation_config: defaults; without one, or one without end tokens, those of the tokenizer are taken.
            unknown_arch, source: as for `kvq.compress`.

        Raises:
            KVQError: as `kvq.compress`.
        """
        self.model, self.tokenizer = model, tokenizer
        self._options: dict[str, Any] = {"unknown_arch": unknown_arch, "source": source}
        self._compression = None if kv_scheme is None else compress(model, kv_scheme, **self._options)
        self.generation_config = _generation_config(generation_config)
        if self.generation_config.eos_token_id is None and tokenizer is not None:
            self.generation_config.eos_token_id = sorted(tokenizer.eos_token_ids)

    @property
    def scheme(self) -> str:
        """The cache scheme of the model as it is now."""
        maker = compression_of(self.model)
        return "fp16" if maker is None else maker.scheme

    def encode(self, text: str) -> list[int]:
        """Ids of a text as `mlx_lm.generate` makes them: special tokens are added where the text has none."""
        return encode_text(self._tokenizer(), text)

    def prefill(self, prompt: str | Any) -> PromptCache:
        """Read a prompt into a new `PromptCache`, to be continued with `generate(..., past_key_values=)`.

        The last token is left to the next call, so what is generated is what `generate` gives without the cache.

        Args:
            prompt: text, or the ids of one sequence.

        Raises:
            GenerationError: for anything but one sequence of tokens of the vocabulary.
        """
        _, prompts = read_prompts(self.encode(prompt) if isinstance(prompt, str) else prompt, None, None, ())
        if len(prompts) != 1:
            raise GenerationError(
                f"a prompt to prefill must be one sequence, got {len(prompts)}; prefill them one by one"
            )
        check_vocabulary(self.model, prompts)
        tokens, caches = prompts[0], make_prompt_cache(self.model)
        decoding.read(self.model, caches, tokens[:-1], PREFILL_CHUNK)
        return PromptCache(self, caches, tokens, held=len(tokens) - 1, scheme=self.scheme)

    def generate(
        self,
        input_ids: Any = None,
        generation_config: Any = None,
        *,
        attention_mask: Any = None,
        logits_processor: Sequence[Callable[..., Any]] | None = None,
        stopping_criteria: Sequence[Callable[..., Any]] | None = None,
        streamer: Any = None,
        past_key_values: PromptCache | Sequence[PromptCache] | None = None,
        assistant_model: Any = None,
        tokenizer: Any = None,
        seed: int | None = None,
        **fields: Any,
    ) -> mx.array | GenerateOutput:
        """Continue prompts, as transformers' `generate` does.

        Args:
            input_ids: `(T,)` or `(B, T)`, a list, NumPy or MLX array; rows padded on the left. `None` is the bos token.
            generation_config: transformers' `GenerationConfig`; what it leaves at `None` comes from the model's.
            attention_mask: as `input_ids`, 0 for padding; without one, pad tokens on the left are padding.
            logits_processor: callables `(input_ids (1, T), scores (1, V)) -> scores`, called for every sequence by
                itself with MLX arrays without padding; they may return NumPy arrays.
            stopping_criteria: callables `(input_ids (1, T), scores) -> bool` or an array of it, called after every
                token of every sequence; `scores` is a tuple of what was kept with `output_scores`, or `None`.
            streamer: with `put(array)` and `end()`, given NumPy arrays: the prompt `(B, T)`, then tokens `(B,)`.
            past_key_values: a `PromptCache` (a list of one per row for several) that holds the beginning of
                `input_ids`; it is updated in place. With `num_return_sequences` it then stands for the prompt.
            assistant_model: a draft model, mlx-lm's or a `CausalLM` (one sequence; speculative decoding).
            tokenizer: decodes for `stop_strings`; the model's own by default.
            seed: of MLX's global random numbers, before the first token is drawn.
            **fields: of `GenerationConfig`; they win over both configs. docs/generation.md has the table.

        Returns:
            Ids `(B * num_return_sequences, T)` int32 with the prompts as given, padded on the right after rows that
            ended earlier; with `return_dict_in_generate` a `GenerateOutput`.

        Raises:
            GenerationError: for what is not supported or does not fit together, by name.
        """
        fields = {name: plain(value) if name in FIELDS else value for name, value in fields.items()}
        values = self._values(generation_config, fields)
        ids, prompts = self._prompts(input_ids, attention_mask, values)
        settings = read_settings(values, ids.shape[1])
        for name in sampling_fields_without_sampling(fields, settings.sampling is not None):
            warnings.warn(f"{name} is read with do_sample=True only; greedy decoding goes without it", stacklevel=2)
        draft = assistant_model.model if isinstance(assistant_model, CausalLM) else assistant_model
        check_vocabulary(self.model, prompts, settings)
        check_callables("logits_processor", logits_processor)
        check_callables("stopping_criteria", stopping_criteria)
        given = _prompt_caches(past_key_values, self, len(prompts))
        _check_together(settings, len(prompts), draft)
        if draft is not None:
            check_draft(self.model, draft)
        decode = self._decode(tokenizer) if settings.stop_strings else None
        if seed is not None:
            mx.random.seed(check_seed(seed))
        schemes = {cache.scheme for cache in given}
        if settings.scheme is not None:
            schemes.add(format_scheme(parse_scheme(settings.scheme)))
        if len(schemes) > 1:
            raise GenerationError(
                f"past_key_values must be of one scheme, that of cache_config if there is one, got "
                f"{' and '.join(sorted(schemes))}; prefill them with the same scheme"
            )
        with self._using(next(iter(schemes), None)), wired_limit(self.model, [generation_stream]):
            rows = self._generate(
                prompts, ids, settings, given, draft, decode, logits_processor or (), stopping_criteria or (), streamer
            )
            return self._result(ids, rows, settings, given)

    # ---- parts of a call ---------------------------------------------------------------------------------------

    def _values(self, generation_config: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a call by name."""
        for name, value in fields.items():
            if name not in FIELDS and value is not None:
                raise GenerationError(
                    "an argument of generate must be one it knows or a field of GenerationConfig, got "
                    f"{name}={shown(value)}; leave it out"
                )
        own = self.generation_config.to_dict()
        if generation_config is None:
            return {**merged(own), **fields}
        from transformers import GenerationConfig

        if not isinstance(generation_config, GenerationConfig):
            raise GenerationError(
                "generation_config must be a transformers.GenerationConfig, got "
                f"{type(generation_config).__name__}; pass a dict as **keywords"
            )
        named = {name: plain(value) for name, value in generation_config.to_dict().items()}
        return {**merged(own, named), **fields}

    def _prompts(
        self, input_ids: Any, attention_mask: Any, values: Mapping[str, Any]
    ) -> tuple[np.ndarray, list[list[int]]]:
        if input_ids is None:
            if values.get("bos_token_id") is None:
                raise GenerationError(
                    "input_ids must be given for a model without a bos_token_id, got None; tokenize a prompt first"
                )
            input_ids = [values["bos_token_id"]]
        return read_prompts(input_ids, attention_mask, values.get("pad_token_id"), end_tokens(values))

    def _tokenizer(self, given: Any = None) -> Any:
        tokenizer = self.tokenizer if given is None else given
        if tokenizer is None:
            raise GenerationError("text must come with a tokenizer, got a model without one; pass tokenizer=")
        return tokenizer

    def _decode(self, tokenizer: Any) -> Callable[[list[int]], str]:
        tokenizer = self._tokenizer(tokenizer)
        return lambda tokens: str(tokenizer.decode(tokens))

    @contextmanager
    def _using(self, scheme: str | None) -> Iterator[None]:
        """The model with caches of another scheme, for a while; not for several threads at once."""
        own = self.scheme
        if scheme is None or scheme == own:
            yield
            return
        compressed = compression_of(self.model)
        if compressed is not None:
            if self._compression is None:
                raise GenerationError(
                    f"a model must be compressed by kvq.CausalLM or kvq.AutoModelForCausalLM to change its scheme for "
                    f"a call, got one compressed with {own} before; make it with kv_scheme="
                )
            self._compression.undo()
        try:
            with compress(self.model, scheme, **self._options):
                yield
        finally:
            if compressed is not None:
                self._compression = compress(self.model, compressed.config, **self._options)

    def _generate(
        self,
        prompts: list[list[int]],
        ids: np.ndarray,
        settings: Settings,
        given: Sequence[PromptCache],
        draft: Any,
        decode: Callable[[list[int]], str] | None,
        processors: Sequence[Callable[..., Any]],
        criteria: Sequence[Callable[..., Any]],
        streamer: Any,
    ) -> list[Row]:
        copies, ending = settings.num_return_sequences, Ending(settings, decode, criteria)
        starts = []
        for i, tokens in enumerate(prompts):
            unread = given[i].unread(tokens) if given else tokens
            caches = given[i].caches if given else make_prompt_cache(self.model)
            held = len(tokens) - len(unread)
            if draft is None:
                decoding.read(self.model, caches, unread[:-1], settings.prefill_chunk_size)
                held = len(tokens) - 1
                if given:
                    given[i].token_ids, given[i].held = list(tokens), held
            starts.append((tokens, caches, held))
        rows = [Row(list(t), len(t), caches, held) for t, caches, held in starts for _ in range(copies)]
        starts.clear()
        continued = list(given) if copies == 1 else []
        for cache in continued:
            cache.caches = []  # the rows have them: a batch copies them, and nobody needs both
        own = [make_processors(settings, row.prompt, processors) for row in rows]
        emit = _emitter(streamer, len(rows), settings.pad)
        try:
            if streamer is not None:
                streamer.put(np.repeat(ids, copies, axis=0))
            if draft is None:
                decoding.decode(self.model, rows, own, settings, ending, emit, ahead=not processors)
            else:
                draft_caches = make_prompt_cache(draft)
                decoding.read(draft, draft_caches, rows[0].tokens[: rows[0].held], settings.prefill_chunk_size)
                decoding.speculate(self.model, draft, draft_caches, rows[0], own[0], settings, ending, emit)
        finally:
            if streamer is not None:
                streamer.end()
            for cache, row in zip(continued, rows, strict=False):
                cache.caches, cache.token_ids, cache.held = row.caches, list(row.tokens), row.held
        return rows

    def _result(
        self, ids: np.ndarray, rows: Sequence[Row], settings: Settings, given: Sequence[PromptCache]
    ) -> mx.array | GenerateOutput:
        made = [row.tokens[row.prompt :] for row in rows]
        longest = max(map(len, made))
        if any(len(tokens) < longest for tokens in made) and settings.pad is None:
            raise GenerationError(
                "pad_token_id must be set where sequences end at different lengths, got None; set it, for example to 0"
            )
        prompts = np.repeat(ids, settings.num_return_sequences, axis=0).tolist()
        padded = [[*p, *t, *[settings.pad] * (longest - len(t))] for p, t in zip(prompts, made, strict=True)]
        sequences = mx.array(padded, mx.int32)
        if not settings.return_dict:
            return sequences
        if given and settings.num_return_sequences == 1:
            caches = tuple(given)
        else:
            scheme = self.scheme
            caches = tuple(PromptCache(self, row.caches, row.tokens, held=row.held, scheme=scheme) for row in rows)
        return GenerateOutput(
            sequences,
            _stacked([row.scores for row in rows]) if settings.output_scores else None,
            _stacked([row.logits for row in rows]) if settings.output_logits else None,
            caches if len(caches) > 1 else caches[0],
        )


def _generation_config(given: Any) -> Any:
    """A copy that may be changed."""
    from transformers import GenerationConfig

    made = GenerationConfig()
    if given is not None:
        if not isinstance(given, GenerationConfig):
            raise GenerationError(
                f"generation_config must be a transformers.GenerationConfig, got {type(given).__name__}; make one"
            )
        made.update(**given.to_dict(), allow_custom_entries=True)
    return made


def _prompt_caches(given: Any, model: CausalLM, rows: int) -> list[PromptCache]:
    """The caches of a call, one per row, or none."""
    if given is None:
        return []
    found = [given] if isinstance(given, PromptCache) else given
    if not isinstance(found, list | tuple) or not all(isinstance(cache, PromptCache) for cache in found):
        raise GenerationError(
            "past_key_values must be a kvq.PromptCache or a list of them, got "
            f"{type(given).__name__}; make one with prefill, or kvq.PromptCache.load"
        )
    if len(found) != rows or len({id(cache) for cache in found}) != rows:
        raise GenerationError(
            f"past_key_values must be one cache for each of the {rows} prompts, got {len({id(c) for c in found})}; "
            "fork it for every row"
        )
    if any(cache.model.model is not model.model for cache in found):
        raise GenerationError("past_key_values must belong to this model, got another model's; prefill them anew")
    return list(found)


def _check_together(settings: Settings, prompts: int, draft: Any) -> None:
    """Raise for settings that each are supported, but not in one call."""
    if (settings.output_scores or settings.output_logits) and not settings.return_dict:
        raise GenerationError(
            "output_scores and output_logits must come with return_dict_in_generate=True, got False; set it too"
        )
    if draft is None:
        return
    rows = prompts * settings.num_return_sequences
    if rows > 1:
        raise GenerationError(
            f"assistant_model must help one sequence at a time, got {rows}; generate them one by one or without it"
        )
    if settings.output_scores or settings.output_logits:
        raise GenerationError(
            "output_scores and output_logits must be off with assistant_model, got on; generate without one of them"
        )


def _emitter(streamer: Any, rows: int, pad: int | None) -> Callable[[dict[int, int]], None]:
    """Hands new tokens to a streamer, `pad` (or 0) in place of rows that are complete."""
    if streamer is None:
        return lambda tokens: None
    return lambda tokens: streamer.put(np.array([tokens.get(i, pad or 0) for i in range(rows)]))


def _stacked(rows: Sequence[Sequence[mx.array]]) -> tuple[mx.array, ...]:
    """Every step's `(B, V)`; NaN for rows without that step."""
    longest = max(rows, key=len)
    missing = mx.full(longest[0].shape, float("nan"), longest[0].dtype)
    return tuple(mx.stack([row[i] if i < len(row) else missing for row in rows]) for i in range(len(longest)))
