"""What layers hold at a length that bytes are counted at, and how many of the newest tokens each keeps dense there.

Measured with `tcq3` at positions 1,800 to 2,000, KL by the newest dense tokens (recent):

    recent            0       16       32       64      128
    SmolLM2-135M  0.0246   0.0146   0.0121   0.0100   0.0086
    Gemma 3 270M  0.0174   0.0108   0.0095   0.0080   0.0065

which is about in proportion to `(recent + 8)^-0.3`, and by the first ones (sinks) 4.4 times (SmolLM2) or 1.4 times
(Gemma 3) as much with 0 as with 4, and 0.96 to 1.01 times with 16. A dense token takes `16 - b` bits an element from
packed ones, and a bit is worth a factor of about 4. So `recent` makes `ln 4 (16 - b) recent / T - 0.3 ln(recent + 8)`
least for T tokens. All of it from `python benchmarks/quality.py --texts documentation code licence --schemes tcq3
tcq3,recent=0 tcq3,recent=32 tcq3,recent=64 tcq3,recent=128 tcq3,sinks=0 tcq3,sinks=16 --prefill 1800`.

Bits go to layers as if no length were named: what a layer's errors cost is taken to grow with the tokens that it packs,
as its bytes do. Windows are cheap at long contexts, but matter less there too: `benchmarks/context.py --kinds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .allocation import Component
from .codecs import get_codec
from .growth import GPU_BLOCK
from .rates import EXACT_BITS, auto_codecs

if TYPE_CHECKING:
    from .config import KVQConfig

NEWEST = (16, 48, 80, 112, 144)  # choices, whole blocks apart: all layers then pack in the same steps

_FALL, _BEFORE = 0.3, 8  # KL is in proportion to (recent + _BEFORE) ** -_FALL
_BIT = 4.0  # by which a bit divides KL


@dataclass(frozen=True)
class Held:
    """Tokens that a layer holds.

    Attributes:
        tokens: all of them.
        sinks, recent: those that are dense.
    """

    tokens: int
    sinks: int
    recent: int

    @property
    def packed(self) -> int:
        """Tokens stored as codes."""
        return self.tokens - self.sinks - self.recent


def newest_tokens(tokens: int, bits: float, most: int = NEWEST[-1]) -> int:
    """The number of newest dense tokens for a layer that holds `tokens` at `bits` an element, at most `most`."""

    def cost(recent: int) -> float:
        return math.log(_BIT) * (EXACT_BITS - bits) * recent / tokens - _FALL * math.log(recent + _BEFORE)

    return min((recent for recent in NEWEST if recent <= max(most, NEWEST[0])), key=cost)


@dataclass(frozen=True)
class Budget:
    """What bits may be spent on.

    Attributes:
        components: KV heads; where the scheme has a context, with the elements of all tokens that they pack and with
            weights that grow alike.
        bits: an element of them, all-in; 0 for a scheme with a bound.
        recent: newest dense tokens by layer, where they are chosen.
    """

    components: list[Component]
    bits: float
    recent: Mapping[int, int]


def budget_of(
    config: KVQConfig,
    heads: Sequence[Component],
    windows: Mapping[int, int],
    least: Callable[[Sequence[Component]], float],
) -> Budget:
    """The budget of an `auto` scheme.

    With a context it takes, at the context, the bytes of these bits for all layers and the scheme's own dense tokens.
    Newest dense tokens are chosen only as far as they leave enough for the fewest bits.

    Args:
        config: with a `target`.
        heads: all KV heads, whose elements are those of one token.
        windows: of the sliding layers among theirs.
        least: the fewest bits that components can have.
    """
    assert config.target is not None
    bits, layers = config.target.bits or 0.0, list(dict.fromkeys(c.layer for c in heads))
    if not config.context:
        return Budget(list(heads), bits, {})
    even = {layer: _held(config, windows.get(layer)) for layer in layers}
    asked = sum(c.elements * bits * even[c.layer].packed for c in heads)
    block = _block(config)
    for most in reversed(NEWEST):
        held = {}
        for layer, own in even.items():
            window = windows.get(layer)
            room = most if window is None else min(most, window // 2 - block)  # a packed layer's `smallest_window`
            held[layer] = replace(own, recent=newest_tokens(own.tokens, bits, room))
        components = _packed(heads, held)
        dense = sum(c.elements * EXACT_BITS * (held[c.layer].recent - even[c.layer].recent) for c in heads)
        left = (asked - dense) / sum(c.elements for c in components)
        if left >= least(components):
            break
    return Budget(components, left, {layer: own.recent for layer, own in held.items()})


def _held(config: KVQConfig, window: int | None) -> Held:
    """Of a layer at the scheme's context, with its own dense tokens; first ones slide out of a window."""
    if window is None:
        return Held(config.context, config.sinks, config.recent)
    return Held(min(config.context, window), 0, config.recent)


def _block(config: KVQConfig) -> int:
    """Tokens between two encodings by any of a scheme's codecs, on any device."""
    codecs = auto_codecs(config.family, config.per).values()
    return math.lcm(GPU_BLOCK, *(get_codec(name).group for name in codecs))


def _packed(heads: Sequence[Component], held: Mapping[int, Held]) -> list[Component]:
    """With the elements of all tokens that they pack, and weights that grow alike."""
    packed = [(c, held[c.layer].packed) for c in heads]
    return [replace(c, weight=c.weight * tokens, elements=c.elements * tokens) for c, tokens in packed]
