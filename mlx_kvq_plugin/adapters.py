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
        kind: `full`, `sliding`, or another word (`recurrent`, `chunked`, ...) for layers that stay as they are.
        attention: the attention module, whose class is routed.
        heads, kv_heads: query and KV heads.
        key_dim, value_dim: elements per head.
        rope: the module that turns this layer's keys, called as `rope(x, offset=n)`; `None` without position embedding.
        window: tokens a query sees on sliding layers.
        shared: later layers attend to the keys and values of this one.
        member: position of the attention's cache in an entry that is a `CacheList`, else `None`.
        note: why a layer of another kind stays as it is, or what stays beside a compressed cache.
    """

    kind: str
    attention: nn.Module | None = None
    heads: int = 0
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    rope: Callable[..., mx.array] | None = None
    window: int | None = None
    shared: bool = False
    member: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Adapter:
    """One architecture.

    Attributes:
        name: for reports and files.
        geometry: `geometry(model)` lists one `LayerGeometry` per entry of the model's own cache list, in its order.
            Called whenever caches are made, since sharding changes head counts after loading.
        attention: the class that replaces the attention's own while the model is compressed, for files that compute
            their attention themselves: a subclass with a `__call__` that understands `KVHandle` (routing.py).
        padding_refused: why a batch of prompts of different lengths would get wrong text, for files of mlx-lm that do
            not follow its padding; such batches raise. Empty where they work.
    """

    name: str
    geometry: Callable[[Any], list[LayerGeometry]]
    attention: type[nn.Module] | None = None
    padding_refused: str = ""


_LATENT = "its attention caches latent vectors and no keys and values (MLA), which are small already"
_OWN_MATH = "its file computes attention itself and never calls mlx-lm's scaled_dot_product_attention"
_RECURRENT = "it has recurrent states and no keys and values"

REFUSED = {
    **dict.fromkeys(
        (
            "deepseek_v3",
            "glm4_moe_lite",
            "joyai_llm_flash",
            "kimi_k2",
            "kimi_k25",
            "kimi_vl",
            "longcat_flash",
            "longcat_flash_ngram",
            "mistral4",
        ),
        _LATENT,
    ),
    **dict.fromkeys(
        ("bailing_hybrid", "bailing_moe_v3", "kimi_k3", "kimi_linear"),
        f"{_LATENT}, beside recurrent layers",
    ),
    **dict.fromkeys(
        ("deepseek_v32", "deepseek_v41", "deepseek_v41_text", "glm_moe_dsa"),
        f"{_LATENT}, and an indexer picks the tokens it sees",
    ),
    "minimax_m3_vl": "an indexer beside its keys and values picks the tokens it sees",
    **dict.fromkeys(("gear", "olmo", "phi3small", "plamo", "plamo2"), _OWN_MATH),
    **dict.fromkeys(("afm7", "iquestloopcoder"), "some of its layers read the caches of others in ways of their own"),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "rwkv7"), _RECURRENT),
}
"""Model types that cannot be served, and why."""


def check_served(model_type: str) -> None:
    """Raise `UnsupportedModelError` with the reason for a model type that is known not to work."""
    if model_type in REFUSED:
        raise UnsupportedModelError(
            f"a model must cache the keys and values of attention that can be routed, got {model_type!r}: "
            f"{REFUSED[model_type]}; use it without compression"
        )


def list_adapters() -> list[str]:
    """Model types that have an adapter, sorted; loads none of them."""
    return plugin_names(GROUP)


def load_adapter(model_type: str) -> Adapter:
    """The adapter of one model type.

    Raises:
        UnsupportedModelError: for an unknown type, and with the reason for one that is known not to work.
        PluginError: for a broken adapter.
    """
    if model_type not in list_adapters():
        check_served(model_type)
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
    attention: Any,
    *,
    kind: str = FULL,
    heads: str = "n_heads",
    kv_heads: str = "n_kv_heads",
    head_dim: int | None = None,
    rope: str | None = "rope",
    window: int | None = None,
    shared: bool = False,
    member: int | None = None,
    note: str = "",
) -> LayerGeometry:
    """Geometry of an attention module; the defaults are llama's attribute names.

    Args:
        attention: the module.
        heads, kv_heads: names of the attributes that count query and KV heads.
        head_dim: elements per head, for modules without the attribute `head_dim`.
        rope: name of the attribute that turns keys, or `None` if this layer has no position embedding.
        kind, window, shared, member, note: as in `LayerGeometry`.
    """
    dim = attention.head_dim if head_dim is None else head_dim
    return LayerGeometry(
        kind=kind,
        attention=attention,
        heads=getattr(attention, heads),
        kv_heads=getattr(attention, kv_heads),
        key_dim=dim,
        value_dim=dim,
        rope=None if rope is None else getattr(attention, rope),
        window=window,
        shared=shared,
        member=member,
        note=note,
    )


def recurrent_geometry() -> LayerGeometry:
    """Geometry of a layer with a recurrent state in place of keys and values."""
    return LayerGeometry(kind="recurrent", note="recurrent state, no keys and values")


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
