"""Attention errors by position and distance: computed by hand in float64, windows, lossless codecs, an exact model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import attention_errors as module
from mlx_kvq_plugin.attention import AttendArgs
from mlx_kvq_plugin.attention_errors import LEAST_TOKENS, attention_errors
from mlx_kvq_plugin.growth import BLOCK
from mlx_kvq_plugin.probes import own_cache, recoded

TOKENS = 230  # past the window of the sliding model


def ids(count: int = TOKENS) -> list[int]:
    return [(7 * i * i + 3 * i) % tiny_models.VOCAB for i in range(count)]


def float64(x: mx.array) -> Any:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def by_hand(model: Any, scheme: str) -> tuple[Any, Any, Any]:
    """Squared relative output errors `(layers, L)`, squared score errors and their counts by distance, in float64."""
    relative, squared, pairs = [], np.zeros(TOKENS), np.zeros(TOKENS)

    def watch(args: AttendArgs) -> mx.array:
        cache = args.cache
        args.cache.observe_queries(args.queries)
        assert cache._freeze()
        dense = [x.astype(mx.float32) for x in cache.dense_tokens()]
        (k, v), (ck, cv) = map(float64, dense), map(float64, recoded(cache, *dense, 0))
        q = float64(args.queries)
        heads = q.shape[1] // k.shape[1]
        output, error, energy = np.zeros(q.shape), np.zeros(TOKENS), np.zeros(TOKENS)
        for h in range(q.shape[1]):
            for n in range(TOKENS):
                first = max(0, n + 1 - (cache.window or TOKENS))
                held = np.arange(first, n + 1)
                codes = held[(n - held >= cache.spec.recent + BLOCK // 2) & (held >= cache.spec.sinks)]
                keys, values = k[0, h // heads].copy(), v[0, h // heads].copy()
                outputs, scores = [], []
                for _ in range(2):
                    score = keys[held] @ q[0, h, n] * args.scale
                    weights = np.exp(score - score.max())
                    outputs.append(weights @ values[held] / weights.sum())
                    scores.append(score[codes - first])
                    keys[codes], values[codes] = ck[0, h // heads][codes], cv[0, h // heads][codes]
                output[0, h, n] = outputs[0]
                error[n] += np.sum((outputs[1] - outputs[0]) ** 2)
                energy[n] += np.sum(outputs[0] ** 2)
                if len(codes):
                    wrong = scores[1] - scores[0]
                    np.add.at(squared, n - codes, (wrong - wrong.mean()) ** 2)
                    np.add.at(pairs, n - codes, 1)
        relative.append(error / energy)
        return mx.array(output.astype(np.float32))

    with kvq.compress(model, scheme) as compression:
        caches = compression.maker()
        for cache in filter(None, map(own_cache, caches)):
            cache.probe = watch
        mx.eval(model(mx.array([ids()]), cache=caches))
    return np.array(relative), squared, pairs


@pytest.mark.parametrize(("make", "scheme"), [(tiny_models.llama, "tq2"), (tiny_models.llama_sliding, "k=tq3,v=tq2")])
def test_errors_are_those_of_float64(make: Any, scheme: str) -> None:
    model = make()
    found = attention_errors(model, ids(), scheme, bins=TOKENS)
    assert found is not None and (found.scheme, found.tokens) == (scheme, TOKENS)
    relative, squared, pairs = by_hand(model, scheme)
    assert [r.first for r in found.positions] == [r.last for r in found.positions] == list(range(TOKENS))
    expected = np.sqrt(relative.mean(axis=0))
    assert [r.value for r in found.positions] == pytest.approx(expected.tolist(), rel=2e-3, abs=1e-6)
    assert max(expected[: found.dense]) == 0.0 and min(expected[60:]) > 0.01
    assert found.distances[0].first == found.dense == np.flatnonzero(pairs)[0]
    for r in found.distances:
        rows = slice(r.first, r.last + 1)
        assert r.value == pytest.approx(float(np.sqrt(squared[rows].sum() / pairs[rows].sum())), rel=1e-3)


def test_ranges_of_distance_double_and_end_with_the_text() -> None:
    found = attention_errors(tiny_models.llama(), ids(), "tq4")
    assert found is not None
    ranges = [(r.first, r.last) for r in found.distances]
    assert ranges == [(20, 39), (40, 79), (80, 159), (160, TOKENS - 1)]
    assert (found.positions[0].first, found.positions[-1].last) == (0, TOKENS - 1)


def test_more_bits_have_smaller_errors_and_lossless_codecs_none() -> None:
    model = tiny_models.llama()
    rough, fine, exact = (attention_errors(model, ids(), scheme) for scheme in ("tq2", "tq5", "identity"))
    assert rough is not None and fine is not None and exact is not None
    for few, many in zip(rough.positions[2:], fine.positions[2:], strict=True):
        assert few.value > 4 * many.value > 0
    assert {r.value for r in (*exact.positions, *exact.distances)} == {0.0}
    assert list(exact.layers) == [0, 1, 2] and set(exact.layers.values()) == {0.0}


def test_layers_that_stay_are_left_out_and_without_others_there_is_nothing() -> None:
    model = tiny_models.llama(num_hidden_layers=4)
    found = attention_errors(model, ids(), "tq4,edges=1")
    assert found is not None and list(found.layers) == [1, 2]
    assert attention_errors(model, ids(), "fp16") is None


def test_the_model_goes_on_exactly() -> None:
    model = tiny_models.llama()
    expected = model(mx.array([ids()]))
    with kvq.compress(model, "tq1") as compression:
        caches = compression.maker()
        for cache in caches:
            cache.probe = module._probe(module._Sums.of(TOKENS))
        found = model(mx.array([ids()]), cache=caches)
    assert mx.allclose(found, expected, rtol=1e-3, atol=1e-3).item()


def test_layers_that_share_keys_are_taken_together() -> None:
    found = attention_errors(tiny_models.gemma3n(), ids(), "tq3")
    assert found is not None and all(0 < value < 1 for value in found.layers.values())


def test_short_texts_are_refused_and_the_model_is_as_before() -> None:
    model = tiny_models.llama()
    with pytest.raises(kvq.KVQError, match=f"must have at least {LEAST_TOKENS} tokens, got {LEAST_TOKENS - 1}"):
        attention_errors(model, ids(LEAST_TOKENS - 1), "tq4")
    assert attention_errors(model, ids(LEAST_TOKENS), "tq4") is not None
    assert "make_cache" not in vars(model)
