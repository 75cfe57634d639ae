"""`kvq cache`: prompt-cache files are made, shown, checked, pushed to a repository and pulled from one."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import asdict
from typing import Any

from ..errors import PromptCacheError
from ..progress import progress_bar
from ..prompt_cache import PromptCacheInfo, read_prompt_cache_info, verify_prompt_cache
from ..prompt_hub import FILE_NAME, pull_prompt_cache, push_prompt_cache
from .arguments import (
    MODEL_HELP,
    UsageError,
    add_command,
    add_progress_option,
    add_prompt_options,
    add_scheme_options,
    add_weight_options,
    complain,
    input_file,
    output_file,
    read_prompt,
)
from .conversation import compressed_model, float32_like, prefill, save, start
from .models import load_model


def _size(info: PromptCacheInfo) -> str:
    ratio = info.fp16_nbytes / info.nbytes if info.nbytes else 1.0
    return f"{info.nbytes / 2**20:.2f} MiB held, {info.fp16_nbytes / 2**20:.2f} MiB in fp16, ratio {ratio:.2f}"


def _run_create(options: argparse.Namespace) -> int:
    prompt, path = read_prompt(options.prompt), output_file(options.out)
    with compressed_model(options) as loaded:
        chat = loaded.tokenizer.has_chat_template and not options.no_chat_template
        if options.system is not None and not chat:
            raise UsageError("--system must go with a chat template, got a plain prompt; put the text into --prompt")
        conversation = start(loaded, chat, options.system)
        with progress_bar(options.progress) as progress:
            prefill(conversation, prompt, progress)
        info = save(conversation, path)
    print(f"{path}: {info.tokens} tokens, scheme {info.scheme}, {_size(info)}")
    return 0


def _run_info(options: argparse.Namespace) -> int:
    info = read_prompt_cache_info(input_file(options.file))
    if options.json:
        print(json.dumps(asdict(info), indent=2))
        return 0
    notes = sorted({text for text in info.notes if text})
    rows = {
        "format": info.format,
        "scheme": info.scheme,
        "model": info.model or "not named",
        "adapter": info.adapter or "none",
        "fingerprint": info.fingerprint,
        "layers": info.layers,
        "tokens": f"{info.tokens} ({'ids stored' if info.token_ids else 'ids not stored'})",
        "size": _size(info),
        **({"notes": "; ".join(notes)} if notes else {}),
        "metadata": ", ".join(info.metadata) or "none",
    }
    for name, value in rows.items():
        print(f"{name:12s} {value}")
    return 0


def _run_verify(options: argparse.Namespace) -> int:
    path = input_file(options.file)
    try:
        info = verify_prompt_cache(path)
    except PromptCacheError as error:
        complain(error)
        return 1
    if options.model is not None:
        model = load_model(options.model, float32_like(options.float32, info)).model
        try:
            verify_prompt_cache(path, model)
        except PromptCacheError as error:
            complain(error)
            return 1
    print(f"ok: {path}, {info.tokens} tokens, scheme {info.scheme}" + (", made by this model" if options.model else ""))
    return 0


def _run_push(options: argparse.Namespace) -> int:
    address = push_prompt_cache(
        input_file(options.file),
        options.repository,
        filename=options.filename,
        revision=options.revision,
        private=options.private or None,
        commit_message=options.message,
        create_pr=options.create_pr,
    )
    print(address)
    return 0


def _run_pull(options: argparse.Namespace) -> int:
    path = output_file(options.out)
    found = pull_prompt_cache(options.repository, filename=options.filename, revision=options.revision)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        shutil.copyfile(found, scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    info = read_prompt_cache_info(path)
    print(f"{path}: {info.tokens} tokens, scheme {info.scheme}, {_size(info)}")
    return 0


def add_commands(commands: Any) -> None:
    """Add `cache` with its commands."""
    parser = commands.add_parser(
        "cache",
        help="Make and check prompt-cache files",
        description="Make and check prompt-cache files.",
        epilog="kvq cache COMMAND --help shows examples.",
        allow_abbrev=False,
    )
    cache = parser.add_subparsers(metavar="COMMAND", required=True)
    create = add_command(
        cache,
        "create",
        _run_create,
        "Let a model read a long prompt once and save the compressed cache. With a chat template the prompt is the "
        "beginning of the user's message, and kvq generate --prompt-cache FILE or mlx_lm.generate --prompt-cache-file "
        "FILE continue it.",
        "  kvq cache create demo:smollm2 --prompt @book.txt --out book.safetensors --kv-scheme rvq1\n"
        '  kvq generate --prompt-cache book.safetensors --prompt "Who is the hero?"\n'
        "  kvq cache create demo:gemma3 --prompt - --out stdin.safetensors < book.txt",
    )
    create.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_prompt_options(create)
    create.add_argument("--out", required=True, metavar="FILE", help="ends in .safetensors")
    add_scheme_options(create)
    add_progress_option(create)

    info = add_command(
        cache,
        "info",
        _run_info,
        "Show the header of a prompt-cache file. Reads no arrays and checks no digest.",
        "  kvq cache info book.safetensors\n  kvq cache info book.safetensors --json",
    )
    info.add_argument("file", metavar="FILE")
    info.add_argument("--json", action="store_true", help="everything, with token ids, as one JSON object")

    verify = add_command(
        cache,
        "verify",
        _run_verify,
        "Check a whole prompt-cache file. Exit code 1 says that it must not be used.",
        "  kvq cache verify book.safetensors\n  kvq cache verify book.safetensors --model demo:smollm2",
    )
    verify.add_argument("file", metavar="FILE")
    verify.add_argument("--model", metavar="MODEL", help="also check that this model made it")
    add_weight_options(verify)

    push = add_command(
        cache,
        "push",
        _run_push,
        "Upload a prompt-cache file to a Hugging Face repository, which is made if it does not exist. The file is "
        "checked first.",
        "  kvq cache push book.safetensors me/book-cache\n"
        "  kvq cache push book.safetensors me/caches --filename book.safetensors --private",
    )
    push.add_argument("file", metavar="FILE")
    _add_repository_options(push)
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--message", metavar="TEXT", help="of the commit")
    push.add_argument("--create-pr", action="store_true", help="propose the file in a pull request")

    pull = add_command(
        cache,
        "pull",
        _run_pull,
        "Download a prompt-cache file from a Hugging Face repository and check it. With HF_HUB_OFFLINE=1 only what was "
        "downloaded before is used.",
        "  kvq cache pull me/book-cache --out book.safetensors",
    )
    _add_repository_options(pull)
    pull.add_argument("--out", required=True, metavar="FILE", help="ends in .safetensors")


def _add_repository_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", metavar="OWNER/NAME", help="a model repository")
    parser.add_argument(
        "--filename", default=FILE_NAME, metavar="NAME", help=f"in the repository (default: {FILE_NAME})"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: the main branch)")
