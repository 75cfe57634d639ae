"""Mistral 3 (multimodal checkpoint): mlx-lm wraps a Llama or Ministral 3 text model as `language_model`.

The wrapper has no `make_cache`, so mlx-lm gives every layer a full cache; the masks still end at the window.
"""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry, check_served


def geometry(model: Any) -> list[LayerGeometry]:
    """Full caches everywhere; raises `UnsupportedModelError` for a text model with latent attention."""
    check_served(model.language_model.model_type)
    return [attention_geometry(layer.self_attn) for layer in model.layers]


ADAPTER = Adapter(name="mistral3", geometry=geometry)
