"""Facts that the server's report and its checks are made of."""

from __future__ import annotations

from typing import Any

from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, ChunkedKVCache, KVCache, RotatingKVCache

from .batch import BatchKVQCache
from .cache import KVQCache
from .loading import CacheMaker


def model_fact(model: Any, name: str) -> Any:
    """A value of a model's configuration, or of its text part's."""
    args = getattr(model, "args", None)
    inner = getattr(args, "text_config", None)
    for facts in (inner if isinstance(inner, dict) else vars(inner) if inner is not None else {}, vars(args or object)):
        if facts.get(name) is not None:
            return facts[name]
    return None


def context_limit(model: Any) -> int | None:
    """Positions a model is made for, scaled rotations included; `None` if its configuration does not tell."""
    limit, scaling = model_fact(model, "max_position_embeddings"), model_fact(model, "rope_scaling")
    if not isinstance(limit, int) or limit <= 0:
        return None
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    if isinstance(factor, int | float) and isinstance(scaling, dict):
        limit = max(limit, int(factor * scaling.get("original_max_position_embeddings", limit)))
    return limit


def fp16_nbytes(cache: Any) -> int:
    """Bytes of a cache's tokens in 16 bits; what has no keys and values counts as it is."""
    if isinstance(cache, (KVQCache, BatchKVQCache)):
        return int(cache.dense_nbytes())
    if not isinstance(cache, (KVCache, RotatingKVCache, ChunkedKVCache, BatchKVCache, BatchRotatingKVCache)):
        return int(cache.nbytes)
    if cache.keys is None or cache.keys.shape[2] == 0:
        return 0
    keys, values = cache.keys, cache.values
    held = min(int(cache.size()), keys.shape[2])
    return int(2 * (keys.size + values.size) * held // keys.shape[2])


def layers_report(maker: CacheMaker) -> dict[str, Any]:
    """Which layers are compressed, and why others are not, as JSON."""
    plans = maker.plan()
    applied = [plan for plan in plans if plan.spec is not None]
    return {
        "total": len(plans),
        "applied": [{"layer": plan.index, "scheme": plan.spec.label if plan.spec else ""} for plan in applied],
        "skipped": [{"layer": plan.index, "reason": plan.reason} for plan in plans if plan.spec is None],
    }
