"""Falcon-H1: every layer has attention and a recurrent state side by side, in one `CacheList`."""

from typing import Any

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry

_ATTENTION = 1  # member of each cache entry; member 0 is the recurrent state


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention everywhere, beside a state that stays."""
    return [
        attention_geometry(
            layer.self_attn,
            heads="num_heads",
            kv_heads="num_kv_heads",
            member=_ATTENTION,
            note="the recurrent state beside it stays",
        )
        for layer in model.layers
    ]


ADAPTER = Adapter(name="falcon_h1", geometry=geometry)
