"""Models by name, with their weights as the device likes them; `kvq demo-model`."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten

from ..demo_models import DEMO, DEMO_MODELS, demo_model_path
from .arguments import UsageError, add_command, note, one_line

DEFAULT_MODEL = "demo:smollm2"

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_UNLOADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError)  # what mlx-lm and the hub raise on bad models


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer.

    Attributes:
        model, tokenizer, config: from mlx-lm.
        source: absolute folder or repository, from where `mlx_lm.load` loads it again.
        float32: whether the weights were asked for in float32.
    """

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    source: str
    float32: bool


def resolve_model(name: str) -> str:
    """Absolute folder or repository of a model's name; raises `UsageError` for what can be neither."""
    if name.startswith(DEMO):
        return str(demo_model_path(name.removeprefix(DEMO)))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"a model folder must have a config.json, got {name!r} without one; check the path")
        return str(folder.resolve())
    if _REPOSITORY.fullmatch(name) and not folder.exists():
        return name
    demos = " or ".join(DEMO + demo for demo in DEMO_MODELS)
    raise UsageError(
        f"a model must be a folder, a Hugging Face repository owner/name, or {demos}, got {name!r}; check the name"
    )


def load_model(name: str, float32: bool | None, *, lazy: bool = False) -> LoadedModel:
    """Load a model, without compression.

    Args:
        name: as for `resolve_model`.
        float32: convert the weights; `None` converts on the CPU, where products of half precision are slow.
        lazy: leave the weights on the disk until they are needed.
    """
    source = resolve_model(name)
    wanted = mx.default_device() == mx.cpu if float32 is None else float32
    try:
        model, tokenizer, config = mlx_lm.load(source, lazy=True, return_config=True)
        parameters: Any = tree_flatten(model.parameters())
        halves = any(x.dtype in (mx.float16, mx.bfloat16) for _, x in parameters)
        if wanted and halves:
            model.set_dtype(mx.float32)
        if not lazy:
            mx.eval(model.parameters())
    except _UNLOADABLE as error:
        raise UsageError(
            f"mlx-lm must be able to load the model {name!r}, got {type(error).__name__} ({one_line(error)}); "
            "check the name and the files"
        ) from error
    if wanted and halves and float32 is None and not lazy:
        note("kvq: weights held as float32, since half precision is slow on the CPU (--no-float32 leaves them)")
    return LoadedModel(model, tokenizer, config, source, wanted)


def _run_demo_model(arguments: argparse.Namespace) -> int:
    for name in arguments.names:
        if name not in DEMO_MODELS:
            raise UsageError(f"a demo model must be one of {', '.join(DEMO_MODELS)}, got {name!r}; pick one of these")
    for name in arguments.names:
        demo = DEMO_MODELS[name]
        note(f"{name}: {demo.description}; licence {demo.licence}")
        print(demo_model_path(name), flush=True)
    return 0


def add_commands(commands: Any) -> None:
    """Add `demo-model`."""
    demo = add_command(
        commands,
        "demo-model",
        _run_demo_model,
        "Make small real models for demos and print their folders. The first call downloads and converts them; "
        "KVQ_CACHE_DIR says where they are kept.",
        "  kvq demo-model smollm2\n"
        "  kvq demo-model smollm2 gemma3\n"
        '  mlx_lm.generate --model "$(kvq demo-model smollm2)" --prompt hello',
    )
    demo.add_argument("names", nargs="+", metavar="NAME", help=" or ".join(DEMO_MODELS))
