"""Routing: making a model's attention understand cache handles, reversibly.

Model files bind `scaled_dot_product_attention` by name. Routing replaces that name in the globals of the module that
defines the attention class with a function that sends `KVHandle` keys to `attend` and everything else, untouched, to
the original. The decision depends on the type of the keys alone, so other models of the same module are unaffected.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .attention import AttendArgs, attend
from .errors import UnsupportedModelError
from .handle import KVHandle

NAME = "scaled_dot_product_attention"

Globals = dict[str, Any]


class RoutedAttention:
    """The routed `scaled_dot_product_attention` of one module; knows the original and who uses it."""

    def __init__(self, original: Callable[..., mx.array]):
        self.original, self.users = original, 0

    def __call__(
        self,
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any = None,
        scale: float = 1.0,
        mask: Any = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if isinstance(keys, KVHandle):
            return attend(AttendArgs(queries, keys.cache, scale, mask, sinks, keys.dtype, values.dtype))
        if sinks is None:
            return self.original(queries, keys, values, cache=cache, scale=scale, mask=mask)
        return self.original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)


def attention_globals(attention: object) -> Globals:
    """Globals of the module that defines the attention's `__call__`; raises when there is no name to route."""
    function = getattr(type(attention).__call__, "__globals__", None)
    if function is None or NAME not in function:
        raise UnsupportedModelError(
            f"the attention class {type(attention).__module__}.{type(attention).__qualname__} must call mlx-lm's "
            f"{NAME}, but its module does not have that name; it needs a model adapter of its own"
        )
    found: Globals = function
    return found


def acquire(module: Globals) -> None:
    """Route `module`, or count one more user of a routed one."""
    routed = module[NAME]
    if not isinstance(routed, RoutedAttention):
        routed = module[NAME] = RoutedAttention(routed)
    routed.users += 1


def release(module: Globals) -> None:
    """Undo one `acquire`; the last one puts the original function back."""
    routed = module[NAME]
    if isinstance(routed, RoutedAttention):
        routed.users -= 1
        if routed.users <= 0:
            module[NAME] = routed.original


class RouteLease:
    """Keeps the importable module `name` routed while caches loaded from a file, or their copies, are alive."""

    def __init__(self, name: str):
        module = vars(importlib.import_module(name))
        acquire(module)
        weakref.finalize(self, release, module)

    def __deepcopy__(self, memo: object) -> RouteLease:
        return self
