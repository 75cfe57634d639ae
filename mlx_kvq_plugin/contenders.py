"""What the ruler compares: a scheme with caches of its own on a model, or mlx-lm's quantized caches.

mlx-lm's are called `mlx-affine8` to `mlx-affine2`. As in mlx-lm, they begin dense and are quantized when the first
prefill chunk is done.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache, RotatingKVCache

from .cache import KVQCache
from .config import FP16
from .errors import SchemeError, UnsupportedModelError
from .layouts import CHUNK, Layout, layer_layout, layouts_nbytes
from .loading import LayerPlan, compress, make_prompt_cache
from .progress import Progress, silent, within
from .report import cache_report

AFFINE = "mlx-affine"
AFFINE_BITS = (8, 6, 5, 4, 3, 2)
AFFINE_SCHEMES = tuple(f"{AFFINE}{bits}" for bits in AFFINE_BITS)
AFFINE_GROUPS = (64, 32)  # the first one that divides the head sizes


def affine_bits(name: str) -> int | None:
    """Bits of `mlx-affine4` and its like, `None` for schemes of this package; raises `SchemeError`."""
    if not name.startswith(AFFINE):
        return None
    if name not in AFFINE_SCHEMES:
        known = ", ".join(AFFINE_SCHEMES)
        raise SchemeError(f"mlx-lm's quantized caches must be one of {known}, got {name!r}; write one of these names")
    return int(name.removeprefix(AFFINE))


@dataclass(frozen=True)
class Contender:
    """A scheme with caches of its own.

    Attributes:
        scheme, bits, note: as in `SchemeResult`.
        caches: changed by every call.
        layouts: of the fresh caches of a model in 16 bits; `None` where there are no keys and values.
        affine: bits and group size of mlx-lm's quantized caches, which `caches` become in the prefill.
    """

    scheme: str
    bits: float
    note: str
    caches: list[Any]
    layouts: tuple[Layout | None, ...]
    affine: tuple[int, int] | None = None

    @property
    def exact(self) -> bool:
        """Whether nothing is lost: its logits are the reference's, bit for bit."""
        members = [_with_keys(cache) for cache in self.caches]
        return self.affine is None and all(cache.exact for cache in members if isinstance(cache, KVQCache))

    def prefill(self, model: Any, tokens: mx.array, chunk: int = CHUNK) -> None:
        """Feed `(B, L)` in chunks; the logits are never computed."""
        for start in range(0, tokens.shape[1], chunk):
            model(tokens[:, start : start + chunk], cache=self.caches)
            self.end_chunk()

    def end_chunk(self) -> None:
        """What mlx-lm does between two chunks of a prompt."""
        if self.affine is not None:
            bits, group = self.affine
            for i, cache in enumerate(self.caches):
                if type(cache) is KVCache:
                    self.caches[i] = cache.to_quantized(group_size=group, bits=bits)
        mx.eval([cache.state for cache in self.caches])

    def step(self, model: Any, tokens: mx.array) -> mx.array:
        """Logits `(B, V)` after one more token a row, `(B, 1)`."""
        logits: mx.array = model(tokens, cache=self.caches)[:, -1]
        return logits

    def copied(self) -> Contender:
        """The same with caches of its own."""
        return replace(self, caches=copy.deepcopy(self.caches))

    @property
    def nbytes(self) -> int:
        """Bytes that the caches hold."""
        return cache_report(self.caches).nbytes

    def nbytes_16bit(self, batch: int, tokens: int, steps: int) -> int:
        """Bytes that the caches would hold if the model computed in 16 bits, which is what dense tokens then take.

        Args:
            batch, tokens: texts, and tokens that each of them has.
            steps: how many of these were fed singly, after all others in chunks.

        Recurrent states count as they are held: their types are their own.
        """
        nbytes, counted = 0, list[Layout]()
        for layout, cache in zip(self.layouts, self.caches, strict=True):
            if isinstance(cache, QuantizedKVCache):
                arrays = [*cache.keys, *cache.values]
                nbytes += sum(x.size * (x.dtype.size if x.dtype == mx.uint32 else 2) for x in arrays)
            elif layout is None:
                nbytes += cache_report([cache]).nbytes
            else:
                counted.append(layout)
                nbytes += sum(part.nbytes for part in _members(cache) if part is not _with_keys(cache))
        return nbytes + batch * layouts_nbytes(counted, tokens, steps)[0]


def make_contender(
    model: Any, name: str, unknown_arch: str = "error", source: str = "", progress: Progress = silent
) -> Contender:
    """Fresh caches of a scheme; raises `KVQError` for what the model cannot do."""
    affine = affine_bits(name)
    with compress(
        model, FP16 if affine else name, unknown_arch=unknown_arch, source=source, progress=within(progress, name)
    ) as compression:
        plans, caches = compression.maker.plan(), make_prompt_cache(model)
        choice = compression.maker.choice
    layouts = tuple(layer_layout(plan.geometry, cache) for plan, cache in zip(plans, caches, strict=True))
    layers = [(plan, cache) for plan, cache in zip(plans, caches, strict=True) if plan.geometry.kv_heads]
    if affine is None:
        sides = [_codec_bits(plan, cache) for plan, cache in layers]
        note = _left([plan.reason for plan, _ in layers if plan.spec is None], len(layers)) if name != FP16 else ""
        chosen = "" if choice is None else choice.summary()
        note = "; ".join(text for text in (chosen, note) if text)
        return Contender(name, _average(layers, sides), note, caches, layouts)
    dims = [dim for plan, cache in layers if type(cache) is KVCache for dim in _dims(plan)]
    group = next((size for size in AFFINE_GROUPS if all(dim % size == 0 for dim in dims)), None)
    if group is None or not dims:
        raise UnsupportedModelError(
            f"mlx-lm's quantized caches must have KVCache layers whose head size is a multiple of "
            f"{AFFINE_GROUPS[-1]}, got {sorted(set(dims)) or 'none'}; leave {name} out"
        )
    stored = affine + 32 / group  # a scale and a bias of 16 bits
    sides = [(stored, stored) if type(cache) is KVCache else (16.0, 16.0) for _, cache in layers]
    kept = [f"mlx-lm cannot quantize a {type(cache).__name__}" for _, cache in layers if type(cache) is not KVCache]
    return Contender(name, _average(layers, sides), _left(kept, len(layers)), caches, layouts, (affine, group))


def _members(entry: Any) -> Sequence[Any]:
    return entry.caches if isinstance(entry, CacheList) else (entry,)


def _with_keys(entry: Any) -> Any:
    """The member with keys and values of an entry that is a `CacheList`, else the entry."""
    kinds = (KVQCache, KVCache, RotatingKVCache)
    return next((part for part in _members(entry) if isinstance(part, kinds)), entry)


def _dims(plan: LayerPlan) -> tuple[int, int]:
    return plan.geometry.key_dim, plan.geometry.value_dim


def _codec_bits(plan: LayerPlan, cache: Any) -> tuple[float, float]:
    """Bits per element of keys and of values."""
    if plan.geometry.member is not None:
        cache = cache.caches[plan.geometry.member]
    if not isinstance(cache, KVQCache):
        return 16.0, 16.0
    keys, values = _dims(plan)
    return cache.spec.bits_per_element(keys, values)


def _average(layers: Sequence[tuple[LayerPlan, Any]], sides: Sequence[tuple[float, float]]) -> float:
    """Bits per element over all layers, by the elements that a token has in each."""
    bits, elements = 0.0, 0
    for (plan, _), (keys, values) in zip(layers, sides, strict=True):
        key_dim, value_dim = _dims(plan)
        bits += plan.geometry.kv_heads * (key_dim * keys + value_dim * values)
        elements += plan.geometry.kv_heads * (key_dim + value_dim)
    return bits / elements


def _left(reasons: Sequence[str], layers: int) -> str:
    if not reasons:
        return ""
    return f"{len(reasons)} of {layers} layers stay as they are: {'; '.join(dict.fromkeys(reasons))}"
