"""AutoModelForCausalLM: from a folder or repository to a `CausalLM`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm

from ..calibration_files import HUB_ERRORS, short_error
from ..config import KVQConfig
from ..demo_models import DEMO, DEMO_MODELS, demo_model_path
from ..errors import GenerationError
from ..schemes import parse_scheme
from .model import CausalLM


class AutoModelForCausalLM:
    """Loads models; not to be instantiated."""

    def __init__(self) -> None:
        raise GenerationError(
            "AutoModelForCausalLM must be used through from_pretrained, got an instantiation; call "
            "AutoModelForCausalLM.from_pretrained(NAME, kv_scheme=...)"
        )

    @staticmethod
    def from_pretrained(
        repo_or_path: str | Path,
        *,
        kv_scheme: str | KVQConfig = "tq4",
        revision: str | None = None,
        dtype: str | mx.Dtype | None = None,
        generation_config: Any = None,
        unknown_arch: str = "error",
        **arguments: Any,
    ) -> CausalLM:
        """Load a model with compressed caches, its tokenizer and its `generation_config.json`.

        Args:
            repo_or_path: a folder, a repository of the Hugging Face hub, or `demo:smollm2` and `demo:gemma3`.
            kv_scheme: a scheme string or a `KVQConfig`; `fp16` leaves the caches to mlx-lm.
            revision: branch, tag or commit of a repository.
            dtype: cast float weights, `"float32"` or `mx.float32`; on CPUs half precision is slow.
            generation_config: in place of the model's own.
            unknown_arch: as for `kvq.compress`.
            **arguments: of `mlx_lm.load` (`tokenizer_config`, `adapter_path`, `lazy`, `trust_remote_code`, ...).

        Raises:
            KVQError: as `kvq.compress`.
            DemoModelError: an unknown demo model.
            GenerationError: an unknown dtype, or a name that is neither a folder nor a repository that can be
                downloaded.
        """
        config = parse_scheme(kv_scheme)  # what is wrong fails before the weights are read
        cast = None if dtype is None else _dtype(dtype)
        source = str(repo_or_path)
        folder = _folder(source, revision)
        model, tokenizer = mlx_lm.load(str(folder), **arguments)
        if cast is not None:
            model.set_dtype(cast)
            mx.eval(model.parameters())
        if generation_config is None and (folder / "generation_config.json").is_file():
            from transformers import GenerationConfig

            generation_config = GenerationConfig.from_pretrained(str(folder))
        return CausalLM(
            model, tokenizer, config, generation_config=generation_config, unknown_arch=unknown_arch, source=source
        )


def _folder(source: str, revision: str | None) -> Path:
    """Where a model's files are; downloads those that mlx-lm would."""
    if source.startswith(DEMO):
        return demo_model_path(source.removeprefix(DEMO))
    if Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=DEFAULT_ALLOW_PATTERNS))
    except HUB_ERRORS as error:
        demos = " or ".join(DEMO + name for name in DEMO_MODELS)
        raise GenerationError(
            f"a model must be a folder, a repository that the hub gives out, or {demos}, "
            f"got {source!r} and {short_error(error)}; check the name"
        ) from error


def _dtype(dtype: str | mx.Dtype) -> mx.Dtype:
    known = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
    for name, found in known.items():
        if dtype in (name, found):
            return found
    raise GenerationError(f"dtype must be one of {', '.join(known)}, got {dtype!r}; choose one of them")
