"""What rounding levels to bytes, as attention on CUDA does, costs in quality on the demo models.

    python benchmarks/byte_levels.py [--model smollm2 gemma3] [--schemes tq4 tq3 rvq1]

The ruler of quality.py (KL to fp16 of single-token steps through the compressed cache, three texts), once with the
codebooks' levels and once with those of kernels/byte_codes.py, both by decoding the stored codes in float32.
"""

from __future__ import annotations

import argparse
from typing import Any

import mlx.core as mx
import numpy as np
from common import TEXTS, load, print_table, store

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import attention
from mlx_kvq_plugin.codecs.turboquant import TurboQuant
from mlx_kvq_plugin.kernels.byte_codes import byte_levels
from mlx_kvq_plugin.rotation import unrotate
from mlx_kvq_plugin.ruler import measure


def decode_at_bytes(codec: TurboQuant, planes: Any, dim: int, dtype: mx.Dtype, statistics: Any) -> mx.array:
    """As the codec's own decoding, at levels of bytes."""
    integers, unit = byte_levels(codec.book)
    levels = mx.array(np.array(integers, np.float32) * unit)
    y = levels[codec.codes(planes, dim)] * planes["scale"].astype(mx.float32)
    return unrotate(y, codec.seed, codec.rotation).astype(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--schemes", nargs="+", default=["tq4", "tq3", "rvq1"])
    parser.add_argument("--prefill", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    # Codes are decoded for every step: the path whose levels can be replaced.
    candidates, decode = attention._CANDIDATES, TurboQuant._decode
    attention._CANDIDATES = tuple(c for c in candidates if c[1] is not attention.attend_packed)
    rows: list[dict[str, Any]] = []
    for name in arguments.model:
        model, tokenizer = load(name)
        texts = {text: tokenizer.encode(TEXTS[text]()) for text in TEXTS}
        found = {}
        for levels, function in (("codebook", decode), ("bytes", decode_at_bytes)):
            TurboQuant._decode = function  # type: ignore[method-assign, assignment]
            measured = measure(
                model,
                texts,
                ["fp16", *arguments.schemes],
                prefill=arguments.prefill,
                steps=arguments.steps,
                source=str(kvq.demo_model_path(name)),
            )
            found[levels] = {row.scheme: row.overall for row in measured}
        for scheme in arguments.schemes:
            own, rounded = found["codebook"][scheme], found["bytes"][scheme]
            assert own is not None and rounded is not None
            kl, top = (own.kl_mean, rounded.kl_mean), (own.top1, rounded.top1)
            rows.append(
                {"model": name, "scheme": scheme, "kl": kl[0], "kl_bytes": kl[1], "top1": top[0], "top1_bytes": top[1]}
            )
            print(rows[-1], flush=True)
    store("byte_levels", rows)
    print_table(["model", "scheme", "KL", "KL of bytes", "top-1", "top-1 of bytes"], [tuple(r.values()) for r in rows])


if __name__ == "__main__":
    main()
