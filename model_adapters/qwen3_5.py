"""Qwen3.5, dense and mixture of experts: Qwen3-Next's layers in a multimodal wrapper."""

from mlx_kvq_plugin.adapters import Adapter

from .qwen3_next import geometry

ADAPTER = Adapter(name="qwen3_5", geometry=geometry)
