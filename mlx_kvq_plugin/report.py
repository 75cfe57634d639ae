"""What a list of caches really holds, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

from .cache import KVQCache


@dataclass(frozen=True)
class LayerReport:
    """One cache entry.

    Attributes:
        index: position in the cache list.
        cache: class name.
        applied: the scheme of a compressed layer, `None` where mlx-lm's own cache was left.
        note: why it was left, or a remark; may be empty.
        tokens: stored tokens.
        packed: how many of them are stored as codes.
        nbytes: bytes allocated: K and V, scales, slack, windows, statistics.
        fp16_nbytes: the same tokens dense in 16 bits, without slack.
    """

    index: int
    cache: str
    applied: str | None
    note: str
    tokens: int
    packed: int
    nbytes: int
    fp16_nbytes: int

    @property
    def ratio(self) -> float:
        """fp16 bytes over bytes held; 1 for an empty layer."""
        return self.fp16_nbytes / self.nbytes if self.nbytes else 1.0


@dataclass(frozen=True)
class CacheReport:
    """All layers of one prompt cache."""

    layers: tuple[LayerReport, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def fp16_nbytes(self) -> int:
        """Bytes of the same tokens in 16 bits."""
        return sum(layer.fp16_nbytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """fp16 bytes over bytes held."""
        return self.fp16_nbytes / self.nbytes if self.nbytes else 1.0

    @property
    def tokens(self) -> int:
        """Most tokens that any layer stores."""
        return max((layer.tokens for layer in self.layers), default=0)

    @property
    def compressed(self) -> int:
        """How many layers are compressed."""
        return sum(layer.applied is not None for layer in self.layers)

    def __str__(self) -> str:
        lines = ["layer cache            scheme        tokens packed   held KiB   fp16 KiB  ratio  note"]
        for layer in self.layers:
            lines.append(
                f"{layer.index:5d} {layer.cache:16s} {layer.applied or 'fp16':12s} {layer.tokens:7d} {layer.packed:6d} "
                f"{layer.nbytes / 1024:10.1f} {layer.fp16_nbytes / 1024:10.1f} {layer.ratio:6.2f}  {layer.note}"
            )
        lines.append(self.summary())
        return "\n".join(line.rstrip() for line in lines)

    def summary(self) -> str:
        """One line: layers compressed, tokens, bytes held against fp16."""
        return (
            f"{self.compressed} of {len(self.layers)} layers compressed, {self.tokens} tokens, "
            f"{self.nbytes / 2**20:.2f} MiB held, {self.fp16_nbytes / 2**20:.2f} MiB in fp16, ratio {self.ratio:.2f}"
        )


def _report(index: int, cache: Any) -> LayerReport:
    name = type(cache).__name__
    note = vars(cache).get("kvq_note", "")
    if isinstance(cache, KVQCache):
        return LayerReport(
            index, name, cache.spec.label, note, cache.held, cache.packed_tokens, cache.nbytes, cache.dense_nbytes()
        )
    if isinstance(cache, CacheList):
        parts = [_report(index, part) for part in cache.caches]
        applied = [part.applied for part in parts if part.applied]
        return LayerReport(
            index,
            name,
            applied[0] if applied else None,
            note or "; ".join(part.note for part in parts if part.note),
            max(part.tokens for part in parts),
            sum(part.packed for part in parts),
            sum(part.nbytes for part in parts),
            sum(part.fp16_nbytes for part in parts),
        )
    if type(cache) in (KVCache, RotatingKVCache) and cache.keys is not None:
        B, H, _, Dk = cache.keys.shape
        fp16 = B * H * cache.size() * (Dk + cache.values.shape[-1]) * 2
        return LayerReport(index, name, None, note or "mlx-lm's own cache", cache.size(), 0, cache.nbytes, fp16)
    nbytes = 0 if type(cache) in (KVCache, RotatingKVCache) else cache.nbytes
    return LayerReport(index, name, None, note or "mlx-lm's own cache", cache.size(), 0, nbytes, nbytes)


def cache_report(cache: list[Any]) -> CacheReport:
    """Report a prompt cache (a list as from `make_prompt_cache`); costs nothing, evaluates nothing."""
    return CacheReport(tuple(_report(i, layer) for i, layer in enumerate(cache)))
