"""SmolLM3: Llama without position embedding on every fourth layer."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention everywhere; no rope where `no_rope_layers` has a 0."""
    return [
        attention_geometry(layer.self_attn, rope="rope" if turned else None)
        for layer, turned in zip(model.layers, model.args.no_rope_layers, strict=True)
    ]


ADAPTER = Adapter(name="smollm3", geometry=geometry)
