"""Tiny random models of mlx-lm's own model files: float32, fixed seeds, weights scaled so that attention is peaked."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

VOCAB = 97
WINDOW = 160
QUERY_GAIN = 3.0  # scores have about this standard deviation
KEY_BIAS = 6.0  # of qwen2: several times the keys' own size
STORED_LESS_ONE = ("gemma", "gemma2", "gemma3", "gemma3_text")  # model types whose norms add 1 to their weights
UNSCALED = ("gemma3n", "gemma4", "gemma4_text")  # model types whose scores are not divided by the root of the head size

BASE = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}
TWO = {**BASE, "num_hidden_layers": 2}  # where all layers are of one kind


def build(file: str, config: dict[str, Any], seed: int = 0) -> Any:
    """`mlx_lm.models.<file>.Model` with random weights."""
    module = import_module(f"mlx_lm.models.{file}")
    model = module.Model(module.ModelArgs.from_dict(config))
    rng = np.random.default_rng(seed)
    weights = [(name, _weight(name, value.shape, config, rng)) for name, value in tree_flatten(model.parameters())]
    model.update(tree_unflatten(weights))
    model.eval()
    mx.eval(model.parameters())
    return model


def _weight(name: str, shape: tuple[int, ...], config: dict[str, Any], rng: np.random.Generator) -> mx.array:
    x = rng.standard_normal(shape)
    if "embed" in name:
        pass
    elif name.endswith("bias"):
        biased = "k_proj" in name and config["model_type"] != "gpt_oss"  # there scores have to be as large as sinks
        x *= KEY_BIAS if biased else 0.3
    elif name.endswith("sinks"):
        x += 4 * QUERY_GAIN  # larger than most scores: they take most of the weight
    elif x.ndim == 1:  # norms and the like
        x = 0.1 * x + (0.0 if config["model_type"] in STORED_LESS_ONE else 1.0)
        if "q_norm" in name:
            x += QUERY_GAIN - 1.0
            if config["model_type"] in UNSCALED:
                x /= shape[0] ** 0.5
    else:
        x /= shape[-1] ** 0.5
        if "q_proj" in name or "lm_head" in name:
            x *= QUERY_GAIN
        if "qkv_proj" in name:
            x[: config["hidden_size"]] *= QUERY_GAIN
    return mx.array(x.astype(np.float32))


def llama(seed: int = 0, **changes: Any) -> Any:
    return build("llama", {**BASE, "model_type": "llama", "head_dim": 64, **changes}, seed)


def llama_head_dim_80() -> Any:
    return llama(hidden_size=160, head_dim=80, num_attention_heads=2, num_key_value_heads=1)


def llama_sliding() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    return llama(num_hidden_layers=4, layer_types=kinds, sliding_window=WINDOW)


def llama3_rope() -> Any:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    return llama(rope_scaling=scaling, rope_theta=5000.0, max_position_embeddings=1024)


def mistral() -> Any:
    return llama(model_type="mistral", num_attention_heads=6, num_key_value_heads=2, seed=1)


def qwen2() -> Any:
    return build("qwen2", {**BASE, "model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1})


def qwen3() -> Any:
    config = {"head_dim": 64, "rope_theta": 1e6, "max_position_embeddings": 4096}
    return build("qwen3", {**BASE, "model_type": "qwen3", **config})


GEMMA = {
    **BASE,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 3,
}


def gemma3_text() -> Any:
    return build("gemma3_text", {**GEMMA, "model_type": "gemma3_text"})


def gemma3() -> Any:
    text = {**GEMMA, "model_type": "gemma3_text"}
    return build("gemma3", {"model_type": "gemma3", "text_config": text, "vocab_size": VOCAB})


PHI3 = {**BASE, "model_type": "phi3", "hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}


def phi3() -> Any:
    return build("phi3", PHI3)


def phi3_longrope() -> Any:
    short, long = [1.0] * 48, [1.0 + 0.25 * j for j in range(48)]
    return build("phi3", {**PHI3, "rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long}})


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def qwen2_moe() -> Any:
    return build("qwen2_moe", {**TWO, **MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 32})


def qwen3_moe() -> Any:
    config = {
        "head_dim": 64,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return build("qwen3_moe", {**TWO, **MOE, "model_type": "qwen3_moe", **config})


LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "full_attention_interval": 2,
    "max_position_embeddings": 4096,
}


def qwen3_next() -> Any:
    config = {
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "shared_expert_intermediate_size": 32,
    }
    return build("qwen3_next", {**BASE, **MOE, **LINEAR, "model_type": "qwen3_next", **config})


def qwen3_5() -> Any:
    text = {**BASE, **LINEAR, "model_type": "qwen3_5_text"}
    return build("qwen3_5", {"model_type": "qwen3_5", "text_config": text})


def qwen3_5_moe() -> Any:
    text = {**BASE, **MOE, **LINEAR, "model_type": "qwen3_5_moe_text", "shared_expert_intermediate_size": 32}
    return build("qwen3_5_moe", {"model_type": "qwen3_5_moe", "text_config": text})


def mixtral() -> Any:
    return build("mixtral", {**TWO, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2})


def mistral3(**changes: Any) -> Any:
    """The wrapper, with sliding layers to which it gives full caches."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = {**BASE, "model_type": "mistral", "head_dim": 64, "layer_types": kinds, "sliding_window": WINDOW, **changes}
    return build("mistral3", {"model_type": "mistral3", "text_config": text})


MINISTRAL = {
    **BASE,
    "model_type": "ministral3",
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e5,
        "factor": 4.0,
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 64,
    },
}


def ministral3() -> Any:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    return build("ministral3", {**MINISTRAL, "layer_types": kinds, "sliding_window": WINDOW})


def mistral3_of_ministral3() -> Any:
    return build("mistral3", {"model_type": "mistral3", "text_config": {**MINISTRAL, "num_hidden_layers": 2}})


def gemma() -> Any:
    return build("gemma", {**TWO, "model_type": "gemma", "head_dim": 64, "num_key_value_heads": 1})


def gemma2(**changes: Any) -> Any:
    """Caps of a few times the scores' size, so that they bend them."""
    config = {"head_dim": 64, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 5.0, **changes}
    return build("gemma2", {**TWO, "model_type": "gemma2", **config})


def gemma3n() -> Any:
    """Six layers, the last two without keys and values of their own."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    text = {
        **BASE,
        "model_type": "gemma3n_text",
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": ["full_attention", *kinds, "sliding_attention", "full_attention"],
        "head_dim": 64,
        "vocab_size_per_layer_input": VOCAB,
        "sliding_window": WINDOW,
        "max_position_embeddings": 4096,
        "rope_local_base_freq": 1e4,
        "rope_theta": 1e6,
        "final_logit_softcapping": 30.0,
        "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
        "hidden_size": 64,
        "intermediate_size": [64] * 6,
    }
    return build("gemma3n", {"model_type": "gemma3n", "text_config": text})


GEMMA4 = {
    **BASE,
    "num_hidden_layers": 6,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 3,
    "hidden_size": 64,
    "head_dim": 64,
    "global_head_dim": 512,
    "num_attention_heads": 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 3,
}


def gemma4_text(**changes: Any) -> Any:
    """Six layers, the last three without keys and values of their own; full layers have heads of 512."""
    return build("gemma4_text", {**GEMMA4, "model_type": "gemma4_text", **changes})


def gemma4() -> Any:
    """The wrapper, with keys that are values too on full layers and no shared layers, as in the large models."""
    changes = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True}
    text = {**GEMMA4, "model_type": "gemma4_text", "num_hidden_layers": 3, "num_global_key_value_heads": 1, **changes}
    return build("gemma4", {"model_type": "gemma4", "text_config": text, "vocab_size": VOCAB})


def phi() -> Any:
    return build("phi", {**TWO, "model_type": "phi", "hidden_size": 160, "num_attention_heads": 2})


def phimoe() -> Any:
    factors = {"short_factor": [1.0] * 16, "long_factor": [1.0 + 0.25 * j for j in range(16)]}
    scaling = {**factors, "long_mscale": 1.2, "short_mscale": 1.2}
    config = {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_scaling": {"type": "longrope", **scaling}}
    return build("phimoe", {**TWO, "model_type": "phimoe", **config})


def falcon_h1(**changes: Any) -> Any:
    config = {
        "head_dim": 64,
        "mamba_d_ssm": 64,
        "mamba_d_head": 32,
        "mamba_n_heads": 2,
        "mamba_d_state": 16,
        "max_position_embeddings": 4096,
    }
    return build("falcon_h1", {**TWO, "model_type": "falcon_h1", **config, **changes})


def gpt_oss() -> Any:
    config = {
        "num_hidden_layers": 4,
        "head_dim": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    }
    return build("gpt_oss", {**BASE, "model_type": "gpt_oss", **config})


def smollm3() -> Any:
    return build("smollm3", {**BASE, "model_type": "smollm3", "head_dim": 64, "no_rope_layers": [1, 0, 1]})


def olmo2() -> Any:
    return build("olmo2", {**TWO, "model_type": "olmo2", "head_dim": 64})


def granite() -> Any:
    config = {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.15,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.7,
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 1e4,
    }
    return build("granite", {**TWO, "model_type": "granite", **config})


def cohere2() -> Any:
    config = {"head_dim": 32, "num_hidden_layers": 4, "sliding_window": WINDOW, "sliding_window_pattern": 2}
    return build("cohere2", {**BASE, "model_type": "cohere2", **config})


def exaone4(**changes: Any) -> Any:
    config = {
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
        "head_dim": 64,
        "rope_scaling": {"rope_type": "default"},
        "sliding_window": WINDOW,
        "sliding_window_pattern": "LLG",
        **changes,
    }
    return build("exaone4", {**BASE, "model_type": "exaone4", **config})


def exaone4_full() -> Any:
    return exaone4(num_hidden_layers=2, sliding_window=None, sliding_window_pattern=None)


def starcoder2() -> Any:
    return build("starcoder2", {**TWO, "model_type": "starcoder2"})


def glm4() -> Any:
    config = {"attention_bias": True, "head_dim": 64, "partial_rotary_factor": 0.5, "rope_theta": 1e4}
    return build("glm4", {**TWO, "model_type": "glm4", **config})


def llama4() -> Any:
    text = {
        **BASE,
        "model_type": "llama4_text",
        "num_hidden_layers": 4,
        "attention_bias": False,
        "attention_chunk_size": 64,
        "head_dim": 64,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 64,
        "max_position_embeddings": 4096,
        "num_experts_per_tok": 1,
        "num_local_experts": 2,
        "rope_scaling": None,
        "rope_theta": 1e5,
        "use_qk_norm": True,
        "floor_scale": 64,
    }
    return build("llama4", {"model_type": "llama4", "text_config": text})


def nemotron_h() -> Any:
    """Four cache entries for five blocks: the feed-forward block has none."""
    config = {
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "mamba_num_heads": 2,
        "mamba_head_dim": 32,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "hybrid_override_pattern": ["M", "*", "-", "M", "*"],
    }
    return build("nemotron_h", {**BASE, "model_type": "nemotron_h", **config})


def seed_oss() -> Any:
    """No adapter of its own, but layers like llama's."""
    return build("seed_oss", {**TWO, "model_type": "seed_oss", "head_dim": 64})


ADAPTED: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama_head_dim_80": llama_head_dim_80,
    "llama_sliding": llama_sliding,
    "llama3_rope": llama3_rope,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma3_text": gemma3_text,
    "gemma3": gemma3,
    "phi3": phi3,
    "phi3_longrope": phi3_longrope,
}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama sliding": llama_sliding,
    "mistral": mistral,
    "mistral3": mistral3,
    "mistral3 of ministral3": mistral3_of_ministral3,
    "ministral3": ministral3,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gemma3": gemma3,
    "gemma3n": gemma3n,
    "gemma4_text": gemma4_text,
    "gemma4": gemma4,
    "phi": phi,
    "phi3": phi3,
    "phimoe": phimoe,
    "falcon_h1": falcon_h1,
    "gpt_oss": gpt_oss,
    "smollm3": smollm3,
    "olmo2": olmo2,
    "granite": granite,
    "cohere2": cohere2,
    "exaone4": exaone4,
    "exaone4 full": exaone4_full,
    "starcoder2": starcoder2,
    "glm4": glm4,
    "llama4": llama4,
    "nemotron_h": nemotron_h,
}
"""One tiny model for every shape of every architecture that has an adapter; the first word is the model type."""
