"""Gemma 2: attention scores are capped with tanh, which mlx-lm's file computes without its shared attention function.

Every layer attends to everything there, also those that the checkpoint trained with a sliding window.
"""

from typing import Any

import mlx.core as mx
from mlx_lm.models import gemma2

from mlx_kvq_plugin.adapters import Adapter, LayerGeometry, attention_geometry
from mlx_kvq_plugin.attention import AttendArgs, Mask, attend, softcapped_attention
from mlx_kvq_plugin.handle import KVHandle


class SoftcapAttention(gemma2.Attention):
    """Gemma 2's attention on compressed caches.

    Also for layers that keep mlx-lm's cache: in batches its own mask has one axis less than its scores.
    """

    def __call__(self, x: mx.array, mask: Mask = None, cache: Any = None) -> mx.array:
        B, L, _ = x.shape

        def heads(projected: mx.array, count: int) -> mx.array:
            return projected.reshape(B, L, count, self.head_dim).transpose(0, 2, 1, 3)

        queries = heads(self.q_proj(x), self.n_heads)
        keys, values = heads(self.k_proj(x), self.n_kv_heads), heads(self.v_proj(x), self.n_kv_heads)
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        cap = self.attn_logit_softcapping
        if isinstance(keys, KVHandle):
            args = AttendArgs(queries, keys.cache, self.scale, mask, None, keys.dtype, values.dtype, softcap=cap)
            output = attend(args)
        else:
            output = softcapped_attention(queries, keys, values, self.scale, cap, mask)
        projected: mx.array = self.o_proj(output.transpose(0, 2, 1, 3).reshape(B, L, -1))
        return projected


def geometry(model: Any) -> list[LayerGeometry]:
    """Full attention everywhere."""
    return [attention_geometry(layer.self_attn) for layer in model.layers]


ADAPTER = Adapter(name="gemma2", geometry=geometry, attention=SoftcapAttention)
