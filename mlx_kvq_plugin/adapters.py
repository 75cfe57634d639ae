"""Model adapters: the facts about one architecture that its layers do not say themselves.

An adapter is found by the model's `model_type` in the entry-point group `mlx_kvq_plugin.adapters` and is loaded only
when a model of that type is compressed. The built-in ones live in the package `model_adapters`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import PluginError, UnsupportedModelError
from .plugins import load_plugin, plugin_names

GROUP = "mlx_kvq_plugin.adapters"

FULL, SLIDING = "full", "sliding"


@dataclass(frozen=True)
class LayerGeometry:
    """Facts about one cache entry; no policy.

    Attributes:
        kind: `full`, `sliding`, or another word (`recurrent`, `latent`, ...) for layers that stay as they are.
        attention: the attention module, whose class is routed.
        heads, kv_heads: query and KV heads.
        key_dim, value_dim: elements per head.
        rope: the module that turns this layer's keys, called as `rope(x, offset=n)`; `None` without position embedding.
        window: tokens a query sees on sliding layers.
        note: why a layer of another kind stays as it is.
    """

    kind: str
    attention: nn.Module | None = None
    heads: int = 0
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    rope: Callable[..., mx.array] | None = None
    window: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Adapter:
    """One architecture.

    Attributes:
        name: for reports and files.
        geometry: `geometry(model)` lists one `LayerGeometry` per entry of the model's own cache list, in its order.
            Called whenever caches are made, since sharding changes head counts after loading.
    """

    name: str
    geometry: Callable[[Any], list[LayerGeometry]]


def list_adapters() -> list[str]:
    """Model types that have an adapter, sorted; loads none of them."""
    return plugin_names(GROUP)


def load_adapter(model_type: str) -> Adapter:
    """The adapter of one model type; raises `UnsupportedModelError` for unknown ones, `PluginError` for broken ones."""
    if model_type not in list_adapters():
        raise UnsupportedModelError(
            f"the model type must be one of {', '.join(list_adapters())}, got {model_type!r}; "
            'pass unknown_arch="generic" (--unknown-arch generic) to try it after an exactness check'
        )
    adapter = load_plugin(GROUP, model_type)
    if not isinstance(adapter, Adapter):
        raise PluginError(f"entry point {model_type!r} in {GROUP} must be an Adapter, got {adapter!r}; fix that plugin")
    return adapter


def model_type_of(model: Any) -> str:
    """mlx-lm's `model_type` of a model."""
    return str(model.model_type)


def attention_geometry(
    attention: Any, *, kind: str = FULL, window: int | None = None, rope: Any = None, head_dim: int | None = None
) -> LayerGeometry:
    """Geometry of an attention module with llama's attribute names: `n_heads`, `n_kv_heads`, `head_dim`, `rope`."""
    dim = head_dim or attention.head_dim
    return LayerGeometry(
        kind=kind,
        attention=attention,
        heads=attention.n_heads,
        kv_heads=attention.n_kv_heads,
        key_dim=dim,
        value_dim=dim,
        rope=rope if rope is not None else attention.rope,
        window=window,
    )


def generic_geometry(model: Any) -> list[LayerGeometry]:
    """For architectures without an adapter: layers named like llama's, kinds read off the model's own caches."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    maker = getattr(model, "make_cache", None)
    maker = getattr(maker, "original", maker)  # of a compressed model: what mlx-lm would make
    caches = [KVCache() for _ in model.layers] if maker is None else maker()
    found = []
    for layer, cache in zip(model.layers, caches, strict=True):
        attention = layer.self_attn
        if type(cache) is KVCache:
            found.append(attention_geometry(attention))
        elif type(cache) is RotatingKVCache:
            found.append(attention_geometry(attention, kind=SLIDING, window=cache.max_size))
        else:
            found.append(LayerGeometry(kind="other", note=f"{type(cache).__name__} stays as it is"))
    return found


GENERIC = Adapter(name="generic", geometry=generic_geometry)
