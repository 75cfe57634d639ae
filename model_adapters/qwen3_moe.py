"""Qwen3-MoE: attention as in Qwen3, queries and keys normalized per head before RoPE."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention everywhere."""
    return [attention_geometry(layer.self_attn, head_dim=model.args.head_dim) for layer in model.layers]


ADAPTER = Adapter(name="qwen3_moe", geometry=geometry)
