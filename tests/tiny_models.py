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
        x *= KEY_BIAS if "k_proj" in name else 0.3
    elif x.ndim == 1:  # norms; Gemma's weights are stored less one
        x = 0.1 * x + (0.0 if "gemma" in config["model_type"] else 1.0)
        if "q_norm" in name:
            x += QUERY_GAIN - 1.0
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


def olmo2() -> Any:
    """No adapter of its own, but layers like llama's."""
    return build("olmo2", {**BASE, "model_type": "olmo2", "head_dim": 64})


def gemma2() -> Any:
    """Computes its attention itself: cannot be routed."""
    return build("gemma2", {**BASE, "model_type": "gemma2", "head_dim": 64})


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
