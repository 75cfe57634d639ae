"""The one-point load hook: while it is installed, every model that mlx-lm loads gets compressed caches.

All of mlx-lm's tools load through `mlx_lm.utils.load_model`, which they look up late: replacing that one name makes
generate, chat, cache_prompt, benchmark, evaluate and the server work on compressed caches, without touching them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx.utils import tree_flatten

from .config import KVQConfig
from .loading import LayerPlan, compress
from .schemes import parse_scheme

log = logging.getLogger(__name__)


def _same_model(path: Path, name: str) -> bool:
    """Whether a folder is the one that mlx-lm loads `name`, a folder or a Hugging Face repository, from."""
    if Path(name).exists():
        return path.resolve() == Path(name).resolve()
    return f"models--{name.replace('/', '--')}" in path.parts


def describe_plan(plans: list[LayerPlan]) -> str:
    """How many layers are compressed and how many are left, with the reasons: one line."""
    left: dict[str, int] = {}
    for plan in plans:
        if plan.spec is None:
            left[plan.reason] = left.get(plan.reason, 0) + 1
    done = len(plans) - sum(left.values())
    reasons = "; ".join(f"{count}: {reason}" for reason, count in left.items())
    return f"{done} of {len(plans)} layers compressed" + (f", left to mlx-lm {reasons}" if left else "")


class LoadHook:
    """What the installed hook does with each model that is loaded; holds no model."""

    def __init__(
        self,
        kv_scheme: str | KVQConfig,
        *,
        unknown_arch: str = "error",
        float32: bool | None = False,
        draft: str | None = None,
        source: str = "",
    ):
        """
        Args:
            kv_scheme, unknown_arch: as for `compress`.
            float32: convert weights in half precision; `None` converts on the CPU, where they are slow.
            draft: folder or repository of a draft model, which stays as mlx-lm makes it: its caches are small, and its
                mistakes cost time only. A model loaded before it, from the same place too, is the target.
            source: name to note in prompt-cache files; empty takes the folder.
        """
        self.config = parse_scheme(kv_scheme)
        self.unknown_arch, self.float32, self.draft, self.source = unknown_arch, float32, draft, source
        self._targets = 0  # models compressed since the last `expect`

    def expect(self, draft: str | None) -> None:
        """The next model is a target again; `draft` is what may follow it."""
        self.draft, self._targets = draft, 0

    def loaded(self, model: Any, path: Path) -> None:
        """Compress a model that was just loaded from `path`, unless it is the draft model."""
        self._convert(model)
        if self.draft is not None and self._targets and _same_model(path, self.draft):
            log.info("kvq: the draft model %s is left to mlx-lm", self.draft)
            return
        compression = compress(model, self.config, unknown_arch=self.unknown_arch, source=self.source or str(path))
        self._targets += 1
        log.info("kvq: scheme %s, %s", compression.maker.scheme, describe_plan(compression.maker.plan()))

    def _convert(self, model: Any) -> None:
        wanted = mx.default_device() == mx.cpu if self.float32 is None else self.float32
        parameters: Any = tree_flatten(model.parameters())
        if wanted and any(x.dtype in (mx.float16, mx.bfloat16) for _, x in parameters):
            model.set_dtype(mx.float32)
            log.info("kvq: weights held as float32")


@contextmanager
def compressed_loading(hook: LoadHook) -> Iterator[LoadHook]:
    """Install `hook` for the time of the context; models loaded meanwhile stay compressed afterwards.

    Raises:
        What `compress` raises, out of mlx-lm's `load`.
    """
    original: Callable[..., tuple[Any, dict[str, Any]]] = mlx_lm.utils.load_model

    def load_model(model_path: Path, lazy: bool = False, *arguments: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        model, config = original(model_path, lazy, *arguments, **options)
        hook.loaded(model, Path(model_path))
        if not lazy:
            mx.eval(model.parameters())  # a conversion is lazy, and lazy arrays cannot cross threads
        return model, config

    mlx_lm.utils.load_model = load_model
    try:
        yield hook
    finally:
        mlx_lm.utils.load_model = original
