"""Prompts as callers give them: ids of one or two dimensions, with or without a mask of left padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import GenerationError
from ..serving_report import model_fact
from .config import Settings


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text as `mlx_lm.generate` makes them: special tokens are added where the text has none."""
    starts = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(text, add_special_tokens=not starts))


def read_ids(input_ids: Any) -> np.ndarray:
    """Token ids as int64 `(B, T)` from lists, NumPy or MLX arrays of one or two dimensions.

    Raises:
        GenerationError: for ragged lists, other types, other dimensions or no token at all.
    """
    ids = _array("input_ids", input_ids)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.size == 0:
        raise GenerationError(
            f"input_ids must have shape (T,) or (B, T) with at least one token, got {ids.shape}; "
            "tokenize a prompt first"
        )
    if ids.min() < 0:
        raise GenerationError(f"input_ids must be token ids, got {ids.min()}; take ids from the model's tokenizer")
    return ids


def read_prompts(
    input_ids: Any, attention_mask: Any, pad: int | None, ends: tuple[int, ...]
) -> tuple[np.ndarray, list[list[int]]]:
    """The ids as given, `(B, T)`, and every row's own tokens without its padding on the left.

    Without a mask, padding is what transformers takes for it: tokens `pad`, if that is not an end token too.

    Raises:
        GenerationError: as `read_ids`; for a mask of another shape, or with zeros after a one.
    """
    ids = read_ids(input_ids)
    if attention_mask is None:
        known = pad is not None and pad not in ends
        mask = ids != pad if known else np.ones(ids.shape, bool)
        if known and not mask.any(axis=1).all():
            mask = np.ones(ids.shape, bool)  # a prompt of nothing but padding is a prompt
    else:
        mask = _mask(attention_mask, ids.shape)
    first = mask.argmax(axis=1)
    if not all(row[start:].all() for row, start in zip(mask, first, strict=True)):
        raise GenerationError(
            "attention_mask must be zeros, then ones in every row, got other zeros; pad on the left "
            '(tokenizer.padding_side = "left")'
        )
    return ids, [row[start:].tolist() for row, start in zip(ids, first, strict=True)]


def check_vocabulary(model: Any, prompts: Sequence[Sequence[int]], settings: Settings | None = None) -> None:
    """Raise `GenerationError` for ids that a model has no row for; MLX would read and write past its arrays.

    End tokens outside of the vocabulary never come and are no error: processors leave them out.
    """
    size = model_fact(model, "vocab_size")
    if size is None:
        raise GenerationError("a model must tell its vocab_size to generate, got None; add it to its configuration")
    asked: dict[str, list[int]] = {"input_ids": [token for tokens in prompts for token in tokens]}
    if settings is not None:
        asked["bad_words_ids"] = [token for word in settings.bad_words_ids for token in word]
        asked["suppress_tokens"] = list(settings.suppress_tokens)
        asked["begin_suppress_tokens"] = list(settings.begin_suppress_tokens)
    for name, ids in asked.items():
        if ids and max(ids) >= size:
            raise GenerationError(
                f"{name} must hold ids below the model's vocab_size {size}, got {max(ids)}; take ids from the model's "
                "tokenizer"
            )


def check_draft(model: Any, draft: Any) -> None:
    """Raise `GenerationError` for a draft model with fewer tokens, which could not read all of the model's."""
    size, own = model_fact(model, "vocab_size"), model_fact(draft, "vocab_size")
    if own is None or own < size:
        raise GenerationError(
            f"an assistant_model must have at least the model's vocab_size {size}, got {own}; take a draft of the same "
            "family"
        )


def check_seed(seed: Any) -> int:
    """A seed that MLX takes."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise GenerationError(f"seed must be an integer from 0 to 2**64 - 1, got {seed!r}; change it")
    return int(seed)


def check_callables(name: str, given: Any) -> None:
    """Raise `GenerationError` for anything but `None` or several callables, such as one without a list around it."""
    if given is None or (isinstance(given, list | tuple) and all(callable(one) for one in given)):
        return
    raise GenerationError(f"{name} must be a list of callables, got {type(given).__name__}; put it into a list")


def _mask(attention_mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    mask = _array("attention_mask", attention_mask)
    if mask.ndim == 1:
        mask = mask[None]
    if mask.shape != shape or not np.isin(mask, (0, 1)).all() or not mask.any(axis=1).all():
        raise GenerationError(
            f"attention_mask must hold zeros and ones, a one in every row, with the shape of input_ids {shape}, got "
            f"shape {mask.shape}; pass the tokenizer's own"
        )
    return mask.astype(bool)


def _array(name: str, value: Any) -> np.ndarray:
    """Integers of a list, a NumPy or an MLX array."""
    if not isinstance(value, list | tuple | np.ndarray | mx.array):
        raise GenerationError(
            f"{name} must be a list, a NumPy array or an MLX array of integers, got {type(value).__name__}; convert it"
        )
    try:
        array = np.array(value)
    except ValueError as error:
        raise GenerationError(
            f"{name} must have rows of one length, got rows of several; pad them on the left and pass attention_mask"
        ) from error
    if array.dtype.kind not in "iub" and array.size:
        raise GenerationError(f"{name} must hold integers, got {array.dtype}; convert it")
    return array.astype(np.int64)
