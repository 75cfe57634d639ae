"""Calibration without any data: on texts that the model itself writes, drawn at temperature 1 from fixed seeds.

The texts begin with the model's first token, as its config.json names it: models that were trained with one write
nothing sensible without it. Texts and calibrations are kept between runs (kept.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx

from . import calibration_files
from .allocation import GRADIENT, KEY, SIDES, whole_bits
from .calibration import Calibration, calibrate_on
from .calibration_files import load_calibration, save_calibration
from .codecs import get_codec
from .config import KVQConfig
from .errors import CalibrationError
from .kept import Identity, Kept, keep, keep_json
from .loading import stock_caches
from .progress import Progress, silent
from .prompt_cache import model_fingerprint
from .rates import family_rates

VERSION = 1  # of how texts are drawn and measured: what is kept of another one is made again
SEQUENCES, LENGTH = 8, 256  # texts, and tokens of each
SAMPLED = 3  # of the texts, for distortion curves
SEED = 0
LEAST_PAIRS = 0.4  # of a text's pairs of neighbours must differ from all others: 0.6 to 0.97 in texts, less in loops

_CONFIG = "config.json"

Texts = list[list[int]]


def self_calibration(
    model: Any,
    config: KVQConfig,
    source: str,
    layers: Sequence[int],
    unknown_arch: str = "error",
    progress: Progress = silent,
) -> Kept[Calibration]:
    """The calibration of a model on its own texts, and where it is kept.

    Args:
        model: from mlx-lm, not compressed.
        config: of which `sinks` and `recent` tokens are taken to stay dense, and whose `family` is measured, with
            those that go on above it.
        source: folder or repository of the model, which says its first token; "" or another one draws it at random.
        layers: cache entries that it must have.
        unknown_arch, progress: as for `compress`.

    Cost: that of `own_texts`, then a forward and a backward pass of each of them.

    Raises:
        CalibrationError: for a model whose texts only repeat, or through which gradients do not pass.
        UnsupportedModelError: as `compress`.
    """
    first, fingerprint = first_token(source), model_fingerprint(model, any_float=True)
    families = list(family_rates(config.family))
    identity = {
        **_texts_identity(model, first),
        "format": calibration_files.VERSION,
        "codecs": [get_codec(f"{family}{bits}").to_json() for family in families for bits in whole_bits(family)],
        "sinks": config.sinks,
        "recent": config.recent,
    }

    def read(path: Path) -> Calibration | None:
        found = load_calibration(path)
        own = (found.fingerprint, found.sinks, found.recent, found.corpus)
        complete = (
            own == (fingerprint, config.sinks, config.recent, origin(first))
            and all((family, side) in found.curves for family in families for side in SIDES)
            and set(layers) <= set(found.sensitivities[GRADIENT][KEY])
        )
        return found if complete else None

    def make() -> Calibration:
        return calibrate_on(
            model,
            own_texts(model, first, progress),
            sampled=SAMPLED,
            families=families,
            corpus=origin(first),
            config=KVQConfig(key="tq4", value="tq4", sinks=config.sinks, recent=config.recent),
            source=source,
            unknown_arch=unknown_arch,
            progress=progress,
        )

    return keep("calibration", calibration_files.SUFFIX, identity, read, make, save_calibration)


def own_texts(model: Any, first: int | None, progress: Progress = silent) -> Texts:
    """`drawn_texts` of a model, kept.

    Cost: `LENGTH` decode steps of `SEQUENCES` rows.

    Raises:
        CalibrationError: for texts that only repeat.
    """

    def check(content: Any) -> Texts:
        shape = [len(text) for text in content]
        if shape != [LENGTH] * SEQUENCES or not all(type(t) is int and t >= 0 for text in content for t in text):
            raise ValueError("other texts")
        return list(content)

    def make() -> Texts:
        return drawn_texts(model, first, SEQUENCES, LENGTH, SEED, progress)

    return keep_json("texts", _texts_identity(model, first), check, make, list).content


def _texts_identity(model: Any, first: int | None) -> Identity:
    return {
        "version": VERSION,
        "model": model_fingerprint(model),
        "first": first,
        "texts": [SEQUENCES, LENGTH, SEED],
    }


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
    model: Any,
    first: int | None,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = SEED,
    progress: Progress = silent,
) -> Texts:
    """Texts drawn from the model at temperature 1; the random state that users seed is left alone.

    Args:
        first: token that all begin with; `None` begins each with a random one.
        sequences, length, seed: how many of how many tokens, and from which seed.
        progress: as for `compress`.

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
    for step in range(length - 1):
        progress("writing texts", step, length - 1)
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
