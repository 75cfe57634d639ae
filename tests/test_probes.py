"""Probes say what can be computed by hand, skip what is not compressed, and change nothing; `kvq inspect --live`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.models.cache import KVCache
from test_cli import model_folder

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.attention import AttendArgs
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.config import LayerSpec
from mlx_kvq_plugin.corpus import corpus_text
from mlx_kvq_plugin.errors import CacheStateError, UnsupportedModelError
from mlx_kvq_plugin.frame import SKIP_TOKENS
from mlx_kvq_plugin.probes import (
    Distortion,
    KeyNorms,
    LayerTiming,
    Skipped,
    distortion,
    key_norms,
    layer_timing,
    recorded_queries,
)
from mlx_kvq_plugin.rotary import Rotary, turn

Run = Callable[..., tuple[int, str, str]]

ROTARY = Rotary("half", tuple(10000.0 ** (-j / 32) for j in range(32)))


def numbers(x: mx.array) -> Any:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def filled(scheme: LayerSpec, keys: mx.array, values: mx.array, steps: int = 0) -> KVQCache:
    """A cache that saw the tokens in one chunk and `steps` single steps."""
    cache = KVQCache(scheme, ROTARY)
    stop = keys.shape[2] - steps
    for start, end in [(0, stop)] + [(i, i + 1) for i in range(stop, keys.shape[2])]:
        cache.update_and_fetch(keys[..., start:end, :], values[..., start:end, :])
        cache.observe_queries(keys[..., start:end, :])
        cache.settle()
    return cache


def turned_keys(count: int, common: float, seed: int = 0) -> mx.array:
    """Keys `(1, 2, count, 64)` of a common vector with `common` of the energy, turned by position."""
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal((1, 2, 1, 64))
    mean *= 8.0 * common**0.5 / np.linalg.norm(mean, axis=-1, keepdims=True)
    noise = rng.standard_normal((1, 2, count, 64)) * (1 - common) ** 0.5
    return turn(ROTARY, mx.array((mean + noise).astype(np.float32)), 0, count)


def run_model(scheme: str, tokens: int = 200, name: str = "llama", steps: int = 3) -> tuple[Any, Any, list[Any]]:
    """A compressed model, its compression and its caches after some tokens."""
    model = tiny_models.ARCHITECTURES[name]()
    compression = kvq.compress(model, scheme)
    caches = kvq.make_prompt_cache(model)
    ids = mx.array(np.random.default_rng(1).integers(0, tiny_models.VOCAB, (1, tokens)))
    mx.eval(model(ids[:, : tokens - steps], cache=caches))
    for i in range(tokens - steps, tokens):
        mx.eval(model(ids[:, i : i + 1], cache=caches))
    return model, compression, caches


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_norms_are_those_of_the_keys() -> None:
    keys = mx.random.normal((1, 2, 100, 64), key=mx.random.key(0))
    keys[0, 1, 50] *= 20.0
    (found,) = key_norms([filled(LayerSpec("identity", "identity"), keys, keys)])
    norms = np.linalg.norm(numbers(keys)[0], axis=-1)
    assert isinstance(found, KeyNorms) and found.tokens == 100
    np.testing.assert_allclose(found.mean, norms.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.largest, norms.max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.largest_to_median, norms.max(axis=1) / np.median(norms, axis=1), rtol=1e-5)
    assert found.largest_to_median[1] > 10 > 2 > found.largest_to_median[0]
    assert found.framed_mean_share is None


def test_the_mean_keys_share_is_large_before_the_frame_and_nothing_after_it() -> None:
    keys = turned_keys(400, common=0.8)
    (found,) = key_norms([filled(LayerSpec("tq4", "tq4"), keys, keys)])
    assert isinstance(found, KeyNorms) and found.framed_mean_share is not None
    np.testing.assert_allclose(found.mean_share, 0.8, atol=0.03)
    assert max(found.framed_mean_share) < 1e-3
    (plain,) = key_norms([filled(LayerSpec("tq4", "tq4", frame=False), keys, keys)])
    np.testing.assert_allclose(plain.mean_share, found.mean_share, atol=0.01)
    assert plain.framed_mean_share is None


def test_the_strongest_channel_is_named_before_and_after_the_frame() -> None:
    keys = mx.random.normal((1, 2, 100, 64), key=mx.random.key(0))
    keys[0, 1, :, 5] *= 10.0
    (found,) = key_norms([filled(LayerSpec("identity", "identity"), keys, keys)])
    assert isinstance(found, KeyNorms) and found.framed_channel_peak is None
    energy = np.mean(numbers(keys)[0, :, SKIP_TOKENS:] ** 2, axis=1)
    np.testing.assert_allclose(found.channel_peak, energy.max(axis=1) / energy.mean(axis=1), rtol=1e-5)
    assert found.channel_peak[1] > 20 > 2 > found.channel_peak[0]
    common = turned_keys(400, common=0.8)
    common[0, 1, :, 31] += 40.0  # of the slowest pair: what all keys have in common is no outlier in the frame
    (framed,) = key_norms([filled(LayerSpec("tq4", "tq4"), common, common)])
    assert framed.framed_channel_peak[1] < 0.5 * framed.channel_peak[1]


def test_a_mean_that_moves_later_is_seen_after_the_frame() -> None:
    """The frame is frozen with the first chunk; another common vector from then on is left in what is encoded."""
    early, late = turned_keys(100, 0.8), turned_keys(500, 0.8, seed=7)
    keys = mx.concatenate([early, late[..., 100:, :]], axis=2)
    cache = filled(LayerSpec("tq6", "tq6"), keys[..., :100, :], keys[..., :100, :])
    cache.update_and_fetch(keys[..., 100:, :], keys[..., 100:, :])
    cache.settle()
    (found,) = key_norms([cache])
    assert min(found.framed_mean_share) > 0.3


def test_positions_count_from_the_windows_first_token() -> None:
    """With others, the turn would be taken back wrongly and the shares of the decoded keys would differ."""
    shares = []
    for scheme in ("tq6", "identity"):
        _, compression, caches = run_model(scheme, 400, "llama sliding")
        with compression:
            (found, *_) = key_norms(caches)
        assert isinstance(found, KeyNorms) and found.tokens == tiny_models.WINDOW
        shares.append(found.mean_share)
        turned = caches[0].decode_all()[0]
        mean = numbers(mx.mean(turn(caches[0].rotary, turned, 400 - tiny_models.WINDOW, 160, inverse=True), axis=2))
        np.testing.assert_allclose(
            found.mean_share, (mean**2).sum((0, 2)) / (numbers(turned) ** 2).sum((0, 2, 3)) * 160, rtol=1e-4
        )
    np.testing.assert_allclose(shares[0], shares[1], rtol=0.02)


# ---- distortion ----------------------------------------------------------------------------------------------------


def test_distortion_is_that_of_encoding_by_hand() -> None:
    keys, values = turned_keys(300, 0.7), mx.random.normal((1, 2, 300, 64), key=mx.random.key(2))
    queries = mx.random.normal((1, 6, 5, 64), key=mx.random.key(3))
    cache = filled(LayerSpec("tq3", "tq2", recent=40), keys, values, steps=3)
    (found,) = distortion([cache], {0: queries})
    dense = cache.held - cache.packed_tokens - cache.sink_tokens
    assert isinstance(found, Distortion) and found.tokens == dense == 43
    body, start = keys[..., -dense:, :], 300 - dense
    decoded = cache.key_codec.decode(cache.key_codec.encode(cache.frame.encode(body, start)), 64)
    error = numbers(cache.frame.decode(decoded, start) - body)
    expected = (error**2).sum(axis=(0, 2, 3)) / (numbers(body) ** 2).sum(axis=(0, 2, 3))
    np.testing.assert_allclose(found.keys, expected, rtol=1e-4)
    plain = cache.value_codec.decode(cache.value_codec.encode(values[..., -dense:, :]), 64)
    error_v, true_v = numbers(plain - values[..., -dense:, :]), numbers(values[..., -dense:, :])
    np.testing.assert_allclose(found.values, (error_v**2).sum((0, 2, 3)) / (true_v**2).sum((0, 2, 3)), rtol=1e-4)
    assert found.scores is not None
    for head in range(2):
        q = numbers(queries)[0, 3 * head : 3 * head + 3].reshape(-1, 64)
        e, s = q @ error[0, head].T, q @ numbers(body)[0, head].T
        e, s = e - e.mean(axis=1, keepdims=True), s - s.mean(axis=1, keepdims=True)
        assert found.scores[head] == pytest.approx((e**2).sum() / (s**2).sum(), rel=1e-3)


def test_fewer_bits_distort_more_and_exact_codecs_not_at_all() -> None:
    keys, values = turned_keys(300, 0.5), turned_keys(300, 0.0, seed=5)
    errors = [distortion([filled(LayerSpec(name, name), keys, values)])[0] for name in ("tq2", "tq3", "tq4")]
    assert errors[0].keys[0] > 2 * errors[1].keys[0] > 4 * errors[2].keys[0] > 0
    assert 0.08 < errors[0].values[0] < 0.16  # 2-bit Lloyd-Max has 0.117
    assert errors[0].scores is None
    (exact,) = distortion([filled(LayerSpec("identity", "identity"), keys, values)])
    assert exact.keys == exact.values == (0.0, 0.0)


@pytest.mark.parametrize("name", ["kivi2", "tq2.5", "tq3+tq2"])
def test_codecs_of_token_groups_with_statistics_and_per_head(name: str) -> None:
    keys = turned_keys(300, 0.7)
    (found,) = distortion([filled(LayerSpec(name, "tq3"), keys, keys)])
    assert isinstance(found, Distortion) and 0.0 < max(found.keys) < 0.2


def test_statistics_that_are_not_fitted_yet_are_fitted_on_a_copy() -> None:
    keys = turned_keys(200, 0.8)
    cache = filled(LayerSpec("tq4", "tq4", compress_after="prefill"), keys, keys)
    assert cache.packed_tokens == 0 and cache.frame is None
    (found,) = distortion([cache])
    assert isinstance(found, Distortion) and found.tokens == 196 and max(found.keys) < 0.01
    assert cache.frame is None
    short = filled(LayerSpec("tq4", "tq4"), keys[..., :50, :], keys[..., :50, :])
    assert distortion([short]) == [Skipped(0, "50 tokens are too few for its statistics")]


def test_queries_are_recorded_and_nothing_stays_behind() -> None:
    model, compression, caches = run_model("tq4", 100)
    with compression:
        plain = kvq.make_prompt_cache(model)
        tokens = mx.arange(60)[None] % tiny_models.VOCAB
        model(tokens, cache=plain)
        energy = plain[0]._query_energy
        watched = kvq.make_prompt_cache(model)
        with recorded_queries(watched) as found:
            model(tokens[:, :58], cache=watched)
            model(tokens[:, 58:59], cache=watched)
            model(tokens[:, 59:], cache=watched)
        assert {index: queries.shape for index, queries in found.items()} == dict.fromkeys(range(3), (1, 4, 60, 64))
        np.testing.assert_allclose(numbers(watched[0]._query_energy), numbers(energy), rtol=1e-4)
        assert "observe_queries" not in vars(watched[0])
        assert isinstance(distortion(caches, found)[1], Distortion)
        with pytest.raises(CacheStateError, match="got 5 tokens"), recorded_queries(caches):
            model(tokens[:, :5], cache=caches)
        assert all("observe_queries" not in vars(cache) for cache in caches)


# ---- time ----------------------------------------------------------------------------------------------------------


def test_timing_asks_with_the_models_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compression, caches = run_model("tq4")
    asked: list[tuple[int, ...]] = []
    from mlx_kvq_plugin import probes

    def seen(args: AttendArgs) -> mx.array:
        asked.append(args.queries.shape)
        return probes_attend(args)

    probes_attend = probes.attend
    monkeypatch.setattr(probes, "attend", seen)
    with compression:
        found = layer_timing(caches, model, repeats=4)
        assert asked == [(1, 4, 1, 64)] * 3 * 5
        assert [(row.heads, row.tokens, row.packed) for row in found] == [(4, 200, caches[0].packed_tokens)] * 3
        assert all(isinstance(row, LayerTiming) and 0 < row.seconds < 1 for row in found)
        assert [row.heads for row in layer_timing(caches, repeats=1)] == [2, 2, 2]
    with pytest.raises(UnsupportedModelError, match="must be compressed"):
        layer_timing(caches, model)


# ---- what all have in common ---------------------------------------------------------------------------------------


def everything(cache: Any) -> dict[str, Any]:
    """All attributes of a cache, arrays as bits."""
    found: dict[str, Any] = {}
    for name, value in vars(cache).items():
        if isinstance(value, mx.array):
            found[name] = numbers(value).tobytes()
        elif isinstance(value, dict) and any(isinstance(x, mx.array) for x in value.values()):
            found[name] = {key: numbers(x).tobytes() for key, x in value.items()}
        elif name == "frame" and value is not None:
            found[name] = numbers(value.mean).tobytes(), numbers(value.scale).tobytes()
        else:
            found[name] = value
    return found


@pytest.mark.parametrize("scheme", ["tq4", "rvq1,compress_after=prefill", "identity", "k=kivi2,v=tq2.5"])
@pytest.mark.parametrize("tokens", [40, 203])
def test_probes_change_nothing(scheme: str, tokens: int) -> None:
    model, compression, caches = run_model(scheme, tokens, "llama sliding", steps=0)
    with compression:
        before, copies = [everything(cache) for cache in caches], copy.deepcopy(caches)
        random = [x.tolist() for x in mx.random.state]
        key_norms(caches)
        distortion(caches, {0: mx.zeros((1, 4, 1, 64))})
        layer_timing(caches, model, repeats=2)
        assert [everything(cache) for cache in caches] == before
        assert [x.tolist() for x in mx.random.state] == random
        for token in range(20):
            step = mx.array([[token]])
            assert mx.array_equal(model(step, cache=caches), model(step, cache=copies))


def test_layers_without_a_compressed_cache_are_skipped_with_the_reason() -> None:
    model, compression, caches = run_model("tq4,edges=1")
    with compression:
        edge = "edge layer (edges=1)"
        for found in (key_norms(caches), distortion(caches), layer_timing(caches, model, 1)):
            assert [row.index for row in found] == [0, 1, 2]
            assert found[0] == Skipped(0, edge) and found[2] == Skipped(2, edge) and not isinstance(found[1], Skipped)
        batch = [KVQCache.merge([caches[1], caches[1]])]
        empty = kvq.make_prompt_cache(model)
    assert key_norms(batch) == [Skipped(0, "it is a batch of sequences: extract one")]
    assert key_norms(empty)[1] == Skipped(1, "it holds no tokens")
    assert distortion([KVCache()]) == [Skipped(0, "mlx-lm's own cache")]


def test_members_of_lists_and_recurrent_layers() -> None:
    model, compression, caches = run_model("tq4", 150, "falcon_h1")
    with compression:
        assert [type(row) for row in key_norms(caches)] == [KeyNorms] * 2
        assert [row.heads for row in layer_timing(caches, model, 1)] == [4, 4]
    _, compression, caches = run_model("tq4", 150, "qwen3_next")
    with compression:
        found = key_norms(caches)
        assert found[0] == Skipped(0, "recurrent state, no keys and values") and isinstance(found[1], KeyNorms)


# ---- kvq inspect --live --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("live") / "tiny")


def test_the_three_tables(run: Run, tiny: Path) -> None:
    code, out, err = run("inspect", tiny, "--live", "--prompt", "It was the best. " * 14, "--kv-scheme", "tq4,edges=1")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{tiny}: {17 * 14} tokens, scheme tq4,edges=1"
    tables = {line.split()[0]: line for line in lines if line}
    assert {"norms", "relative", "attention", "layer"} <= set(tables)
    rows = [line.split() for line in lines if line.startswith("    1 ")]
    assert [len(row) for row in rows] == [9, 8, 5]
    assert rows[2][1:4] == ["4", f"{17 * 14}", f"{17 * 14 - 20}"]
    assert lines[-2:] == [f"layer {i} left out: edge layer (edges=1)" for i in (0, 2)]


def test_live_json_has_what_the_probes_give(run: Run, tiny: Path) -> None:
    argv = ("inspect", tiny, "--live", "--json", "--kv-scheme", "rvq1", "--kv-scheme", "tq4")
    report = json.loads(run(*argv)[1])
    first, second = report["live"]
    assert (first["scheme"], second["scheme"], first["tokens"]) == ("rvq1", "tq4", 1024)
    assert len(first["key_norms"]) == len(first["distortion"]) == len(first["timing"]) == 3
    assert first["distortion"][0]["values"][0] > 5 * second["distortion"][0]["values"][0] > 0
    assert first["distortion"][0]["scores"][0] > second["distortion"][0]["scores"][0] > 0
    assert first["key_norms"][0]["mean_share"][0] == pytest.approx(second["key_norms"][0]["mean_share"][0], abs=0.1)
    assert len(corpus_text("prose")) > 1024


def test_mistakes_of_live(run: Run, tiny: Path) -> None:
    for argv, text in (
        (("--prompt", "x"), "--live"),
        (("--live", "--prompt", "short"), "16 tokens"),
        (("--live", "--kv-scheme", "no"), "'no'"),
    ):
        code, out, err = run("inspect", tiny, *argv)
        assert (code, out) == (2, "") and text in err


@pytest.mark.real_model
def test_real_keys_have_a_large_mean_that_the_frame_takes_away(
    real_model: Callable[[str], tuple[Any, Any]], text_ids: Callable[[Any, int], list[int]]
) -> None:
    model, tokenizer = real_model("smollm2")
    with kvq.compress(model, "tq4"):
        caches = kvq.make_prompt_cache(model)
        mx.eval(model(mx.array([text_ids(tokenizer, 300)]), cache=caches))
        norms, errors = key_norms(caches), distortion(caches)
    assert min(np.mean(row.mean_share) for row in norms) > 0.4
    assert max(np.mean(row.framed_mean_share) for row in norms) < 0.02
    assert max(max(row.keys) for row in errors) < 0.02 and max(max(row.values) for row in errors) < 0.03
