"""The key frame: exact by algebra, blind to the mean at every position, and with the scales that serve scores best."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from frame_cases import DIM, float32, normal, pair_channels, turned
from frame_cases import ROTARIES as TURNING

from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.config import LayerSpec
from mlx_kvq_plugin.frame import KeyFrame, fit_frame, frame_size, query_energy
from mlx_kvq_plugin.rotary import Rotary, no_rotation, turn

ROTARIES = {**TURNING, "none": no_rotation()}
every_rotary = pytest.mark.parametrize("name", ROTARIES)


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def float64(x: mx.array) -> np.ndarray:
    return np.array(x).astype(np.float64)


def tied(rotary: Rotary, sizes: np.ndarray) -> np.ndarray:
    """One size per pair and per unturned channel, `(D - P,)`, spread to `(D,)`."""
    first, second = pair_channels(rotary)
    spread = np.empty(DIM)
    spread[first] = spread[second] = sizes[: rotary.pairs]
    spread[2 * rotary.pairs :] = sizes[rotary.pairs :]
    return spread


def sizes(rotary: Rotary, span: float, seed: int) -> np.ndarray:
    """Channel sizes over a factor of `span`, equal within pairs, in no particular order."""
    values = np.geomspace(1 / np.sqrt(span), np.sqrt(span), DIM - rotary.pairs)
    return tied(rotary, np.random.default_rng(seed).permutation(values))


def some_frame(rotary: Rotary) -> KeyFrame:
    scale = np.exp(0.5 * normal(2, 3, 1, DIM - rotary.pairs, seed=8))
    constant = 5 * normal(2, 3, 1, DIM, seed=10) * (np.arange(DIM) < 2 * rotary.pairs)
    return KeyFrame(rotary, float32(5 * normal(2, 3, 1, DIM, seed=9)), float32(scale), float32(constant))


@every_rotary
@pytest.mark.parametrize("start", [0, 61, 4000])
def test_decoding_is_the_inverse_of_encoding(name: str, start: int) -> None:
    frame, keys = some_frame(ROTARIES[name]), float32(normal(2, 3, 70, DIM))
    # Means of up to 20 come and go, divided by scales of at least 0.2: float32 keeps 1e-6 of that.
    np.testing.assert_allclose(
        np.array(frame.decode(frame.encode(keys, start), start)), np.array(keys), rtol=0, atol=2e-5
    )


@every_rotary
@pytest.mark.parametrize("start", [0, 61, 4000])
def test_encoding_subtracts_the_turned_mean_and_the_constant_and_scales(name: str, start: int) -> None:
    rotary = ROTARIES[name]
    frame, keys = some_frame(rotary), normal(2, 3, 70, DIM)
    mean = turned(rotary, np.broadcast_to(float64(frame.mean), keys.shape), start) + float64(frame.constant)
    scale = np.stack([tied(rotary, row) for row in float64(frame.scale).reshape(6, -1)]).reshape(2, 3, 1, DIM)
    found = np.array(frame.encode(float32(keys), start))
    np.testing.assert_allclose(found, (keys - mean) * scale, rtol=0, atol=1e-4)  # numbers up to 100


@every_rotary
@pytest.mark.parametrize("start", [0, 61, 4000])
def test_both_terms_of_a_score_add_up_to_the_whole(name: str, start: int) -> None:
    rotary = ROTARIES[name]
    frame, keys, queries = some_frame(rotary), normal(2, 3, 70, DIM), normal(2, 3, 5, DIM, seed=1)
    body = float64(frame.scale_queries(float32(queries))) @ float64(frame.encode(float32(keys), start)).swapaxes(-1, -2)
    mean = float64(frame.mean_scores(float32(queries), start, 70))
    scores = queries @ keys.swapaxes(-1, -2)
    np.testing.assert_allclose(body + mean, scores, rtol=0, atol=5e-4)  # float32 terms of up to 300 that cancel
    assert np.sqrt(np.mean(mean**2)) > 20  # the mean's part is not a detail here
    expected = turned(rotary, np.broadcast_to(float64(frame.mean), keys.shape), start) + float64(frame.constant)
    np.testing.assert_allclose(mean, queries @ expected.swapaxes(-1, -2), rtol=0, atol=2e-4)


@every_rotary
@pytest.mark.parametrize("start", [4, 1400, 20_011])
def test_the_mean_is_removed_far_beyond_the_tokens_it_was_fitted_on(name: str, start: int) -> None:
    rotary = ROTARIES[name]
    mu = 20 * normal(1, 2, 1, DIM, seed=1)
    keys = [turned(rotary, mu + normal(1, 2, 128, DIM, seed=seed), at) for seed, at in ((2, 4), (3, start))]
    frame = fit_frame(rotary, float32(keys[0]), 4, None)
    left = np.mean(float64(frame.encode(float32(keys[1]), start)) ** 2) / rotary.magnitude**2
    # The mean of 128 tokens is off by 1/128 of their energy; angles read in float32 drift by 1e-7 a position, which
    # leaves (20 * 2e-7 * 20000)^2 = 0.006 at most. 16k numbers average to within 3%.
    assert 0.96 < left < 1.05
    assert np.mean(keys[1] ** 2) > 300 * left


@pytest.mark.parametrize("fitted_at", [0, 100, 5003])
def test_the_mean_is_that_before_the_rotation_wherever_it_is_fitted(fitted_at: int) -> None:
    rotary = ROTARIES["half"]
    mu, e = 20 * normal(2, 2, 1, DIM, seed=1), normal(2, 2, 128, DIM, seed=2)
    frame = fit_frame(rotary, float32(turned(rotary, mu + e, fitted_at)), fitted_at, None)
    expected = mu + e.mean(axis=2, keepdims=True)
    np.testing.assert_allclose(np.array(frame.mean), expected, rtol=0, atol=1e-4 + 2e-5 * fitted_at)


def score_error(scale: np.ndarray, key_energy: np.ndarray, query_energy: np.ndarray) -> float:
    """Expected score error, up to a constant, of an error that is isotropic after the scaling."""
    return float(np.sum(scale**2 * key_energy) * np.sum(query_energy / scale**2))


def uneven(rotary: Rotary, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Post-RoPE keys and queries of very different energies, and those energies per channel."""
    e, q = sizes(rotary, 30, 5), sizes(rotary, 10, 6)
    keys = turned(rotary, 3 + e * normal(1, 2, tokens, DIM, seed=7), 4)
    queries = turned(rotary, q * normal(1, 4, tokens, DIM, seed=8), 4)
    return keys, queries, (rotary.magnitude * e) ** 2, (rotary.magnitude * q) ** 2


@every_rotary
def test_scales_are_those_of_the_least_score_error(name: str) -> None:
    rotary = ROTARIES[name]
    keys, queries, v, w = uneven(rotary, 512)
    frame = fit_frame(rotary, float32(keys), 4, query_energy(float32(queries), 2))
    least = np.sum(np.sqrt(v * w)) ** 2  # Cauchy-Schwarz
    for head in range(2):
        scale = float64(frame.channel_scale())[0, head, 0]
        found = score_error(scale, v, w)
        # Energies from 512 tokens are right to about 6%, their fourth root to 1.5%; the floor adds some per mille.
        assert least * (1 - 1e-9) <= found < 1.01 * least
        for exponent in (0.0, 0.125, 0.5):
            assert found < 0.9 * score_error((w / v) ** exponent, v, w)


@every_rotary
def test_scales_are_the_fourth_root_of_the_ratio_of_pair_energies(name: str) -> None:
    """On data without any symmetry within pairs, in few tokens: the mean of both channels counts."""
    rotary = ROTARIES[name]
    keys = turned(rotary, 5 * normal(1, 1, 7, DIM) * np.geomspace(0.1, 10, DIM) + 2, 4)
    queries = normal(1, 2, 7, DIM, seed=1) * np.geomspace(3, 0.2, DIM)
    positions = np.arange(4, 11)
    # R_n mu of the mean before the rotation, by turning each token back to position 0 and the mean forth again.
    first, second = pair_channels(rotary)
    phase = np.exp(1j * positions[:, None] * np.array(rotary.angles))
    centred = keys - keys.mean(axis=2, keepdims=True)
    pairs = keys[..., first] + 1j * keys[..., second]
    pairs = pairs - (pairs / phase).mean(axis=2, keepdims=True) * phase
    centred[..., first], centred[..., second] = pairs.real, pairs.imag

    def energies(x: np.ndarray) -> np.ndarray:
        channels = np.mean(x * x, axis=(0, 1, 2))
        each = np.concatenate([0.5 * (channels[first] + channels[second]), channels[2 * rotary.pairs :]])
        return each + 0.003 * each.mean()

    expected = (energies(queries) / energies(centred)) ** 0.25
    found = np.array(fit_frame(rotary, float32(keys), 4, query_energy(float32(queries), 1)).scale)[0, 0, 0]
    ratio = found / expected  # a common factor is free
    np.testing.assert_allclose(ratio / ratio[0], 1, rtol=0, atol=1e-4)  # angles read in float32


@every_rotary
def test_scales_lower_the_score_error_of_a_real_codec(name: str) -> None:
    rotary, codec = ROTARIES[name], get_codec("tq3")
    keys, queries, _, _ = uneven(rotary, 256)
    fitted = fit_frame(rotary, float32(keys), 4, query_energy(float32(queries), 2))

    def measured(scale: mx.array) -> float:
        frame = replace(fitted, scale=scale)
        x = frame.encode(float32(keys), 4)
        decoded = float64(frame.decode(codec.decode(codec.encode(x), DIM), 4))
        errors = queries.reshape(1, 2, 512, DIM) @ (decoded - keys).swapaxes(-1, -2)
        return float(np.mean(errors**2))

    ones = mx.ones_like(fitted.scale)
    best = measured(fitted.scale)
    # Theory at these energies: 0.31 to 0.38 of the error at exponents 0 and 1/2, and 0.74 to 0.79 of that at 1/8.
    assert best < 0.45 * measured(ones)
    assert best < 0.45 * measured(fitted.scale**2)
    assert best < 0.85 * measured(fitted.scale**0.5)


@every_rotary
def test_scales_are_tied_within_pairs_and_free_elsewhere(name: str) -> None:
    rotary = ROTARIES[name]
    keys = normal(1, 1, 128, DIM) * np.geomspace(0.1, 10, DIM)  # nothing in the data is tied
    frame = fit_frame(rotary, float32(keys), 4, query_energy(float32(normal(1, 2, 128, DIM)), 1))
    spread = np.array(frame.channel_scale())[0, 0, 0]
    first, second = pair_channels(rotary)
    np.testing.assert_array_equal(spread[first], spread[second])
    assert len(np.unique(spread)) == DIM - rotary.pairs == frame.scale.shape[-1]


def test_scaling_by_tied_scales_commutes_with_turning() -> None:
    for name in ("half", "interleaved", "partial"):
        frame, x = some_frame(ROTARIES[name]), float32(normal(2, 3, 9, DIM))
        scale = frame.channel_scale()
        difference = turn(frame.rotary, x * scale, 77, 9) - turn(frame.rotary, x, 77, 9) * scale
        assert float(mx.max(mx.abs(difference))) < 1e-5  # float32 numbers up to 20


@pytest.mark.parametrize("codec_name", ["tq4", "affine4"])
def test_a_key_bias_does_not_change_the_scores_error(codec_name: str) -> None:
    """A constant added to all keys before RoPE, as the bias of a projection: free in the frame, ruinous without."""
    rotary, codec = ROTARIES["half"], get_codec(codec_name)
    e, queries, bias = normal(1, 2, 300, DIM), normal(1, 2, 20, DIM, seed=1), 12 * normal(1, 2, 1, DIM, seed=2)

    def error(bias: np.ndarray | float, framed: bool) -> float:
        keys = turned(rotary, e + bias, 4)
        if framed:
            frame = fit_frame(rotary, float32(keys[:, :, :128]), 4, query_energy(float32(queries), 2))
            x = frame.encode(float32(keys), 4)
            decoded = frame.decode(codec.decode(codec.encode(x), DIM), 4)
        else:
            decoded = codec.decode(codec.encode(float32(keys)), DIM)
        return float(np.mean((queries @ (float64(decoded) - keys).swapaxes(-1, -2)) ** 2))

    without_bias = error(0.0, framed=True)
    assert error(bias, framed=True) == pytest.approx(without_bias, rel=0.02)  # a few codes flip by rounding
    assert error(bias, framed=False) > 30 * without_bias


def test_query_energy_sums_over_the_query_heads_of_each_group() -> None:
    queries = normal(2, 6, 5, DIM)
    expected = np.stack([np.sum(queries[:, 3 * h : 3 * h + 3] ** 2, axis=(1, 2)) for h in range(2)], axis=1)
    found = np.array(query_energy(float32(queries), 2))
    np.testing.assert_allclose(found, expected[:, :, None], rtol=1e-5)


def test_rows_and_heads_have_their_own_statistics() -> None:
    rotary = ROTARIES["half"]
    keys = normal(2, 3, 100, DIM) * np.geomspace(1, 3, 6).reshape(2, 3, 1, 1) + normal(2, 3, 1, DIM, seed=1)
    keys[1, 1] += 9
    keys = float32(keys)
    energy = query_energy(float32(normal(2, 3, 100, DIM, seed=2)), 3)
    together = fit_frame(rotary, keys, 4, energy)
    for b, h in np.ndindex(2, 3):
        cut = np.s_[b : b + 1, h : h + 1]
        alone = fit_frame(rotary, keys[cut], 4, energy[cut])
        np.testing.assert_allclose(np.array(alone.mean), np.array(together.mean[cut]), rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.array(alone.constant), np.array(together.constant[cut]), rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.array(alone.scale), np.array(together.scale[cut]), rtol=1e-5)


def test_without_query_energy_scales_are_one() -> None:
    frame = fit_frame(ROTARIES["partial"], float32(5 * normal(1, 2, 64, DIM)), 4, None)
    np.testing.assert_array_equal(np.array(frame.channel_scale()), np.ones((1, 2, 1, DIM)))


def test_dead_pairs_get_finite_scales() -> None:
    rotary = ROTARIES["half"]
    keys, queries = normal(1, 1, 128, DIM), normal(1, 1, 128, DIM, seed=1)
    keys[..., [3, 35]] = 0  # a pair that no key uses
    queries[..., [9, 41]] = 0  # a pair that no query looks at
    frame = fit_frame(rotary, float32(turned(rotary, keys, 4)), 4, query_energy(float32(turned(rotary, queries, 4)), 1))
    scale = np.array(frame.scale)[0, 0, 0]
    typical = np.median(scale)
    limit = (1 / 0.003) ** 0.25  # 4.3: the floor of 0.3% of the mean energy
    assert scale[3] == pytest.approx(limit * typical, rel=0.1)
    assert scale[9] == pytest.approx(typical / limit, rel=0.1)
    silent = fit_frame(rotary, mx.zeros((1, 1, 64, DIM)), 4, mx.zeros((1, 1, 1, DIM)))
    np.testing.assert_allclose(np.array(silent.scale), 1, rtol=1e-5)


def test_bytes_are_two_and_a_half_float32_rows_a_head() -> None:
    frame = some_frame(ROTARIES["half"])
    assert frame.nbytes == 2 * 3 * 2.5 * DIM * 4


@every_rotary
def test_kernels_get_rows_of_whole_16_bytes(name: str) -> None:
    frame = some_frame(ROTARIES[name])
    size = frame_size(DIM, ROTARIES[name].pairs)
    assert size % 4 == 0
    found, rest = np.array(frame.joined()), DIM - ROTARIES[name].pairs
    assert found.shape == (2, 3, 1, size)
    for start, part in ((0, frame.mean), (DIM, frame.constant), (2 * DIM, frame.scale)):
        np.testing.assert_array_equal(found[..., start : start + part.shape[-1]], np.array(part))
    np.testing.assert_array_equal(found[..., 2 * DIM + rest :], 0)
    assert replace(frame, mean=2 * frame.mean).joined()[0, 0, 0, 0] == 2 * frame.mean[0, 0, 0, 0]


def test_statistics_leave_out_the_first_tokens() -> None:
    """Attention sinks are outliers: the frame of a cache must not see the first four tokens."""
    rotary = ROTARIES["half"]
    assert rotary is not None
    x = 3 + normal(1, 2, 128, DIM)
    x[:, :, :4] += 1000
    keys, queries = turned(rotary, x, 0), float32(normal(1, 4, 128, DIM, seed=1))
    for sinks in (0, 4):
        cache = KVQCache(LayerSpec("tq4", "tq4", sinks=sinks), rotary)
        cache.update_and_fetch(float32(keys), float32(keys))
        cache.observe_queries(queries)
        cache.compact()
        assert cache.frame is not None
        expected = x[:, :, 4:].mean(axis=2, keepdims=True)
        np.testing.assert_allclose(np.array(cache.frame.mean), expected, rtol=0, atol=1e-3)
