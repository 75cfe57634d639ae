"""Phi-3.5-MoE: biases, long-context rope with fixed factors and a magnitude."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention everywhere; the head size is the hidden size over the heads."""
    head_dim = model.args.hidden_size // model.args.num_attention_heads
    return [attention_geometry(layer.self_attn, head_dim=head_dim) for layer in model.layers]


ADAPTER = Adapter(name="phimoe", geometry=geometry)
