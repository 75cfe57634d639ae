"""`kvq generate` and `kvq chat`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import mlx.core as mx

from ..errors import KVQError
from ..report import cache_report
from .arguments import (
    MODEL_HELP,
    UsageError,
    add_command,
    add_progress_option,
    add_prompt_options,
    add_sampling_options,
    add_scheme_options,
    complain,
    input_file,
    note,
    output_file,
    positive,
    read_prompt,
)
from .conversation import Conversation, check_scheme, compressed_model, reply, resume, save, start
from .models import LoadedModel, load_model
from .streaming import ReplyStream

HELP = """\
/report       what the cache holds, layer by layer
/save FILE    save the conversation with its cache
/load FILE    go on with a saved one
/clear        start anew
/quit         end, as end of input does"""


def _say(
    conversation: Conversation,
    text: str,
    options: argparse.Namespace,
    draft: LoadedModel | None = None,
    live: bool = False,
) -> Any:
    """Stream the reply to stdout; returns mlx-lm's last response."""
    last, drafted = None, 0
    with ReplyStream(lambda: conversation.cache, live=live, progress=options.progress) as stream:
        for last in reply(conversation, text, options, draft, stream.prefilled):
            drafted += last.from_draft
            stream.add(last)
    if draft is not None and last is not None:
        note(f"draft model: proposed {drafted} of {last.generation_tokens} tokens")
    return last


def _print_statistics(conversation: Conversation, response: Any) -> None:
    report = cache_report(conversation.cache)
    total = len(conversation.token_ids) - response.generation_tokens
    cached = total - response.prompt_tokens
    note(
        f"prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens/s"
        + (f" ({cached} more were in the cache)" if cached else "")
    )
    note(f"generation: {response.generation_tokens} tokens, {response.generation_tps:.1f} tokens/s")
    packed = max((layer.packed for layer in report.layers), default=0)
    note(
        f"cache: {report.nbytes / 2**20:.2f} MiB held, {report.fp16_nbytes / 2**20:.2f} MiB in fp16, ratio "
        f"{report.ratio:.2f}; {report.compressed} of {len(report.layers)} layers compressed, {packed} of "
        f"{report.tokens} tokens packed" + (", the others in float32" if conversation.loaded.float32 else "")
    )
    note(f"peak memory: {mx.get_peak_memory() / 2**30:.2f} GiB")


def _opened(loaded: LoadedModel, options: argparse.Namespace) -> Conversation:
    if options.prompt_cache is None:
        chat = loaded.tokenizer.has_chat_template and not options.no_chat_template
        if options.system is not None and not chat:
            raise UsageError("--system must go with a chat template, got a plain prompt; put the text into --prompt")
        return start(loaded, chat, options.system)
    return resume(loaded, input_file(options.prompt_cache), chat=not options.no_chat_template)


def _run_generate(options: argparse.Namespace) -> int:
    prompt = read_prompt(options.prompt)
    target = output_file(options.save_prompt_cache) if options.save_prompt_cache is not None else None
    if options.prompt_cache is not None and options.system is not None:
        raise UsageError("--system must begin a conversation, got a --prompt-cache to continue; leave one of them out")
    mx.random.seed(options.seed)
    with compressed_model(options, options.prompt_cache) as loaded:
        conversation = _opened(loaded, options)
        draft = load_model(options.draft_model, options.float32) if options.draft_model is not None else None
        response = _say(conversation, prompt, options, draft, options.live)
        if options.report:
            note(str(cache_report(conversation.cache)))
        _print_statistics(conversation, response)
        if target is not None:
            save(conversation, target)
    return 0


def _lines() -> Iterator[str]:
    """What the user types, until the end of input."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (gives `input` a history and line editing)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _command(conversation: Conversation, line: str, options: argparse.Namespace) -> Conversation:
    """Carry out a line that starts with a slash; returns the conversation to go on with."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if bool(argument) != (name in ("/save", "/load")):
        name = ""
    match name:
        case "/report":
            note(str(cache_report(conversation.cache)))
        case "/save":
            info = save(conversation, output_file(argument))
            note(f"saved {info.tokens} tokens")
        case "/load":
            path = input_file(argument)
            check_scheme(conversation, path)
            loaded = resume(conversation.loaded, path)
            if loaded.messages is None:
                raise UsageError(f"{path.name} must hold a chat, got plain text; continue it with kvq generate")
            note(f"loaded {len(loaded.token_ids)} tokens, {len(loaded.messages)} messages")
            return loaded
        case "/clear":
            return start(conversation.loaded, True, options.system)
        case _:
            raise UsageError(f"a command must be /report, /save FILE, /load FILE, /clear or /quit, got {line!r}")
    return conversation


def _run_chat(options: argparse.Namespace) -> int:
    mx.random.seed(options.seed)
    with compressed_model(options) as loaded:
        if not loaded.tokenizer.has_chat_template:
            raise UsageError(
                f"a model must have a chat template to chat, got {loaded.source!r} without one; use kvq generate"
            )
        conversation = start(loaded, True, options.system)
        if sys.stdin.isatty():
            note(HELP)
        for line in _lines():
            if line == "/quit":
                break
            try:
                if line.startswith("/"):
                    conversation = _command(conversation, line, options)
                else:
                    _say(conversation, line, options)
            except KVQError as error:  # a mistake does not end the chat
                complain(error)
    return 0


def add_commands(commands: Any) -> None:
    """Add `generate` and `chat`."""
    generate = add_command(
        commands,
        "generate",
        _run_generate,
        "Generate text with a compressed KV cache. The text goes to stdout, statistics go to stderr. A prompt after "
        "--prompt-cache continues what the file holds: a new turn after a reply, the same message after kvq cache "
        "create.",
        '  kvq generate --prompt "Why is the sky blue?" --kv-scheme rvq1\n'
        "  kvq generate mlx-community/Qwen3-8B-4bit --prompt @question.txt --save-prompt-cache chat.safetensors\n"
        '  kvq generate --prompt-cache chat.safetensors --prompt "And at night?"',
    )
    generate.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} (default: demo:smollm2)")
    add_prompt_options(generate)
    add_scheme_options(generate)
    add_sampling_options(generate)
    generate.add_argument("--prompt-cache", metavar="FILE", help="go on from this file")
    generate.add_argument("--save-prompt-cache", metavar="FILE", help="save the cache at the end")
    generate.add_argument(
        "--draft-model", metavar="MODEL", help="speculative decoding: the same tokens, proposed by a smaller model"
    )
    generate.add_argument(
        "--num-draft-tokens", type=positive, default=3, metavar="N", help="proposed at a time (default: 3)"
    )
    generate.add_argument(
        "--live",
        action="store_true",
        help="show below the text, while it grows, how many bytes the cache holds and what fp16 would hold",
    )
    generate.add_argument("--report", action="store_true", help="what the cache holds, layer by layer")

    add_progress_option(generate)

    chat = add_command(
        commands,
        "chat",
        _run_chat,
        "Chat in the terminal with one compressed KV cache for all turns.",
        "  kvq chat\n"
        "  kvq chat mlx-community/Qwen3-8B-4bit --kv-scheme rvq1,edges=2 --temp 0.7\n\n"
        f"in the chat:\n{HELP}",
    )
    chat.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} (default: demo:smollm2)")
    chat.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    add_scheme_options(chat)
    add_sampling_options(chat)
    add_progress_option(chat)
