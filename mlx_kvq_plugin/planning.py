"""What schemes do to a model and to its memory, before there are caches: from geometry, without the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .adapters import GENERIC, REFUSED, Adapter, load_adapter, model_type_of
from .allocation import KEY, SIDES, Allocation, Component, allocate, plain_curve
from .auto import even_choice
from .auto_choice import AutoChoice
from .codecs import Codec
from .codecs.per_head import PerHead
from .config import KVQConfig
from .errors import AllocationError, CodecError, UnsupportedModelError
from .layouts import STEPS, Layout, layer_layout, layouts_nbytes
from .loading import CacheMaker, LayerPlan, plan_layers, windows_of
from .schemes import format_scheme


@dataclass(frozen=True)
class SchemePlan:
    """What a scheme does to a model, entry by entry; without layers there is an error.

    Attributes:
        scheme: as a string.
        layers: what is done to each cache entry.
        layouts: of each entry's cache; `None` where it has no keys and values.
        error: why the scheme is not possible.
        choice: what an `auto` scheme chose, on a model with weights.
    """

    scheme: str
    layers: tuple[LayerPlan, ...]
    layouts: tuple[Layout | None, ...] = ()
    error: str = ""
    choice: AutoChoice | None = None

    @property
    def uncounted(self) -> int:
        """Entries with a recurrent state, alone or beside keys and values: its bytes do not grow and are left out."""
        return sum(
            layout is None or layer.geometry.member is not None
            for layer, layout in zip(self.layers, self.layouts, strict=True)
        )

    def nbytes(self, tokens: int, *, batch: int = 1, steps: int = STEPS) -> int:
        """Bytes of all layers after `tokens` tokens in each of `batch` sequences; `steps` as for `layouts_nbytes`."""
        return batch * layouts_nbytes(filter(None, self.layouts), tokens, steps)[0]

    def peak_nbytes(self, tokens: int, *, batch: int = 1, steps: int = STEPS) -> int:
        """The most bytes of all layers between two calls on the way to `tokens` tokens: never less than `nbytes`."""
        return batch * layouts_nbytes(filter(None, self.layouts), tokens, steps)[1]


def plan_caches(maker: CacheMaker, itemsize: int = 2) -> SchemePlan:
    """The plan of a cache maker's model and scheme; the model's weights are not needed.

    Args:
        maker: of a compressed model (`Compression.maker`), or one made for a model that stays as it is.
        itemsize: bytes of an element of the model's keys and values.
    """
    layers, caches = maker.plan(), maker()
    layouts = [layer_layout(layer.geometry, cache, itemsize) for layer, cache in zip(layers, caches, strict=True)]
    return SchemePlan(maker.scheme, tuple(layers), tuple(layouts), choice=maker.choice)


def head_bits(plan: LayerPlan) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """All-in bits per element of packed keys and of values, one a KV head, in a 16-bit model; 16 where none are packed.

    Both are empty for an entry without keys and values.
    """
    geometry, spec = plan.geometry, plan.spec
    if spec is None:
        return (16.0,) * geometry.kv_heads, (16.0,) * geometry.kv_heads

    def bits(codec: Codec, dim: int, dtype: str) -> tuple[float, ...]:
        if not isinstance(codec, PerHead):
            return (codec.bits_per_element(dim, dtype),) * geometry.kv_heads
        found = {head: part.codec.bits_per_element(dim, dtype) for part in codec.parts for head in part.heads}
        return tuple(found[head] for head in sorted(found))

    keys = bits(spec.key_codec, geometry.key_dim, "float32" if spec.framed else "float16")
    return keys, bits(spec.value_codec, geometry.value_dim, "float16")


def plan_scheme(model: Any, config: KVQConfig, adapter: Adapter, itemsize: int = 2) -> SchemePlan:
    """The plan of a scheme on a model, which is not changed; a head size that a codec cannot do is its `error`.

    Average bits are spread evenly: which heads get more is for a calibration to say, how many bits there are is not.
    How many bits a KL divergence takes is: such a scheme is an `error` here.
    """
    try:
        allocation = _even_allocation(config, plan_layers(model, config, adapter))
        return plan_caches(CacheMaker(model, config, adapter, allocation=allocation), itemsize)
    except (CodecError, AllocationError) as error:
        return SchemePlan(format_scheme(config), (), (), str(error))


def _even_allocation(config: KVQConfig, layers: Sequence[LayerPlan]) -> Allocation | None:
    budgets = {side: budget for side, budget in zip(SIDES, config.budgets, strict=True) if budget is not None}
    if not config.allocated:
        return None
    compressed = [layer for layer in layers if layer.spec is not None]
    components = [
        Component(layer.index, head, side, 1.0, layer.geometry.key_dim if side == KEY else layer.geometry.value_dim)
        for side in SIDES
        for head in range(max((layer.geometry.kv_heads for layer in compressed), default=0))
        for layer in compressed  # innermost: equal weights get their bits in this order
        if head < layer.geometry.kv_heads
    ]
    if not components:
        return None
    if config.target is not None:
        return even_choice(config, components, windows_of(compressed))
    curves = {(budget.family, side): plain_curve(budget.choices()) for side, budget in budgets.items()}
    return allocate(components, budgets, curves)


def adapter_of(model: Any, unknown_arch: str = "error") -> Adapter:
    """The model's adapter; with `generic` the generic one for unknown types, whose exactness only weights can show.

    Raises:
        UnsupportedModelError: for an unknown type, and for one that is known not to work.
    """
    try:
        return load_adapter(model_type_of(model))
    except UnsupportedModelError:
        if unknown_arch != "generic" or model_type_of(model) in REFUSED:
            raise
        return GENERIC


def longest_context(nbytes: Callable[[int], int], budget: int, most: int) -> int:
    """The longest context of at most `most` tokens whose bytes fit `budget`: one token more does not; 0 if none does.

    By doubling and bisection, so `nbytes` should grow with the tokens; packing in blocks makes it a few tokens uneven.
    """
    fits, fails = 0, min(most, 1024)
    while nbytes(fails) <= budget:
        if fails == most:
            return most
        fits, fails = fails, min(most, 2 * fails)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if nbytes(middle) <= budget:
            fits = middle
        else:
            fails = middle
    return fits
