"""Gemma 4 (multimodal checkpoint): mlx-lm wraps the text model as `language_model`."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry

from .gemma4_text import geometry as text_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """The text model's geometry."""
    return text_geometry(model.language_model)


ADAPTER = Adapter(name="gemma4", geometry=geometry)
