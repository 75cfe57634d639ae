"""Gemma 3 (text): every sixth layer attends to everything, the others to a sliding window; per-kind rotary bases."""

from typing import Any

from mlx_kvq_plugin.adapters import FULL, SLIDING, Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Kinds from `is_sliding` of each attention, the window from the config."""
    window = model.args.sliding_window
    return [
        attention_geometry(layer.self_attn, kind=SLIDING, window=window)
        if layer.self_attn.is_sliding
        else attention_geometry(layer.self_attn, kind=FULL)
        for layer in model.layers
    ]


ADAPTER = Adapter(name="gemma3_text", geometry=geometry)
