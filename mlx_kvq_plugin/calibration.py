"""Calibration: how much each KV head's keys and values matter to a model, measured once and kept in a file.

A calibration holds the sensitivities of sensitivity.py and the distortion of every codec family on the model's own keys
and values; allocation.py turns both into bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
import safetensors
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors.numpy import save_file

from .allocation import (
    ACTIVATION,
    GRADIENT,
    KEY,
    SENSITIVITIES,
    SIDES,
    VALUE,
    Allocation,
    Budget,
    Component,
    DistortionCurve,
    whole_bits,
)
from .allocation import allocate as allocate_components
from .codecs import get_codec, list_codecs
from .config import KVQConfig
from .corpus import CORPUS, corpus_text
from .errors import CalibrationError, CodecError, KVQError
from .prompt_cache import model_fingerprint
from .standalone import fit_distortion_curve

FILE_NAME = "kvq_calibration.safetensors"
VERSION = 1
LEAST_TOKENS = 128  # of a sequence: the key frame takes 68
_METADATA = "kvq_calibration"
_SCHEME = "tq4"  # its prefill chunk gives the key frames

Weights = Mapping[str, Mapping[int, tuple[float, ...]]]  # by side and layer, one a KV head


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` measured.

    Attributes:
        fingerprint: of the model's weights in any float dtype.
        model: its name, for messages.
        sensitivities: by kind, side and cache entry: one weight a KV head.
        elements: by side and cache entry: the head size.
        curves: distortions by codec family and side.
        sequences, length: how many sequences of how many tokens were used.
        corpus: digest of the texts.
    """

    fingerprint: str
    model: str
    sensitivities: Mapping[str, Weights]
    elements: Mapping[str, Mapping[int, int]]
    curves: Mapping[tuple[str, str], DistortionCurve]
    sequences: int
    length: int
    corpus: str

    def components(self, kind: str, layers: Sequence[int] | None = None) -> list[Component]:
        """Components with the weights of one kind, of all layers or of some; raises `CalibrationError`."""
        weights = self.sensitivities[kind]
        chosen = sorted(weights[KEY]) if layers is None else layers
        missing = [layer for layer in chosen if layer not in weights[KEY]]
        if missing:
            raise CalibrationError(
                f"the calibration of {self.model} must have every compressed layer, got none for {missing}; "
                "calibrate again"
            )
        return [
            Component(layer, head, side, weight, self.elements[side][layer])
            for layer in chosen
            for side in SIDES
            for head, weight in enumerate(weights[side][layer])
        ]

    def allocate(self, config: KVQConfig, layers: Sequence[int] | None = None) -> Allocation:
        """Codecs for a scheme with average bits."""
        budgets: dict[str, Budget] = {
            side: budget for side, budget in zip(SIDES, config.budgets, strict=True) if budget is not None
        }
        return allocate_components(self.components(config.sensitivity, layers), budgets, self.curves)


# ---- measuring -----------------------------------------------------------------------------------------------------


def calibration_sequences(tokenizer: Any, texts: Sequence[str], sequences: int, length: int) -> list[list[int]]:
    """Token sequences spread evenly over the texts and over each text; raises `CalibrationError` for short ones."""
    if length < LEAST_TOKENS or sequences < 1:
        raise CalibrationError(
            f"a calibration must have sequences of at least {LEAST_TOKENS} tokens, got {sequences} of {length}; "
            "choose more"
        )
    found = []
    for i, text in enumerate(texts):
        ids = list(tokenizer.encode(text))
        count = len(range(i, sequences, len(texts)))
        if count and len(ids) < length:
            raise CalibrationError(
                f"a calibration text must have at least {length} tokens, got {len(ids)} in text {i + 1}; "
                "give longer texts or a smaller --length"
            )
        for start in np.linspace(0, max(0, len(ids) - length), count).astype(int):
            found.append(ids[start : start + length])
    return found


def calibrate(
    model: Any,
    tokenizer: Any,
    *,
    texts: Sequence[str] = (),
    sequences: int = 9,
    length: int = 256,
    seed: int = 0,
    source: str = "",
    done: Callable[[int, int], None] = lambda step, steps: None,
) -> Calibration:
    """Measure sensitivities and distortion curves of a model.

    Args:
        model, tokenizer: as mlx-lm loads them, not compressed.
        texts: to calibrate on; the package's corpus of prose, code and chat without any.
        sequences, length: how many sequences of how many tokens; each takes a forward and a backward pass.
        seed: of the tokens drawn from the model.
        source: the model's name, for messages.
        done: called with the sequences done and their number.

    Raises:
        CalibrationError: for texts that are too short, or a model through which gradients do not pass.
        UnsupportedModelError: as `compress`.
    """
    from .loading import compress
    from .sensitivity import measure_sensitivities

    texts = list(texts) or [corpus_text(name) for name in CORPUS]
    ids = calibration_sequences(tokenizer, texts, sequences, length)
    with compress(model, _SCHEME) as compression:
        plans = [plan for plan in compression.maker.plan() if plan.spec is not None]
        if not plans:
            raise CalibrationError("a model must have layers to compress for a calibration, got none; nothing to do")
        found = []
        for step, sequence in enumerate(ids):
            found.append(measure_sensitivities(model, compression.maker(), plans, mx.array([sequence]), seed + step))
            done(step + 1, len(ids))

    def mean(kind: str, name: tuple[str, int]) -> tuple[float, ...]:
        weights = np.mean([getattr(one[name], kind) for one in found], axis=0)
        return tuple(weights.tolist())

    sensitivities = {
        kind: {side: {plan.index: mean(kind, (side, plan.index)) for plan in plans} for side in SIDES}
        for kind in SENSITIVITIES
    }
    dims = {
        KEY: {plan.index: plan.geometry.key_dim for plan in plans},
        VALUE: {plan.index: plan.geometry.value_dim for plan in plans},
    }
    samples = {name: [one[name].sample for one in found[: len(texts)]] for name in found[0]}
    return Calibration(
        fingerprint=model_fingerprint(model, any_float=True),
        model=source or type(model).__module__,
        sensitivities=sensitivities,
        elements=dims,
        curves=_curves(samples),
        sequences=len(ids),
        length=length,
        corpus=hashlib.blake2b("\0".join(texts).encode(), digest_size=16).hexdigest(),
    )


def _curves(samples: Mapping[tuple[str, int], list[mx.array]]) -> dict[tuple[str, str], DistortionCurve]:
    """Distortion curves of every installed family with two or more whole rates that can do the head sizes."""
    curves: dict[tuple[str, str], DistortionCurve] = {}
    for side in SIDES:
        data = [x for (own, _), parts in sorted(samples.items()) if own == side for x in parts]
        for family in list_codecs():
            rates = whole_bits(family)
            if len(rates) < 2 or (side == VALUE and not get_codec(f"{family}{rates[0]}").values):
                continue
            try:
                curves[family, side] = fit_distortion_curve(family, data)
            except CodecError:  # a head size that the family cannot do
                continue
    return curves


# ---- files ---------------------------------------------------------------------------------------------------------


def save_calibration(path: str | Path, calibration: Calibration) -> None:
    """Write a calibration file, atomically."""
    path = Path(path).expanduser()
    arrays = {
        f"{kind}.{side}.{layer}": np.array(weights, np.float32)
        for kind, sides in calibration.sensitivities.items()
        for side, layers in sides.items()
        for layer, weights in layers.items()
    }
    header = {
        "version": VERSION,
        "fingerprint": calibration.fingerprint,
        "model": calibration.model,
        "elements": {side: {str(i): d for i, d in layers.items()} for side, layers in calibration.elements.items()},
        "curves": [
            {"family": family, "side": side, "bits": curve.bits, "mse": curve.mse}
            for (family, side), curve in sorted(calibration.curves.items())
        ],
        "sequences": calibration.sequences,
        "length": calibration.length,
        "corpus": calibration.corpus,
    }
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        save_file(arrays, temporary, metadata={_METADATA: json.dumps(header, sort_keys=True), "format": "mlx"})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_calibration(path: str | Path) -> Calibration:
    """Read a calibration file; raises `CalibrationError` for anything else."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise CalibrationError(f"a calibration file must exist, got {str(path)!r}; make one with kvq calibrate")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})[_METADATA])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if header["version"] > VERSION:
            raise CalibrationError(
                f"a calibration file must have version {VERSION} or less, got {header['version']} in {path.name}; "
                "install a newer mlx-kvq-plugin"
            )
        weights: dict[str, dict[str, dict[int, tuple[float, ...]]]] = {}
        for name, array in arrays.items():
            kind, side, layer = name.split(".")
            weights.setdefault(kind, {}).setdefault(side, {})[int(layer)] = tuple(array.astype(float).tolist())
        return Calibration(
            fingerprint=header["fingerprint"],
            model=header["model"],
            sensitivities={kind: {side: weights[kind][side] for side in SIDES} for kind in (GRADIENT, ACTIVATION)},
            elements={side: {int(i): d for i, d in layers.items()} for side, layers in header["elements"].items()},
            curves={
                (row["family"], row["side"]): DistortionCurve.fit(row["bits"], row["mse"]) for row in header["curves"]
            },
            sequences=header["sequences"],
            length=header["length"],
            corpus=header["corpus"],
        )
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
        if isinstance(error, KVQError):
            raise
        raise CalibrationError(
            f"a calibration file must be written by kvq calibrate, got {type(error).__name__} in {path.name}: {error}; "
            "make it again"
        ) from error


def find_calibration(source: str) -> Path | None:
    """The calibration file next to a model: in its folder, or in its Hugging Face repository; `None` without one."""
    if not source:
        return None
    folder = Path(source).expanduser()
    if folder.is_dir():
        path = folder / FILE_NAME
        return path if path.is_file() else None
    try:
        return Path(huggingface_hub.hf_hub_download(source, FILE_NAME))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CalibrationError(
            f"a calibration must be a file next to the model, got {type(error).__name__} for {source!r}; "
            "name one with calibration=FILE"
        ) from error


def push_calibration(
    path: str | Path, repository: str, *, token: str | None = None, endpoint: str | None = None
) -> str:
    """Upload a calibration to a Hugging Face model repository, where `find_calibration` finds it; returns its address.

    Raises:
        CalibrationError: when the file is none, or the hub refuses it.
    """
    calibration = load_calibration(path)
    try:
        info = huggingface_hub.HfApi(endpoint=endpoint, token=token).upload_file(
            path_or_fileobj=str(Path(path).expanduser()),
            path_in_repo=FILE_NAME,
            repo_id=repository,
            commit_message=f"Calibration of {Path(calibration.model).name} for mlx-kvq-plugin",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(
            f"the hub must accept the file, got {type(error).__name__} for {repository!r}: {first}; check the name and "
            "your token"
        ) from error
    return str(info.commit_url)


def calibration_for(model: Any, config: KVQConfig, source: str) -> Calibration:
    """The calibration that a scheme with average bits uses on a model; raises `CalibrationError`."""
    path = Path(config.calibration) if config.calibration else find_calibration(source)
    command = f"kvq calibrate {source or 'MODEL'}"
    if path is None:
        where = f" next to {source}" if source else ""
        raise CalibrationError(
            f"average bits must come with a calibration of the model, got none{where}; make one with: {command}"
        )
    calibration = load_calibration(path)
    if calibration.fingerprint != model_fingerprint(model, any_float=True):
        raise CalibrationError(
            f"a calibration must be of the model's own weights, got {path.name} of {calibration.model}; make one "
            f"with: {command}"
        )
    return calibration
