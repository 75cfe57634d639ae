"""Qwen3-Next: every fourth layer has gated attention, the others a recurrent state."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry, recurrent_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention, or a recurrent state that stays."""
    return [
        recurrent_geometry()
        if layer.is_linear
        else attention_geometry(layer.self_attn, heads="num_attention_heads", kv_heads="num_key_value_heads")
        for layer in model.layers
    ]


ADAPTER = Adapter(name="qwen3_next", geometry=geometry)
