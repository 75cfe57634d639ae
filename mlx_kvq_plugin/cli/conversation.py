"""A prompt cache together with the tokens it holds, continued turn by turn and kept in files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from jinja2 import TemplateError
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler

from ..generation.inputs import encode_text
from ..loading import compress, compression_of, make_prompt_cache
from ..progress import Progress, progress_bar, silent
from ..prompt_cache import PromptCacheInfo, load_prompt_cache, read_prompt_cache_info, save_prompt_cache
from ..schemes import format_scheme, parse_scheme
from ..sliding import allow_speculation
from .arguments import DEFAULT_SCHEME, UsageError, input_file, note, one_line
from .models import DEFAULT_MODEL, LoadedModel, load_model

Messages = list[dict[str, str]]


@dataclass
class Conversation:
    """What was said, and its cache.

    Attributes:
        loaded: the model, compressed.
        cache: one cache per layer.
        token_ids: the tokens that the cache holds.
        messages: what they stand for in terms of the chat template; `None` for plain text. A last message of the
            user is still open: the next text continues it.
    """

    loaded: LoadedModel
    cache: list[Any]
    token_ids: list[int] = field(default_factory=list)
    messages: Messages | None = None


def start(loaded: LoadedModel, chat: bool, system: str | None = None) -> Conversation:
    """An empty conversation."""
    messages = ([{"role": "system", "content": system}] if system else []) if chat else None
    return Conversation(loaded, make_prompt_cache(loaded.model), messages=messages)


def resume(loaded: LoadedModel, path: Path, *, chat: bool = True) -> Conversation:
    """The conversation that a prompt-cache file holds; `chat=False` goes on with it as plain text."""
    cache, info = load_prompt_cache(path, loaded.model)
    if not info.token_ids:
        raise UsageError(f"{path.name} must store its token ids to be continued, got none; save it with token_ids=...")
    messages = json.loads(info.metadata["messages"]) if chat and "messages" in info.metadata else None
    return Conversation(loaded, cache, list(info.token_ids), messages)


def save(conversation: Conversation, path: Path) -> PromptCacheInfo:
    """Write the cache with everything needed to go on, here or in `mlx_lm.generate --prompt-cache-file`."""
    loaded = conversation.loaded
    metadata = {"model": loaded.source, "tokenizer_config": "{}", "float32": json.dumps(loaded.float32)}
    if conversation.messages is not None:
        metadata["messages"] = json.dumps(conversation.messages)
    try:
        return save_prompt_cache(
            path, conversation.cache, model=loaded.model, token_ids=conversation.token_ids, metadata=metadata
        )
    except OSError as error:
        raise UsageError(
            f"the prompt-cache file {str(path)!r} must be writable, got {one_line(error)}; choose another place"
        ) from error


def _template(conversation: Conversation, **options: Any) -> list[int]:
    tokenizer = conversation.loaded.tokenizer
    try:
        text = tokenizer.apply_chat_template(conversation.messages, tokenize=False, **options)
    except (TemplateError, ValueError) as error:
        raise UsageError(
            f"the model's chat template must accept the messages, got {one_line(error)}; "
            "change them or use --no-chat-template"
        ) from error
    return list(tokenizer.encode(text, add_special_tokens=False))


def _hear(conversation: Conversation, text: str) -> None:
    messages = conversation.messages
    assert messages is not None
    if messages and messages[-1]["role"] == "user":
        messages[-1] = {"role": "user", "content": messages[-1]["content"] + text}
    else:
        messages.append({"role": "user", "content": text})


def _plain_tokens(conversation: Conversation, text: str) -> list[int]:
    tokenizer = conversation.loaded.tokenizer
    if not conversation.token_ids:
        return encode_text(tokenizer, text)
    return conversation.token_ids + list(tokenizer.encode(text, add_special_tokens=False))


def _align(conversation: Conversation, ids: list[int]) -> list[int]:
    """Make the cache a prefix of `ids` and return the rest, at least one token.

    Templates may render an earlier turn otherwise than it was generated; the cache is then trimmed to the equal
    part, or made anew where a sliding window cannot be trimmed.
    """
    held = conversation.token_ids
    pairs = zip(held, ids[:-1], strict=False)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(held), len(ids) - 1))
    if common < len(held):
        if can_trim_prompt_cache(conversation.cache):
            trim_prompt_cache(conversation.cache, len(held) - common)
        else:
            conversation.cache, common = make_prompt_cache(conversation.loaded.model), 0
    conversation.token_ids = list(ids)
    return ids[common:]


def _drafting(conversation: Conversation, draft: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    """What mlx-lm needs for speculative decoding; raises `UsageError` where it would go wrong."""
    loaded, cache = conversation.loaded, conversation.cache
    sizes = loaded.tokenizer.vocab_size, draft.tokenizer.vocab_size
    if sizes[0] != sizes[1]:
        raise UsageError(f"a draft model must have the model's {sizes[0]} tokens, got {sizes[1]}; choose another one")
    if len(cache) != len(loaded.model.layers):
        raise UsageError(
            f"mlx-lm's speculative decoding must have one cache a layer, got {len(cache)} for "
            f"{len(loaded.model.layers)} layers; leave --draft-model out"
        )
    allow_speculation(cache)
    if not can_trim_prompt_cache(cache):
        raise UsageError(
            "speculative decoding must have caches that can be trimmed, got recurrent ones or one that mlx-lm made and "
            "whose window is full; leave --draft-model out"
        )
    return {
        "draft_model": draft.model,
        "num_draft_tokens": options.num_draft_tokens,
        "prompt_cache": cache + make_prompt_cache(draft.model),
    }


def reply(
    conversation: Conversation,
    text: str,
    options: argparse.Namespace,
    draft: LoadedModel | None = None,
    prefilled: Callable[[int, int], None] | None = None,
) -> Iterator[Any]:
    """Say `text` to the model and yield mlx-lm's responses.

    Args:
        options: with `max_tokens`, `temp` and `top_p`; `num_draft_tokens` with a draft model.
        draft: proposes tokens that the model verifies.
        prefilled: called with the tokens of the prompt that are read, and how many there are; not with a draft model.
    """
    loaded = conversation.loaded
    if conversation.messages is None:
        ids = _plain_tokens(conversation, text)
    else:
        _hear(conversation, text)
        ids = _template(conversation, add_generation_prompt=True)
    answer = ""
    rest = _align(conversation, ids)
    drafting = {"prompt_cache": conversation.cache} if draft is None else _drafting(conversation, draft, options)
    for response in mlx_lm.stream_generate(
        loaded.model,
        loaded.tokenizer,
        rest,
        max_tokens=options.max_tokens,
        sampler=make_sampler(temp=options.temp, top_p=options.top_p),
        prompt_progress_callback=prefilled,
        **drafting,
    ):
        conversation.token_ids.append(response.token)  # mlx-lm feeds every token it yields, the last one too
        answer += response.text
        yield response
    if draft is not None:  # what was not verified before the end is not in the cache
        del conversation.token_ids[conversation.cache[0].offset :]
    if conversation.messages is not None:
        conversation.messages.append({"role": "assistant", "content": answer})


def prefill(conversation: Conversation, text: str, progress: Progress = silent) -> None:
    """Let the model read `text`, the beginning of a message of the user or plain text, without replying."""
    if conversation.messages is None:
        ids = _plain_tokens(conversation, text)
    else:
        _hear(conversation, text)
        ids = _template(conversation, add_generation_prompt=False, continue_final_message=True)
    for _ in generate_step(
        mx.array(_align(conversation, ids)),
        conversation.loaded.model,
        max_tokens=0,
        prompt_cache=conversation.cache,
        prompt_progress_callback=lambda done, of: progress("reading the prompt", done, of),
    ):
        pass


def _scheme(asked: str | None, info: PromptCacheInfo | None) -> str:
    """The scheme to compress with; a file's caches go on as they are."""
    scheme = format_scheme(parse_scheme(asked if asked is not None else info.scheme if info else DEFAULT_SCHEME))
    if info is not None and scheme != info.scheme:
        raise UsageError(
            f"--kv-scheme must be the file's scheme {info.scheme!r}, got {asked!r}; leave the option out or make the "
            "file again"
        )
    return scheme


@contextmanager
def compressed_model(options: argparse.Namespace, file: str | None = None) -> Iterator[LoadedModel]:
    """The model of the options, compressed while the context lasts.

    Args:
        options: with `model`, `kv_scheme`, `unknown_arch`, `float32` and `progress`.
        file: a prompt-cache file, which gives what the options leave open.
    """
    info = read_prompt_cache_info(input_file(file)) if file is not None else None
    scheme = _scheme(options.kv_scheme, info)  # a wrong scheme fails before the weights are read
    name = options.model or (info.model if info else "") or DEFAULT_MODEL
    loaded = load_model(name, float32_like(options.float32, info))
    with progress_bar(options.progress) as progress:
        compression = compress(
            loaded.model, scheme, unknown_arch=options.unknown_arch, source=loaded.source, progress=progress
        )
    with compression:
        choice = compression.maker.choice
        if choice is not None:
            note(f"kvq: {choice.scheme}: {choice.summary()}")
            for path in choice.kept:
                note(f"kvq: kept in {path}")
        yield loaded


def float32_like(asked: bool | None, info: PromptCacheInfo | None) -> bool | None:
    """Whether to convert the weights: as asked, else as the file's model was."""
    if asked is None and info is not None and "float32" in info.metadata:
        return bool(json.loads(info.metadata["float32"]))
    return asked


def check_scheme(conversation: Conversation, path: Path) -> None:
    """Refuse a file of another scheme than the running model's."""
    maker, info = compression_of(conversation.loaded.model), read_prompt_cache_info(path)
    if maker is not None and maker.scheme != info.scheme:
        raise UsageError(
            f"{path.name} must have this chat's scheme {maker.scheme!r}, got {info.scheme!r}; "
            f"start kvq chat with --kv-scheme {info.scheme}"
        )
