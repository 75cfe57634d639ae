"""Automatic bits without a calibration: against the same bits for all layers, and bounds on the KL divergence.

    python benchmarks/automatic.py [--model smollm2 gemma3] [--steps 100]

`auto` goes by the model's calibration where one lies beside it, as it does in quality.py. Here it goes by the texts
that the model writes itself: its source is a folder that holds config.json alone. Bits are those of `tq3`, all-in. KL
is measured by the ruler of `kvq eval`; beside it is what was predicted, and for bounds what was measured on the model's
own texts, in steps of several tokens and, by the ruler, in single ones. The seconds that a choice took are printed: an
empty cache folder (`KVQ_CACHE_DIR`) makes all of them anew.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from common import TEXTS, load, machine, print_table, store, uncalibrated

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.bound import PREFILL
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.ruler import head_dim, measure
from mlx_kvq_plugin.self_calibration import LENGTH, first_token, own_texts

BOUNDS = ("0.05", "0.02", "0.005")


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
        bounds = [f"auto:kl<={bound}" for bound in BOUNDS]
        schemes = bounds + [
            scheme for family in ("tq", "tcq") for scheme in (f"{family}3", f"auto@{bits},family={family}")
        ]
        texts = {text: tokenizer.encode(TEXTS[text]()) for text in TEXTS}
        with uncalibrated(name) as source:
            choices = {}
            for scheme in schemes:
                start = time.perf_counter()
                with kvq.compress(model, scheme, source=source) as compression:
                    choices[scheme] = compression.maker.choice
                print(f"{name} {scheme}: chosen in {time.perf_counter() - start:.0f} s", flush=True)
            drawn = enumerate(own_texts(model, first_token(source)))
            own_rows = measure(
                model,
                {f"{i}": text for i, text in drawn},
                bounds,
                prefill=PREFILL,
                steps=LENGTH - PREFILL,
                source=source,
                joint=False,
            )
            singly = {row.scheme: row.overall.kl_mean for row in own_rows if row.overall is not None}
            print(singly, flush=True)
            for row in measure(model, texts, schemes, prefill=arguments.prefill, steps=arguments.steps, source=source):
                own = row.overall
                assert own is not None, row.error
                choice = choices[row.scheme]
                rows.append(
                    {
                        "model": name,
                        "scheme": row.scheme,
                        "bits": row.bits,
                        "kl": own.kl_mean,
                        "top1": own.top1,
                        "predicted_kl": None if choice is None else choice.kl,
                        "own_kl": None if choice is None else choice.measured_kl,
                        "own_kl_single_steps": singly.get(row.scheme),
                    }
                )
                print(rows[-1], row.note, flush=True)
    store("automatic", rows)
    print_table(list(rows[0]), [tuple(row.values()) for row in rows])


if __name__ == "__main__":
    main()
