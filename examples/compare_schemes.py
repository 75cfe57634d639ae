"""Which scheme? Bytes, divergence and agreement of several, on a text of yours.

    python examples/compare_schemes.py [--model demo:smollm2] [--schemes tq4 tq3 rvq1] [--text FILE]

`kvq eval` and `kvq frontier` do this with more care, on several texts at once; here are the functions they are made of.
"""

from __future__ import annotations

from pathlib import Path

from loading import load, options

import mlx_kvq_plugin as kvq

PREFILL, STEPS = 200, 100


def main() -> None:
    parser = options(__doc__, scheme="")
    parser.add_argument("--schemes", nargs="+", default=["identity", "tq4", "tq3", "rvq1", "affine4"])
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("document.txt"))
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model, None)
    tokens = list(tokenizer.encode(arguments.text.read_text()))[: PREFILL + STEPS]
    reference = kvq.step_logprobs(model, kvq.make_prompt_cache(model), tokens, PREFILL)
    print(f"{len(tokens)} tokens, {len(tokens) - PREFILL} of them one by one\n")
    print("scheme     KiB held  fp16 KiB   KL, nats  same top-1  perplexity (fp16)")
    for scheme in arguments.schemes:
        with kvq.compress(model, scheme):
            caches = kvq.make_prompt_cache(model)
            run = kvq.step_logprobs(model, caches, tokens, PREFILL)
            report = kvq.cache_report(caches)
        found = kvq.compare(reference, run, tokens[PREFILL:])
        held = sum(layer.nbytes for layer in report.layers) / 1024
        dense = sum(layer.fp16_nbytes for layer in report.layers) / 1024
        quality = f"{found.kl_mean:8.4f}  {found.top1:10.1%}  {found.perplexity:.2f} ({found.reference_perplexity:.2f})"
        print(f"{scheme:9s} {held:9.0f} {dense:9.0f}   {quality}")


if __name__ == "__main__":
    main()
