"""The plugin against the contract: every check of `mlx_kvq_plugin.testing`, and what only this codec promises."""

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models import seed_oss

from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.testing import AdapterSuite, CodecSuite


class TestAbsMax4(CodecSuite):
    name = "absmax4"
    scheme = "absmax64"


class TestAbsMax6(CodecSuite):
    name = "absmax6"


class TestSeedOSS(AdapterSuite):
    scheme = "absmax64"

    def model(self):
        mx.random.seed(3)
        arguments = seed_oss.ModelArgs(
            model_type="seed_oss",
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rms_norm_eps=1e-6,
            vocab_size=128,
            attention_bias=False,
            attention_out_bias=False,
            mlp_bias=False,
            rope_theta=10000.0,
            tie_word_embeddings=True,
        )
        model = seed_oss.Model(arguments)
        model.update(tree_map(lambda x: x.astype(mx.float32), model.parameters()))
        return model


def test_errors_are_half_a_step_at_most():
    for name, levels in (("absmax4", 16), ("absmax6", 64)):
        codec, x = get_codec(name), mx.random.normal((1, 1, 50, 64))
        error = mx.abs(codec.decode(codec.encode(x)) - x)
        step = 2 * mx.max(mx.abs(x), axis=-1, keepdims=True) / (levels - 1)
        assert mx.all(error <= 0.5 * step * 1.2)  # scales are rounded to bfloat16: the outermost level may lie inside
