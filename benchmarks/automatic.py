"""Automatic bits without a calibration: against the same bits for all layers, and bounds on the KL divergence.

    python benchmarks/automatic.py [--model smollm2 gemma3] [--steps 100]

`auto` goes by the model's calibration where one lies beside it, as it does in quality.py. Here it goes by the texts
that the model writes itself: its source is a folder that holds config.json alone. Bits are those of `tq3`, all-in. KL
is measured by the ruler of `kvq eval`; beside it is what was predicted, and for bounds what was measured on the model's
own texts, with the seconds that the choice took: a cache folder of its own (`KVQ_CACHE_DIR`) makes all of them anew.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from typing import Any

from common import TEXTS, load, machine, print_table, store

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.ruler import head_dim, measure

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
        schemes = [f"auto:kl<={bound}" for bound in BOUNDS]
        schemes += [scheme for family in ("tq", "tcq") for scheme in (f"{family}3", f"auto@{bits},family={family}")]
        texts = {text: tokenizer.encode(TEXTS[text]()) for text in TEXTS}
        with tempfile.TemporaryDirectory() as source:
            shutil.copy(kvq.demo_model_path(name) / "config.json", source)
            choices = {}
            for scheme in schemes:
                start = time.perf_counter()
                with kvq.compress(model, scheme, source=source) as compression:
                    choices[scheme] = compression.maker.choice
                print(f"{name} {scheme}: chosen in {time.perf_counter() - start:.0f} s", flush=True)
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
                    }
                )
                print(rows[-1], row.note, flush=True)
    store("automatic", rows)
    print_table(list(rows[0]), [tuple(row.values()) for row in rows])


if __name__ == "__main__":
    main()
