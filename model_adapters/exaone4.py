"""EXAONE 4: sliding layers with rope and full ones without in the large model, full ones with rope in the small one."""

from typing import Any

from mlx_kvq_plugin.adapters import FULL, SLIDING, Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Kinds from `is_local` of each attention, rope where `use_rope` says so."""
    args = model.args
    return [
        attention_geometry(layer.self_attn, kind=SLIDING, head_dim=args.head_dim, window=args.sliding_window)
        if layer.self_attn.is_local
        else attention_geometry(
            layer.self_attn, kind=FULL, head_dim=args.head_dim, rope="rope" if layer.self_attn.use_rope else None
        )
        for layer in model.layers
    ]


ADAPTER = Adapter(name="exaone4", geometry=geometry)
