"""Llama, and every model type that mlx-lm runs with its llama file: Mistral, Falcon3, ..."""

from typing import Any

from mlx_kvq_plugin.adapters import FULL, SLIDING, Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention, or a sliding window where the config's `layer_types` says so."""
    return [
        attention_geometry(layer.self_attn, kind=SLIDING, window=model.model.sliding_window)
        if layer.use_sliding
        else attention_geometry(layer.self_attn, kind=FULL)
        for layer in model.layers
    ]


ADAPTER = Adapter(name="llama", geometry=geometry)
