"""OLMo 2: queries and keys are normalized over all heads together before RoPE."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention everywhere."""
    return [attention_geometry(layer.self_attn) for layer in model.layers]


ADAPTER = Adapter(name="olmo2", geometry=geometry)
