"""Qwen3: queries and keys are normalized per head before RoPE."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention everywhere."""
    return [attention_geometry(layer.self_attn, head_dim=model.args.head_dim) for layer in model.layers]


ADAPTER = Adapter(name="qwen3", geometry=geometry)
