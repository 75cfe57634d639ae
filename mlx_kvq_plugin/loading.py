"""From a scheme to caches on a model: `load`, `compress`, `make_prompt_cache`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.models import cache as mlx_cache

from .adapters import FULL, GENERIC, REFUSED, SLIDING, Adapter, LayerGeometry, load_adapter, model_type_of
from .allocation import KEY, VALUE, Allocation, whole_bits
from .cache import KVQCache
from .config import KVQConfig, LayerSpec
from .errors import UnsupportedModelError
from .progress import Progress, silent
from .rotary import Rotary, read_rotary
from .routing import Globals, acquire, attention_globals, release
from .schemes import format_scheme, parse_scheme
from .sliding import SlidingKVQCache, smallest_window

if TYPE_CHECKING:
    from .auto_choice import AutoChoice

log = logging.getLogger("mlx_kvq_plugin")


@dataclass(frozen=True)
class LayerPlan:
    """What one entry of the cache list becomes.

    Attributes:
        index: position in the cache list.
        geometry: facts.
        spec: what is done, or `None` for a layer that stays as mlx-lm makes it.
        reason: why it stays, or a remark on a compressed layer; may be empty.
        rotary: the layer's rotation, for compressed layers.
    """

    index: int
    geometry: LayerGeometry
    spec: LayerSpec | None
    reason: str = ""
    rotary: Rotary | None = None

    @property
    def window(self) -> int | None:
        """Tokens that a sliding layer keeps, `None` for one that keeps all."""
        return self.geometry.window if self.geometry.kind == SLIDING else None


def windows_of(plans: Sequence[LayerPlan]) -> dict[int, int]:
    """Windows of the sliding layers among some, by cache entry."""
    return {plan.index: plan.window for plan in plans if plan.window is not None}


def stock_caches(model: Any) -> list[Any]:
    """The caches mlx-lm makes, whether or not the model is compressed."""
    maker = getattr(model, "make_cache", None)
    if isinstance(maker, CacheMaker):
        maker = maker.original
    if maker is not None:
        return list(maker())
    return [mlx_cache.KVCache() for _ in model.layers]


_EXPECTED = {FULL: mlx_cache.KVCache, SLIDING: mlx_cache.RotatingKVCache}
_read: dict[tuple[int, int], tuple[Any, Rotary | None, str]] = {}


def _rotary_of(geometry: LayerGeometry) -> tuple[Rotary | None, str]:
    """`read_rotary`, once per rope module and head size (layers often have equal but separate modules)."""
    key = (id(geometry.rope), geometry.key_dim)
    known = _read.get(key)
    if known is None or known[0] is not geometry.rope:
        known = _read[key] = (geometry.rope, *read_rotary(geometry.rope, geometry.key_dim))
    return known[1], known[2]


def plan_layers(
    model: Any, config: KVQConfig, adapter: Adapter, allocation: Allocation | None = None
) -> list[LayerPlan]:
    """What `config` does to each cache entry of `model`: pure, nothing is changed.

    Average and automatic bits take an `allocation`; without one the codecs of such a scheme are those of the nearest
    whole bits, or some of the family that is chosen from.
    """
    stock = stock_caches(model)
    layers = adapter.geometry(model)
    if len(stock) != len(layers):
        raise UnsupportedModelError(
            f"model adapter {adapter.name} must describe every cache of the model, got {len(layers)} descriptions "
            f"for {len(stock)} caches; fix the adapter"
        )
    attention = [i for i, layer in enumerate(layers) if layer.kind in _EXPECTED]
    edges = _edges(model, attention, config.edges)
    return [
        _plan_layer(i, layer, cache, config, i in edges, allocation)
        for i, (layer, cache) in enumerate(zip(layers, stock, strict=True))
    ]


def _edges(model: Any, attention: list[int], count: int) -> set[int]:
    """Those of `attention` among the first or last `count` of the whole model, of which a pipeline rank has a part."""
    if count == 0:
        return set()
    inner: Any = getattr(model, "model", None)
    end = getattr(inner, "end_idx", None)
    before = 0 if end is None else inner.start_idx  # layers of other ranks, counted as if all had attention
    after = 0 if end is None else model.args.num_hidden_layers - end
    first, last = max(0, count - before), max(0, count - after)
    return set(attention[:first] + attention[max(0, len(attention) - last) :])


def _plan_layer(
    index: int, layer: LayerGeometry, entry: Any, config: KVQConfig, edge: bool, allocation: Allocation | None
) -> LayerPlan:
    def stays(reason: str) -> LayerPlan:
        return LayerPlan(index, layer, None, reason)

    cache = entry if layer.member is None else entry.caches[layer.member]

    if not config.compresses:
        return stays("scheme fp16 leaves every layer to mlx-lm")
    if layer.kind not in _EXPECTED:
        return stays(layer.note or f"{layer.kind} layers have no keys and values to compress")
    if type(cache) is not _EXPECTED[layer.kind]:
        return stays(f"mlx-lm gives this {layer.kind} layer a {type(cache).__name__}")
    if edge:
        return stays(f"edge layer (edges={config.edges})")
    spec = config.layer_spec(*(_allocated(config, allocation, side, index) for side in (KEY, VALUE)))
    if allocation is not None and config.target is not None and spec.key_codec.exact and spec.value_codec.exact:
        return stays("16 bits by need")
    if allocation is not None:
        spec = spec.with_(recent=allocation.recent.get(index, spec.recent))
    for codec, dim in ((spec.key_codec, layer.key_dim), (spec.value_codec, layer.value_dim)):
        codec.planes(dim, "float16")  # raises CodecError for a head size it cannot do
    if layer.kind == SLIDING:
        if cache.keep:
            return stays(f"a rotating cache that keeps {cache.keep} first tokens is not packed")
        if cache.max_size < smallest_window(spec):
            return stays(f"a window of {cache.max_size} tokens is too small to pack (below {smallest_window(spec)})")
    rotary, reason = _rotary_of(layer)
    remark = f"key frame removes a plain mean: {reason}" if rotary is None and spec.frame else ""
    return LayerPlan(index, layer, spec, "; ".join(text for text in (layer.note, remark) if text), rotary)


def _allocated(config: KVQConfig, allocation: Allocation | None, side: str, index: int) -> str:
    """The codec that an average gives to a layer's side; "" for a side without average bits."""
    if config.target is not None:
        rates = whole_bits(config.family)
        return allocation.codec(side, index) if allocation else f"{config.family}{rates[len(rates) // 2]}"
    budget = dict(zip((KEY, VALUE), config.budgets, strict=True))[side]
    if budget is None:
        return ""
    if allocation is None:
        return budget.family + str(min(budget.choices(), key=lambda bits: abs(bits - budget.bits)))
    return allocation.codec(side, index)


class CacheMaker:
    """The `make_cache` of a compressed model."""

    def __init__(
        self,
        model: Any,
        config: KVQConfig,
        adapter: Adapter,
        source: str = "",
        allocation: Allocation | None = None,
        choice: AutoChoice | None = None,
    ):
        self.model, self.config, self.adapter, self.source = model, config, adapter, source
        self.allocation = allocation
        self.choice = choice  # of an `auto` scheme
        self.original = getattr(model, "make_cache", None)

    @property
    def scheme(self) -> str:
        """The scheme as a string."""
        return format_scheme(self.config)

    def plan(self) -> list[LayerPlan]:
        """What happens to each cache entry; raises `UnsupportedModelError` for an allocation on a part of its model."""
        if self.allocation is not None:
            from .distributed import check_scheme

            check_scheme(self.model, self.config)
        return plan_layers(self.model, self.config, self.adapter, self.allocation)

    def __call__(self) -> list[Any]:
        caches = stock_caches(self.model)
        for i, plan in enumerate(self.plan()):
            if plan.spec is not None:
                caches[i] = self._compressed(plan, caches[i])
            caches[i].kvq_note = plan.reason
        return caches

    def _compressed(self, plan: LayerPlan, stock: Any) -> Any:
        """The entry in place of mlx-lm's `stock` one: a compressed cache, or a list with one among its members."""
        assert plan.spec is not None
        geometry = plan.geometry
        if geometry.member is not None:
            members = list(stock.caches)
            members[geometry.member] = self._compressed(
                replace(plan, geometry=replace(geometry, member=None)), members[geometry.member]
            )
            return mlx_cache.CacheList(*members)
        # A replaced attention belongs to its model: there is no module that a loaded cache could route.
        route = "" if self.adapter.attention is not None else type(geometry.attention).__module__
        made: KVQCache
        if geometry.kind == SLIDING:
            made = SlidingKVQCache(plan.spec, stock.max_size, plan.rotary, route, geometry.shared)
        else:
            made = KVQCache(plan.spec, plan.rotary, route, geometry.shared)
        made.padding_refused = self.adapter.padding_refused
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheMaker:
        copied = CacheMaker.__new__(CacheMaker)
        memo[id(self)] = copied
        copied.__dict__.update(self.__dict__)
        copied.model = memo.get(id(self.model), self.model)
        original = self.original
        if original is not None and getattr(original, "__self__", None) is self.model:
            copied.original = getattr(type(copied.model), original.__name__).__get__(copied.model)
        return copied


class Compression:
    """A compressed model; also a context manager. `undo` restores the model completely."""

    def __init__(
        self,
        model: Any,
        maker: CacheMaker,
        modules: list[Globals],
        swapped: list[tuple[Any, type[nn.Module]]],
        replaced: Any = None,
    ):
        self.model, self.maker, self._modules, self._swapped, self._replaced = model, maker, modules, swapped, replaced
        self._active = True

    def undo(self) -> None:
        """Restore the model and the attention of its modules; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        if self.model.__dict__.get("make_cache") is self.maker:
            del self.model.__dict__["make_cache"]
            if self._replaced is not None:
                self.model.make_cache = self._replaced
        for module in self._modules:
            release(module)
        for attention, original in self._swapped:
            attention.__class__ = original

    def __enter__(self) -> Compression:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def compression_of(model: Any) -> CacheMaker | None:
    """The cache maker of a compressed model, or `None`."""
    maker = getattr(model, "make_cache", None)
    return maker if isinstance(maker, CacheMaker) else None


def compress(
    model: Any,
    kv_scheme: str | KVQConfig = "tq4",
    *,
    unknown_arch: str = "error",
    source: str = "",
    progress: Progress = silent,
) -> Compression:
    """Give a loaded mlx-lm model compressed caches.

    Everything that makes caches through the model (`mlx_lm.generate`, `stream_generate`, `make_prompt_cache`) gets
    compressed ones from then on.

    Args:
        model: a model loaded by mlx-lm.
        kv_scheme: a scheme string (schemes.py) or a `KVQConfig`.
        unknown_arch: `error`, or `generic` to try an architecture without an adapter: its layers must look like
            llama's, and an exactness check with the identity codec runs first. Types that are known not to work stay
            refused.
        source: repository or path the model came from, for prompt-cache files.
        progress: called with what an `auto` scheme measures, and how much of it.

    Returns:
        A `Compression`; use it as a context manager or call `undo()` to restore the model.

    Raises:
        SchemeError: a scheme that cannot be used.
        UnsupportedModelError: an architecture that cannot be compressed.
        PluginError: a broken plugin.
        CodecError: a codec that cannot do the model's head sizes.
        CalibrationError: average bits without a calibration of this model; `auto` on a model that writes no texts by
            itself, or through which gradients do not pass.
        AllocationError: bits or a KL divergence that `auto` cannot meet on this model.
    """
    config = parse_scheme(kv_scheme)
    if compression_of(model) is not None:
        raise UnsupportedModelError(
            "a model must be compressed once, got one that already is; call undo() on the earlier compression first"
        )
    if unknown_arch not in ("error", "generic"):
        raise UnsupportedModelError(f'unknown_arch must be "error" or "generic", got {unknown_arch!r}')
    try:
        adapter = load_adapter(model_type_of(model))
    except UnsupportedModelError:
        if unknown_arch != "generic" or model_type_of(model) in REFUSED:
            raise
        adapter = GENERIC
        _check_generic(model)
    return _attach(model, config, adapter, source, progress)


def _attach(
    model: Any, config: KVQConfig, adapter: Adapter, source: str = "", progress: Progress = silent
) -> Compression:
    maker = CacheMaker(model, config, adapter, source, *_allocation(model, config, adapter, source, progress))
    plans = maker.plan()
    modules: list[Globals] = []
    swapped: list[tuple[Any, type[nn.Module]]] = []
    if adapter.attention is None:
        for plan in plans:
            module = attention_globals(plan.geometry.attention) if plan.spec is not None else None
            if module is not None and not any(module is other for other in modules):
                modules.append(module)
    elif config.compresses:  # layers that stay too: a file's own attention may not understand batches
        attentions = [plan.geometry.attention for plan in plans if plan.geometry.attention is not None]
        swapped = [(attention, type(attention)) for attention in attentions]
    for module in modules:
        acquire(module)
    for attention, _ in swapped:
        attention.__class__ = adapter.attention
    replaced = model.__dict__.get("make_cache")
    model.make_cache = maker
    return Compression(model, maker, modules, swapped, replaced)


def _allocation(
    model: Any, config: KVQConfig, adapter: Adapter, source: str, progress: Progress
) -> tuple[Allocation | None, AutoChoice | None]:
    """The allocation of a scheme over the layers that it compresses, and why an `auto` scheme chose it."""
    if not config.allocated:
        return None, None
    from .distributed import check_scheme

    check_scheme(model, config)
    compressed = [plan for plan in plan_layers(model, config, adapter) if plan.spec is not None]
    layers = [plan.index for plan in compressed]
    if not layers:
        return None, None
    if config.target is None:
        from .calibration_files import calibration_for

        return calibration_for(model, config, source).allocate(config, layers), None
    from .auto import choose_for

    unknown_arch = "generic" if adapter is GENERIC else "error"
    allocation, choice = choose_for(model, config, layers, windows_of(compressed), source, unknown_arch, progress)
    log.info("kvq: %s", choice)
    return allocation, choice


def _check_generic(model: Any) -> None:
    """Logits with identity caches must equal mlx-lm's exactly on an architecture that no adapter vouches for."""
    tokens = mx.arange(1, 97)[None] % model.args.vocab_size

    def run(caches: list[Any]) -> list[mx.array]:
        outputs = [model(tokens, cache=caches)] + [model(tokens[:, i : i + 1], cache=caches) for i in range(8)]
        mx.eval(outputs)
        return outputs

    expected = run(stock_caches(model))
    try:
        with _attach(model, KVQConfig(key="identity", value="identity"), GENERIC) as compression:
            found = run(compression.maker())
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"model type {model_type_of(model)!r} must have layers like llama's for the generic adapter, got "
            f"{type(error).__name__}: {error}; it needs a model adapter of its own"
        ) from error
    for a, b in zip(expected, found, strict=True):
        if not mx.array_equal(a, b, equal_nan=True):
            raise UnsupportedModelError(
                f"model type {model_type_of(model)!r} must give equal logits with identity caches, got a difference "
                f"of {mx.max(mx.abs(a - b)).item():.3g}; it needs a model adapter of its own"
            )


def load(
    path_or_hf_repo: str, kv_scheme: str | KVQConfig = "tq4", *, unknown_arch: str = "error", **arguments: Any
) -> tuple[Any, ...]:
    """`mlx_lm.load` plus compression.

    Args:
        path_or_hf_repo: as for `mlx_lm.load`.
        kv_scheme: a scheme string or a `KVQConfig`.
        unknown_arch: as for `compress`.
        **arguments: passed to `mlx_lm.load`.

    Returns:
        What `mlx_lm.load` returns: `(model, tokenizer)`, or with the config if `return_config=True`.
    """
    config = parse_scheme(kv_scheme)  # a wrong scheme fails before the weights are read
    loaded = mlx_lm.load(path_or_hf_repo, **arguments)
    compress(loaded[0], config, unknown_arch=unknown_arch, source=path_or_hf_repo)
    return tuple(loaded)


def make_prompt_cache(model: Any) -> list[Any]:
    """Fresh caches of a model, one per layer: compressed ones if the model is."""
    return list(mlx_cache.make_prompt_cache(model))
