"""The main job in one run: generate with a compressed KV cache, save it, load it, go on.

    python examples/demo.py [--model smollm2|gemma3] [--kv-scheme tq3]

Needs no hub: the model is made from packages of the Python index (see `kvq demo-model --help`).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx_lm import stream_generate

import mlx_kvq_plugin as kvq

DOCUMENT = Path(__file__).with_name("document.txt").read_text()
QUESTION = "\n\nIn short: who was Maren Holt, and what did she do in November 1903?"
FOLLOW_UP = "\n\nQuestion: When was the tower automated?\nAnswer:"


def prompt_ids(tokenizer, text: str) -> list[int]:
    """The document and a question, in the model's chat format if it has one."""
    if tokenizer.has_chat_template:
        return list(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True))
    return list(tokenizer.encode(text + "\nAnswer:"))


def stream(model, tokenizer, ids: list[int], cache: list, max_tokens: int) -> list[int]:
    """Generate greedily, print the text as it comes, return the new tokens."""
    tokens, last = [], None
    for last in stream_generate(model, tokenizer, ids, max_tokens=max_tokens, prompt_cache=cache):
        print(last.text, end="", flush=True)
        tokens.append(int(last.token))
    if last is not None:
        print(
            f"\n   [prompt {last.prompt_tokens} tokens at {last.prompt_tps:.0f}/s, "
            f"{last.generation_tokens} generated at {last.generation_tps:.1f}/s]"
        )
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", choices=sorted(kvq.DEMO_MODELS))
    parser.add_argument("--kv-scheme", default="tq3")
    parser.add_argument("--max-tokens", type=int, default=48)
    arguments = parser.parse_args()

    path = str(kvq.demo_model_path(arguments.model))
    model, tokenizer = kvq.load(path, kv_scheme=arguments.kv_scheme)
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)  # half precision products are slow on CPUs
    ids = prompt_ids(tokenizer, DOCUMENT + QUESTION)

    print(f"\n1. {arguments.model} answers from a document of {len(ids)} tokens, scheme {arguments.kv_scheme}:\n")
    cache = kvq.make_prompt_cache(model)
    answer = stream(model, tokenizer, ids, cache, arguments.max_tokens)

    print("\n2. What its KV cache holds (first layers):\n")
    report = kvq.cache_report(cache)
    print("\n".join([*str(report).splitlines()[:4], "  ...", report.summary()]))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lighthouse.safetensors"
        kvq.save_prompt_cache(file, cache, model=model, token_ids=[*ids, *answer])
        resumed, info = kvq.load_prompt_cache(file, model)
        size = file.stat().st_size / 2**20
    print(f"\n3. Saved to one file of {size:.2f} MiB ({info.tokens} tokens), loaded, and asked another question:\n")
    follow_up = list(tokenizer.encode(FOLLOW_UP, add_special_tokens=False))
    from_file = stream(model, tokenizer, follow_up, resumed, 24)
    unbroken = [
        int(response.token)
        for response in stream_generate(model, tokenizer, follow_up, max_tokens=24, prompt_cache=cache)
    ]
    print(f"\n   The same tokens as without the file: {from_file == unbroken}")
    if from_file != unbroken:
        raise SystemExit("demo: the resumed cache gave other tokens than the unbroken run; please report this")


if __name__ == "__main__":
    main()
