"""Prompts of uneven lengths at once: mlx-lm's `batch_generate` on compressed caches, and each prompt alone.

    python examples/batch.py [--model demo:smollm2] [--kv-scheme tq4]

No padding is stored: every row's cache holds its own tokens.
"""

from __future__ import annotations

import time
from pathlib import Path

from loading import load, options
from mlx_lm import batch_generate

DOCUMENT = Path(__file__).with_name("document.txt").read_text()
PROMPTS = ("The sea is", "Lighthouses were built because ships", f"{DOCUMENT}\n\nIn short:", f"{DOCUMENT[:900]}\n\nSo")


def main() -> None:
    arguments = options(__doc__).parse_args()
    model, tokenizer = load(arguments.model, arguments.kv_scheme)
    prompts = [tokenizer.encode(text) for text in PROMPTS]

    begin = time.perf_counter()
    together = batch_generate(model, tokenizer, prompts, max_tokens=24).texts
    middle = time.perf_counter()
    alone = [batch_generate(model, tokenizer, [prompt], max_tokens=24).texts[0] for prompt in prompts]
    end = time.perf_counter()

    for prompt, text in zip(prompts, together, strict=True):
        print(f"{len(prompt):5d} tokens: {text!r}")
    print(f"\nTogether {middle - begin:.1f} s, one by one {end - middle:.1f} s; the same texts: {together == alone}")


if __name__ == "__main__":
    main()
