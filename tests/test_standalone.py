"""Codecs, caches and distortion curves on plain arrays, against attention and errors computed by NumPy in float64."""

import gc
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import standalone
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.errors import AllocationError, AttentionError, CodecError, SchemeError
from mlx_kvq_plugin.standalone import CompressedKV, fit_distortion_curve

D = 64
WINDOW = 140
CHUNKS = (150, 1, 12, 40, 1, 1, 7)  # prefill, single steps, steps of several tokens


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def attention(
    queries: Any, keys: Any, values: Any, scale: float, window: int | None = None, mask: str | None = "causal"
) -> np.ndarray:
    """Softmax attention of the newest tokens in float64."""
    queries, keys, values = (np.array(x, dtype=np.float64) for x in (queries, keys, values))
    L, total = queries.shape[-2], keys.shape[-2]
    keys, values = (np.repeat(x, queries.shape[-3] // x.shape[-3], axis=-3) for x in (keys, values))
    scores = queries @ np.swapaxes(keys, -1, -2) * scale
    position, other = np.arange(total - L, total)[:, None], np.arange(total)
    if mask == "causal":
        seen = other <= position if window is None else (other <= position) & (other > position - window)
        scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


def turned(x: np.ndarray, offset: int) -> tuple[np.ndarray, nn.RoPE]:
    """Keys `(..., L, D)` after RoPE, and the module."""
    rope = nn.RoPE(D, traditional=False, base=10_000)
    return np.array(rope(mx.array(x.astype(np.float32))[None], offset=offset))[0], rope


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
def test_a_lossless_cache_is_float64_attention(window, heads):
    """Scores of deviation 3: a key that is 1% off changes the output by ten times the tolerance."""
    Hq, Hkv = heads
    kv = CompressedKV("identity", window=window)
    keys, values = normal(0, Hkv, sum(CHUNKS), D), normal(1, Hkv, sum(CHUNKS), 32)
    queries = 3 * normal(2, Hq, sum(CHUNKS), D)
    stop = 0
    for L in CHUNKS:
        new = slice(stop, stop := stop + L)
        kv.append(keys[:, new], values[:, new])
        found = kv.attend(queries[:, new])
        expected = attention(queries[:, new], keys[:, :stop], values[:, :stop], D**-0.5, window)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
        if L > 1:
            wrong = attention(queries[:, new], 1.01 * keys[:, :stop], values[:, :stop], D**-0.5, window)
            assert np.max(np.abs(wrong - expected)) > 2e-4
        alone = kv.attend(queries[:, stop - 1 : stop], scale=0.3)
        np.testing.assert_allclose(
            alone,
            attention(queries[:, stop - 1 : stop], keys[:, :stop], values[:, :stop], 0.3, window),
            rtol=0,
            atol=2e-5,
        )
    assert kv.packed_tokens > 100
    assert kv.tokens == (stop if window is None else WINDOW - 1 + CHUNKS[-1])


SCHEMES = ["tq4", "rvq1", "tq2.5", "k=tqprod3,v=tq4", "k=qjl2,v=affine4", "k=kivi4,v=affine2g32", "polar4,frame=off"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("window", [None, WINDOW])
def test_attention_is_that_to_the_decoded_tokens(scheme, window):
    keys, rope = turned(normal(3, 2, 260, D) + 2, 0)
    values = normal(4, 2, 260, D)
    queries = normal(5, 4, 260, D)
    kv = CompressedKV(scheme, rope=rope, window=window)
    kv.append(keys[:, :250], values[:, :250])
    kv.attend(queries[:, :250])
    assert kv.packed_tokens > 90
    for i in range(250, 260):
        kv.append(keys[:, i : i + 1], values[:, i : i + 1])
        decoded = [np.array(x)[0] for x in kv.decode()]
        assert decoded[0].shape == decoded[1].shape == (2, kv.tokens, D)
        assert 0 < np.max(np.abs(decoded[0] - keys[:, i + 1 - kv.tokens : i + 1])) < 4  # lossy, and the right tokens
        found = kv.attend(queries[:, i : i + 1])
        expected = attention(queries[:, i : i + 1], *decoded, D**-0.5, window)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_batches_are_their_sequences():
    keys, values, queries = normal(6, 3, 2, 200, D), normal(7, 3, 2, 200, D), normal(8, 3, 4, 200, D)
    kv = CompressedKV("tq4")
    kv.append(keys[:, :, :150], values[:, :, :150])
    kv.attend(queries[:, :, :150])
    kv.append(keys[:, :, 150:], values[:, :, 150:])
    found = kv.attend(queries[:, :, 150:])
    assert found.shape == (3, 4, 50, D)
    for row in range(3):
        alone = CompressedKV("tq4")
        alone.append(keys[row, :, :150], values[row, :, :150])
        alone.attend(queries[row, :, :150])
        alone.append(keys[row, :, 150:], values[row, :, 150:])
        np.testing.assert_allclose(found[row], alone.attend(queries[row, :, 150:]), rtol=0, atol=1e-5)


def test_masks():
    keys, values, queries = normal(9, 2, 90, D), normal(10, 2, 90, D), normal(11, 4, 30, D)
    kv = CompressedKV("identity")
    kv.append(keys, values)
    exact = attention(queries, keys, values, D**-0.5, mask=None)
    np.testing.assert_allclose(kv.attend(queries, mask=None), exact, rtol=0, atol=1e-5)
    one = queries[:, :1]
    seen = np.arange(90) % 3 == 0
    exact = attention(one, keys[:, seen], values[:, seen], D**-0.5)
    np.testing.assert_allclose(kv.attend(one, mask=seen), exact, rtol=0, atol=1e-5)
    np.testing.assert_allclose(kv.attend(one, mask=mx.array(seen)), exact, rtol=0, atol=1e-5)
    added = np.where(seen, 0.0, -1e9)
    np.testing.assert_allclose(kv.attend(one, mask=added), exact, rtol=0, atol=1e-5)


def test_a_mask_in_a_full_window_is_over_its_tokens_by_age():
    keys, values, one = normal(12, 2, 200, D), normal(13, 2, 200, D), normal(14, 2, 1, D)
    kv = CompressedKV("identity", window=WINDOW)
    kv.append(keys[:, :190], values[:, :190])
    kv.attend(keys[:, :190])
    for i in range(190, 200):
        kv.append(keys[:, i : i + 1], values[:, i : i + 1])
        kv.attend(one)
    seen = np.arange(WINDOW) < 20  # the oldest
    exact = attention(one, keys[:, 200 - WINDOW :][:, seen], values[:, 200 - WINDOW :][:, seen], D**-0.5)
    np.testing.assert_allclose(kv.attend(one, mask=seen), exact, rtol=0, atol=1e-5)


def relative_error(kv: CompressedKV, keys: np.ndarray) -> float:
    decoded = np.array(kv.decode()[0])[0]
    return float(np.sum((decoded - keys) ** 2) / np.sum(keys**2))


def test_the_rope_gives_the_rotary_frame():
    """A mean key that turns with the position costs nothing where the rope is known."""
    keys, rope = turned(normal(15, 2, 600, D) + 6, 0)
    values = normal(16, 2, 600, D)
    errors = {}
    for name, options in {"rope": {"rope": rope}, "none": {}, "off": {"rope": rope}}.items():
        kv = CompressedKV("tq3,frame=off" if name == "off" else "tq3", **options)
        kv.append(keys, values)
        kv.pack()
        errors[name] = relative_error(kv, keys)
    assert errors["rope"] < 0.2 * errors["none"] and errors["none"] < errors["off"]


def test_tokens_are_packed_by_attention_by_pack_and_by_the_next_tokens():
    keys, values = normal(17, 2, 300, D), normal(18, 2, 300, D)
    packed = []
    for how in ("not", "attend", "pack", "append"):
        kv = CompressedKV("tq4,sinks=4,recent=16")
        kv.append(keys[:, :200], values[:, :200])
        if how == "attend":
            kv.attend(keys[:, :200])
        if how == "pack":
            kv.pack()
        if how == "append":
            kv.append(keys[:, 200:201], values[:, 200:201])
        packed.append(kv.packed_tokens)
    assert packed == [0, 180, 180, 180]


def test_other_queries_than_the_tokens_own_change_nothing():
    keys, values = normal(19, 2, 200, D), normal(20, 2, 200, D)
    uneven = 3 * normal(21, 2, 12, D) * np.linspace(0.1, 9, D)  # would teach other scales of the frame
    plain, asked = CompressedKV("tq2"), CompressedKV("tq2")
    for kv in (plain, asked):
        for start, stop in ((0, 40), (40, 52), (52, 200)):
            kv.append(keys[:, start:stop], values[:, start:stop])
            for count in (5, 60) if kv is asked else ():
                kv.attend(np.resize(uneven, (2, count, D)), mask=None)
            kv.attend(keys[:, start:stop])
            for count in (5, 60) if kv is asked else ():
                kv.attend(np.resize(uneven, (2, count, D)), mask=None)
            if kv is asked:
                kv.attend(uneven[:, :1])
    assert plain.packed_tokens == asked.packed_tokens > 0
    assert mx.array_equal(plain.decode()[0], asked.decode()[0])
    taught = CompressedKV("tq2")
    taught.append(keys, values)
    taught.attend(np.resize(uneven, (2, 200, D)))
    assert not mx.array_equal(plain.decode()[0], taught.decode()[0])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_numpy_goes_in_and_out(dtype):
    x = normal(22, 2, 100, D).astype(dtype)
    kv = CompressedKV("tq4")
    kv.append(x, x)
    found = kv.attend(x)
    assert type(found) is np.ndarray and found.dtype == (np.float16 if dtype == np.float16 else np.float32)
    assert type(kv.attend(x.tolist(), mask=None)) is np.ndarray
    kv.append(x[:, :1], x[:, :1])
    assert kv.attend(x[:, :1]).shape == (2, 1, D)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_mlx_goes_in_and_out(dtype):
    x = mx.array(normal(23, 1, 2, 100, D).astype(np.float32)).astype(dtype)
    kv = CompressedKV("tq4")
    kv.append(x, x)
    kv.attend(x)
    kv.append(x[:, :, :1], x[:, :, :1])
    found = kv.attend(x[0, :, :1])
    assert isinstance(found, mx.array) and found.dtype == dtype and found.shape == (2, 1, D)
    assert [part.dtype for part in kv.decode()] == [dtype, dtype]


@pytest.mark.parametrize("scheme", ["tq4", "k=tq4,v=tq2", "k=kivi2,v=affine2g32"])
def test_bytes_are_those_of_mlx(scheme):
    x, row = normal(24, 1, 8, 1024, 128).astype(np.float16), normal(25, 1, 8, 1, 128).astype(np.float16)

    def filled() -> CompressedKV:
        kv = CompressedKV(scheme)
        kv.append(x, x)
        kv.pack()
        for _ in range(40):
            kv.append(row, row)
            kv.attend(row)
        mx.eval(kv.decode())
        return kv

    def active() -> int:
        gc.collect()
        mx.synchronize()
        mx.clear_cache()
        return mx.get_active_memory()

    filled()  # signs that live as long as the process
    limit = mx.set_cache_limit(0)  # a buffer from MLX's pool may be larger than was asked for
    try:
        before = active()
        kv = filled()
        held = active() - before
    finally:
        mx.set_cache_limit(limit)
    assert held == pytest.approx(kv.nbytes, rel=0.01)
    assert kv.tokens == 1064
    assert kv.fp16_nbytes == 8 * 1064 * 256 * 2
    assert 3 < kv.fp16_nbytes / kv.nbytes < 6


def test_an_empty_cache_holds_nothing():
    kv = CompressedKV()
    assert (kv.tokens, kv.packed_tokens, kv.nbytes, kv.fp16_nbytes) == (0, 0, 0, 0)
    for call in (lambda: kv.attend(normal(26, 2, 1, D)), kv.pack, kv.decode):
        with pytest.raises(AttentionError, match="a cache must hold tokens before they are used, got an empty one"):
            call()


@pytest.mark.parametrize("scheme", ["fp16", "tq@2.5", "tq4,edges=2", kvq.KVQConfig(edges=1)])
def test_schemes_of_whole_models_are_refused(scheme):
    with pytest.raises(SchemeError, match="a cache of one layer must have a scheme with codecs of its own, got"):
        CompressedKV(scheme)


def test_what_does_not_fit_is_refused():
    keys, values = normal(27, 2, 100, D), normal(28, 2, 100, D)
    kv = CompressedKV("tq4")

    def refused(error: type[Exception], said: str, keys: Any, values: Any) -> None:
        with pytest.raises(error, match=said):
            kv.append(keys, values)

    refused(CodecError, r"same tokens, one or more, got .* and \(1, 2, 99, 64\)", keys, values[:, :99])
    refused(CodecError, "same tokens, one or more", keys[:, :0], values[:, :0])
    refused(CodecError, "must be floats, got mlx.core.int64", np.ones((2, 3, D), int), np.ones((2, 3, D), int))
    refused(CodecError, r"tokens must be \(L, D\), .* got 1 axes", keys[0, 0], values[0, 0])
    refused(CodecError, "head size", keys[..., :42], values)
    with pytest.raises(SchemeError, match="a window must have at least 136 tokens to be packed, got 100"):
        CompressedKV("tq4", window=100)

    kv.append(keys, values)
    stored = r"those stored, \(\(1, 2, 64\), \(1, 2, 64\)\), got"
    refused(CodecError, stored, keys[:1], values[:1])
    refused(CodecError, stored, keys[..., :32], values)
    refused(CodecError, stored, np.stack([keys] * 2), np.stack([values] * 2))
    assert kv.tokens == 100
    for count in (2, 99, 101):
        with pytest.raises(AttentionError, match=f"100 tokens appended last or of the newest alone, got {count}"):
            kv.attend(normal(29, 2, count, D))
    with pytest.raises(AttentionError, match="a multiple of its heads"):
        kv.attend(normal(30, 3, 1, D))
    with pytest.raises(AttentionError, match="queries must be"):
        kv.attend(normal(31, 2, 1, 32))


def test_a_rope_that_is_no_single_rotation_is_refused():
    class Growing(nn.RoPE):
        def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
            return super().__call__(x, offset=offset * offset)

    kv = CompressedKV("tq4", rope=Growing(D))
    with pytest.raises(CodecError, match="must have been turned by one rotation for all positions, got a rope of"):
        kv.append(normal(32, 2, 80, D), normal(33, 2, 80, D))
    assert kv.tokens == 0


# ---- distortion curves -----------------------------------------------------------------------------------------------


class Fading:
    """A codec whose relative squared error at b bits is 1.5 * 3.7^-b, of head i times i + 1."""

    def __init__(self, name: str):
        self.error = 1.5 * 3.7 ** -int(name.removeprefix("fading"))

    def fit(self, x: mx.array) -> dict[str, mx.array]:
        return {}

    def encode(self, x: mx.array, statistics: object) -> mx.array:
        return x

    def decode(self, x: mx.array, dim: int, dtype: mx.Dtype, statistics: object) -> mx.array:
        heads = mx.arange(1, x.shape[1] + 1).reshape(1, -1, 1, 1)
        return x * (1 - mx.sqrt(self.error * heads))


@pytest.fixture
def fading(monkeypatch):
    monkeypatch.setattr(standalone, "get_codec", lambda name, *choices: Fading(name))
    monkeypatch.setattr(standalone, "whole_bits", lambda family: (2, 3, 4))


def test_the_fit_finds_the_curve_that_the_errors_are_on(fading):
    x = normal(41, 50, D)
    for bits, measured in (((), (2, 3, 4)), ((3, 5, 6, 8), (3, 5, 6, 8))):
        curve = fit_distortion_curve("fading", x, bits=bits)
        assert curve.bits == measured
        assert curve.mse == pytest.approx([1.5 * 3.7**-b for b in measured], rel=1e-4)
        assert (curve.alpha, curve.beta) == (pytest.approx(1.5, rel=1e-3), pytest.approx(3.7, rel=1e-3))
        assert curve.at(2.5) == pytest.approx(1.5 * 3.7**-2.5, rel=2e-3)


def test_errors_are_averaged_over_all_heads(fading):
    def alpha(x: np.ndarray | Sequence[np.ndarray]) -> float:
        return fit_distortion_curve("fading", x).alpha

    assert alpha(normal(42, 3, 50, D)) == pytest.approx(1.5 * 2, rel=1e-3)
    loud = normal(43, 3, 50, D) * np.array([1, 10, 100])[:, None, None]  # each head counts as much as any
    assert alpha(loud) == pytest.approx(1.5 * 2, rel=1e-3)
    assert alpha([normal(44, 1, 50, D), normal(45, 3, 20, D)]) == pytest.approx(1.5 * 7 / 4, rel=1e-3)
    assert alpha(np.stack([loud, loud])) == pytest.approx(1.5 * 2, rel=1e-3)


def test_turboquant_gains_nearly_a_factor_of_four_a_bit():
    x = normal(46, 4, 300, 128)
    curve = fit_distortion_curve("tq", x)
    assert curve.bits == (1, 2, 3, 4, 5, 6)
    assert 3.5 < curve.beta < 4  # RateQuant measures 3.5 to 3.6
    assert 1.3 < curve.alpha < 1.7
    for bits, error in zip(curve.bits, curve.mse, strict=True):
        band = get_codec(f"tq{bits}").expected_mse(128)
        assert band is not None and 0.98 * band[0] < error < 1.02 * band[1]
    assert fit_distortion_curve("tq", mx.array(x.astype(np.float32)), bits=(2, 4)).mse == curve.mse[1:4:2]
    assert fit_distortion_curve("tq", x, bits=(2, 4), seed=3).mse != curve.mse[1:4:2]
    assert fit_distortion_curve("tq", x, bits=(2, 4), rotation="dense").mse != curve.mse[1:4:2]


def test_curves_need_two_rates_of_a_family():
    x = normal(47, 50, D)
    with pytest.raises(AllocationError, match="two or more positive errors"):
        fit_distortion_curve("tq", x, bits=(3,))
    with pytest.raises(CodecError, match="codec tq9 does not exist"):
        fit_distortion_curve("tq", x, bits=(3, 9))
    with pytest.raises(CodecError, match="got 1 axes"):
        fit_distortion_curve("tq", x[0])
