"""The claims of the README on real weights: exactness, bytes, quality, resuming, mlx-lm's own tools."""

from __future__ import annotations

import copy
import gc
import shutil
import sys
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import main as generate_main
from mlx_lm.models.cache import KVCache, load_prompt_cache, make_prompt_cache, trim_prompt_cache

import mlx_kvq_plugin as kvq

pytestmark = pytest.mark.real_model

MODELS = ("smollm2", "gemma3")


def last_logits(model: Any, caches: list[Any], ids: list[int], cuts: list[int]) -> mx.array:
    """Logits after each run of tokens between cuts."""
    rows = []
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        rows.append(model(mx.array([ids[start:stop]]), cache=caches)[0, -1])
        mx.eval(rows[-1], [cache.state for cache in caches])
    return mx.stack(rows)


@pytest.mark.parametrize(("name", "prompt"), [("smollm2", 200), ("gemma3", 560)])
def test_identity_scheme_is_bit_identical_to_mlx_lm(name, prompt, real_model, text_ids):
    """Prefill in uneven chunks, then 64 single steps; past Gemma's window of 512 tokens."""
    model, tokenizer = real_model(name)
    ids = text_ids(tokenizer, prompt + 64)
    cuts = [prompt // 3, prompt - 1, *range(prompt, prompt + 63)]
    expected = last_logits(model, make_prompt_cache(model), ids, cuts)
    with kvq.compress(model, "identity"):
        caches = kvq.make_prompt_cache(model)
        found = last_logits(model, caches, ids, cuts)
    report = kvq.cache_report(caches)
    assert report.compressed == len(caches) and all(layer.packed > 0 for layer in report.layers)
    assert mx.array_equal(expected, found)


# Measured on this text with some room; without the key frame tq4 misses on Gemma, and any wrong token misses all.
@pytest.mark.parametrize("name", MODELS)
def test_quality_of_single_steps_through_the_compressed_cache(name, real_model, text_ids):
    model, tokenizer = real_model(name)
    ids = text_ids(tokenizer, 300)
    reference = kvq.step_logprobs(model, make_prompt_cache(model), ids, 200)
    for scheme, limit, top1 in (("tq4", 0.015, 0.90), ("rvq1", 0.20, 0.75)):
        with kvq.compress(model, scheme):
            run = kvq.step_logprobs(model, kvq.make_prompt_cache(model), ids, 200)
        fidelity = kvq.compare(reference, run, ids[200:])
        assert 0 < fidelity.kl_mean <= limit, (scheme, fidelity)
        assert fidelity.top1 >= top1, (scheme, fidelity)
        assert fidelity.perplexity == pytest.approx(fidelity.reference_perplexity, rel=0.15)


def float16_tokens(model: Any, ids: list[int]) -> list[tuple[mx.array, mx.array]]:
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([ids]), cache=caches)[:, -1])
    tokens = [tuple(side.astype(mx.float16) for side in cache.keys_and_values()) for cache in caches]
    mx.eval(tokens)
    return tokens


def allocated(make: Any, tokens: list[tuple[mx.array, mx.array]]) -> tuple[int, int]:
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    caches = make()
    for cache, (keys, values) in zip(caches, tokens, strict=True):
        for start, stop in ((0, keys.shape[2] - 1), (keys.shape[2] - 1, keys.shape[2])):
            cache.update_and_fetch(keys[..., start:stop, :], values[..., start:stop, :])
            if isinstance(cache, kvq.KVQCache):
                cache.compact()
            mx.eval(cache.state)
    gc.collect()
    return mx.get_active_memory() - before, sum(cache.nbytes for cache in caches)


def test_bytes_really_allocated_for_a_thousand_real_tokens(real_model, text_ids):
    model, tokenizer = real_model("smollm2")
    tokens = float16_tokens(model, text_ids(tokenizer, 1000))
    pool = mx.set_cache_limit(0)  # the buffer pool may hand out larger buffers than asked for
    try:
        stock, _ = allocated(lambda: [KVCache() for _ in tokens], tokens)
        for scheme, ratio in (("tq4", 3.3), ("tq3", 4.0), ("rvq1", 4.8)):
            with kvq.compress(model, scheme):
                held, reported = allocated(lambda: kvq.make_prompt_cache(model), tokens)
            assert stock / held >= ratio, scheme
            assert reported == pytest.approx(held, rel=0.02), scheme
    finally:
        mx.set_cache_limit(pool)


@pytest.mark.parametrize("scheme", ["tq4", "rvq1,edges=1", "k=tq3,v=affine4,compress_after=prefill"])
def test_resumed_cache_equals_unbroken_run_bit_for_bit(scheme, real_model, text_ids, tmp_path):
    model, tokenizer = real_model("smollm2")
    ids = text_ids(tokenizer, 180)
    with kvq.compress(model, scheme):
        caches = kvq.make_prompt_cache(model)
        last_logits(model, caches, ids[:150], [130, *range(131, 150)])
        file = tmp_path / "prompt.safetensors"
        kvq.save_prompt_cache(file, caches, model=model, token_ids=ids[:150])
        resumed, info = kvq.load_prompt_cache(file, model)
        own = load_prompt_cache(str(file))  # mlx-lm's own loader
        assert info.token_ids == tuple(ids[:150]) and info.tokens == 150
        assert [cache.nbytes for cache in resumed] == [cache.nbytes for cache in caches]
        cuts = list(range(1, 30))
        expected = last_logits(model, caches, ids[150:], cuts)
        assert mx.array_equal(expected, last_logits(model, resumed, ids[150:], cuts))
        assert mx.array_equal(expected, last_logits(model, own, ids[150:], cuts))


def test_resumed_sliding_window_equals_unbroken_run(real_model, text_ids, tmp_path):
    model, tokenizer = real_model("gemma3")
    ids = text_ids(tokenizer, 560)
    with kvq.compress(model, "tq4"):
        caches = kvq.make_prompt_cache(model)
        last_logits(model, caches, ids[:540], [300, 530])
        file = tmp_path / "prompt.safetensors"
        kvq.save_prompt_cache(file, caches, model=model)
        resumed, _ = kvq.load_prompt_cache(file, model)
        cuts = list(range(1, 20))
        expected = last_logits(model, caches, ids[540:], cuts)
        assert mx.array_equal(expected, last_logits(model, resumed, ids[540:], cuts))


def test_stream_generate_works_unchanged_and_trimming_repeats_the_text(real_model, text_ids):
    model, tokenizer = real_model("smollm2")
    ids = text_ids(tokenizer, 120)
    with kvq.compress(model, "tq6"):
        caches = kvq.make_prompt_cache(model)
        first = [r.token for r in mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=12, prompt_cache=caches)]
        again = copy.deepcopy(caches)
        assert caches[0].offset >= 131 and caches[0].packed_tokens > 0
        trim_prompt_cache(again, again[0].offset - 119)
        second = [
            r.token for r in mlx_lm.stream_generate(model, tokenizer, ids[119:], max_tokens=12, prompt_cache=again)
        ]
    assert first == second


def test_mlx_lm_generate_reads_the_prompt_cache_file(real_model, text_ids, tmp_path, monkeypatch, capsys):
    """`mlx_lm.generate --prompt-cache-file` once the plugin is imported: an uncompressed model, our caches."""
    model, _ = real_model("smollm2")
    folder = tmp_path / "float32"  # half precision products are slow on CPUs
    shutil.copytree(kvq.demo_model_path("smollm2", progress=False), folder)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    path = str(folder)
    plain, tokenizer = mlx_lm.load(path)
    ids = text_ids(tokenizer, 100)
    with kvq.compress(plain, "tq4", source=path):
        caches = kvq.make_prompt_cache(plain)
        mx.eval(plain(mx.array([ids]), cache=caches), [cache.state for cache in caches])
        file = tmp_path / "prompt.safetensors"
        kvq.save_prompt_cache(file, caches, model=plain, token_ids=ids)
        question = " In one word, a cache"
        tail = tokenizer.encode(question, add_special_tokens=True)
        expected = "".join(
            r.text for r in mlx_lm.stream_generate(plain, tokenizer, tail, max_tokens=6, prompt_cache=caches)
        )
    arguments = ["--prompt-cache-file", str(file), "--prompt", question, "--ignore-chat-template"]
    monkeypatch.setattr(sys, "argv", ["mlx_lm.generate", *arguments, "--max-tokens", "6", "--verbose", "True"])
    generate_main()
    assert expected.strip() and expected.strip() in capsys.readouterr().out
