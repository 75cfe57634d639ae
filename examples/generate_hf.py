"""transformers' generate() on a compressed KV cache: streaming, a batch, one document read once, a chat.

    python examples/generate_hf.py [--model demo:smollm2] [--kv-scheme tq4]

Needs neither a hub nor PyTorch: the default model is made from packages of the Python index.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from loading import load_hf, options
from transformers import GenerationConfig, TextStreamer

import mlx_kvq_plugin as kvq

DOCUMENT = Path(__file__).with_name("document.txt").read_text()
QUESTIONS = ("\n\nQuestion: When was the tower automated?\nAnswer:", "\n\nQuestion: Who was Maren Holt?\nAnswer:")


def stream(model: kvq.CausalLM) -> None:
    print("\n1. Text as it comes, sampled with a seed:\n")
    config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=24)
    ids = model.encode("The lighthouse stood on")
    model.generate(ids, config, seed=1, streamer=TextStreamer(model.tokenizer))


def batch(model: kvq.CausalLM) -> None:
    print("\n2. Prompts of different lengths at once, padded on the left:\n")
    rows = [model.encode(text) for text in ("The sea is", "Lighthouses were built because ships")]
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    output = model.generate(ids, attention_mask=mask, max_new_tokens=12)
    for row, tokens in zip(rows, output.tolist(), strict=True):
        print("  ", repr(model.tokenizer.decode(tokens[width - len(row) :])))


def ask(model: kvq.CausalLM) -> bool:
    """Whether answers from the saved document are those of a fresh run."""
    cache = model.prefill(DOCUMENT)
    print(f"\n3. A document read once, {cache.report().summary()}:\n")
    same = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "document.safetensors"
        cache.save(file)
        for question in QUESTIONS:
            ids = cache.token_ids + model.tokenizer.encode(question, add_special_tokens=False)
            settings = {"max_new_tokens": 16, "stop_strings": ["\n", "."], "tokenizer": model.tokenizer}
            answer = model.generate(ids, past_key_values=cache.fork(), **settings)
            print("  ", repr(model.tokenizer.decode(answer[0].tolist()[len(ids) :])))
            loaded = kvq.PromptCache.load(file, model)
            same.append(model.generate(ids, past_key_values=loaded, **settings).tolist() == answer.tolist())
    return all(same)


def chat(model: kvq.CausalLM) -> None:
    print("\n4. A chat, through the pipeline:\n")
    pipe = kvq.pipeline("text-generation", model=model, max_new_tokens=16, do_sample=False)
    (record,) = pipe([{"role": "user", "content": "Name a colour of the sea."}])
    print("  ", record["generated_text"][-1])


def main() -> None:
    arguments = options(__doc__).parse_args()
    model = load_hf(arguments.model, arguments.kv_scheme)
    stream(model)
    batch(model)
    same = ask(model)
    if model.tokenizer.has_chat_template:
        chat(model)
    print(f"\nAnswers from the file are those from memory: {same}")
    if not same:
        raise SystemExit("generate_hf: the loaded cache gave other tokens than its original; please report this")


if __name__ == "__main__":
    main()
