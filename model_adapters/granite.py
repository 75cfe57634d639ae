"""Granite: layers like llama's, with scores multiplied by a number of the config."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention everywhere."""
    return [attention_geometry(layer.self_attn) for layer in model.layers]


ADAPTER = Adapter(name="granite", geometry=geometry)
