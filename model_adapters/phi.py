"""Phi-1, 1.5 and 2: biases, rope on a part of the channels, queries in float32."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention everywhere."""
    return [
        attention_geometry(layer.self_attn, heads="num_heads", kv_heads="num_key_value_heads") for layer in model.layers
    ]


ADAPTER = Adapter(name="phi", geometry=geometry)
