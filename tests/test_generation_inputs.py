"""Arguments of `generate` that MLX would not survive or explain: ids outside of the vocabulary, seeds, callables."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
from refusals import message_of

import mlx_kvq_plugin as kvq

VOCAB = tiny_models.VOCAB


@pytest.fixture(scope="module")
def lm() -> kvq.CausalLM:
    return kvq.CausalLM(tiny_models.llama(), kv_scheme="tq4")


@pytest.mark.parametrize("ids", [[VOCAB], [5, VOCAB, 6], [[1, 2], [3, 5000]]])
def test_prompts_outside_of_the_vocabulary_are_refused(lm, ids: Any) -> None:
    text = message_of(lambda: lm.generate(ids, max_new_tokens=2))
    assert text.startswith(f"input_ids must hold ids below the model's vocab_size {VOCAB}, got ")
    assert lm.generate([VOCAB - 1], max_new_tokens=2).shape == (1, 3)


def test_a_prompt_to_prefill_must_be_in_the_vocabulary(lm) -> None:
    assert f"got {VOCAB};" in message_of(lambda: lm.prefill([1, VOCAB, 2]))


def test_a_draft_of_a_smaller_vocabulary_is_refused_whatever_the_prompt(lm) -> None:
    draft = tiny_models.llama(vocab_size=50)
    for prompt in ([60], [3]):
        text = message_of(lambda prompt=prompt: lm.generate(prompt, assistant_model=draft, max_new_tokens=2))
        assert f"vocab_size {tiny_models.VOCAB}, got 50" in text


@pytest.mark.parametrize(
    "field", [{"suppress_tokens": [VOCAB]}, {"begin_suppress_tokens": [3, 5000]}, {"bad_words_ids": [[1], [2, VOCAB]]}]
)
def test_fields_of_ids_outside_of_the_vocabulary_are_refused_by_name(lm, field: dict[str, Any]) -> None:
    (name,) = field
    assert message_of(lambda: lm.generate([1, 2], max_new_tokens=2, **field)).startswith(f"{name} must hold ids below")


def test_end_tokens_outside_of_the_vocabulary_change_nothing(lm) -> None:
    """Some generation_config.json files name end tokens that the model has no row for."""
    expected = lm.generate([5, 6], max_new_tokens=6).tolist()
    options = {"eos_token_id": [VOCAB, 5000], "min_new_tokens": 4, "max_new_tokens": 6}
    assert lm.generate([5, 6], **options).tolist() == expected
    first = expected[0][2]
    held_back = lm.generate([5, 6], **{**options, "eos_token_id": [first, VOCAB]}).tolist()
    assert first not in held_back[0][2:6]
    assert lm.generate([5, 6], max_new_tokens=6).tolist() == expected


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "a", True])
def test_seeds_are_checked(lm, seed: Any) -> None:
    text = message_of(lambda: lm.generate([1], do_sample=True, seed=seed, max_new_tokens=2))
    assert text.startswith("seed must be an integer from 0 to 2**64 - 1")


@pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("given", [lambda ids, scores: scores, [3], "abc"])
def test_callables_come_in_lists(lm, name: str, given: Any) -> None:
    text = message_of(lambda: lm.generate([1], max_new_tokens=2, **{name: given}))
    assert text.startswith(f"{name} must be a list of callables")


def test_tokens_of_a_prompt_cache_are_all_of_them(lm) -> None:
    cache = lm.prefill([1, 2, 3])
    assert cache.token_ids == [1, 2, 3] and cache.held == 2
    output = lm.generate(cache.token_ids, past_key_values=cache, max_new_tokens=3)
    assert cache.token_ids == output[0].tolist()
