"""A model without weights: what config.json alone tells about its layers and about the size of its weights.

MLX arrays are lazy: the random numbers that mlx-lm's model classes begin with are never computed, so the model of 70
billion parameters takes a fraction of a second and no memory. A skeleton must not be run.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text
from mlx_lm.utils import _get_classes

from .errors import UnsupportedModelError

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_UNBUILDABLE = (ValueError, TypeError, KeyError, AttributeError, IndexError, ImportError, RuntimeError)


@dataclass(frozen=True)
class Weights:
    """The size of a model's weights.

    Attributes:
        parameters: how many numbers there are.
        nbytes: bytes of these in memory, with the scales and biases of quantized ones.
        quantization: in words; empty for weights that are not quantized.
    """

    parameters: int
    nbytes: int
    quantization: str = ""

    @property
    def bits(self) -> float:
        """Bits a parameter, all in."""
        return 8.0 * self.nbytes / self.parameters


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config about the text model; those of a nested `text_config` come first."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def model_dtype(config: dict[str, Any]) -> mx.Dtype:
    """The dtype of the weights, and so of keys and values, that a config names: bfloat16 where it names none."""
    text = text_config(config)
    name = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    return _DTYPES.get(str(name).removeprefix("torch."), mx.bfloat16)


def trained_positions(config: dict[str, Any]) -> int | None:
    """`max_position_embeddings` of a config, or `None`."""
    positions = text_config(config).get("max_position_embeddings")
    return positions if isinstance(positions, int) and positions > 0 else None


def model_skeleton(config: dict[str, Any]) -> Any:
    """The model of a config as mlx-lm builds it before it reads weights; the parameters are never evaluated.

    Raises:
        UnsupportedModelError: when mlx-lm has no such model or cannot build it from this config.
    """
    config = copy.deepcopy(config)  # mlx-lm's classes write into it
    if "model_file" in config:
        raise UnsupportedModelError(
            f"a model must be one of mlx-lm's own to be planned, got one with a file {config['model_file']!r} of its "
            "own code; load it with mlx-lm and use kvq.compress"
        )
    try:
        model_class, arguments = _get_classes(config)
        model = model_class(arguments.from_dict(config))
    except _UNBUILDABLE as error:
        raise UnsupportedModelError(
            f"config.json must describe a model that mlx-lm {version('mlx-lm')} can build, got model type "
            f"{config.get('model_type')!r} and {type(error).__name__}: {' '.join(str(error).split())}; check the file"
        ) from error
    text = getattr(model, "language_model", model)
    if isinstance(text, gemma3_text.Model) and text_config(config).get("tie_word_embeddings", True):
        text.sanitize({})  # drops the output layer, as it does when it is given weights without one
    model.set_dtype(model_dtype(config))
    return model


def estimate_weights(model: Any, config: dict[str, Any]) -> Weights:
    """The size of a skeleton's weights; quantizes the skeleton's layers as the config's `quantization` says.

    A config does not name the layers that stay unquantized for their own reasons: taken are all that `mlx_lm.convert`
    would quantize. Quantization by other tools (`quantization_config` alone) is not counted: mlx-lm dequantizes
    most of these.
    """
    parameters, nbytes = _sizes(model)
    quantization = config.get("quantization")
    if not isinstance(quantization, dict):
        return Weights(parameters, nbytes)
    size, bits = int(quantization["group_size"]), int(quantization["bits"])
    own = getattr(model, "quant_predicate", None)

    def chosen(path: str, module: Any) -> Any:
        if path in quantization:
            return quantization[path]
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % size:
            return False
        return True if own is None else own(path, module)

    nn.quantize(model, group_size=size, bits=bits, mode=quantization.get("mode", "affine"), class_predicate=chosen)
    return Weights(parameters, _sizes(model)[1], f"{bits} bits in groups of {size}")


def _sizes(model: Any) -> tuple[int, int]:
    """Elements and bytes of all parameters."""
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return sum(array.size for array in arrays.values()), sum(array.nbytes for array in arrays.values())
