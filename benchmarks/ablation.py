"""What each part of the recommended 3 bits is worth: `tcq3` with its defaults, and with one part taken away or added.

    python benchmarks/ablation.py [--model smollm2 gemma3] [--texts documentation code story]

The ruler of `kvq eval`: 400 tokens of prefill, 200 single-token steps. Parts without an option are patched away: the
scales of rotary pairs and of value channels (all 1), the turning mean (the plain mean of the keys as they are stored,
which does not turn, or none at all), and the rotation (codes of the channels themselves). Automatic bits are those of
`tq3`, all-in, without a calibration beside the model. Ratios are those of a 16-bit model at 600 tokens.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from common import TEXTS, load, machine, print_table, store, uncalibrated
from texts import NAMES, tokens_of

from mlx_kvq_plugin import cache, frame, rotation
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.rotary import Rotary, turn
from mlx_kvq_plugin.ruler import head_dim, measure

BASE = "tcq3"
OPTIONS = (
    ("as it is", BASE),
    ("without the trellis", "tq3"),
    ("without the key frame", f"{BASE},frame=off"),
    ("without matched scales of tokens", f"{BASE},scaling=least_squares"),
    ("without dense first tokens", f"{BASE},sinks=0"),
    ("without dense newest tokens", f"{BASE},recent=0"),
    ("without all five", "tq3,frame=off,scaling=least_squares,sinks=0,recent=0"),
    ("one bit less", "tcq2"),
    ("one bit more", "tcq4"),
    ("with the outer 2 + 2 layers in 16 bits", f"{BASE},edges=2"),
)


def unscaled(rotary: Rotary, keys: mx.array, start: int, energy: mx.array | None) -> frame.KeyFrame:
    """`fit_frame` with scales of 1."""
    return frame.fit_frame(rotary, keys, start, None)


def unscaled_values(values: mx.array) -> mx.array:
    """`fit_value_scale` with scales of 1."""
    return mx.ones((*values.shape[:2], 1, values.shape[3]))


def no_mean(rotary: Rotary, mean: mx.array, left: mx.array, start: int) -> tuple[mx.array, mx.array]:
    """In place of `steady_part`: nothing is subtracted."""
    return mx.zeros_like(mean), mx.zeros_like(mean)


def constant_mean(rotary: Rotary, mean: mx.array, left: mx.array, start: int) -> tuple[mx.array, mx.array]:
    """In place of `steady_part`: the mean of the keys themselves."""
    keys = left + turn(rotary, mean, start, left.shape[2])
    return mx.zeros_like(mean), mx.mean(keys, axis=2, keepdims=True)


def patches() -> dict[str, AbstractContextManager[Any]]:
    """What no option takes away, by its name; each to be entered once."""
    return {
        "as it is, measured alone like the next rows": nullcontext(),
        "without the scales of rotary pairs": patch.object(cache, "fit_frame", unscaled),
        "without the scales of value channels": patch.object(cache, "fit_value_scale", unscaled_values),
        "with a constant mean for the turning one": patch.object(frame, "steady_part", constant_mean),
        "without a mean": patch.object(frame, "steady_part", no_mean),
        "without the rotation": patch.object(rotation, "_labels", lambda *_: []),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=NAMES)
    parser.add_argument("--prefill", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--no-store", action="store_true", help="leave the stored results as they are")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.model:
        model, tokenizer = load(name)
        texts = {text: tokens_of(text, tokenizer) for text in arguments.texts}
        bits = f"{get_codec('tq3').bits_per_element(head_dim(model)):g}"
        named = dict(OPTIONS) | {"with bits of its own for every layer": f"auto@{bits},family=tcq"}
        runs = [(named, nullcontext()), *(({part: BASE}, change) for part, change in patches().items())]
        with uncalibrated(name) as source:
            for schemes, change in runs:
                with change:
                    found = list(
                        measure(
                            model,
                            texts,
                            list(schemes.values()),
                            prefill=arguments.prefill,
                            steps=arguments.steps,
                            source=source,
                        )
                    )
                for part, row in zip(schemes, found, strict=True):
                    own = row.overall
                    assert own is not None, row.error
                    measured = {"bits": row.bits, "ratio": row.ratio_16bit, "kl_mean": own.kl_mean}
                    measured |= {"kl_median": own.kl_median, "kl_p99": own.kl_p99, "top1": own.top1}
                    measured["kl_texts"] = {text: one.fidelity.kl_mean for text, one in row.texts.items()}
                    rows.append({"model": name, "part": part, "scheme": row.scheme, **measured})
                    print(rows[-1], row.note, flush=True)
        if not arguments.no_store:
            store("ablation", rows)
    print(machine())
    print_table(list(rows[0]), [tuple(row.values()) for row in rows])


if __name__ == "__main__":
    main()
