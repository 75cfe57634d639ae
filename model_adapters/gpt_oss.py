"""gpt-oss: sliding and full layers by turns, with attention sinks: logits that take part in the softmax only."""

from typing import Any

from mlx_kvq_plugin.adapters import FULL, SLIDING, Adapter, LayerGeometry, attention_geometry


def geometry(model: Any) -> list[LayerGeometry]:
    """Kinds from the config's `layer_types`."""
    return [
        attention_geometry(
            layer.self_attn,
            kind=FULL if kind == "full_attention" else SLIDING,
            window=None if kind == "full_attention" else model.args.sliding_window,
            heads="num_attention_heads",
            kv_heads="num_key_value_heads",
        )
        for layer, kind in zip(model.layers, model.model.layer_types, strict=True)
    ]


ADAPTER = Adapter(name="gpt_oss", geometry=geometry)
