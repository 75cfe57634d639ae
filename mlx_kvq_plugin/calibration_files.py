"""Calibration files: one safetensors file, written atomically, found next to a model or in a Hugging Face repository.

The arrays are sensitivities, named `kind.side.layer`, one number a KV head; the rest is a JSON header in the metadata.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import safetensors
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from safetensors.numpy import save

from .allocation import SENSITIVITIES, SIDES, DistortionCurve
from .cache_folder import write_whole
from .calibration import Calibration, check_weights
from .config import KVQConfig
from .errors import CalibrationError
from .prompt_cache import model_fingerprint

FILE_NAME = "kvq_calibration.safetensors"
SUFFIX = ".safetensors"
VERSION = 1

_METADATA = "kvq_calibration"
_PLAIN = ("fingerprint", "model", "sinks", "recent", "sequences", "length", "corpus")  # JSON as they are
_SNAPSHOT = re.compile(r"/models--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)$")  # of the hub's cache
HUB_ERRORS = (HTTPError, OSError, ValueError)  # the first is that of the hub's HTTP library


def save_calibration(path: str | Path, calibration: Calibration) -> None:
    """Write a calibration file, atomically; raises `CalibrationError` where it cannot be written."""
    path = Path(path).expanduser()
    arrays = {
        f"{kind}.{side}.{layer}": np.array(weights, np.float32)
        for kind, sides in calibration.sensitivities.items()
        for side, layers in sides.items()
        for layer, weights in layers.items()
    }
    header = {
        "version": VERSION,
        "elements": {side: {str(i): d for i, d in layers.items()} for side, layers in calibration.elements.items()},
        "curves": [
            {"family": family, "side": side, "bits": curve.bits, "mse": curve.mse}
            for (family, side), curve in sorted(calibration.curves.items())
        ],
        "attention": calibration.attention,
        **{name: getattr(calibration, name) for name in _PLAIN},
    }
    try:
        write_whole(path, save(arrays, {_METADATA: json.dumps(header, sort_keys=True), "format": "mlx"}))
    except OSError as error:
        raise CalibrationError(
            f"a calibration must go to a folder that can be written, got {short_error(error)} for {str(path)!r}; "
            "choose another path"
        ) from error


def load_calibration(path: str | Path) -> Calibration:
    """Read a calibration file; raises `CalibrationError` for anything else."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise CalibrationError(f"a calibration file must exist, got {str(path)!r}; make one with kvq calibrate")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_METADATA)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if text is None:
            raise ValueError("another safetensors file")
        header = json.loads(text)
        if header["version"] > VERSION:
            raise CalibrationError(
                f"a calibration file must have version {VERSION} or less, got {header['version']} in {path.name}; "
                "install a newer mlx-kvq-plugin"
            )
        weights: dict[str, dict[str, dict[int, tuple[float, ...]]]] = {}
        for name, array in arrays.items():
            kind, side, layer = name.split(".")
            weights.setdefault(kind, {}).setdefault(side, {})[int(layer)] = tuple(array.astype(float).tolist())
        check_weights(weights)
        elements = {side: {int(i): d for i, d in layers.items()} for side, layers in header["elements"].items()}
        if any(set(weights[kind][side]) != set(elements[side]) for kind in SENSITIVITIES for side in SIDES):
            raise ValueError("sensitivities of some layers only")
        return Calibration(
            sensitivities=weights,
            elements=elements,
            curves={
                (row["family"], row["side"]): DistortionCurve.fit(row["bits"], row["mse"]) for row in header["curves"]
            },
            attention=tuple(header["attention"]),
            **{name: header[name] for name in _PLAIN},
        )
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError, OSError) as error:
        raise CalibrationError(
            f"a calibration file must be written by kvq calibrate and complete, got {short_error(error)} in "
            f"{path.name}; make it again"
        ) from error


def short_error(error: BaseException) -> str:
    """An error's type and the first line of what it says, without its full stop."""
    first = (str(error).strip().splitlines() or [""])[0].split(". ")[0].rstrip(".:")
    return f"{type(error).__name__} ({first})" if first else type(error).__name__


def find_calibration(source: str) -> Path | None:
    """The calibration file next to a model: in its folder, or in its Hugging Face repository.

    A repository is asked with the hub's own cache, token and settings (`HF_ENDPOINT`, `HF_HUB_OFFLINE`). A folder of
    that cache stands for its repository: mlx-lm downloads nothing but the model into it.

    Args:
        source: folder or repository; "" has none.

    Returns:
        The path of the file, downloaded where necessary; `None` without one, also where the hub cannot be reached.

    Raises:
        CalibrationError: when the hub refuses, or `source` can be neither.
    """
    if not source:
        return None
    folder, revision = Path(source).expanduser(), None
    if folder.is_dir():
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
        snapshot = _SNAPSHOT.search(folder.absolute().as_posix())
        if snapshot is None:
            return None
        source, revision = snapshot["name"].replace("--", "/"), snapshot["revision"]
    try:
        return Path(huggingface_hub.hf_hub_download(source, FILE_NAME, revision=revision))
    except EntryNotFoundError:
        return None
    except HUB_ERRORS as error:
        raise CalibrationError(
            f"a calibration must be a file next to the model, got {short_error(error)} for {source!r}; "
            "name one with calibration=FILE"
        ) from error


def push_calibration(
    path: str | Path, repository: str, *, token: str | None = None, endpoint: str | None = None
) -> str:
    """Upload a calibration to a Hugging Face model repository, where `find_calibration` finds it; returns its address.

    Args:
        path: of the file.
        repository: `owner/name`, which must exist.
        token, endpoint: as for `huggingface_hub.HfApi`, which knows the ones set up for its own commands.

    Raises:
        CalibrationError: when the file is none, or the hub refuses it.
    """
    calibration = load_calibration(path)
    try:
        info = huggingface_hub.HfApi(endpoint=endpoint, token=token).upload_file(
            path_or_fileobj=str(Path(path).expanduser()),
            path_in_repo=FILE_NAME,
            repo_id=repository,
            commit_message=f"Calibration of {calibration.model} for mlx-kvq-plugin",
        )
    except (*HUB_ERRORS, RuntimeError) as error:  # its upload protocol raises the last
        raise CalibrationError(
            f"the hub must accept the file, got {short_error(error)} for {repository!r}; check the name and your token"
        ) from error
    return str(info.commit_url)


def calibration_path(config: KVQConfig, source: str) -> Path | None:
    """The calibration file that a scheme names, or that is next to the model; raises `CalibrationError`."""
    named = config.calibration
    return Path(named) if named.endswith(SUFFIX) else find_calibration(named or source)


def calibration_for(model: Any, config: KVQConfig, source: str) -> Calibration:
    """The calibration that a scheme with average bits uses on a model; raises `CalibrationError`."""
    command = f"kvq calibrate {source or 'MODEL'}"
    if not Path(source or FILE_NAME).is_dir():
        command += f" --out {FILE_NAME} (and add calibration={FILE_NAME} to the scheme)"
    named, path = config.calibration, calibration_path(config, source)
    if path is None:
        where = f" in {named}" if named else f" next to {source}" if source else ""
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
