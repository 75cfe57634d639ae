"""A chat that goes on in another process: the first one saves its cache, the second answers from it.

    python examples/chat_resumed.py [--model demo:smollm2] [--kv-scheme tq4]

The second process reads the new question only. What reading the whole chat again would have cost is measured beside it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loading import load_hf, options

import mlx_kvq_plugin as kvq

DOCUMENT = Path(__file__).with_name("document.txt").read_text()
TOLD = f"{DOCUMENT}\n\nThat is the story of the lighthouse. Who was its keeper in November 1903?"
ASKED = "In which year was the lighthouse built?"
ANSWER = "\0"  # stands for an answer in a chat template


def first_turn(model: kvq.CausalLM) -> list[int]:
    """The chat up to where the model answers."""
    return list(model.tokenizer.apply_chat_template([{"role": "user", "content": TOLD}], add_generation_prompt=True))


def next_turn(model: kvq.CausalLM) -> list[int]:
    """What the template puts between an answer and the next one."""
    chat = [
        {"role": "user", "content": TOLD},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": ASKED},
    ]
    text = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return list(model.tokenizer.encode(text.partition(ANSWER)[2], add_special_tokens=False))


def answer(model: kvq.CausalLM, ids: list[int], cache: kvq.PromptCache | None) -> tuple[kvq.PromptCache, float]:
    """Prints an answer; its cache, and the seconds until its first token was there."""
    begin = time.perf_counter()
    one = model.generate(ids, past_key_values=cache, max_new_tokens=1, return_dict_in_generate=True)
    seconds = time.perf_counter() - begin
    cache = one.past_key_values
    tokens = model.generate(cache.token_ids, past_key_values=cache, max_new_tokens=24)[0].tolist()
    print("   Assistant:", model.tokenizer.decode(tokens[len(ids) :], skip_special_tokens=True).strip())
    return cache, seconds


def begin(model: kvq.CausalLM, file: Path) -> None:
    ids = first_turn(model)
    print(f"1. One process reads {len(ids)} tokens, answers, saves its cache and ends.")
    cache, seconds = answer(model, ids, None)
    cache.save(file)
    size = file.stat().st_size / 2**20
    print(f"   {seconds:.2f} s to the first token; {cache.report().summary()}; file {size:.2f} MiB")


def resume(model: kvq.CausalLM, file: Path) -> None:
    started = time.perf_counter()
    cache = kvq.PromptCache.load(file, model)
    loaded = time.perf_counter() - started
    told = cache.token_ids
    if told[-1] == model.tokenizer.eos_token_id:  # which the template writes itself; the layers do not hold it yet
        told = told[:-1]
    ids = [*told, *next_turn(model)]
    print(f"2. Another process loads {len(cache.token_ids)} tokens in {loaded:.2f} s and is asked: {ASKED}")
    _, seconds = answer(model, ids, cache)
    print(f"   {seconds:.2f} s to the first token")
    print("3. The same, with the whole chat read again:")
    _, again = answer(model, ids, None)
    print(f"   {again:.2f} s to the first token, {again - seconds - loaded:.2f} s more")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--resume", type=Path, help="a file of the first process")
    parser.add_argument("--save", type=Path, help="where the first process saves")
    arguments = parser.parse_args()
    if arguments.resume or arguments.save:
        model = load_hf(arguments.model, arguments.kv_scheme)
        if arguments.save:
            begin(model, arguments.save)
        else:
            resume(model, arguments.resume)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chat.safetensors"
        command = [sys.executable, __file__, "--model", arguments.model, "--kv-scheme", arguments.kv_scheme]
        subprocess.run([*command, "--save", file], check=True)
        subprocess.run([*command, "--resume", file], check=True)


if __name__ == "__main__":
    main()
