"""Nemotron-H: recurrent, attention and feed-forward blocks in the config's order; no position embedding."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry, recurrent_geometry

_RECURRENT, _ATTENTION = "M", "*"  # block types with a cache entry; the others have none


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention without rope, or a recurrent state that stays."""
    return [
        attention_geometry(block.mixer, heads="num_heads", kv_heads="num_key_value_heads", rope=None)
        if block.block_type == _ATTENTION
        else recurrent_geometry()
        for block in model.layers
        if block.block_type in (_RECURRENT, _ATTENTION)
    ]


ADAPTER = Adapter(
    name="nemotron_h",
    geometry=geometry,
    padding_refused="mlx-lm's nemotron_h.py lets padding change the recurrent state of the shorter rows",
)
