"""Ministral 3: Llama whose queries grow with their position beyond the trained length."""

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


ADAPTER = Adapter(name="ministral3", geometry=geometry)
