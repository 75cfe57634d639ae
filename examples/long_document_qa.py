"""A long document read once, and several questions that go on from forks of its cache.

    python examples/long_document_qa.py [--model demo:smollm2] [--kv-scheme tq3] [--document FILE]

A fork costs a copy of the packed bytes; the document is read once, whatever the number of questions.
"""

from __future__ import annotations

import time
from pathlib import Path

from loading import load_hf, options

QUESTIONS = ("When was the lighthouse built?", "Who was Maren Holt?", "When was the tower automated?")
SETTINGS = {"max_new_tokens": 16, "stop_strings": ["\n"]}


def main() -> None:
    parser = options(__doc__, "tq3")
    parser.add_argument("--document", type=Path, default=Path(__file__).with_name("document.txt"))
    arguments = parser.parse_args()
    model = load_hf(arguments.model, arguments.kv_scheme)
    encode, decode = model.tokenizer.encode, model.tokenizer.decode

    begin = time.perf_counter()
    document = model.prefill(arguments.document.read_text())
    print(f"Read in {time.perf_counter() - begin:.2f} s: {document.report().summary()}\n")
    for question in QUESTIONS:
        ids = document.token_ids + encode(f"\n\nQuestion: {question}\nAnswer:", add_special_tokens=False)
        seconds, answers = [], []
        for cache in (document.fork(), None):  # from the cache, and reading everything again
            begin = time.perf_counter()
            answers.append(model.generate(ids, past_key_values=cache, **SETTINGS)[0].tolist()[len(ids) :])
            seconds.append(time.perf_counter() - begin)
        print(f"{question}\n   {decode(answers[0], skip_special_tokens=True).strip()}")
        print(f"   {seconds[0]:.2f} s from the cache, {seconds[1]:.2f} s reading the document again")


if __name__ == "__main__":
    main()
