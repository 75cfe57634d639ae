"""Sensitivities against a model written out in NumPy; shifted attention against MLX's and against packed caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest
import tiny_models

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.allocation import KEY, SIDES, VALUE
from mlx_kvq_plugin.attention import AttendArgs, attend
from mlx_kvq_plugin.cache import KVQCache, flat_caches
from mlx_kvq_plugin.config import LayerSpec
from mlx_kvq_plugin.errors import CalibrationError
from mlx_kvq_plugin.rotary import read_rotary
from mlx_kvq_plugin.sensitivity import Sensitivity, measure_sensitivities, shifted_attention
from mlx_kvq_plugin.sliding import SlidingKVQCache

Array = npt.NDArray[np.float64]

SINKS, FAR = 4, 16 + 4  # of the default scheme: recent tokens and half a block


def tokens_of(length: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(1, tiny_models.VOCAB, (1, length)))


def sensitivities(model: Any, tokens: mx.array, seed: int = 0) -> dict[tuple[str, int], Sensitivity]:
    with kvq.compress(model, "tq4") as compression:
        plans = [plan for plan in compression.maker.plan() if plan.spec is not None]
        return measure_sensitivities(model, compression.maker(), plans, tokens, seed)


# ---- a llama of one layer in float64 ---------------------------------------------------------------------------------

SMALL = {"num_hidden_layers": 1, "head_dim": 16, "hidden_size": 32, "num_attention_heads": 4}
LENGTH = 32


def normed(x: Array, weight: Array) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight


def turned(x: Array, positions: Array) -> Array:
    """RoPE of `(heads, L, D)`: channel j with j + D / 2."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], axis=-1)


class Llama:
    """The loss of a llama of one layer on drawn tokens, as a function of shifts of what is far."""

    def __init__(self, model: Any, tokens: mx.array, drawn: mx.array):
        def weight(module: Any) -> Array:
            return np.array(module.weight, np.float64)

        layer, self.drawn = model.model.layers[0], np.array(drawn)[0]
        attention, self.length = layer.self_attn, tokens.shape[1]
        self.positions = np.arange(self.length, dtype=np.float64)
        self.x = weight(model.model.embed_tokens)[np.array(tokens)[0]]
        h = normed(self.x, weight(layer.input_layernorm))

        def heads(projection: Any) -> Array:
            return (h @ weight(projection).T).reshape(self.length, -1, SMALL["head_dim"]).swapaxes(0, 1)

        self.q, self.k, self.v = (heads(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        self.after = weight(attention.o_proj), weight(layer.post_attention_layernorm)
        self.mlp = [weight(p) for p in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)]
        self.head = weight(model.model.norm), weight(model.lm_head)
        self.scores = self.attended(self.k)
        distance = self.positions[:, None] - self.positions
        self.mask = np.where(distance >= 0, 0.0, -np.inf)
        self.far = ((distance >= FAR) & (self.positions >= SINKS)).astype(float)

    def attended(self, keys: Array, turn: bool = True) -> Array:
        """Scores `(Hq, L, L)` of keys `(Hkv, L, D)`."""
        q = turned(self.q, self.positions) / SMALL["head_dim"] ** 0.5
        keys = turned(keys, self.positions) if turn else keys
        return np.stack([q[i] @ keys[i // 2].T for i in range(4)])

    def loss(self, shift: Array, side: str) -> float:
        scores, extra = self.scores, 0.0
        if side == KEY:
            scores = scores + self.attended(shift, turn=False) * self.far
        weights = np.exp(scores + self.mask - np.max(scores + self.mask, axis=-1, keepdims=True))
        weights /= np.sum(weights, axis=-1, keepdims=True)
        if side == VALUE:
            extra = np.stack([(weights[i] * self.far) @ shift[i // 2] for i in range(4)])
        output = np.stack([weights[i] @ self.v[i // 2] for i in range(4)]) + extra
        x = self.x + output.swapaxes(0, 1).reshape(self.length, -1) @ self.after[0].T
        h = normed(x, self.after[1])
        gate = h @ self.mlp[0].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ self.mlp[1].T)) @ self.mlp[2].T
        logits = normed(x, self.head[0]) @ self.head[1].T
        most = np.max(logits, axis=-1, keepdims=True)
        total = np.log(np.sum(np.exp(logits - most), axis=-1)) + most[:, 0]
        return float(np.sum(total - np.take_along_axis(logits, self.drawn[:, None], axis=-1)[:, 0]))

    def gradient(self, side: str, step: float = 1e-4) -> Array:
        """By central differences, `(Hkv, L, D)`."""
        found = np.zeros_like(self.k)
        for index in np.ndindex(found.shape):
            shift = np.zeros_like(found)
            shift[index] = step
            found[index] = (self.loss(shift, side) - self.loss(-shift, side)) / (2 * step)
        return found

    def frame(self) -> tuple[Array, Array]:
        """Keys in the rotary frame, not turned, and the channel scales: both as rotary-pair energies need them."""
        half = SMALL["head_dim"] // 2

        def pairs(energy: Array) -> Array:
            energy = 0.5 * (energy[..., :half] + energy[..., half:])
            return energy + 0.003 * np.mean(energy, axis=-1, keepdims=True)

        centred = self.k - np.mean(self.k[:, SINKS:], axis=1, keepdims=True)
        v = pairs(np.mean(centred[:, SINKS:] ** 2, axis=1))
        w = pairs(np.sum(self.q.reshape(2, 2, self.length, -1) ** 2, axis=(1, 2)))
        scale = (w / v) ** 0.25
        scale = np.tile(scale / np.exp(np.mean(np.log(scale), axis=-1, keepdims=True)), 2)
        return centred * scale[:, None], scale[:, None]


def test_gradient_sensitivities_are_finite_differences_in_the_rotary_frame() -> None:
    model, tokens, seed = tiny_models.llama(**SMALL), tokens_of(LENGTH), 5
    drawn = mx.random.categorical(model(tokens), key=mx.random.key(seed))
    found, plain = sensitivities(model, tokens, seed), Llama(model, tokens, drawn)
    x, scale = plain.frame()
    for side, tensor, gradient in (
        (KEY, x, plain.gradient(KEY) / scale),
        (VALUE, plain.v, plain.gradient(VALUE)),
    ):
        products = np.sum(gradient**2, axis=-1) * np.sum(tensor**2, axis=-1) / SMALL["head_dim"]
        assert np.all(products[:, :SINKS] == 0) and np.all(products[:, LENGTH - FAR :] == 0)
        assert found[side, 0].gradient == pytest.approx(np.mean(products[:, SINKS:], axis=1), rel=2e-3)
    for side, tensor in ((KEY, plain.k), (VALUE, plain.v)):
        energy = np.sum(tensor[:, SINKS:] ** 2, axis=-1)
        assert found[side, 0].activation == pytest.approx(np.mean(energy, axis=1), rel=1e-5)
    for side, tensor in ((KEY, turned(x, plain.positions)), (VALUE, plain.v)):
        assert np.allclose(np.array(found[side, 0].sample)[0], tensor, atol=1e-4)


# ---- which tokens count ----------------------------------------------------------------------------------------------


def test_tokens_that_are_never_read_as_codes_have_no_weight() -> None:
    model = tiny_models.llama(num_hidden_layers=2)
    for length, weighted in ((SINKS + FAR, False), (SINKS + FAR + 1, True)):
        found = sensitivities(model, tokens_of(length))
        for side in SIDES:
            assert np.all((found[side, 0].gradient > 0) == weighted) and np.all(found[side, 0].activation > 0)


def test_windows_keep_no_first_tokens_dense_so_these_count() -> None:
    model = tiny_models.llama_sliding()  # the second layer is a full one
    found = sensitivities(model, tokens_of(FAR + 1))
    for side in SIDES:
        assert [bool(np.all(found[side, layer].gradient > 0)) for layer in range(3)] == [True, False, True]


def test_the_seed_draws_the_tokens() -> None:
    model, tokens = tiny_models.llama(num_hidden_layers=1), tokens_of(64)
    first, again, other = (sensitivities(model, tokens, seed)[VALUE, 0] for seed in (0, 0, 1))
    assert np.array_equal(first.gradient, again.gradient) and np.array_equal(first.activation, other.activation)
    assert not np.allclose(first.gradient, other.gradient, rtol=0.01)


# ---- on every kind of attention --------------------------------------------------------------------------------------

MODELS: dict[str, Callable[[], Any]] = {
    "llama sliding": tiny_models.llama_sliding,
    "gemma2": tiny_models.gemma2,
    "gpt_oss": tiny_models.gpt_oss,
    "gemma3n": tiny_models.gemma3n,
    "gemma4_text": tiny_models.gemma4_text,
    "falcon_h1": tiny_models.falcon_h1,
    "qwen3_5": tiny_models.qwen3_5,
    "mistral": tiny_models.mistral,
}
LONG = tiny_models.WINDOW + 40


def logits_of(model: Any, tokens: mx.array, prompt: int) -> mx.array:
    """Of a prompt and single tokens through fresh caches."""
    caches = kvq.make_prompt_cache(model)
    pieces = [tokens[:, :prompt], *(tokens[:, i : i + 1] for i in range(prompt, tokens.shape[1]))]
    found = mx.concatenate([model(piece, cache=caches) for piece in pieces], axis=1)
    mx.eval(found)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_measuring_leaves_the_model_and_later_caches_as_they_were(name: str) -> None:
    model, tokens = MODELS[name](), tokens_of(LONG)
    stock = logits_of(model, tokens, LONG - 4)
    with kvq.compress(model, "tq4") as compression:
        packed = logits_of(model, tokens, LONG - 4)
        plans = [plan for plan in compression.maker.plan() if plan.spec is not None]
        found = measure_sensitivities(model, compression.maker(), plans, tokens, 0)
        assert mx.array_equal(logits_of(model, tokens, LONG - 4), packed)
        assert all(cache.probe is None for cache in flat_caches(compression.maker()) if isinstance(cache, KVQCache))
    assert mx.array_equal(logits_of(model, tokens, LONG - 4), stock)
    assert not any(module.training for module in model.modules())
    assert set(found) == {(side, plan.index) for side in SIDES for plan in plans}
    for plan in plans:
        for side, dim in ((KEY, plan.geometry.key_dim), (VALUE, plan.geometry.value_dim)):
            one = found[side, plan.index]
            assert one.gradient.shape == one.activation.shape == (plan.geometry.kv_heads,)
            assert np.all(np.isfinite(one.gradient)) and np.all(one.gradient > 0) and np.all(one.activation > 0)
            assert one.sample.shape == (1, plan.geometry.kv_heads, 48, dim)


@contextmanager
def probed(caches: list[Any], probe: Callable[[AttendArgs], mx.array]) -> Iterator[list[Any]]:
    for cache in flat_caches(caches):
        if isinstance(cache, KVQCache):
            cache.probe = probe
    yield caches


@pytest.mark.parametrize("name", MODELS)
def test_without_shifts_it_is_the_models_own_attention(name: str) -> None:
    model, tokens = MODELS[name](), tokens_of(LONG)
    stock = model(tokens, cache=kvq.make_prompt_cache(model))
    calls = []

    def plain(args: AttendArgs) -> mx.array:
        calls.append(args)
        zeros = [mx.zeros(x.shape) for x in args.cache.dense_tokens()]
        return shifted_attention(args, *zeros).astype(args.queries.dtype)

    with kvq.compress(model, "tq4") as compression, probed(compression.maker(), plain) as caches:
        found = model(tokens, cache=caches)
    assert calls
    scale = mx.max(mx.abs(stock)).item()
    assert mx.max(mx.abs(found - stock)).item() < 2e-4 * scale
    shifted = [
        lambda args, side=side: shifted_attention(
            args, *(mx.full(x.shape, 0.01 * (i == side)) for i, x in enumerate(args.cache.dense_tokens()))
        )
        for side in (0, 1)
    ]
    for probe in shifted:  # a shift of a hundredth is seen
        with kvq.compress(model, "tq4") as compression, probed(compression.maker(), probe) as caches:
            assert mx.max(mx.abs(model(tokens, cache=caches) - stock)).item() > 4e-4 * scale


@pytest.mark.parametrize("name", ["gemma3n", "gemma4_text", "llama sliding"])
def test_keys_are_seen_in_the_frames_of_real_caches(name: str) -> None:
    """Those of layers whose tokens later layers read are fitted to all their queries."""
    model, tokens, keys = MODELS[name](), tokens_of(LONG), dict[int, mx.array]()

    def plain(args: AttendArgs) -> mx.array:
        keys[id(args.cache)] = args.cache.dense_tokens()[0]
        return shifted_attention(args, *(mx.zeros(x.shape) for x in args.cache.dense_tokens()))

    found = sensitivities(model, tokens)
    with kvq.compress(model, "tq4") as compression:
        caches, dense = compression.maker(), compression.maker()
        mx.eval(model(tokens, cache=caches), [cache.state for cache in caches])
        with probed(dense, plain):
            mx.eval(model(tokens, cache=dense))
    for layer, (cache, seen) in enumerate(zip(caches, dense, strict=True)):
        x = cache.frame.encode(keys[id(seen)], 0)[:, :, -48:]
        assert mx.max(mx.abs(x - found[KEY, layer].sample)).item() < 1e-3 * mx.max(mx.abs(x)).item()


# ---- real codes ------------------------------------------------------------------------------------------------------

HKV, HQ, D = 2, 6, 64
PROMPT = 120
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": mx.array([0.5, 1.0, 2.0, 0.0, -1.0, 3.0])},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("window", [None, 400])
def test_shifts_by_codec_errors_give_what_a_packed_cache_computes(window: int | None, call: str) -> None:
    """After a prompt and 3 steps the newest code is as far as `shifted_attention` takes it to be on average."""
    total = PROMPT + 4
    rng = np.random.default_rng(3)
    q, k, v = (mx.array(rng.standard_normal((1, h, total, D)).astype(np.float32)) for h in (HQ, HKV, HKV))
    rotary, _ = read_rotary(nn.RoPE(D), D)

    def cache_of() -> KVQCache:
        spec = LayerSpec("tq2", "tq2")
        return KVQCache(spec, rotary) if window is None else SlidingKVQCache(spec, window, rotary)

    def args_of(cache: KVQCache, queries: mx.array) -> AttendArgs:
        arguments = {"sinks": None, **CALLS[call]}
        return AttendArgs(queries, cache, D**-0.5, "causal", key_dtype=q.dtype, value_dtype=q.dtype, **arguments)

    packed = cache_of()
    packed.update_and_fetch(k[:, :, :PROMPT], v[:, :, :PROMPT])
    attend(args_of(packed, q[:, :, :PROMPT]))
    for i in range(PROMPT, total):
        packed.update_and_fetch(k[:, :, i : i + 1], v[:, :, i : i + 1])
        expected = attend(args_of(packed, q[:, :, i : i + 1]))
    sinks = 0 if window else SINKS
    assert packed.packed_tokens == total - FAR - sinks
    dense = cache_of()
    dense.update_and_fetch(k, v)
    shifts = [decoded - exact for decoded, exact in zip(packed.decode_all(), (k, v), strict=True)]
    assert all(mx.max(mx.abs(shift)).item() > 0.3 for shift in shifts)
    far = (mx.arange(total) >= sinks) & (mx.arange(total) < total - FAR)
    shifts = [mx.where(far[:, None], shift, 9.0) for shift in shifts]  # nobody reads codes of the others
    found = shifted_attention(args_of(dense, q), *shifts)[:, :, -1:]
    assert mx.max(mx.abs(found - expected)).item() < 2e-5
    exact = shifted_attention(args_of(dense, q), *(mx.zeros_like(shift) for shift in shifts))[:, :, -1:]
    assert mx.max(mx.abs(exact - expected)).item() > 0.02


# ---- gradients that do not pass --------------------------------------------------------------------------------------


class Stubborn(nn.Module):
    """Has no gradient, as some kernels have none."""

    def __init__(self, seen: list[bool]):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self._seen = seen

    def __call__(self, x: mx.array) -> mx.array:
        self._seen += [self.training, self.dropout.training]
        return x + mx.linalg.svd(x, compute_uv=False, stream=mx.cpu)[..., None]  # type: ignore[index]


def test_a_model_without_gradients_is_refused_and_left_as_it_was() -> None:
    model, seen = tiny_models.llama(num_hidden_layers=1), list[bool]()
    model.model.layers[0].mlp = Stubborn(seen)
    model.eval()
    with pytest.raises(CalibrationError, match=r"gradients must pass through the model .* got [VR]"):
        sensitivities(model, tokens_of(40))
    assert seen == [True, False]  # plain operations in place of kernels, but no dropout
    assert not any(module.training for module in model.modules())
