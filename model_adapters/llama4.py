"""Llama 4: every fourth layer attends to everything without position embedding; the others, in chunks, stay."""

from typing import Any

from mlx_kvq_plugin.adapters import FULL, Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention where `use_rope` is 0, else attention to the newest chunk alone."""
    chunk = model.args.text_config.attention_chunk_size
    return [
        attention_geometry(layer.self_attn, kind="chunked", window=chunk, note="holds the newest chunk only")
        if layer.self_attn.use_rope
        else attention_geometry(layer.self_attn, kind=FULL, rope=None)
        for layer in model.layers
    ]


ADAPTER = Adapter(name="llama4", geometry=geometry)
