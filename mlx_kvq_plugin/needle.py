"""Needle retrieval: a pass key at some depth of a long text, asked for at its end.

Whether the answer is right saturates on small models and short texts; how much likelier the right key is than the best
wrong one does not. That margin is what is reported. The wrong keys begin with all the other digits and stand nowhere
in the text, so what is lost is lost by the cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .errors import KVQError
from .evaluation import logprobs

NEEDLE = " The pass key of Lisbon is {}. Remember it."
QUESTION = "\n\nQuestion: What is the pass key of Lisbon?\nAnswer: The pass key of Lisbon is"
RIGHT = "73914"
WRONG = ("15806", "20586", "38273", "46309", "58143", "61750", "84062", "91427")
CHUNK = 256  # tokens of a prefill chunk, so that later chunks read what earlier ones left packed


@dataclass(frozen=True)
class Haystack:
    """Prompts of equal length, one for each depth, and how answers are told apart.

    Attributes:
        depths: where the needle is, as fractions of the filler.
        prompts: tokens `(len(depths), L)`.
        answer: tokens of the right key.
        shared: how many of them every wrong key begins with too.
        rivals: the token of each wrong key after those.
    """

    depths: tuple[float, ...]
    prompts: mx.array
    answer: tuple[int, ...]
    shared: int
    rivals: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of a prompt."""
        return int(self.prompts.shape[1])


@dataclass(frozen=True)
class Retrieval:
    """What came back from one depth.

    Attributes:
        depth: fraction of the filler before the needle.
        margin: log probability of the right key over the best wrong one, in nats, where they first differ.
        logprob: log probability of the whole right key, in nats.
    """

    depth: float
    margin: float
    logprob: float


def build_haystack(tokenizer: Any, filler: str, depths: Sequence[float], tokens: int) -> Haystack:
    """Prompts with about `tokens` tokens of filler.

    Args:
        tokenizer: from mlx-lm.
        filler: text that is cut at the ends of sentences and repeated if it is too short.
        depths: fractions from 0 to 1.
        tokens: of the filler, at most; needle and question come on top.

    Raises:
        KVQError: without a whole sentence of filler, or when the tokenizer writes keys alike.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    sentences = [encode(text) for text in re.findall(r"\S.*?[.!?](?:\s+|$)", filler, re.DOTALL)]
    pieces: list[list[int]] = []
    count = 0
    while sentences and count + len(piece := sentences[len(pieces) % len(sentences)]) <= tokens:
        pieces.append(piece)
        count += len(piece)
    if not pieces:
        raise KVQError(
            f"the filler of needle retrieval must have a sentence of at most {tokens} tokens, got none; "
            "allow more tokens or give another text"
        )
    prompts = []
    for depth in depths:
        place = round(depth * len(pieces))
        parts = [*pieces[:place], encode(NEEDLE.format(RIGHT)), *pieces[place:], encode(QUESTION)]
        prompts.append([*tokenizer.encode(""), *(token for part in parts for token in part)])  # special tokens first
    answer, wrong = encode(f" {RIGHT}"), [encode(f" {key}") for key in WRONG]
    shared = 0
    while shared < len(answer) and all(key[shared : shared + 1] == [answer[shared]] for key in wrong):
        shared += 1
    rivals = tuple(key[shared] for key in wrong if len(key) > shared)
    if shared == len(answer) or len(rivals) < len(wrong) or answer[shared] in rivals:
        raise KVQError(
            f"a tokenizer must tell the key {RIGHT} from every wrong key by one token, got {answer} and {wrong}; "
            "leave needle retrieval out for this model"
        )
    return Haystack(tuple(depths), mx.array(prompts), tuple(answer), shared, rivals)


def retrieve(
    haystack: Haystack, prefill: Callable[[mx.array, int], None], step: Callable[[mx.array], mx.array]
) -> tuple[Retrieval, ...]:
    """What one run finds, at every depth.

    Args:
        haystack: all depths are rows of one batch.
        prefill: `prefill(tokens (B, L), chunk)` feeds tokens in chunks.
        step: `step(tokens (B, 1))` feeds one token a row and returns the logits after it `(B, V)`.
    """
    prefill(haystack.prompts[:, :-1], CHUNK)
    new, rows = haystack.prompts[:, -1:], len(haystack.depths)
    margin, total = mx.zeros(rows), mx.zeros(rows)
    for i, token in enumerate(haystack.answer):
        found = logprobs(step(new))
        total = total + found[:, token]
        if i == haystack.shared:
            margin = found[:, token] - mx.max(found[:, mx.array(haystack.rivals)], axis=-1)
        mx.eval(margin, total)
        new = mx.full((rows, 1), token, dtype=mx.int32)
    columns: list[Any] = [margin.tolist(), total.tolist()]
    return tuple(Retrieval(*row) for row in zip(haystack.depths, *columns, strict=True))
