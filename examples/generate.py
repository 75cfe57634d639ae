"""Three lines: load a model with a compressed cache, stream a text, see what the cache holds.

    python examples/generate.py [--model demo:smollm2] [--kv-scheme tq4] [--prompt TEXT]

Everything else of mlx-lm works in the same way.
"""

from __future__ import annotations

from pathlib import Path

from loading import load, options
from mlx_lm import stream_generate

import mlx_kvq_plugin as kvq


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--prompt", default=Path(__file__).with_name("document.txt").read_text(), help="a story")
    parser.add_argument("--max-tokens", type=int, default=60)
    arguments = parser.parse_args()

    model, tokenizer = load(arguments.model, arguments.kv_scheme)
    cache = kvq.make_prompt_cache(model)
    for response in stream_generate(
        model, tokenizer, arguments.prompt, max_tokens=arguments.max_tokens, prompt_cache=cache
    ):
        print(response.text, end="", flush=True)
    print(f"\n\n{kvq.cache_report(cache).summary()}")


if __name__ == "__main__":
    main()
