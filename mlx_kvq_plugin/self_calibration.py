"""Calibration without any data: on texts that the model itself writes, drawn at temperature 1 from fixed seeds.

The texts begin with the model's first token, as its config.json names it: models that were trained with one write
nothing sensible without it. Kept in memory for the process, by weights; nothing is written.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx

from .calibration import Calibration, calibrate_on
from .config import KVQConfig
from .errors import CalibrationError
from .loading import stock_caches
from .prompt_cache import model_fingerprint

SEQUENCES, LENGTH = 8, 256  # texts, and tokens of each
SAMPLED = 3  # of the texts, for distortion curves
SEED = 0
LEAST_PAIRS = 0.4  # of a text's pairs of neighbours must differ from all others: 0.6 to 0.97 in texts, less in loops

_CONFIG = "config.json"
_made: dict[tuple[str, str, int, int, int | None], Calibration] = {}


def self_calibration(model: Any, config: KVQConfig, source: str, unknown_arch: str = "error") -> Calibration:
    """The calibration of a model on its own texts.

    Args:
        model: from mlx-lm, not compressed.
        config: of which `sinks` and `recent` tokens are taken to stay dense, and whose `family` is measured.
        source: folder or repository of the model, which says its first token; "" or another one draws it at random.
        unknown_arch: as for `compress`.

    Cost: `LENGTH` decode steps of `SEQUENCES` rows, then a forward and a backward pass of each row.

    Raises:
        CalibrationError: for a model whose texts only repeat, or through which gradients do not pass.
        UnsupportedModelError: as `compress`.
    """
    first = first_token(source)
    key = (model_fingerprint(model), config.family, config.sinks, config.recent, first)
    if key not in _made:
        ids = drawn_texts(model, first)
        _made[key] = calibrate_on(
            model,
            ids,
            sampled=SAMPLED,
            families=[config.family],
            corpus=origin(first),
            config=KVQConfig(key="tq4", value="tq4", sinks=config.sinks, recent=config.recent),
            source=source,
            unknown_arch=unknown_arch,
        )
    return _made[key]


def origin(first: int | None) -> str:
    """The texts in words."""
    begin = "random tokens" if first is None else f"token {first}"
    return f"gradients on {SEQUENCES} texts of {LENGTH} tokens that the model wrote itself from {begin}"


def first_token(source: str) -> int | None:
    """The token that a model's texts begin with, by its config.json; `None` where that is not here or names none.

    Nothing is downloaded: a repository's file is there since the model was loaded.
    """
    path: Any = Path(source).expanduser() / _CONFIG if source else None
    if path is not None and not path.is_file():
        known = huggingface_hub.try_to_load_from_cache(source, _CONFIG) if "/" in source else None
        path = Path(known) if isinstance(known, str) else None
    if path is None:
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    found = config.get("bos_token_id", (config.get("text_config") or {}).get("bos_token_id"))
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, int) else None


def drawn_texts(
    model: Any, first: int | None, sequences: int = SEQUENCES, length: int = LENGTH, seed: int = SEED
) -> list[list[int]]:
    """Texts drawn from the model at temperature 1; the random state that users seed is left alone.

    Args:
        first: token that all begin with; `None` begins each with a random one.
        sequences, length, seed: how many of how many tokens, and from which seed.

    Raises:
        CalibrationError: for texts that only repeat.
    """
    caches, key = stock_caches(model), mx.random.key(seed)
    key, start = mx.random.split(key)
    if first is None:
        vocabulary = model(mx.array([[0]]), cache=stock_caches(model)).shape[-1]
        tokens = [mx.random.randint(0, vocabulary, (sequences, 1), key=start)]
    else:
        tokens = [mx.full((sequences, 1), first)]
    for _ in range(length - 1):
        key, own = mx.random.split(key)
        logits = model(tokens[-1], cache=caches)[:, -1].astype(mx.float32)
        tokens.append(mx.random.categorical(logits, key=own)[:, None].astype(tokens[0].dtype))
        mx.eval(tokens[-1])
    texts: Any = mx.concatenate(tokens, axis=1).tolist()
    pairs = sum(len(set(pairwise(text))) for text in texts) / (sequences * (length - 1))
    if pairs < LEAST_PAIRS:
        begin = "its first token" if first is not None else "random tokens, since its first one is not known"
        raise CalibrationError(
            f"texts that a model writes must not only repeat, got {pairs:.0%} different pairs of tokens in those that "
            f"begin with {begin}; calibrate it with kvq calibrate, or name the model's folder or repository as source"
        )
    return texts  # type: ignore[no-any-return]
