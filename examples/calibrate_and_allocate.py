"""Bits where they matter: calibrate a model, then the same average with and without an allocation.

    python examples/calibrate_and_allocate.py [--model demo:smollm2] [--sequences 3]

Calibrate once for a model: `kvq calibrate` keeps the file next to it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from loading import load, options, path_of

import mlx_kvq_plugin as kvq

PREFILL, STEPS = 160, 60


def main() -> None:
    parser = options(__doc__, scheme="")
    parser.add_argument("--sequences", type=int, default=3)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model, None)

    begin = time.perf_counter()
    calibration = kvq.calibrate(model, tokenizer, sequences=arguments.sequences, source=path_of(arguments.model))
    print(f"Calibrated on {arguments.sequences} sequences in {time.perf_counter() - begin:.0f} s.\n")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calibration.safetensors"
        kvq.save_calibration(file, calibration)
        text = Path(__file__).with_name("document.txt").read_text()
        tokens = list(tokenizer.encode(text))[: PREFILL + STEPS]
        reference = kvq.step_logprobs(model, kvq.make_prompt_cache(model), tokens, PREFILL)
        for bits in (2, 3, 4):
            for scheme in (f"tq{bits}", f"tq@{bits},calibration={file}"):
                with kvq.compress(model, scheme):
                    caches = kvq.make_prompt_cache(model)
                    found = kvq.compare(reference, kvq.step_logprobs(model, caches, tokens, PREFILL), tokens[PREFILL:])
                    held = kvq.cache_report(caches)
                name = scheme.partition(",")[0]
                print(f"{name:6s} KL {found.kl_mean:.4f} nats, same top-1 token {found.top1:.0%}; {held.summary()}")


if __name__ == "__main__":
    main()
