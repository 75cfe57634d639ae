"""How much errors in the cached keys and values of each KV head change what a model says.

Two kinds, per (layer, KV head, K or V). `gradient`: the expected squared change of the loss by an error as large as the
token, `E |g_n|^2 |x_n|^2 / D`, with g the gradient of the loss with respect to the cached tokens as the codec sees them
(keys in the rotary frame, so divided by the pair scales) and x those tokens. `activation`: `E |x|^2` of the tokens as
they are cached, what needs no gradient.

After RateQuant (arXiv 2605.06675, section 4), with two differences. The next tokens in the loss are drawn from the
model's own distribution, not read from the text, so that the squared gradient estimates the Fisher information, which
is the curvature of the KL divergence. And a token counts only where it is read as codes: its error reaches the queries
that come after it has left the dense tokens, and first tokens that stay dense have none. Most attention is to the
nearest tokens, so counting those too would allocate bits by what never gets an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .allocation import KEY, VALUE
from .attention import AttendArgs
from .cache import KVQCache
from .errors import CalibrationError
from .frame import SKIP_TOKENS, fit_frame, query_energy
from .growth import BLOCK
from .loading import LayerPlan
from .packed_attention import masked_scores, softmax_weights
from .value_scale import fit_value_scale

Array = npt.NDArray[np.float64]

SAMPLE_TOKENS = 48  # of every layer and head in one sequence, for distortions


@dataclass(frozen=True)
class Sensitivity:
    """One side of one layer on one sequence.

    Attributes:
        gradient, activation: one number a KV head.
        sample: some tokens `(1, Hkv, S, D)` as the codec sees them.
    """

    gradient: Array
    activation: Array
    sample: mx.array


def compressed_member(entry: Any, plan: LayerPlan) -> KVQCache:
    """The compressed cache of a cache entry, alone or a member of a list."""
    cache: KVQCache = entry if plan.geometry.member is None else entry.caches[plan.geometry.member]
    return cache


def far_tokens(cache: KVQCache, L: int) -> mx.array:
    """Which of L tokens `(L, L)` each of L queries reads as codes while decoding, window and causality left aside.

    Codes are `recent` tokens and half a block behind the query, and not among the first `sinks`.
    """
    position = mx.arange(L)
    return (position[:, None] - position >= cache.spec.recent + BLOCK // 2) & (position >= cache.spec.sinks)


def shifted_attention(args: AttendArgs, key_shift: mx.array, value_shift: mx.array) -> mx.array:
    """Attention of a whole prompt to its dense tokens, shifted wherever a query would read them as codes.

    Args:
        args: of the L tokens that a fresh cache holds, all still dense.
        key_shift, value_shift: `(B, Hkv, L, D)`, what is added to the tokens for the queries of `far_tokens`.

    Returns:
        `(B, Hq, L, Dv)` float32; allocates the scores `(B, Hq, L, L)`.
    """
    cache = args.cache
    keys, values = (x.astype(mx.float32) for x in cache.dense_tokens())
    B, Hq, L, Dk = args.queries.shape
    Hkv = keys.shape[1]
    far = mx.tile(far_tokens(cache, L).astype(mx.float32), (Hq // Hkv, 1))
    queries = (args.queries.astype(mx.float32) * args.scale).reshape(B, Hkv, -1, Dk)
    scores = queries @ keys.swapaxes(-1, -2) + (queries @ key_shift.swapaxes(-1, -2)) * far
    if args.softcap is not None:
        scores = mx.tanh(scores / args.softcap) * args.softcap
    weights = softmax_weights(masked_scores(scores, args.mask, cache, Hq, L), args.sinks, Hkv, L)
    output = weights @ values + (weights * far) @ value_shift
    return output.reshape(B, Hq, L, -1)


def measure_sensitivities(
    model: Any, caches: list[Any], plans: Sequence[LayerPlan], tokens: mx.array, seed: int
) -> dict[tuple[str, int], Sensitivity]:
    """Sensitivities by (side, layer) from one sequence.

    Args:
        model: compressed by a lossy scheme.
        caches: fresh ones; they are used up.
        plans: of the entries to measure.
        tokens: `(1, L)`, fed as one prefill chunk, from which the key frames are fitted too.
        seed: of the next tokens drawn.

    Raises:
        CalibrationError: for a model through which gradients do not pass.
    """
    members = [compressed_member(caches[plan.index], plan) for plan in plans]

    def probe(shift: Sequence[mx.array], seen: list[mx.array]) -> Callable[[AttendArgs], mx.array]:
        def attend(args: AttendArgs) -> mx.array:
            keys, values = args.cache.dense_tokens()
            energy = query_energy(args.queries, keys.shape[1])
            seen[:] = [keys, values, energy + seen[2] if seen else energy]  # layers may share keys and values
            return shifted_attention(args, shift[0], shift[1]).astype(args.queries.dtype)

        return attend

    def loss(shifts: list[list[mx.array]]) -> tuple[mx.array, list[list[mx.array]]]:
        tensors: list[list[mx.array]] = [[] for _ in members]
        for member, shift, seen in zip(members, shifts, tensors, strict=True):
            member.probe = probe(shift, seen)
        logits = model(tokens, cache=caches).astype(mx.float32)
        drawn = mx.random.categorical(mx.stop_gradient(logits), key=mx.random.key(seed))
        picked = mx.take_along_axis(logits, drawn[..., None], axis=-1)[..., 0]
        return mx.sum(mx.logsumexp(logits, axis=-1) - picked), tensors

    def zeros(plan: LayerPlan, dim: int) -> mx.array:
        return mx.zeros((1, plan.geometry.kv_heads, tokens.shape[1], dim))

    shifts = [[zeros(plan, plan.geometry.key_dim), zeros(plan, plan.geometry.value_dim)] for plan in plans]
    try:
        with _differentiable(model):
            (_, tensors), gradients = mx.value_and_grad(loss)(shifts)
            mx.eval(tensors, gradients)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise CalibrationError(
            f"gradients must pass through the model for a calibration, got {type(error).__name__}: {error}; "
            "choose a scheme without average bits"
        ) from error
    found: dict[tuple[str, int], Sensitivity] = {}
    for plan, member, (keys, values, energy), (key_gradient, value_gradient) in zip(
        plans, members, tensors, gradients, strict=True
    ):
        keys, values = keys.astype(mx.float32), values.astype(mx.float32)
        frame = fit_frame(member.rotary, keys[:, :, SKIP_TOKENS:], SKIP_TOKENS, energy)
        x, key_gradient = frame.encode(keys, 0), frame.scale_queries(key_gradient)
        dense = member.spec.sinks
        found[KEY, plan.index] = _sensitivity(x, key_gradient, keys, dense)
        scale = fit_value_scale(values[:, :, SKIP_TOKENS:])
        found[VALUE, plan.index] = _sensitivity(values / scale, value_gradient * scale, values, dense)
    return found


@contextmanager
def _differentiable(model: Any) -> Iterator[None]:
    """Training mode, but for dropout: layers whose kernels have no gradient then use plain operations."""
    evaluated = [module for module in model.modules() if not module.training]
    for module in evaluated:
        module._training = not isinstance(module, nn.Dropout)
    try:
        yield
    finally:
        for module in evaluated:
            module._training = False


def _sensitivity(x: mx.array, gradient: mx.array, cached: mx.array, dense: int) -> Sensitivity:
    """Both kinds; `dense` first tokens have no errors. Windows have none of these: their outliers count, as codes."""
    energy = mx.sum(mx.square(gradient), axis=-1) * mx.sum(mx.square(x), axis=-1)
    by_gradient = mx.mean(energy[..., dense:], axis=(0, 2)) / x.shape[-1]
    by_activation = mx.mean(mx.sum(mx.square(cached[:, :, SKIP_TOKENS:]), axis=-1), axis=(0, 2))
    sample = x[:, :, -SAMPLE_TOKENS:]
    mx.eval(by_gradient, by_activation, sample)
    return Sensitivity(np.array(by_gradient, np.float64), np.array(by_activation, np.float64), sample)
