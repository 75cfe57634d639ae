"""Needle retrieval: where the key is, what tells keys apart, what is counted."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import pytest
import tiny_models

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.corpus import corpus_text
from mlx_kvq_plugin.needle import CHUNK, NEEDLE, QUESTION, RIGHT, WRONG, Haystack, build_haystack, retrieve
from mlx_kvq_plugin.ruler import measure

BEGIN = 0  # a special token


class Characters:
    """A tokenizer with a token for each character, after `BEGIN`; words of `whole` are tokens of their own."""

    def __init__(self, *whole: str):
        self.whole = list(whole)
        self.pieces = re.compile("|".join([*map(re.escape, whole), "."]), re.DOTALL)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        found = [
            1000 + self.whole.index(piece) if piece in self.whole else ord(piece) for piece in self.pieces.findall(text)
        ]
        return [BEGIN] * add_special_tokens + found

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.whole[token - 1000] if token >= 1000 else chr(token) for token in tokens if token != BEGIN)


FILLER = "One fish. Two fishes! Are there three? There are four."


def test_haystacks_have_the_needle_at_their_depths_and_equal_lengths():
    tokenizer, depths = Characters(), (0.0, 0.25, 0.5, 1.0)
    stack = build_haystack(tokenizer, FILLER, depths, 500)
    filler = FILLER + (500 // (len(FILLER) + 1)) * f" {FILLER}"
    assert stack.prompts.shape == (4, stack.tokens) and stack.depths == depths
    needle = NEEDLE.format(RIGHT)
    for depth, row in zip(depths, stack.prompts.tolist(), strict=True):
        assert row.count(BEGIN) == 1 and row[0] == BEGIN
        text = tokenizer.decode(row)
        assert text.endswith(QUESTION) and text.count(needle) == 1 and text.count(RIGHT) == 1
        rest = text.removesuffix(QUESTION)
        place = rest.index(needle)
        before, after = rest[:place], rest[place + len(needle) :]
        assert place / len(before + after) == pytest.approx(depth, abs=0.05)
        assert 450 <= len(before + after) <= 500
        assert filler.replace(" ", "").startswith((before + after).replace(" ", ""))
        assert before == "" or before.rstrip()[-1] in ".!?", "only whole sentences"


def test_long_fillers_are_cut_and_short_ones_repeated():
    short, long = (build_haystack(Characters(), FILLER, [0.5], tokens).tokens for tokens in (30, 3000))
    overhead = len(NEEDLE.format(RIGHT)) + len(QUESTION) + 1
    assert 0 < short - overhead <= 30 and 2900 < long - overhead <= 3000


def test_no_wrong_key_begins_as_the_right_one_or_stands_in_the_texts():
    assert {key[0] for key in WRONG} == set("12345689")
    assert all(len(key) == len(RIGHT) for key in WRONG)
    for text in (NEEDLE, QUESTION, corpus_text("prose")):
        assert not any(key in text for key in (RIGHT, *WRONG))


def test_rivals_are_the_tokens_where_keys_part():
    stack = build_haystack(Characters(), FILLER, [0.5], 100)
    assert stack.answer == tuple(ord(c) for c in f" {RIGHT}") and stack.shared == 1
    assert stack.rivals == tuple(ord(key[0]) for key in WRONG)
    whole = build_haystack(Characters(f" {RIGHT}", *(f" {key}" for key in WRONG)), FILLER, [0.5], 100)
    assert whole.shared == 0 and len(whole.answer) == 1 and len(set(whole.rivals)) == len(WRONG)


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: [7] * len(text.split()),  # every word is unknown
        lambda text: [ord("7") if c.isdigit() else ord(c) for c in text],  # digits are one token
    ],
)
def test_tokenizers_that_write_keys_alike_are_refused(encode):
    class Alike:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return encode(text)

    with pytest.raises(kvq.KVQError, match=f"must tell the key {RIGHT} from every wrong key by one token"):
        build_haystack(Alike(), FILLER, [0.5], 100)


@pytest.mark.parametrize(("filler", "tokens"), [("no sentence at all", 100), ("", 100), (FILLER, 5)])
def test_fillers_without_a_sentence_that_fits_are_refused(filler, tokens):
    with pytest.raises(kvq.KVQError, match=f"must have a sentence of at most {tokens} tokens, got none"):
        build_haystack(Characters(), filler, [0.5], tokens)


class Reader:
    """A fake model that remembers the key of some rows, and is sure of a rival in the others."""

    def __init__(self, stack: Haystack, remembers: list[bool], sure: float):
        self.stack, self.remembers, self.sure = stack, remembers, sure
        self.fed: list[list[int]] = [[] for _ in remembers]
        self.chunks: list[int] = []

    def prefill(self, tokens: mx.array, chunk: int) -> None:
        self.chunks.append(chunk)
        self._feed(tokens)

    def _feed(self, tokens: mx.array) -> None:
        for row, new in zip(self.fed, tokens.tolist(), strict=True):
            row += new

    def step(self, tokens: mx.array) -> mx.array:
        assert tokens.shape == (len(self.remembers), 1)
        self._feed(tokens)
        said = len(self.fed[0]) - self.stack.tokens
        logits = mx.zeros((len(self.remembers), 200))
        for i, remembers in enumerate(self.remembers):
            logits[i, self.stack.answer[said] if remembers else self.stack.rivals[1]] = self.sure
        return logits


def test_who_remembers_has_a_margin_and_who_does_not_a_negative_one():
    stack = build_haystack(Characters(), FILLER, [0.0, 0.5, 1.0], 100)
    reader = Reader(stack, [True, False, True], 50.0)
    found = retrieve(stack, reader.prefill, reader.step)
    assert reader.chunks == [CHUNK]
    assert reader.fed == [[*row, *stack.answer[:-1]] for row in stack.prompts.tolist()], "the right key is fed"
    assert [row.depth for row in found] == [0.0, 0.5, 1.0]
    assert [row.margin for row in found] == pytest.approx([50.0, -50.0, 50.0])
    assert [row.logprob for row in found] == pytest.approx([0.0, -50.0 * len(stack.answer), 0.0], abs=1e-4)


def test_who_knows_nothing_has_no_margin():
    stack = build_haystack(Characters(), FILLER, [0.5], 100)
    reader = Reader(stack, [True], 0.0)
    (found,) = retrieve(stack, reader.prefill, reader.step)
    assert found.margin == 0.0
    assert found.logprob == pytest.approx(-len(stack.answer) * 5.298317)  # log(200)


def test_the_ruler_retrieves_through_the_compressed_cache():
    model: Any = tiny_models.llama(vocab_size=128)
    stack = build_haystack(Characters(), FILLER, [0.1, 0.9], 300)
    ids = list(range(1, 41))
    rows = list(measure(model, {"only": ids}, ["fp16", "tq4", "tq1"], prefill=30, steps=10, haystack=stack))

    def alone(depth: int, scheme: str) -> float:
        with kvq.compress(model, scheme):
            caches = kvq.make_prompt_cache(model)
            prompt = stack.prompts[depth : depth + 1]
            for start in range(0, stack.tokens - 1, CHUNK):
                model(prompt[:, start : min(start + CHUNK, stack.tokens - 1)], cache=caches)
                mx.eval([cache.state for cache in caches])
            logits = [model(prompt[:, -1:], cache=caches)[0, -1]]
            for token in stack.answer[: stack.shared]:
                logits.append(model(mx.array([[token]]), cache=caches)[0, -1])
        last = logits[-1]
        return float((last[stack.answer[stack.shared]] - mx.max(last[mx.array(stack.rivals)])).item())

    for row in rows:
        assert row.reference_needle == rows[0].needle
        for i, found in enumerate(row.needle):
            assert found.margin == pytest.approx(alone(i, row.scheme), rel=1e-3, abs=1e-3)
    far = [max(abs(a.margin - b.margin) for a, b in zip(row.needle, rows[0].needle, strict=True)) for row in rows]
    assert far[0] == 0.0 < min(far[1:])
