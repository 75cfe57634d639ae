"""Qwen1.5-MoE and Qwen2-57B-A14B: attention with Qwen2's biases."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention everywhere; the head size is the hidden size over the heads."""
    head_dim = model.args.hidden_size // model.args.num_attention_heads
    return [attention_geometry(layer.self_attn, head_dim=head_dim) for layer in model.layers]


ADAPTER = Adapter(name="qwen2_moe", geometry=geometry)
