"""Mixtral: a mixture of experts whose attention is llama's under other names."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention everywhere."""
    return [
        attention_geometry(layer.self_attn, heads="num_heads", kv_heads="num_key_value_heads") for layer in model.layers
    ]


ADAPTER = Adapter(name="mixtral", geometry=geometry)
