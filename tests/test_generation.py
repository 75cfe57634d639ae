"""`CausalLM.generate` on tiny models: mlx-lm's tokens, transformers' conventions, one sentence for what is refused."""

from __future__ import annotations

import functools
import itertools
import time
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.generate import generate_step
from refusals import message_of
from transformers import GenerationConfig

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.generation.processors import warped

SCHEMES = ("fp16", "identity", "tq4", "rvq1")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(1, tiny_models.VOCAB, length).tolist()


def reference(model: Any, prompt: list[int], steps: int, **options: Any) -> list[int]:
    """mlx-lm's own greedy tokens."""
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=steps, **options)]


def new(output: mx.array, prompt: list[int], row: int = 0) -> list[int]:
    assert output.dtype == mx.int32
    tokens = output[row].tolist()
    assert tokens[: len(prompt)] == prompt
    return tokens[len(prompt) :]


@pytest.fixture
def lm() -> kvq.CausalLM:
    return kvq.CausalLM(tiny_models.llama(), kv_scheme="tq4")


# ---- greedy decoding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_greedy_tokens_are_those_of_mlx_lm(name: str, scheme: str) -> None:
    lm = kvq.CausalLM(tiny_models.ADAPTED[name](), kv_scheme=scheme)
    for length in (1, 2, 90, 170):
        prompt = prompt_of(length)
        expected = reference(lm.model, prompt, 40)
        assert new(lm.generate(prompt, max_new_tokens=40), prompt) == expected


def test_long_prompts_are_read_in_the_chunks_of_mlx_lm(lm) -> None:
    prompt = prompt_of(150)
    expected = reference(lm.model, prompt, 20, prefill_step_size=64)
    output = lm.generate(prompt, max_new_tokens=20, prefill_chunk_size=64)
    assert new(output, prompt) == expected != reference(lm.model, prompt, 20)


@pytest.mark.parametrize(
    "make", [list, np.array, mx.array, lambda x: [x], lambda x: np.array([x]), lambda x: mx.array([x])]
)
def test_input_ids_of_every_kind(lm, make: Any) -> None:
    prompt = prompt_of(12)
    output = lm.generate(make(prompt), max_new_tokens=3)
    assert output.shape == (1, 15) and new(output, prompt) == reference(lm.model, prompt, 3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_left_padded_rows_get_the_tokens_they_get_alone(scheme: str) -> None:
    """Rows end at different steps: the rest of a row is padding, and the others go on."""
    lm = kvq.CausalLM(tiny_models.gemma3_text(), kv_scheme=scheme)
    prompts = [prompt_of(n) for n in (1, 7, 100, 165)]
    alone = [reference(lm.model, prompt, 30) for prompt in prompts]
    end = alone[1][10]
    width = max(map(len, prompts))
    ids = [[5] * (width - len(p)) + p for p in prompts]  # 5 may be any token: the mask says what is padding
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    output = lm.generate(ids, attention_mask=np.array(mask), max_new_tokens=30, eos_token_id=end, pad_token_id=0)
    cut = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in alone]
    assert len(cut[1]) <= 11 and len({len(tokens) for tokens in cut}) > 1
    longest = max(map(len, cut))
    assert output.tolist() == [row + t + [0] * (longest - len(t)) for row, t in zip(ids, cut, strict=True)]


def test_pad_tokens_on_the_left_are_padding_without_a_mask(lm) -> None:
    prompt = prompt_of(9)
    output = lm.generate([[0, 0, *prompt], [*prompt_of(11)]], max_new_tokens=5, pad_token_id=0)
    assert new(output, [0, 0, *prompt]) == reference(lm.model, prompt, 5)


def test_generation_ends_with_an_end_token_that_stays(lm) -> None:
    prompt = prompt_of(20)
    tokens = reference(lm.model, prompt, 20)
    end = tokens[7]
    until = tokens[: tokens.index(end) + 1]
    for ends in (end, [end], [96, end]):
        assert new(lm.generate(prompt, max_new_tokens=20, eos_token_id=ends), prompt) == until


# ---- configs ------------------------------------------------------------------------------------------------------


def test_the_call_wins_over_its_config_and_that_over_the_models() -> None:
    own = GenerationConfig(max_new_tokens=3, no_repeat_ngram_size=1)
    lm = kvq.CausalLM(tiny_models.llama(), kv_scheme="tq4", generation_config=own)
    prompt = prompt_of(10)

    def length(*arguments: Any, **fields: Any) -> int:
        return lm.generate(prompt, *arguments, **fields).shape[1] - len(prompt)

    assert length() == 3
    assert length(GenerationConfig(max_new_tokens=5)) == 5
    assert length(GenerationConfig(max_new_tokens=5), max_new_tokens=4) == 4
    assert length(max_new_tokens=None) == 20  # None takes the model's value back
    assert length(GenerationConfig(do_sample=False)) == 3
    tokens = lm.generate(prompt, GenerationConfig(max_new_tokens=30))[0].tolist()
    assert len(set(tokens[len(prompt) :]) | set(prompt)) == 30 + len(set(prompt))  # the model's own field still holds
    assert own.max_new_tokens == 3


def test_lengths(lm) -> None:
    prompt = prompt_of(10)
    assert lm.generate(prompt).shape == (1, 30)
    assert lm.generate(prompt, max_length=14).shape == (1, 14)
    assert lm.generate(prompt, max_length=14, max_new_tokens=6).shape == (1, 16)
    assert "max_length must be above" in message_of(lambda: lm.generate(prompt, max_length=10))
    end = reference(lm.model, prompt, 1)[0]
    for fields in ({"min_new_tokens": 5}, {"min_length": 15}):
        tokens = new(lm.generate(prompt, eos_token_id=end, max_new_tokens=9, **fields), prompt)
        assert len(tokens) >= 5 and end not in tokens[:5]
    assert new(lm.generate(prompt, eos_token_id=end, max_new_tokens=9), prompt) == [end]


def test_max_time_ends_generation(lm) -> None:
    slow = [lambda ids, scores: time.sleep(0.02) or False]
    output = lm.generate(prompt_of(5), max_new_tokens=1000, max_time=0.1, stopping_criteria=slow)
    assert output.shape[1] < 30


def test_a_prompt_of_nothing_is_the_bos_token(lm) -> None:
    assert lm.generate(bos_token_id=7, max_new_tokens=4).tolist() == lm.generate([7], max_new_tokens=4).tolist()
    assert "input_ids must be given" in message_of(lambda: lm.generate(max_new_tokens=4))


# ---- scores -------------------------------------------------------------------------------------------------------


def test_repetition_penalty_looks_back_at_everything(lm) -> None:
    """Against the formula on full logits: the prompt is longer than mlx-lm's default of 20 tokens."""
    prompt = prompt_of(60)
    tokens = new(lm.generate(prompt, max_new_tokens=12, repetition_penalty=1.7), prompt)
    text = list(prompt)
    caches = kvq.make_prompt_cache(lm.model)
    lm.model(mx.array([text[:-1]]), cache=caches)
    for _ in range(12):
        logits = np.array(lm.model(mx.array([text[-1:]]), cache=caches)[0, -1])
        seen = np.unique(text)
        logits[seen] = np.where(logits[seen] < 0, logits[seen] * 1.7, logits[seen] / 1.7)
        text.append(int(logits.argmax()))
    assert tokens == text[60:] != reference(lm.model, prompt, 12)


def test_no_repeated_ngrams(lm) -> None:
    prompt = prompt_of(3) * 10
    plain = lm.generate(prompt, max_new_tokens=60)[0].tolist()
    for size in (1, 2, 3):
        tokens = lm.generate(prompt, max_new_tokens=60, no_repeat_ngram_size=size)[0].tolist()
        grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
        added = grams[len(prompt) - size + 1 :]
        assert len(set(added)) == len(added) and not set(added) & set(grams[: len(prompt) - size + 1])
        assert tokens != plain


def test_words_and_tokens_that_must_not_come(lm) -> None:
    prompt = prompt_of(30)
    tokens = reference(lm.model, prompt, 6)
    first, second = tokens[0], tokens[1]
    assert new(lm.generate(prompt, max_new_tokens=6, begin_suppress_tokens=[first]), prompt)[0] != first
    assert first not in new(lm.generate(prompt, max_new_tokens=30, suppress_tokens=[first]), prompt)
    assert first not in new(lm.generate(prompt, max_new_tokens=30, bad_words_ids=[[first]]), prompt)
    paired = new(lm.generate(prompt, max_new_tokens=30, bad_words_ids=[[first, second]]), prompt)
    assert paired[0] == first and (first, second) not in set(itertools.pairwise(paired))


def test_sampling_draws_from_transformers_distribution() -> None:
    """Temperature, then top-k, then top-p, then min-p, against the definitions in float64."""
    logits = np.random.default_rng(3).normal(0, 3, (2, 50))
    logprobs = mx.array((logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32))
    fields = {"temperature": 1.8, "top_k": 20, "top_p": 0.8, "min_p": 0.1}
    from mlx_kvq_plugin.generation.config import Sampling

    found = np.array(mx.softmax(warped(logprobs, Sampling(**fields)), axis=-1))
    for row, given in zip(found, logits, strict=True):
        p = np.exp(given / 1.8)
        p[np.argsort(p)[:-20]] = 0
        p /= p.sum()
        order = np.argsort(p)[::-1]
        kept = order[: int(np.searchsorted(np.cumsum(p[order]), 0.8)) + 1]
        p[np.setdiff1d(np.arange(50), kept)] = 0
        p[p < 0.1 * p.max()] = 0
        assert 1 < (p > 0).sum() < 20
        np.testing.assert_allclose(row, p / p.sum(), atol=1e-5)


def test_sampling_with_a_seed_is_reproducible(lm) -> None:
    prompt = prompt_of(10)

    def drawn(seed: int, **fields: Any) -> list[int]:
        return new(lm.generate(prompt, do_sample=True, seed=seed, max_new_tokens=25, **fields), prompt)

    assert drawn(1) == drawn(1) != drawn(2)
    greedy = reference(lm.model, prompt, 25)
    assert drawn(1) != greedy
    for fields in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-3}):
        assert drawn(1, **fields) == greedy
    output = lm.generate([prompt, prompt], do_sample=True, seed=1, max_new_tokens=25)
    assert output[0].tolist() != output[1].tolist()


def test_sampling_fields_without_sampling_are_told(lm) -> None:
    with pytest.warns(UserWarning, match="temperature is read with do_sample=True only"):
        lm.generate([1, 2], max_new_tokens=1, temperature=0.3)
    lm.generate([1, 2], max_new_tokens=1, top_k=50, top_p=1.0)  # the defaults say nothing


def test_several_sequences_of_a_prompt(lm) -> None:
    prompts = [prompt_of(8), prompt_of(8, 1)]
    output = lm.generate(prompts, max_new_tokens=12, num_return_sequences=3, do_sample=True, seed=4)
    assert output.shape == (6, 20)
    assert [row[:8] for row in output.tolist()] == [prompts[0]] * 3 + [prompts[1]] * 3
    assert len({tuple(row) for row in output.tolist()}) == 6
    greedy = lm.generate(prompts, max_new_tokens=12, num_return_sequences=2)
    for i in range(4):
        assert new(greedy, prompts[i // 2], i) == reference(lm.model, prompts[i // 2], 12)


def test_scores_and_logits(lm) -> None:
    prompt = prompt_of(20)
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = lm.generate(prompt, repetition_penalty=2.0, suppress_tokens=[3], **options)
    tokens = new(output.sequences, prompt)
    assert len(output.scores) == len(output.logits) == 6 and output["sequences"] is output.sequences
    caches = kvq.make_prompt_cache(lm.model)
    lm.model(mx.array([prompt[:-1]]), cache=caches)
    for token, before, scores, logits in zip(tokens, [prompt[-1], *tokens], output.scores, output.logits, strict=False):
        assert scores.shape == logits.shape == (1, tiny_models.VOCAB)
        assert int(mx.argmax(scores)) == token and scores[0, 3].item() == -float("inf")
        np.testing.assert_allclose(logits[0], lm.model(mx.array([[before]]), cache=caches)[0, -1], atol=1e-5)
        assert not mx.array_equal(scores, logits)
    plain = lm.generate(prompt, **options)
    assert all(mx.array_equal(a, b) for a, b in zip(plain.scores, plain.logits, strict=True))
    drawn = lm.generate(prompt, do_sample=True, top_k=5, temperature=0.5, seed=1, **options)
    for scores, logits in zip(drawn.scores, drawn.logits, strict=True):
        kept = np.isfinite(np.array(scores))
        assert kept.sum() == 5
        np.testing.assert_allclose(np.array(scores)[kept], 2 * np.array(logits)[kept], rtol=1e-5)
    normal = lm.generate(prompt, renormalize_logits=True, **options).scores[0]
    assert mx.logsumexp(normal).item() == pytest.approx(0, abs=1e-4)


def test_scores_of_rows_that_ended_are_nan(lm) -> None:
    prompts = [prompt_of(9), prompt_of(9, 2)]
    end = reference(lm.model, prompts[0], 3)[2]
    output = lm.generate(prompts, max_new_tokens=8, eos_token_id=end, return_dict_in_generate=True, output_scores=True)
    made = [row[9:] for row in output.sequences.tolist()]
    lengths = [row.index(end) + 1 if end in row else len(row) for row in made]
    assert min(lengths) < max(lengths) == len(output.scores)
    for step, scores in enumerate(output.scores):
        assert [bool(mx.isnan(row).all()) for row in scores] == [step >= length for length in lengths]


def test_logits_processors_of_the_caller(lm) -> None:
    prompt = prompt_of(6)
    seen = []

    def ban_in_place(ids: mx.array, scores: mx.array) -> mx.array:
        seen.append((ids.tolist()[0], scores.shape))
        scores[:, reference_tokens[0]] = -float("inf")
        return scores

    reference_tokens = reference(lm.model, prompt, 4)
    tokens = new(lm.generate(prompt, max_new_tokens=4, logits_processor=[ban_in_place]), prompt)
    assert reference_tokens[0] not in tokens
    assert seen == [(prompt + tokens[:i], (1, tiny_models.VOCAB)) for i in range(4)]  # once a token, no more
    forced = lm.generate(
        prompt,
        max_new_tokens=4,
        logits_processor=[lambda ids, s: np.where(np.arange(s.shape[1]) == 9, 0, -np.inf)[None]],
    )
    assert new(forced, prompt) == [9] * 4
    assert "logits_processor must return" in message_of(
        lambda: lm.generate(prompt, logits_processor=[lambda ids, scores: None])
    )


def test_a_processor_sees_no_step_after_the_end(lm) -> None:
    prompt = prompt_of(20)
    tokens = reference(lm.model, prompt, 20)
    end, seen = tokens[7], []
    output = lm.generate(
        prompt, max_new_tokens=20, eos_token_id=end, logits_processor=[lambda ids, s: seen.append(ids.size) or s]
    )
    assert seen == list(range(20, output.size)) and output.size < 40


@pytest.mark.parametrize("fields", [{"repetition_penalty": 1.6}, {"logits_processor": [lambda ids, scores: scores]}])
def test_rows_that_go_on_keep_their_own_tokens(lm, fields: dict[str, Any]) -> None:
    """The first rows end first: what is kept for each of the others moves up."""
    prompts = [prompt_of(12, seed) for seed in range(4)]
    alone = [new(lm.generate(prompt, max_new_tokens=24, **fields), prompt) for prompt in prompts]
    end = alone[0][2]
    cut = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in alone]
    output = lm.generate(prompts, max_new_tokens=24, eos_token_id=end, pad_token_id=0, **fields)
    assert len(cut[0]) <= 3 and max(map(len, cut)) == 24
    assert [new(output, p, i) for i, p in enumerate(prompts)] == [t + [0] * (24 - len(t)) for t in cut]


@pytest.mark.parametrize("fields", [{"min_new_tokens": 5}, {"min_length": 15}])
def test_an_end_token_may_come_right_after_the_least_length(lm, fields: dict[str, Any]) -> None:
    prompt = prompt_of(10)
    eager = [lambda ids, scores: scores + 1e4 * (mx.arange(scores.shape[1]) == 9)]
    output = lm.generate(prompt, eos_token_id=9, max_new_tokens=12, logits_processor=eager, **fields)
    tokens = new(output, prompt)
    assert len(tokens) == 6 and tokens[5] == 9 and 9 not in tokens[:5]


def test_a_row_that_goes_on_keeps_its_own_least_length(lm) -> None:
    """The longer prompt's row ends first; the other must not count from that prompt."""
    long, short = prompt_of(30), prompt_of(5)
    options = {
        "attention_mask": [[1] * 30, [0] * 25 + [1] * 5],
        "eos_token_id": 9,
        "min_new_tokens": 4,
        "pad_token_id": 0,
    }
    output = lm.generate(
        [long, [0] * 25 + short],
        max_new_tokens=12,
        logits_processor=[lambda ids, scores: scores + 1e4 * (mx.arange(scores.shape[1]) == 9)],
        stopping_criteria=[lambda ids, scores: ids.shape[1] == 32],
        **options,
    )
    made = [row[30:] for row in output.tolist()]
    assert made[0][2:] == [0, 0, 0] and len(made[1]) == 5 and made[1][4] == 9


def test_stopping_criteria_of_the_caller(lm) -> None:
    prompts = [prompt_of(6), prompt_of(6, 1)]
    stops = [lambda ids, scores: ids.shape[1] >= 9 and ids[0, 0].item() == prompts[0][0]]
    output = lm.generate(prompts, max_new_tokens=8, stopping_criteria=stops, pad_token_id=0)
    assert new(output, prompts[0]) == reference(lm.model, prompts[0], 8)[:3] + [0] * 5
    assert new(output, prompts[1], 1) == reference(lm.model, prompts[1], 8)
    as_array = [lambda ids, scores: np.array([ids.shape[1] >= 8])]
    assert lm.generate(prompts[0], stopping_criteria=as_array).shape == (1, 8)


# ---- schemes of a call ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", ["fp16", "tq4"])
def test_a_scheme_for_one_call(own: str) -> None:
    lm = kvq.CausalLM(tiny_models.llama(), kv_scheme=own)
    prompt = prompt_of(120)
    config = {"backend": "mlx-kvq", "scheme": "tq2"}
    with kvq.compress(tiny_models.llama(), "tq2") as other:
        expected = reference(other.model, prompt, 30)
    before = reference(lm.model, prompt, 30)
    assert before != expected
    options = {"cache_implementation": "quantized", "cache_config": config, "max_new_tokens": 30}
    output = lm.generate(prompt, return_dict_in_generate=True, **options)
    assert new(output.sequences, prompt) == expected
    assert {row.applied for row in output.past_key_values.report().layers} == {"tq2"}
    assert lm.scheme == own and new(lm.generate(prompt, max_new_tokens=30), prompt) == before
    again = lm.generate([*output.sequences[0].tolist(), 3], past_key_values=output.past_key_values, max_new_tokens=2)
    assert again.shape == (1, 153) and output.past_key_values.scheme == "tq2" and lm.scheme == own


def test_schemes_that_do_not_fit_are_refused(lm) -> None:
    def call(**fields: Any) -> Any:
        return lambda: lm.generate([1, 2], max_new_tokens=2, **fields)

    assert "cache_implementation" in message_of(call(cache_implementation="static"))
    for config in (None, {"backend": "quanto", "nbits": 4}, {"backend": "mlx-kvq"}):
        assert "cache_config" in message_of(call(cache_implementation="quantized", cache_config=config))
    assert "cache_config" in message_of(call(cache_config={"backend": "mlx-kvq", "scheme": "tq4"}))
    cache = lm.prefill([1, 2, 3])
    quantized = {"cache_implementation": "quantized", "cache_config": {"backend": "mlx-kvq", "scheme": "rvq1"}}
    assert "one scheme" in message_of(lambda: lm.generate([1, 2, 3], past_key_values=cache, **quantized))
    outside = tiny_models.llama()
    with kvq.compress(outside, "tq3"):
        wrapped = kvq.CausalLM(outside)
        assert wrapped.scheme == "tq3" and wrapped.generate([1, 2], max_new_tokens=2).shape == (1, 4)
        assert "kv_scheme=" in message_of(lambda: wrapped.generate([1, 2], **quantized))


# ---- drafts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["fp16", "tq4"])
def test_a_draft_model_changes_no_token(scheme: str) -> None:
    lm = kvq.CausalLM(tiny_models.llama(), kv_scheme=scheme)
    drafts = [kvq.CausalLM(tiny_models.llama(seed=3), kv_scheme="rvq1"), tiny_models.llama()]
    prompt = prompt_of(70)
    expected = reference(lm.model, prompt, 50)
    end = expected[30]
    until = expected[: expected.index(end) + 1]
    for draft in drafts:
        for drafted in (None, 4):
            options = {"assistant_model": draft, "num_assistant_tokens": drafted, "return_dict_in_generate": True}
            output = lm.generate(prompt, max_new_tokens=50, **options)
            assert new(output.sequences, prompt) == expected
            output = lm.generate(prompt, max_new_tokens=50, eos_token_id=end, **options)
            assert new(output.sequences, prompt) == until
            cache = output.past_key_values
            assert cache.token_ids == prompt + until and {c.offset for c in cache.caches} == {cache.held}
            assert len(cache.token_ids) - 1 <= cache.held <= len(cache.token_ids)
    penalty = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "max_new_tokens": 30}
    plain = lm.generate(prompt, **penalty).tolist()
    assert plain != lm.generate(prompt, max_new_tokens=30).tolist()
    for draft in drafts:
        assert lm.generate(prompt, assistant_model=draft, **penalty).tolist() == plain


def test_a_draft_model_continues_a_prompt_cache() -> None:
    lm, draft = kvq.CausalLM(tiny_models.gemma3_text(), kv_scheme="tq4"), tiny_models.llama(seed=3)
    prompt = prompt_of(200)  # past the window
    plain, drafted = lm.prefill(prompt[:180]), lm.prefill(prompt[:180])
    expected = lm.generate(prompt, past_key_values=plain, max_new_tokens=20).tolist()
    assert lm.generate(prompt, past_key_values=drafted, max_new_tokens=20, assistant_model=draft).tolist() == expected


# ---- prompt caches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_prefilled_prompt_gives_the_tokens_of_an_unbroken_run(scheme: str) -> None:
    lm = kvq.CausalLM(tiny_models.gemma3_text(), kv_scheme=scheme)
    prompt = prompt_of(200)
    expected = reference(lm.model, prompt, 30)
    cache = lm.prefill(prompt)
    fork = cache.fork()
    output = lm.generate(prompt, past_key_values=cache, max_new_tokens=30, return_dict_in_generate=True)
    assert new(output.sequences, prompt) == expected
    assert output.past_key_values is cache and cache.token_ids == prompt + expected
    assert cache.held == 229 and {c.offset for c in cache.caches} == {229}
    assert new(lm.generate(prompt, past_key_values=fork, max_new_tokens=30), prompt) == expected


@pytest.mark.parametrize("scheme", ["fp16", "tq4"])
def test_forks_go_their_own_ways(scheme: str, tmp_path) -> None:
    lm = kvq.CausalLM(tiny_models.llama(), kv_scheme=scheme)
    book = prompt_of(150)
    cache = lm.prefill(book)
    cache.save(tmp_path / "book.safetensors", {"title": "book"})
    held = [mx.array(part) for layer in cache.caches for part in _arrays(layer.state)]
    answers = []
    for seed in range(3):
        question = [*book, *prompt_of(9, seed)]
        fresh = kvq.PromptCache.load(tmp_path / "book.safetensors", lm)
        assert (fresh.token_ids, fresh.held, fresh.scheme) == (book, 149, scheme)
        fork = cache.fork()
        output = lm.generate(question, past_key_values=fork, max_new_tokens=40)
        assert output.tolist() == lm.generate(question, past_key_values=fresh, max_new_tokens=40).tolist()
        answers.append(new(output, question))
        assert fork.token_ids == output[0].tolist() and fork.report().tokens == fork.held == 150 + 9 + 40 - 1
    assert len({tuple(answer) for answer in answers}) == 3
    assert cache.token_ids == book and cache.held == 149 and cache.report().tokens == 149
    after = [part for layer in cache.caches for part in _arrays(layer.state)]
    assert all(mx.array_equal(a, b) for a, b in zip(held, after, strict=True))


def _arrays(state: Any) -> list[mx.array]:
    if isinstance(state, mx.array):
        return [state]
    return [array for part in state for array in _arrays(part)] if isinstance(state, list | tuple) else []


def test_a_conversation_goes_on_in_its_cache(lm) -> None:
    """A sequence that ends early has its last token read already; both kinds of cache go on."""
    prompt = prompt_of(60)
    end = reference(lm.model, prompt, 5)[4]
    first = lm.generate(prompt, max_new_tokens=20, eos_token_id=end, return_dict_in_generate=True)
    cache = first.past_key_values
    said = first.sequences[0].tolist()
    assert said[-1] == end and cache.token_ids == said and cache.held == len(said)
    longer = said + prompt_of(5)
    output = lm.generate(longer, past_key_values=cache, max_new_tokens=6)
    caches = kvq.make_prompt_cache(lm.model)
    list(generate_step(mx.array(prompt), lm.model, max_tokens=len(said) - 60, prompt_cache=caches))
    assert new(output, longer) == reference(lm.model, longer[len(said) :], 6, prompt_cache=caches)
    # exactly what the layers hold: the last token is read again
    again = lm.generate(prompt, max_new_tokens=20, eos_token_id=end, return_dict_in_generate=True).past_key_values
    assert again.held == len(said)
    assert lm.generate(said, past_key_values=again, max_new_tokens=4).shape == (1, len(said) + 4)
    assert again.held == len(said) + 3 and {c.offset for c in again.caches} == {again.held}


def test_prompt_caches_of_a_batch(lm) -> None:
    prompts = [prompt_of(70), prompt_of(70, 1)]
    caches = [lm.prefill(prompt[:50]) for prompt in prompts]
    singles = [cache.fork() for cache in caches]
    expected = [
        lm.generate(p, past_key_values=c, max_new_tokens=9)[0].tolist() for p, c in zip(prompts, singles, strict=True)
    ]
    output = lm.generate(prompts, past_key_values=caches, max_new_tokens=9, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected and output.past_key_values == tuple(caches)
    for cache, single, tokens in zip(caches, singles, expected, strict=True):
        assert cache.token_ids == tokens and cache.held == single.held == {c.offset for c in cache.caches}.pop()
    more = [tokens + [4] for tokens in expected]
    assert lm.generate(more, past_key_values=caches, max_new_tokens=5).tolist() == [
        lm.generate(p, past_key_values=c, max_new_tokens=5)[0].tolist() for p, c in zip(more, singles, strict=True)
    ]


def test_several_sequences_leave_a_prompt_cache_at_the_prompt(lm) -> None:
    prompt = prompt_of(40)
    cache = lm.prefill(prompt[:30])
    output = lm.generate(
        prompt, past_key_values=cache, num_return_sequences=2, max_new_tokens=6, return_dict_in_generate=True
    )
    first, second = output.past_key_values
    assert (
        first.token_ids == second.token_ids == output.sequences[0].tolist() and first.caches[0] is not second.caches[0]
    )
    assert cache.token_ids == prompt and cache.held == 39
    assert new(lm.generate(prompt, past_key_values=cache, max_new_tokens=6), prompt) == first.token_ids[40:]


def test_prompt_caches_that_do_not_fit_are_refused(lm, tmp_path) -> None:
    prompt = prompt_of(30)
    cache = lm.prefill(prompt)

    def call(ids: Any, caches: Any) -> Any:
        return lambda: lm.generate(ids, past_key_values=caches, max_new_tokens=2)

    assert "from token 3 on" in message_of(call([*prompt[:3], 96 - prompt[3], *prompt[4:]], cache))
    assert "from token 5 on" in message_of(call(prompt[:5], cache))
    assert "PromptCache" in message_of(call(prompt, cache.caches))
    assert "one cache for each of the 2" in message_of(call([prompt, prompt], cache))
    assert "one cache for each of the 2" in message_of(call([prompt, prompt], [cache, cache]))
    other = kvq.CausalLM(tiny_models.llama(seed=5), kv_scheme="tq4")
    assert "another model" in message_of(lambda: other.generate(prompt, past_key_values=cache))
    assert cache.token_ids == prompt and cache.held == 29  # nothing was changed
    assert "one sequence" in message_of(lambda: lm.prefill([prompt, prompt]))
    kvq.save_prompt_cache(tmp_path / "bare.safetensors", cache.caches, model=lm.model)
    with pytest.raises(kvq.KVQError, match="must hold its token ids"):
        kvq.PromptCache.load(tmp_path / "bare.safetensors", lm)
    full = kvq.CausalLM(tiny_models.gemma3_text(), kv_scheme="tq4")
    long = prompt_of(200)
    end = reference(full.model, long, 3)[2]
    ended = full.generate(long, eos_token_id=end, return_dict_in_generate=True)
    assert ended.past_key_values.held == ended.sequences.size
    assert "add a token" in message_of(lambda: full.generate(ended.sequences, past_key_values=ended.past_key_values))


def test_a_batch_that_fails_leaves_usable_caches(lm) -> None:
    prompts = [prompt_of(50), prompt_of(50, 1)]
    caches = [lm.prefill(prompt) for prompt in prompts]
    stops = [lambda ids, scores: 1 / 0 if ids.shape[1] == 55 else False]
    with pytest.raises(ZeroDivisionError):
        lm.generate(prompts, past_key_values=caches, max_new_tokens=20, stopping_criteria=stops)
    for cache, prompt in zip(caches, prompts, strict=True):
        assert {c.offset for c in cache.caches} == {cache.held}
        expected = prompt + reference(lm.model, prompt, 20)
        assert cache.token_ids == expected[:55]
        assert lm.generate(expected[:56], past_key_values=cache, max_new_tokens=4)[0].tolist() == expected[:60]


def test_a_call_that_fails_leaves_a_usable_cache(lm) -> None:
    prompt = prompt_of(50)
    cache = lm.prefill(prompt)

    def fail(ids: mx.array, scores: Any) -> bool:
        if ids.shape[1] == 55:
            raise RuntimeError("enough")
        return False

    with pytest.raises(RuntimeError, match="enough"):
        lm.generate(prompt, past_key_values=cache, max_new_tokens=20, stopping_criteria=[fail])
    assert len(cache.token_ids) == 55 and {c.offset for c in cache.caches} == {cache.held}
    expected = prompt + reference(lm.model, prompt, 20)
    assert lm.generate(cache.token_ids + [3], past_key_values=cache, max_new_tokens=3).shape == (1, 59)
    assert cache.token_ids[:55] == expected[:55]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([], {}, "at least one token"),
        ([[1, 2], [3]], {}, "rows of one length"),
        ([[[1]]], {}, "shape"),
        ("text", {}, "input_ids must be a list"),
        ([1.5], {}, "integers"),
        ([-1], {}, "token ids"),
        ([[1, 2]], {"attention_mask": [[1, 0]]}, "attention_mask must be zeros, then ones"),
        ([[1, 2]], {"attention_mask": [[0, 0]]}, "a one in every row"),
        ([[1, 2]], {"attention_mask": [[1]]}, "with the shape of input_ids"),
        ([1], {"generation_config": {"top_k": 3}}, "generation_config must be"),
        ([1], {"inputs_embeds": np.zeros((40, 40))}, "inputs_embeds=array([[0"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1"),
        ([1], {"do_sample": True, "temperature": 0.0}, "temperature must be a number above 0"),
        ([1], {"do_sample": True, "top_p": 1.5}, "top_p"),
        ([1], {"do_sample": True, "min_p": -0.5}, "min_p"),
        ([1], {"num_return_sequences": 2.0}, "num_return_sequences"),
        ([1], {"stop_strings": "end"}, "tokenizer"),
        ([1], {"stop_strings": [""]}, "stop_strings"),
        ([1], {"eos_token_id": ["x"]}, "eos_token_id"),
        ([1], {"bad_words_ids": [[]]}, "bad_words_ids"),
        ([1], {"output_scores": True}, "return_dict_in_generate"),
        ([[1], [2]], {"assistant_model": tiny_models}, "one sequence at a time"),
        ([1], {"assistant_model": 1, "output_scores": True, "return_dict_in_generate": True}, "assistant_model"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(lm, ids: Any, options: dict[str, Any], words: str) -> None:
    assert words in message_of(lambda: lm.generate(ids, **options))


def test_rows_of_different_lengths_need_a_pad_token(lm) -> None:
    prompts = [prompt_of(6), prompt_of(6, 1)]
    stops = [lambda ids, scores: ids.shape[1] >= 9 and ids[0, 0].item() == prompts[0][0]]
    assert "pad_token_id" in message_of(lambda: lm.generate(prompts, stopping_criteria=stops))


def test_a_draft_that_cannot_be_checked_is_refused() -> None:
    lm = kvq.CausalLM(tiny_models.ARCHITECTURES["falcon_h1"](), kv_scheme="tq4")
    assert "trimmed" in message_of(lambda: lm.generate([1, 2, 3], assistant_model=tiny_models.llama()))


def test_every_architecture_generates_batches_or_says_why() -> None:
    prompt, other = prompt_of(30), prompt_of(20)
    for name in ("qwen3", "gemma3n", "gpt_oss", "falcon_h1", "llama4", "nemotron_h", "phi3"):
        lm = kvq.CausalLM(tiny_models.ARCHITECTURES[name](), kv_scheme="identity")
        rows = [reference(lm.model, p, 8) for p in (prompt, other)]
        assert new(lm.generate(prompt, max_new_tokens=8), prompt) == rows[0], name
        ids = [prompt, [0] * 10 + other]
        fields = {"attention_mask": [[1] * 30, [0] * 10 + [1] * 20], "max_new_tokens": 8}
        if name == "llama4":
            assert "one sequence at a time" in message_of(functools.partial(lm.generate, ids, **fields))
        else:
            output = lm.generate(ids, **fields)
            assert [new(output, p, i) for i, p in enumerate(ids)] == rows, name
