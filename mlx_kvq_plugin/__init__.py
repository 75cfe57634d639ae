"""KV-cache compression for mlx-lm.

    import mlx_kvq_plugin as kvq
    model, tokenizer = kvq.load("mlx-community/Qwen3-8B-4bit", kv_scheme="rvq1")

Importing registers the cache classes in `mlx_lm.models.cache`, where mlx-lm looks classes of saved caches up by name.
"""

from mlx_lm.models import cache as _mlx_cache

from .adapters import Adapter, LayerGeometry, attention_geometry, list_adapters
from .allocation import Allocation, DistortionCurve
from .auto_choice import AutoChoice, LayerChoice
from .batch import BatchKVQCache
from .cache import KVQCache
from .calibration import Calibration, calibrate
from .calibration_files import find_calibration, load_calibration, push_calibration, save_calibration
from .codecs import Codec, Plane, Published, get_codec, list_codecs
from .config import KVQConfig, LayerSpec
from .demo_models import DEMO_MODELS, demo_model_path
from .distributed import Placement, placement_of, sharded_load
from .errors import KVQError
from .evaluation import Fidelity, compare, step_logprobs
from .generation import AutoModelForCausalLM, CausalLM, PromptCache, pipeline
from .loading import Compression, compress, compression_of, load, make_prompt_cache
from .probes import distortion, key_norms, layer_timing, recorded_queries
from .prompt_cache import (
    PromptCacheInfo,
    load_prompt_cache,
    read_prompt_cache_info,
    save_prompt_cache,
    verify_prompt_cache,
)
from .prompt_hub import pull_prompt_cache, push_prompt_cache
from .report import CacheReport, LayerReport, cache_report
from .schemes import format_scheme, list_schemes, parse_scheme
from .sliding import SlidingKVQCache, allow_speculation
from .standalone import CompressedKV, fit_distortion_curve
from .theory import validate_codecs

__all__ = [
    "DEMO_MODELS",
    "Adapter",
    "Allocation",
    "AutoChoice",
    "AutoModelForCausalLM",
    "BatchKVQCache",
    "CacheReport",
    "Calibration",
    "CausalLM",
    "Codec",
    "CompressedKV",
    "Compression",
    "DistortionCurve",
    "Fidelity",
    "KVQCache",
    "KVQConfig",
    "KVQError",
    "LayerChoice",
    "LayerGeometry",
    "LayerReport",
    "LayerSpec",
    "Placement",
    "Plane",
    "PromptCache",
    "PromptCacheInfo",
    "Published",
    "SlidingKVQCache",
    "allow_speculation",
    "attention_geometry",
    "cache_report",
    "calibrate",
    "compare",
    "compress",
    "compression_of",
    "demo_model_path",
    "distortion",
    "find_calibration",
    "fit_distortion_curve",
    "format_scheme",
    "get_codec",
    "key_norms",
    "layer_timing",
    "list_adapters",
    "list_codecs",
    "list_schemes",
    "load",
    "load_calibration",
    "load_prompt_cache",
    "make_prompt_cache",
    "parse_scheme",
    "pipeline",
    "placement_of",
    "pull_prompt_cache",
    "push_calibration",
    "push_prompt_cache",
    "read_prompt_cache_info",
    "recorded_queries",
    "save_calibration",
    "save_prompt_cache",
    "sharded_load",
    "step_logprobs",
    "validate_codecs",
    "verify_prompt_cache",
]

for _class in (KVQCache, SlidingKVQCache, BatchKVQCache):
    setattr(_mlx_cache, _class.__name__, _class)
