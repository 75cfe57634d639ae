"""Automatic bits without a calibration, against the same bits for all layers: KL by the ruler of `kvq eval`.

    python benchmarks/automatic.py [--model smollm2 gemma3] [--steps 100]

`auto` goes by the model's calibration where one lies beside it, as it does in quality.py. Here it goes by the texts
that the model writes itself: its source is a folder that holds config.json alone. Bits are those of `tq3`, all-in.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import TEXTS, load, machine, print_table, store, uncalibrated

from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.ruler import head_dim, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--prefill", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    print(machine())
    rows: list[dict[str, Any]] = []
    for name in arguments.model:
        model, tokenizer = load(name)
        bits = f"{get_codec('tq3').bits_per_element(head_dim(model)):g}"
        schemes = [scheme for family in ("tq", "tcq") for scheme in (f"{family}3", f"auto@{bits},family={family}")]
        texts = {text: tokenizer.encode(TEXTS[text]()) for text in TEXTS}
        with uncalibrated(name) as source:
            for row in measure(model, texts, schemes, prefill=arguments.prefill, steps=arguments.steps, source=source):
                own = row.overall
                assert own is not None, row.error
                rows.append(
                    {"model": name, "scheme": row.scheme, "bits": row.bits, "kl": own.kl_mean, "top1": own.top1}
                )
                print(rows[-1], row.note, flush=True)
    store("automatic", rows)
    print_table(list(rows[0]), [tuple(row.values()) for row in rows])


if __name__ == "__main__":
    main()
