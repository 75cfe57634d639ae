"""Codecs and caches on plain arrays, without any model: for experiments."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask

from .allocation import DistortionCurve, whole_bits
from .arrays import from_numpy, plain_tokens, to_numpy
from .attention import AttendArgs, Mask, attend
from .cache import KVQCache
from .codecs import LEAST_SQUARES, get_codec
from .config import KVQConfig
from .errors import AttentionError, CodecError, SchemeError
from .rotary import read_rotary
from .rotation import HADAMARD
from .schemes import parse_scheme
from .sliding import SlidingKVQCache, smallest_window


def fit_distortion_curve(
    family: str,
    x: Any,
    *,
    bits: Sequence[int] = (),
    seed: int = 0,
    rotation: str = HADAMARD,
    scaling: str = LEAST_SQUARES,
) -> DistortionCurve:
    """Relative squared error of a codec family on data, by its bits, and the fit `alpha * beta ** -bits`.

    Args:
        family: of codecs, such as `tq`.
        x: tokens `(L, D)`, `(Hkv, L, D)` or `(B, Hkv, L, D)`, MLX or NumPy, or a list of such arrays; the errors are
            averaged over all heads.
        bits: suffixes of the family; all whole ones without any.
        seed, rotation, scaling: as for `get_codec`.

    Returns:
        A `DistortionCurve` (arXiv 2605.06675, equation 2; its fit starts at 2 bits).
    """
    rates = tuple(bits) or whole_bits(family)
    arrays = [plain_tokens(array).astype(mx.float32) for array in _listed(x)]
    means = []
    for rate in rates:
        codec = get_codec(f"{family}{rate}", seed, rotation, scaling)
        errors = []
        for tokens in arrays:
            statistics = codec.fit(tokens)
            decoded = codec.decode(codec.encode(tokens, statistics), tokens.shape[-1], mx.float32, statistics)
            energy = mx.maximum(mx.sum(tokens * tokens, axis=(2, 3)), 1e-30)
            errors.append((mx.sum((tokens - decoded) ** 2, axis=(2, 3)) / energy).reshape(-1))
        means.append(float(np.array(mx.mean(mx.concatenate(errors)))))
    return DistortionCurve.fit(rates, means)


def _listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, list | tuple) else [x]


class CompressedKV:
    """The compressed cache of one attention layer on plain arrays.

    Arrays are `(B, heads, L, D)`, or `(heads, L, D)` for one sequence; MLX or NumPy in, the same out. New tokens are
    dense until `attend` has been called for them, or `pack`, or until more are appended; then those are packed that the
    scheme does not keep dense (its `sinks` and `recent`). What the layer's queries look like is learnt from `attend`.
    """

    def __init__(self, kv_scheme: str | KVQConfig = "tq4", *, rope: Any = None, window: int | None = None):
        """
        Args:
            kv_scheme: as for `kvq.load`, without average bits.
            rope: the module that turned the keys, called as `rope(x, offset=n)` (`mlx.nn.RoPE`), for the rotary frame;
                without one the frame removes a plain mean.
            window: tokens that a query sees, itself included; all without.

        Raises:
            SchemeError: for schemes and windows that leave nothing to pack.
        """
        self.config = parse_scheme(kv_scheme)
        if self.config.allocated or not self.config.compresses or self.config.edges:
            raise SchemeError(
                f"a cache of one layer must have a scheme with codecs of its own, got {kv_scheme!r}; name them, "
                'for example "tq4"'
            )
        smallest = smallest_window(self.config.layer_spec())
        if window is not None and window < smallest:
            raise SchemeError(f"a window must have at least {smallest} tokens to be packed, got {window}; widen it")
        self._rope, self._window = rope, window
        self._cache: KVQCache | None = None
        self._newest = 0  # tokens of the last append

    def append(self, keys: Any, values: Any) -> None:
        """Add tokens: keys `(B, Hkv, L, Dk)`, after RoPE, and values `(B, Hkv, L, Dv)`; float64 becomes float32.

        Raises:
            CodecError: for shapes that do not go together, or not with the tokens stored, numbers that are not floats,
                head sizes that the codecs cannot do, and ropes that are not one rotation for all positions.
        """
        keys, values = plain_tokens(keys), plain_tokens(values)
        if keys.shape[:3] != values.shape[:3] or keys.shape[2] == 0:
            raise CodecError(
                f"keys and values must be of the same tokens, one or more, got {keys.shape} and {values.shape}"
            )
        if not all(mx.issubdtype(x.dtype, mx.floating) for x in (keys, values)):
            raise CodecError(f"keys and values must be floats, got {keys.dtype} and {values.dtype}; convert them")
        if self._cache is None:
            self._cache = self._empty(keys.shape[-1], values.shape[-1])
        elif self._shapes(keys, values) != self._shapes(*self._cache.dense_tokens()):
            stored = self._shapes(*self._cache.dense_tokens())
            raise CodecError(
                f"new tokens must have the (B, Hkv, Dk) and (B, Hkv, Dv) of those stored, {stored}, got "
                f"{self._shapes(keys, values)}; use another cache"
            )
        self._cache.update_and_fetch(keys, values)
        self._newest = keys.shape[2]

    @staticmethod
    def _shapes(keys: mx.array, values: mx.array) -> tuple[tuple[int, ...], ...]:
        return tuple((*x.shape[:2], x.shape[3]) for x in (keys, values))

    def _empty(self, key_dim: int, value_dim: int) -> KVQCache:
        spec = self.config.layer_spec()
        for codec, dim in ((spec.key_codec, key_dim), (spec.value_codec, value_dim)):
            codec.planes(dim, "float16")  # CodecError for a head size it cannot do
        rotary, reason = read_rotary(self._rope, key_dim)
        if rotary is None:
            raise CodecError(
                f"keys must have been turned by one rotation for all positions, got a rope of which {reason}; leave "
                "rope out for a plain mean"
            )
        return KVQCache(spec, rotary) if self._window is None else SlidingKVQCache(spec, self._window, rotary)

    def attend(self, queries: Any, *, scale: float | None = None, mask: Any = "causal") -> Any:
        """Attention to everything stored.

        Args:
            queries: `(B, Hq, L, Dk)`, Hq a multiple of Hkv: of the L tokens appended last, or of the newest one alone;
                without a mask as many as you like.
            scale: of the scores; `Dk ** -0.5` without.
            mask: `"causal"`, which keeps to the window too, `None` for no mask, or an array over the tokens held, as
                `AttendArgs` describes.

        Returns:
            `(B, Hq, L, Dv)` in the dtype of the queries.

        Raises:
            AttentionError: for an empty cache, and for queries that do not fit.
        """
        cache = self._filled()
        q = plain_tokens(queries)
        L = q.shape[2]
        if mask is not None and L not in (1, self._newest):
            raise AttentionError(
                f"queries under a mask must be of the {self._newest} tokens appended last or of the newest alone, "
                f"got {L}; pass mask=None for others"
            )
        if self._newest != L:  # not the tokens' own queries: nothing is learnt from them, nothing packed
            cache = copy.copy(cache)
            cache.shared, cache.observe_queries = True, _ignore  # type: ignore[method-assign]
        args = AttendArgs(
            queries=q,
            cache=cache,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            mask=self._mask(mask, L),
            sinks=None,
            key_dtype=q.dtype,
            value_dtype=q.dtype,
        )
        output = attend(args)
        output = output.reshape(*output.shape[4 - np.ndim(queries) :])
        return output if isinstance(queries, mx.array) else to_numpy(output)

    def _mask(self, mask: Any, L: int) -> Mask:
        if isinstance(mask, str) and mask == "causal" and self._window is not None and self.tokens > self._window:
            windowed: mx.array = create_causal_mask(L, self.tokens - L, window_size=self._window)
            return windowed
        if mask is None or isinstance(mask, str):
            return mask
        return self._filled().mask_in_own_order(mask if isinstance(mask, mx.array) else from_numpy(np.asarray(mask)))

    def pack(self) -> None:
        """Pack the newest tokens without attention to them; they can still be attended to."""
        self._filled().compact()

    def decode(self) -> tuple[mx.array, mx.array]:
        """Keys `(B, Hkv, tokens, Dk)` and values `(B, Hkv, tokens, Dv)` as attention sees them; allocates them all."""
        return self._filled().decode_all()

    def _filled(self) -> KVQCache:
        if self._cache is None:
            raise AttentionError("a cache must hold tokens before they are used, got an empty one; append some")
        return self._cache

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


def _ignore(queries: mx.array) -> None:
    """Of queries that statistics must not see."""
