"""Gemma 3n: sliding and full layers; the last ones have no keys and values and attend to those of earlier layers."""

from typing import Any

from mlx_kvq_plugin.adapters import FULL, SLIDING, Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Kinds from `is_sliding`, for the layers that have a cache; two of them are shared with the layers that do not."""
    text = model.model.language_model
    owners = text.first_kv_shared_layer_idx
    shared = set(text.layer_idx_to_cache_idx[owners:])
    return [
        attention_geometry(layer.self_attn, kind=SLIDING, window=text.sliding_window, shared=i in shared)
        if layer.self_attn.is_sliding
        else attention_geometry(layer.self_attn, kind=FULL, shared=i in shared)
        for i, layer in enumerate(text.layers[:owners])
    ]


ADAPTER = Adapter(name="gemma3n", geometry=geometry)
