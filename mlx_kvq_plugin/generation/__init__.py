"""Generation as Hugging Face's transformers does it, on mlx-lm's models with compressed caches.

`fields` knows every field of transformers' `GenerationConfig`, `config` what a call makes of them, `inputs` reads
prompts, `processors` changes scores, `endings` says when a sequence is complete, `decoding` runs the model, `prompts`
keeps prompt caches; `model`, `auto` and `pipeline` are what users call.
"""

from .auto import AutoModelForCausalLM
from .fields import FIELDS, Field, parity_table
from .model import CausalLM, GenerateOutput
from .pipeline import TextGenerationPipeline, pipeline
from .prompts import PromptCache

__all__ = [
    "FIELDS",
    "AutoModelForCausalLM",
    "CausalLM",
    "Field",
    "GenerateOutput",
    "PromptCache",
    "TextGenerationPipeline",
    "parity_table",
    "pipeline",
]
