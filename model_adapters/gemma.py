"""Gemma: head size 256, one KV head in the small model; layers like llama's."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention everywhere."""
    return [attention_geometry(layer.self_attn) for layer in model.layers]


ADAPTER = Adapter(name="gemma", geometry=geometry)
