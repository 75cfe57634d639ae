"""KV-cache compression for mlx-lm.

    import mlx_kvq_plugin as kvq
    model, tokenizer = kvq.load("mlx-community/Qwen3-8B-4bit", kv_scheme="rvq1")

Importing registers the cache classes in `mlx_lm.models.cache`, where mlx-lm looks classes of saved caches up by name.
"""

from mlx_lm.models import cache as _mlx_cache

from .cache import KVQCache
from .loading import compress, load, make_prompt_cache
from .sliding import SlidingKVQCache

for _class in (KVQCache, SlidingKVQCache):
    setattr(_mlx_cache, _class.__name__, _class)
