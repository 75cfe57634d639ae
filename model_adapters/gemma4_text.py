"""Gemma 4 (text): sliding layers, and full ones with larger heads; in the small models the last layers have no keys and
values and attend to those of earlier layers.
"""

from typing import Any

from mlx_kvq_plugin.adapters import FULL, SLIDING, Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Kinds from `is_sliding`, for the layers that have a cache."""
    args = model.args
    owners = args.num_hidden_layers - args.num_kv_shared_layers
    shared = set(model.model.previous_kvs[owners:])
    return [
        attention_geometry(layer.self_attn, kind=SLIDING, window=args.sliding_window, shared=i in shared)
        if layer.self_attn.is_sliding
        else attention_geometry(layer.self_attn, kind=FULL, shared=i in shared)
        for i, layer in enumerate(model.layers[:owners])
    ]


ADAPTER = Adapter(name="gemma4_text", geometry=geometry)
