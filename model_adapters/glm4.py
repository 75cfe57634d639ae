"""GLM-4: interleaved rope on half of the channels, optional biases."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention everywhere."""
    return [attention_geometry(layer.self_attn) for layer in model.layers]


ADAPTER = Adapter(name="glm4", geometry=geometry)
