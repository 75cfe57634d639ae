"""Codecs and caches on plain arrays, without any model: for experiments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .allocation import DistortionCurve, whole_bits
from .arrays import from_numpy, to_numpy, with_lead_axes
from .attention import AttendArgs, Mask, attend
from .cache import KVQCache
from .codecs import get_codec
from .config import KVQConfig
from .errors import AttentionError, CodecError, SchemeError
from .rotary import read_rotary
from .rotation import HADAMARD
from .schemes import parse_scheme
from .sliding import SlidingKVQCache


def fit_distortion_curve(
    family: str, x: Any, *, bits: Sequence[int] = (), seed: int = 0, rotation: str = HADAMARD
) -> DistortionCurve:
    """Relative squared error of a codec family on data, by its bits, and the fit `alpha * beta ** -bits`.

    Args:
        family: of codecs, such as `tq`.
        x: tokens `(L, D)`, `(Hkv, L, D)` or `(B, Hkv, L, D)`, MLX or NumPy, or a list of such arrays; the errors are
            averaged over all heads.
        bits: suffixes of the family; all whole ones without any.
        seed, rotation: as for `get_codec`.

    Returns:
        A `DistortionCurve` (arXiv 2605.06675, equation 2; its fit starts at 2 bits).
    """
    rates = tuple(bits) or whole_bits(family)
    arrays = [with_lead_axes(a if isinstance(a, mx.array) else from_numpy(np.asarray(a))) for a in _listed(x)]
    means = []
    for rate in rates:
        codec = get_codec(f"{family}{rate}", seed, rotation)
        errors = []
        for array in arrays:
            tokens = array.astype(mx.float32)
            statistics = codec.fit(tokens)
            decoded = codec.decode(codec.encode(tokens, statistics), tokens.shape[-1], mx.float32, statistics)
            energy = mx.maximum(mx.sum(tokens * tokens, axis=(2, 3)), 1e-30)
            errors.append(mx.mean(mx.sum((tokens - decoded) ** 2, axis=(2, 3)) / energy))
        means.append(float(np.array(mx.mean(mx.stack(errors)))))
    return DistortionCurve.fit(rates, means)


def _listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, list | tuple) else [x]


class CompressedKV:
    """The compressed cache of one attention layer on plain arrays.

    Arrays are `(B, heads, L, D)`, or `(heads, L, D)` for one sequence; MLX or NumPy in, the same out.
    """

    def __init__(self, kv_scheme: str | KVQConfig = "tq4", *, rope: Any = None, window: int | None = None):
        """
        Args:
            kv_scheme: as for `kvq.load`, without average bits.
            rope: the module that turned the keys, called as `rope(x, offset=n)` (`mlx.nn.RoPE`), for the rotary frame;
                without one the frame removes a plain mean.
            window: tokens that a query sees; all without.
        """
        self.config = parse_scheme(kv_scheme)
        if any(self.config.budgets) or not self.config.compresses or self.config.edges:
            raise SchemeError(
                f"a cache of one layer must have a scheme with codecs of its own, got {kv_scheme!r}; name them, "
                'for example "tq4"'
            )
        self._rope, self._window = rope, window
        self._cache: KVQCache | None = None

    def append(self, keys: Any, values: Any) -> None:
        """Add tokens: keys `(B, Hkv, L, Dk)`, after RoPE, and values `(B, Hkv, L, Dv)`."""
        keys, values = (with_lead_axes(_array(x)) for x in (keys, values))
        if keys.shape[:3] != values.shape[:3]:
            raise CodecError(f"keys and values must be of the same tokens, got {keys.shape} and {values.shape}")
        if self._cache is None:
            self._cache = self._empty(keys.shape[-1], values.shape[-1])
        self._cache.update_and_fetch(keys, values)

    def _empty(self, key_dim: int, value_dim: int) -> KVQCache:
        spec = self.config.layer_spec()
        for name, dim in ((spec.key, key_dim), (spec.value, value_dim)):
            get_codec(name, spec.seed, spec.rotation).planes(dim, "float16")  # CodecError for a head size it cannot do
        rotary = read_rotary(self._rope, key_dim)[0]
        return KVQCache(spec, rotary) if self._window is None else SlidingKVQCache(spec, self._window, rotary)

    def attend(self, queries: Any, *, scale: float | None = None, mask: Mask = "causal") -> Any:
        """Attention of the newest tokens to everything stored.

        Args:
            queries: `(B, Hq, L, Dk)`, Hq a multiple of Hkv, of the L tokens appended last.
            scale: of the scores; `Dk ** -0.5` without.
            mask: `"causal"`, `None` for no mask, or an array as `AttendArgs` describes.

        Returns:
            `(B, Hq, L, Dv)`.
        """
        if self._cache is None:
            raise AttentionError("a cache must hold tokens before it is attended to, got an empty one; append some")
        q = with_lead_axes(_array(queries))
        args = AttendArgs(
            queries=q,
            cache=self._cache,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            mask=mask,
            sinks=None,
            key_dtype=q.dtype,
            value_dtype=q.dtype,
        )
        output = attend(args)
        output = output.reshape(*output.shape[4 - len(queries.shape) :])
        return output if isinstance(queries, mx.array) else to_numpy(output)

    @property
    def tokens(self) -> int:
        """Tokens stored."""
        return 0 if self._cache is None else self._cache.held

    @property
    def packed_tokens(self) -> int:
        """Tokens stored as codes."""
        return 0 if self._cache is None else self._cache.packed_tokens

    @property
    def nbytes(self) -> int:
        """Bytes allocated: dense tokens, planes with their slack, statistics."""
        return 0 if self._cache is None else self._cache.nbytes

    @property
    def fp16_nbytes(self) -> int:
        """Bytes of the same tokens dense in 16 bits."""
        return 0 if self._cache is None else self._cache.dense_nbytes()


def _array(x: Any) -> mx.array:
    return x if isinstance(x, mx.array) else from_numpy(np.asarray(x))
