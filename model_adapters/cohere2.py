"""Cohere 2 (Command R7B, Command A): sliding layers with interleaved rope, full ones without position embedding."""

from typing import Any

from mlx_kvq_plugin.adapters import FULL, SLIDING, Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Kinds from `use_sliding_window` of each attention; full layers have a rope module that they do not use."""
    return [
        attention_geometry(layer.self_attn, kind=SLIDING, window=model.args.sliding_window)
        if layer.self_attn.use_sliding_window
        else attention_geometry(layer.self_attn, kind=FULL, rope=None)
        for layer in model.layers
    ]


ADAPTER = Adapter(name="cohere2", geometry=geometry)
