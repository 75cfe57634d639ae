"""Models spread over several machines: which part of one a process holds, and `sharded_load`.

mlx-lm splits a model in two ways, and the caches follow from the layers that a rank has. Tensor-parallel ranks hold
every layer with some of its heads, pipeline ranks hold some of the layers with all heads. Statistics and codes belong
to one KV head of one layer, so a rank computes those that one machine would have computed for them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils as mlx_utils

from .config import KVQConfig
from .errors import UnsupportedModelError
from .loading import compress
from .schemes import format_scheme, parse_scheme

TENSOR, PIPELINE = "tensor", "pipeline"

_RANK_STEM = re.compile(r"(?P<stem>.+)\.rank\d+of\d+")


@dataclass(frozen=True)
class Placement:
    """The part of a model that this process holds.

    Attributes:
        rank, ranks: which part, of how many; 0 of 1 for a whole model.
        sharding: `tensor`, `pipeline`, both joined by `+`, or empty for a whole model.
        group: the processes that hold the parts; `None` stands for all processes.
    """

    rank: int = 0
    ranks: int = 1
    sharding: str = ""
    group: Any = field(default=None, compare=False, repr=False)

    def file(self, path: str | Path) -> Path:
        """This rank's file of a family: `a.safetensors`, or for a part `a.rank0of2.safetensors`; takes both forms."""
        path = Path(path)
        if self.ranks == 1:
            return path
        return path.with_name(f"{rankless(path).stem}.rank{self.rank}of{self.ranks}{path.suffix}")

    def gather(self, value: int) -> list[int]:
        """A 32-bit number of every rank, in their order; every rank must ask, or the others wait for it."""
        if self.ranks == 1:
            return [value]
        numbers: Any = mx.distributed.all_gather(mx.array([value], mx.uint32), group=self.group, stream=mx.cpu)
        return list(numbers.tolist())


def rankless(path: Path) -> Path:
    """The name of a file's family: without `.rank0of2`, if it has that."""
    match = _RANK_STEM.fullmatch(path.stem)
    return path.with_name(match["stem"] + path.suffix) if match else path


def _tensor_group(model: Any) -> Any:
    """The processes that share the heads of a model, or `None`."""
    for _, module in model.named_modules():
        group = getattr(module, "group", None)
        if isinstance(group, mx.distributed.Group) and group.size() > 1:
            return group
    return None


def placement_of(model: Any) -> Placement:
    """Which part of a model this process holds, read off its layers; asks no other process."""
    group, inner = _tensor_group(model), getattr(model, "model", None)
    stages, stage = int(getattr(inner, "pipeline_size", 1)), int(getattr(inner, "pipeline_rank", 0))
    if stages == 1:
        return Placement() if group is None else Placement(group.rank(), group.size(), TENSOR, group)
    if group is None:
        return Placement(stage, stages, PIPELINE)
    return Placement(stage * group.size() + group.rank(), stages * group.size(), f"{TENSOR}+{PIPELINE}")


def _check_heads(config: dict[str, Any], ranks: int) -> None:
    """mlx-lm cuts projections into equal parts wherever the cut falls; inside a head the result is wrong."""
    text = config.get("text_config", config)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = text.get(name)
        if isinstance(heads, int) and heads % ranks:
            raise UnsupportedModelError(
                f"a tensor-parallel model must have a multiple of {ranks} heads for {ranks} ranks, got {name}={heads}; "
                "use another number of ranks, or a pipeline_group if the model supports it"
            )


def check_scheme(model: Any, config: KVQConfig) -> None:
    """Raise `UnsupportedModelError` for average or automatic bits on a part of a model."""
    if config.allocated and placement_of(model).ranks > 1:
        raise _not_allocated(config)


def _not_allocated(config: KVQConfig) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"a model over several ranks must have a scheme of whole bits, got {format_scheme(config)!r}: a calibration is "
        "of a whole model; name a codec instead"
    )


def sharded_load(
    path_or_hf_repo: str,
    kv_scheme: str | KVQConfig = "tq4",
    *,
    pipeline_group: Any = None,
    tensor_group: Any = None,
    unknown_arch: str = "error",
    return_config: bool = False,
    **arguments: Any,
) -> tuple[Any, ...]:
    """`mlx_lm.utils.sharded_load` plus compression: called on every rank, each gets its part of the model.

    Args:
        path_or_hf_repo: as for `mlx_lm.load`; every rank reads (and downloads) it by itself.
        kv_scheme: a scheme string or a `KVQConfig`, the same on every rank.
        pipeline_group, tensor_group: from `mx.distributed.init()`: split by layers, or by heads. Without either all
            processes split the model by heads if it can, else by layers.
        unknown_arch: as for `compress`.
        return_config: whether to return the config as well.
        **arguments: passed to mlx-lm: `tokenizer_config`, `trust_remote_code`.

    Returns:
        `(model, tokenizer)`, or with the config.

    Raises:
        ValueError: from mlx-lm, for a model that cannot be split that way.
        UnsupportedModelError: when the heads cannot be shared out evenly, and as `compress`.
    """
    scheme = parse_scheme(kv_scheme)  # a wrong scheme fails before the weights are read
    if scheme.allocated:
        raise _not_allocated(scheme)
    model, tokenizer, config = mlx_utils.sharded_load(
        path_or_hf_repo, pipeline_group, tensor_group, return_config=True, **arguments
    )
    group = _tensor_group(model)
    if group is not None:
        _check_heads(config, group.size())
    compress(model, scheme, unknown_arch=unknown_arch, source=path_or_hf_repo)
    return (model, tokenizer, config) if return_config else (model, tokenizer)
