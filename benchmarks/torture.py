"""Weights that are hostile to quantized caches, though the model computes the same: how much worse do schemes get?

    python benchmarks/torture.py [--model smollm2 gemma3] [--schemes tq4 tq3 rvq1 mlx-affine4] [--torture constant]
    python benchmarks/torture.py --torture constant --model smollm2 --schemes tq4 tq3 --prefill 100 --skip-to 1800

    constant  a vector of 5 times the norm of a key is added to all keys of a head after the rotary: softmax drops it
    pairs     every rotary pair of the keys is scaled by 2^-3 to 2^3, that of the queries by the inverse
    bias      k_proj gets a bias of 20 times the norm of a key in four channels: another model, measured against itself
    bias0.5, bias1, bias2, bias5, bias10   the same, of so many times the norm (20 times that of a channel is bias5 at
              head size 64)
    values    one channel of every value head times 50, its columns of o_proj divided by 50

`float16` rows are mlx-lm's own caches with keys and values rounded to float16: what the model itself cannot tell apart.
All but `bias` leave every logit of mlx-lm's own caches as it is, up to rounding, which is checked. Figures are KL means
in nats, one text, a prefill and single-token steps as in `kvq eval`, and their ratios to those of the untouched model.
For biases also the error of the scores `q . k` times the scale, in nats (attention_errors.py).
With `--skip-to` statistics are those of the prefill, a first chunk, and the steps come after so many tokens of the
documentation, as in aging.py; rows go to results/torture-far.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
from aging import STEPS, measured
from common import RESULTS, TEXTS, documentation, load, machine, print_table, store
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

from mlx_kvq_plugin.attention_errors import attention_errors
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.contenders import affine_bits
from mlx_kvq_plugin.evaluation import divergence, logprobs
from mlx_kvq_plugin.ruler import measure

LARGE, BIAS, CHANNELS, VALUE = 5.0, 20.0, 4, 50.0
SAME = 1e-3  # nats: what rounding may change where a model stays the same


def attentions(model: Any) -> list[Any]:
    """The attention modules, a layer each."""
    return [layer.self_attn for layer in model.layers]


def heads_of(attention: Any) -> tuple[int, int, int]:
    """Query heads, KV heads, head size."""
    heads, kv_heads = attention.n_heads, attention.n_kv_heads
    return heads, kv_heads, attention.k_proj.weight.shape[0] // kv_heads


def key_norm(model: Any, ids: list[int]) -> float:
    """The root of the mean squared norm of the model's keys on a few tokens."""
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([ids[:64]]), cache=caches))
    squares = [mx.mean(mx.sum(cache.keys[..., :64, :] ** 2, axis=-1)).item() for cache in caches]
    return float(sum(squares) / len(squares)) ** 0.5


@contextmanager
def arriving(change: Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]) -> Iterator[None]:
    """Keys and values are changed on their way into any cache."""
    kinds = {kind: kind.update_and_fetch for kind in (KVCache, RotatingKVCache, QuantizedKVCache, KVQCache)}

    def changed(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, keys, values: original(self, *change(keys, values))

    for kind, original in kinds.items():
        kind.update_and_fetch = changed(original)
    try:
        yield
    finally:
        for kind, original in kinds.items():
            kind.update_and_fetch = original


def constant(model: Any, norm: float) -> Any:
    """A constant on all keys of a head."""
    _, kv_heads, dim = heads_of(attentions(model)[0])
    direction = mx.random.normal((1, kv_heads, 1, dim), key=mx.random.key(1))
    added = direction / mx.linalg.norm(direction, axis=-1, keepdims=True) * (LARGE * norm)
    return arriving(lambda keys, values: (keys + added.astype(keys.dtype), values))


@contextmanager
def replaced(modules: list[tuple[Any, str, mx.array]]) -> Iterator[None]:
    """Other arrays in place of attributes of modules."""
    before = [(module, name, module.get(name)) for module, name, _ in modules]
    for module, name, array in modules:
        module[name] = array
    mx.eval([array for *_, array in modules])
    try:
        yield
    finally:
        for module, name, array in before:
            if array is None:
                module.pop(name)
            else:
                module[name] = array


def pairs(model: Any, norm: float) -> Any:
    """Scaled rotary pairs, in norm weights where keys are normed after their projection."""
    changes = []
    for layer, attention in enumerate(attentions(model)):
        heads, kv_heads, dim = heads_of(attention)
        exponents = mx.random.uniform(-3, 3, (kv_heads, dim // 2), key=mx.random.key(layer))
        if "k_norm" in attention:  # one weight for all heads; Gemma's norms multiply by 1 + weight
            scale = mx.concatenate([2 ** exponents[0]] * 2)
            for module, factor in ((attention.k_norm, scale), (attention.q_norm, 1 / scale)):
                changes.append((module, "weight", (1 + module.weight) * factor - 1))
        else:
            scale = mx.concatenate([2**exponents] * 2, axis=-1)
            of_queries = mx.repeat(1 / scale, heads // kv_heads, axis=0)
            for module, factor in ((attention.k_proj, scale), (attention.q_proj, of_queries)):
                changes.append((module, "weight", module.weight * factor.reshape(-1, 1)))
    return replaced(changes)


def bias(model: Any, norm: float, times: float = BIAS) -> Any:
    """Large biases in a few channels of every KV head, of so many times the norm of a key together."""
    changes = []
    for attention in attentions(model):
        _, kv_heads, dim = heads_of(attention)
        one = mx.zeros((kv_heads, dim))
        one[:, 3 : 3 + CHANNELS] = times * norm / CHANNELS**0.5
        changes.append((attention.k_proj, "bias", one.reshape(-1)))
    return replaced(changes)


def values(model: Any, norm: float) -> Any:
    """A loud channel of values, quiet again in the output projection."""
    changes = []
    for attention in attentions(model):
        heads, kv_heads, dim = heads_of(attention)
        loud = mx.ones((kv_heads, dim))
        loud[:, 7] = VALUE
        changes.append((attention.v_proj, "weight", attention.v_proj.weight * loud.reshape(-1, 1)))
        quiet = mx.repeat(1 / loud, heads // kv_heads, axis=0).reshape(1, -1)
        changes.append((attention.o_proj, "weight", attention.o_proj.weight * quiet))
    return replaced(changes)


TORTURES: dict[str, Callable[[Any, float], Any]] = {
    "constant": constant,
    "pairs": pairs,
    "bias": bias,
    "values": values,
    **{f"bias{times}": partial(bias, times=times) for times in (0.5, 1, 2, 5, 10)},
}


def stock_logprobs(model: Any, ids: list[int]) -> mx.array:
    """Log probabilities of the model with mlx-lm's own caches."""
    found = logprobs(model(mx.array([ids]), cache=make_prompt_cache(model))[0])
    mx.eval(found)
    return found


def rounded(model: Any, ids: list[int], steps: int) -> float:
    """KL mean of the last positions with keys and values rounded to float16 in mlx-lm's caches."""

    def change(keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys.astype(mx.float16).astype(keys.dtype), values.astype(mx.float16).astype(values.dtype)

    plain = stock_logprobs(model, ids)
    with arriving(change):
        return float(mx.mean(divergence(plain, stock_logprobs(model, ids))[-steps:]).item())


def kl_means(model: Any, ids: list[int], schemes: list[str], prefill: int, steps: int) -> dict[str, float]:
    """KL mean of every scheme."""
    rows = measure(model, {"text": ids}, schemes, prefill=prefill, steps=steps)
    return {"float16": rounded(model, ids, steps), **{row.scheme: row.overall.kl_mean for row in rows}}


def far_kl_means(model: Any, ids: list[int], schemes: list[str], prefill: int, skip_to: int) -> dict[str, float]:
    """KL mean of every scheme far from the tokens of its statistics."""
    found = {scheme: measured(model, scheme, ids, skip_to, [prefill])[prefill][0] for scheme in schemes}
    return {"float16": rounded(model, ids, STEPS), **found}


def score_errors(model: Any, ids: list[int], schemes: list[str]) -> dict[str, float]:
    """Errors of the scores in nats, root mean square over ranges of distance, of schemes of this package."""
    found = {}
    for scheme in schemes:
        errors = attention_errors(model, ids, scheme) if affine_bits(scheme) is None else None
        if errors is not None:
            found[scheme] = (sum(one.value**2 for one in errors.distances) / len(errors.distances)) ** 0.5
    return found


def with_others(rows: list[dict[str, Any]], label: str) -> list[dict[str, Any]]:
    """New rows, and the stored ones of what they do not have, in the order stored."""

    def name(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["model"], row["torture"], row["scheme"], row.get("statistics_of"), row.get("steps_after")

    new = {name(row): row for row in rows}
    path = RESULTS / f"{label}.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    return [new.pop(name(row), row) for row in before] + list(new.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--schemes", nargs="+", default=["tq4", "tq3", "rvq1", "mlx-affine4"])
    parser.add_argument("--torture", nargs="+", default=list(TORTURES), choices=list(TORTURES))
    parser.add_argument("--text", default="story", choices=list(TEXTS))
    parser.add_argument("--prefill", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--skip-to", type=int, help="tokens before the steps, 64 of them, of a long text")
    parser.add_argument("--no-store", action="store_true", help="leave the stored results as they are")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.model:
        model, tokenizer = load(name)
        prefill, skip_to = arguments.prefill, arguments.skip_to
        if skip_to:
            ids = list(tokenizer.encode(documentation()))[: skip_to + STEPS]
            kls = partial(far_kl_means, model, ids, arguments.schemes, prefill, skip_to)
        else:
            ids = list(tokenizer.encode(TEXTS[arguments.text]()))[: prefill + arguments.steps]
            kls = partial(kl_means, model, ids, arguments.schemes, prefill, arguments.steps)
        far = {"statistics_of": prefill, "steps_after": skip_to} if skip_to else {}
        norm, plain = key_norm(model, ids), stock_logprobs(model, ids)
        before = kls()
        biased = any(torture.startswith("bias") for torture in arguments.torture)
        scores = score_errors(model, ids, arguments.schemes) if biased else {}
        for torture in arguments.torture:
            with TORTURES[torture](model, norm):
                moved = mx.mean(divergence(plain, stock_logprobs(model, ids))).item()
                if not torture.startswith("bias") and moved > SAME:
                    raise SystemExit(f"{torture} must leave {name} as it is, got {moved:.2g} nats with mlx-lm's caches")
                after = kls()
                scores_after = score_errors(model, ids, arguments.schemes) if torture.startswith("bias") else {}
            for scheme in before:
                errors = {}
                if scheme in scores_after:
                    errors = {"scores": round(scores_after[scheme], 3), "scores_untouched": round(scores[scheme], 3)}
                rows.append(
                    {
                        "model": name,
                        "torture": torture,
                        "scheme": scheme,
                        **far,
                        "kl": float(f"{after[scheme]:.3g}"),
                        "untouched": float(f"{before[scheme]:.3g}"),
                        "ratio": round(after[scheme] / before[scheme], 2),
                        **errors,
                    }
                )
                print(rows[-1], flush=True)
    print(machine())
    if not arguments.no_store:
        label = "torture-far" if arguments.skip_to else "torture"
        store(label, with_others(rows, label))
    head = list(dict.fromkeys(key for row in rows for key in row))
    print_table(head, [[row.get(key, "") for key in head] for row in rows])


if __name__ == "__main__":
    main()
