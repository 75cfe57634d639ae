"""mlx-lm's speculative decoding on compressed caches: the tokens of plain greedy decoding, past windows too."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.errors import CacheStateError

EXACT = "k=identity,v=identity"
STEPS = 80


def prompt_of(length: int) -> mx.array:
    return mx.array(np.random.default_rng(length).integers(1, tiny_models.VOCAB, length))


def greedy(model: Any, prompt: mx.array, steps: int = STEPS) -> list[int]:
    return [int(token) for token, _ in generate_step(prompt, model, max_tokens=steps)]


def speculative(model: Any, draft: Any, prompt: mx.array, drafted: int, **options: Any) -> tuple[list[int], int]:
    """Tokens, and how many of them the draft model proposed."""
    found = list(speculative_generate_step(prompt, model, draft, num_draft_tokens=drafted, max_tokens=STEPS, **options))
    return [int(token) for token, _, _ in found], sum(by_draft for _, _, by_draft in found)


class Guess:
    """A draft model that knows the right continuation and proposes something else every few tokens."""

    def __init__(self, prompt: mx.array, tokens: list[int], wrong_every: int):
        self.text = [*prompt.tolist(), *tokens, *[1] * 64]
        self.wrong_every, self.vocabulary = wrong_every, tiny_models.VOCAB
        self.layers: list[Any] = [None]

    def make_cache(self) -> list[Any]:
        return [tiny_models.llama().make_cache()[0]]

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        start = cache[0].offset
        L = tokens.shape[1]
        blank = mx.zeros((1, 1, L, 1))
        cache[0].update_and_fetch(blank, blank)
        after = [self.text[start + i + 1] for i in range(L)]
        proposed = [t if (start + i) % self.wrong_every else (t + 1) % 90 for i, t in enumerate(after)]
        return 10.0 * (mx.arange(self.vocabulary) == mx.array([proposed])[..., None])


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("scheme", "drafted"), [(EXACT, 2), (EXACT, 5), ("tq4", 2), ("rvq1", 5), ("kivi2,compress_after=prefill", 2)]
)
def test_tokens_equal_plain_greedy_decoding(name: str, scheme: str, drafted: int) -> None:
    model = tiny_models.ADAPTED[name]()
    for length in (20, 130):  # with 80 steps the second passes the window of 160
        prompt = prompt_of(length)
        with kvq.compress(model, scheme):
            expected = greedy(model, prompt)
            for wrong_every in (3, 4):
                tokens, by_draft = speculative(model, Guess(prompt, expected, wrong_every), prompt, drafted)
                assert tokens == expected
                assert by_draft > STEPS / 3  # not vacuous: some are accepted, some rejected


def test_mlx_lm_alone_is_wrong_past_a_window_and_ours_is_not() -> None:
    model = tiny_models.gemma3_text()
    prompt = prompt_of(150)
    expected = greedy(model, prompt)
    stock, _ = speculative(model, Guess(prompt, expected, 3), prompt, 3)
    assert stock != expected, "mlx-lm mended this: simplify the sliding cache"
    with kvq.compress(model, EXACT):
        ours, _ = speculative(model, Guess(prompt, expected, 3), prompt, 3)
        assert ours == expected


@pytest.mark.parametrize("scheme", [EXACT, "tq4"])
def test_the_cache_afterwards_is_that_of_plain_decoding(scheme: str) -> None:
    model = tiny_models.gemma3_text()
    prompt, more = prompt_of(150), prompt_of(9)
    with kvq.compress(model, scheme):
        expected = greedy(model, prompt)
        caches = [make_prompt_cache(model) for _ in range(2)]
        list(generate_step(prompt, model, max_tokens=STEPS, prompt_cache=caches[0]))
        guess = Guess(prompt, expected, 3)
        list(
            speculative_generate_step(
                prompt, model, guess, num_draft_tokens=3, max_tokens=STEPS, prompt_cache=caches[1] + guess.make_cache()
            )
        )
        # generate_step has fed its last token, speculative decoding has not
        ahead = caches[0][0].offset - caches[1][0].offset
        assert 0 <= ahead <= 1
        if ahead:
            model(mx.array([expected[-1:]]), cache=caches[1])
        logits = [model(more[None], cache=cache) for cache in caches]
        np.testing.assert_allclose(logits[1], logits[0], atol=1e-4 if scheme == EXACT else 0.05)
        assert [c.held for c in caches[0]] == [c.held for c in caches[1]]


def test_a_draft_model_may_be_compressed_too() -> None:
    model, draft = tiny_models.gemma3_text(), tiny_models.llama(seed=3)
    prompt = prompt_of(140)
    with kvq.compress(model, "tq4"), kvq.compress(draft, "rvq1"):
        tokens, _ = speculative(model, draft, prompt, 3)
        assert tokens == greedy(model, prompt)


@pytest.mark.parametrize("scheme", [EXACT, "tq4"])
def test_a_resumed_cache_past_its_window(scheme: str) -> None:
    """mlx-lm asks whether it is trimmable before the first step; no, unless speculation is announced."""
    model = tiny_models.gemma3_text()
    prompt = prompt_of(5)
    with kvq.compress(model, scheme):
        caches = [make_prompt_cache(model) for _ in range(2)]
        for cache in caches:
            list(generate_step(prompt_of(200), model, max_tokens=4, prompt_cache=cache))
        plain = generate_step(prompt, model, max_tokens=STEPS, prompt_cache=caches[0])
        expected = [int(token) for token, _ in plain]
        guess = Guess(prompt, expected, 3)
        cache = caches[1] + guess.make_cache()
        with pytest.raises(ValueError, match=r"trimmable prompt cache .*SlidingKVQCache"):
            speculative(model, guess, prompt, 3, prompt_cache=cache)
        kvq.allow_speculation(cache)
        with pytest.raises(CacheStateError, match="at most the 0 tokens"):
            cache[0].trim(1)
        tokens, _ = speculative(model, guess, prompt, 3, prompt_cache=cache)
        assert tokens == expected
        assert not cache[0].is_trimmable() or cache[0]._rollback


@pytest.mark.real_model
def test_gemma_3_past_its_window(real_model: Any, text_ids: Any) -> None:
    """Windows of 512 tokens; the same tokens as plain decoding, with rejected drafts on the way."""
    model, tokenizer = real_model("gemma3")
    prompt = mx.array(text_ids(tokenizer, 505))
    with kvq.compress(model, "tq4"):
        expected = [int(token) for token, _ in generate_step(prompt, model, max_tokens=24)]
        guess = Guess(prompt, expected, 3)
        guess.vocabulary = model.args.vocab_size
        found = list(speculative_generate_step(prompt, model, guess, num_draft_tokens=4, max_tokens=24))
    assert [int(token) for token, _, _ in found] == expected
    assert 6 < sum(by_draft for _, _, by_draft in found) < 24
