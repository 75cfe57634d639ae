"""The batch cache under mlx-lm's own batched generation, and what histories (test_cache_histories.py) do not reach."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_models
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import BatchRotatingKVCache, KVCache

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.batch import BatchKVQCache
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.config import LayerSpec
from mlx_kvq_plugin.errors import CacheStateError
from mlx_kvq_plugin.rotary import no_rotation
from mlx_kvq_plugin.sliding import SlidingKVQCache

EXACT = "k=identity,v=identity"
MODELS = ("llama", "qwen2", "gemma3_text", "llama_sliding")
LENGTHS, LATE = (300, 7, 120, 1), (200, 33)  # the longest is past the tiny models' window of 160
STEPS, LATE_STEPS = (40, 60, 30, 50), (40, 30)


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[int(token) for token in rng.integers(1, tiny_models.VOCAB, n)] for n in lengths]


def alone(model: Any, prompt: list[int], steps: int, chunk: int = 2048) -> list[int]:
    """Greedy tokens of one sequence."""
    generator = generate_step(mx.array(prompt), model, max_tokens=steps, prefill_step_size=chunk)
    return [int(token) for token, _ in generator]


class Batch:
    """A run of mlx-lm's BatchGenerator: tokens of every sequence, caches of the finished, classes of the live."""

    def __init__(self, model: Any, chunk: int = 2048):
        self.generator = BatchGenerator(model, prefill_step_size=chunk)
        self.tokens: dict[int, list[int]] = {}
        self.caches: dict[int, list[Any]] = {}
        self.classes: set[str] = set()

    def add(self, prompts: list[list[int]], steps: Sequence[int], **options: Any) -> None:
        for uid in self.generator.insert(prompts, list(steps), **options):
            self.tokens[uid] = []

    def run(self, steps: int = 10**6) -> Batch:
        for _ in range(steps):
            responses = self.generator.next_generated()
            if not responses:
                break
            for response in responses:
                self.tokens[response.uid].append(int(response.token))
                if response.finish_reason:
                    self.caches[response.uid] = response.prompt_cache
            for batch in (self.generator._prompt_batch, self.generator._generation_batch):
                self.classes |= {type(cache).__name__ for cache in batch.prompt_cache}
        return self


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_models.ADAPTED[request.param]()


@pytest.mark.parametrize("scheme", [EXACT, "tq4", "rvq1", "affine4"])
def test_every_row_gets_the_tokens_it_would_get_alone(model: Any, scheme: str) -> None:
    with kvq.compress(model, scheme):
        chunk = 64 if scheme == "tq4" else 2048
        expected = [
            alone(model, prompt, steps, chunk)
            for prompt, steps in zip(prompts(LENGTHS + LATE), STEPS + LATE_STEPS, strict=True)
        ]
        given = prompts(LENGTHS + LATE)
        batch = Batch(model, chunk)
        batch.add(given[: len(LENGTHS)], STEPS)
        for prompt, steps in zip(given[len(LENGTHS) :], LATE_STEPS, strict=True):
            batch.run(7)
            batch.add([prompt], [steps])
        assert list(batch.run().tokens.values()) == expected
        assert batch.classes == {"BatchKVQCache"}
        assert all(isinstance(cache, KVQCache) for caches in batch.caches.values() for cache in caches)


def test_identity_batches_equal_mlx_lms(model: Any) -> None:
    stock = Batch(model)
    stock.add(prompts(LENGTHS), STEPS)
    stock.run()
    with kvq.compress(model, EXACT):
        ours = Batch(model)
        ours.add(prompts(LENGTHS), STEPS)
        assert ours.run().tokens == stock.tokens


@pytest.mark.parametrize("first", ["sliding", "full"])
def test_layers_left_to_mlx_lm_share_masks_with_compressed_ones(first: str) -> None:
    """The first layer of a kind makes the mask of all: mlx-lm's cache for ours, and ours for mlx-lm's."""
    kinds = ["sliding_attention", "full_attention"] * 2
    kinds = kinds if first == "sliding" else kinds[::-1]
    model = tiny_models.llama(num_hidden_layers=4, layer_types=kinds, sliding_window=tiny_models.WINDOW)
    with kvq.compress(model, "tq4,edges=1"):
        expected = [alone(model, p, n) for p, n in zip(prompts(LENGTHS), STEPS, strict=True)]
        batch = Batch(model)
        batch.add(prompts(LENGTHS), STEPS)
        assert list(batch.run().tokens.values()) == expected
        assert batch.classes == {"BatchKVQCache", "BatchKVCache", "BatchRotatingKVCache"}


def test_a_finished_row_goes_on_alone_and_in_another_batch() -> None:
    model = tiny_models.gemma3_text()
    first, more = prompts((250, 90)), prompts((40, 40), seed=1)
    with kvq.compress(model, "tq4"):
        batch = Batch(model)
        batch.add(first, (20, 30))
        batch.run()
        expected = []
        for prompt, extra, steps in zip(first, more, (20, 30), strict=True):
            cache = kvq.make_prompt_cache(model)
            list(generate_step(mx.array(prompt), model, max_tokens=steps, prompt_cache=cache))
            list(zip(range(25), generate_step(mx.array(extra), model, max_tokens=25, prompt_cache=cache), strict=False))
            expected.append(cache[0].nbytes)
        again = Batch(model)
        again.add(more, (25, 25), caches=list(batch.caches.values()))
        again.run()
        for caches, nbytes in zip(again.caches.values(), expected, strict=True):
            assert abs(caches[0].nbytes - nbytes) <= 0.1 * nbytes


def test_batch_generate_with_prompt_caches_leaves_them_alone() -> None:
    model = tiny_models.llama()
    with kvq.compress(model, "rvq1"):
        cache = kvq.make_prompt_cache(model)
        list(generate_step(mx.array(prompts((150,))[0]), model, max_tokens=1, prompt_cache=cache))
        before = [np.array(x) for layer in cache for x in layer.decode_all()]
        batch = Batch(model)
        batch.add(prompts((30, 20), seed=2), (20, 20), caches=[cache, cache])
        batch.run()
        for x, y in zip((x for layer in cache for x in layer.decode_all()), before, strict=True):
            np.testing.assert_array_equal(x, y)


def filled(lengths: Sequence[int], spec: LayerSpec, make: Callable[..., Any] = KVQCache, **options: Any) -> list[Any]:
    rng = np.random.default_rng(0)
    caches = []
    for i, length in enumerate(lengths):
        cache = make(spec, rotary=no_rotation(), **options)
        x = [mx.array((i + rng.standard_normal((1, 2, length, 64))).astype(np.float32)) for _ in range(2)]
        cache.update_and_fetch(*x)
        cache.settle()
        caches.append(cache)
    return caches


def test_statistics_differ_per_row_and_no_padding_is_stored() -> None:
    caches = filled((500, 100), LayerSpec("tq4", "tq4"))
    batch = KVQCache.merge(caches)
    assert isinstance(batch, BatchKVQCache)
    means = [np.array(row.frame.mean) for row in batch.rows]
    assert np.abs(means[0].mean() - 0) < 0.1 < 0.9 < means[1].mean()
    assert batch.nbytes == sum(cache.nbytes for cache in caches) and batch.held == 600
    assert batch.dense_nbytes() == 600 * 2 * 128 * 2


def test_an_extracted_cache_holds_its_own_bytes_only() -> None:
    previous = mx.set_cache_limit(0)
    try:
        batch = KVQCache.merge(filled((4000, 200), LayerSpec("tq4", "tq4")))
        mx.eval(batch.state)
        gc.collect()
        row = batch.extract(1)
        mx.eval(row.state)
        before = mx.get_active_memory()
        nbytes = row.nbytes
        assert nbytes < batch.nbytes / 5
        del batch
        gc.collect()
        held = mx.get_active_memory()
        del row
        gc.collect()
        assert before > held > mx.get_active_memory()
        assert held - mx.get_active_memory() == pytest.approx(nbytes, rel=0.02)
    finally:
        mx.set_cache_limit(previous)


def test_left_padding_of_an_empty_batch() -> None:
    """Rows that begin with padding compute what they compute without it."""
    model = tiny_models.llama()
    first, second = prompts((40, 25))
    with kvq.compress(model, "tq4"):
        expected = []
        for prompt in (first, second):
            caches = kvq.make_prompt_cache(model)
            expected.append(model(mx.array([prompt]), cache=caches)[:, -1])
        batch = [layer.merge([layer, layer]) for layer in kvq.make_prompt_cache(model)]
        for layer in batch:
            layer.prepare(left_padding=[0, 15])
        found = model(mx.array([first, [0] * 15 + second]), cache=batch)[:, -1]
        np.testing.assert_allclose(found, mx.concatenate(expected), atol=2e-5)
        assert [row.held for row in batch[0].rows] == [40, 25] and batch[0].offset.tolist() == [40, 25]


def test_a_last_chunk_of_one_token_of_padded_prompts() -> None:
    """mlx-lm's own rotating batch raises there."""
    stock = BatchRotatingKVCache(24, [0, 0])
    stock.prepare(lengths=[17, 3], right_padding=[0, 14])
    x = mx.zeros((2, 1, 16, 8))
    stock.update_and_fetch(x, x)
    with pytest.raises(RuntimeError):
        stock.update_and_fetch(x[:, :, :1], x[:, :, :1])
    model = tiny_models.gemma3_text()
    with kvq.compress(model, "tq4"):
        for lengths in ((130, 5), (66, 66, 2), (322, 7)):  # one less is prefilled, in chunks of 64
            given = prompts(lengths)
            expected = [alone(model, prompt, 12, 64) for prompt in given]
            batch = Batch(model)
            batch.generator.prefill_step_size = 2048
            batch.generator._prompt_batch.prefill_step_size = 64
            batch.add(given, [12] * len(given))
            assert list(batch.run().tokens.values()) == expected


def test_masks_that_a_model_changes_are_obeyed() -> None:
    """A mask as made says no more than "causal"; another array, though equal in shape, may say more."""
    model = tiny_models.llama()
    first, second = prompts((60, 45))
    with kvq.compress(model, EXACT):
        batch = [layer.merge([layer, layer]) for layer in kvq.make_prompt_cache(model)]
        for layer in batch:
            layer.prepare(lengths=[60, 45], right_padding=[0, 15])
        model(mx.array([first, second + [0] * 15]), cache=batch)
        for layer in batch:
            layer.finalize()
        layer = batch[0]
        mask = layer.make_mask(1)
        x = mx.random.normal((2, 2, 1, 64))
        layer.update_and_fetch(x, x)
        assert [own for *_, own in layer.row_calls(mask)] == [None, None]
        narrow = mask & (mx.arange(mask.shape[-1]) >= mask.shape[-1] - 5)
        owns = [own for *_, own in layer.row_calls(narrow)]
        assert [own.shape[-1] for own in owns] == [61, 46] and [mx.sum(own).item() for own in owns] == [5, 5]
        with pytest.raises(CacheStateError, match="one column for each"):
            layer.row_calls(mask[..., 1:])


def test_only_caches_of_one_kind_form_a_batch() -> None:
    spec = LayerSpec("tq4", "tq4")
    (full,), (other,) = filled((30,), spec), filled((30,), LayerSpec("rvq1", "rvq1"))
    (sliding,) = filled((30,), spec, SlidingKVQCache, max_size=160)
    for stranger in (other, sliding, KVCache()):
        with pytest.raises(CacheStateError, match="one class and scheme"):
            full.merge([full, stranger])
    batch = full.merge([full])
    with pytest.raises(CacheStateError, match="same kind"):
        batch.extend(KVCache())
    x = mx.zeros((3, 2, 1, 64))
    with pytest.raises(CacheStateError, match="one row for each"):
        batch.update_and_fetch(x, x)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_real_models_batch(name: str, real_model: Callable[[str], tuple[Any, Any]]) -> None:
    model, tokenizer = real_model(name)
    texts = ["The KV cache of a language model", "Once upon a time there was", "1, 2, 3, 4,", "def add(a, b):"]
    given = [tokenizer.encode(text * repeat) for text, repeat in zip(texts, (12, 1, 5, 2), strict=True)]
    steps = 12
    with kvq.compress(model, "tq4"):
        expected = [alone(model, prompt, steps) for prompt in given]
        found = mlx_lm.batch_generate(model, tokenizer, given, max_tokens=steps, return_token_ids=True)
    for tokens, wanted in zip(found.token_ids, expected, strict=True):
        assert tokens == wanted[: len(tokens)]
