"""Ministral 3: Llama whose queries grow with their position beyond the trained length; its layers look like llama's."""

from mlx_kvq_plugin.adapters import Adapter

from .llama import geometry

ADAPTER = Adapter(name="ministral3", geometry=geometry)
