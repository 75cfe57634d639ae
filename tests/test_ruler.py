"""The ruler against slow independent computations in float64, on tiny models."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
import tiny_models
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models import llama as llama_file

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import ruler
from mlx_kvq_plugin.contenders import AFFINE_SCHEMES
from mlx_kvq_plugin.errors import SchemeError, UnsupportedModelError
from mlx_kvq_plugin.evaluation import LAST
from mlx_kvq_plugin.loading import stock_caches
from mlx_kvq_plugin.results import SchemeResult
from mlx_kvq_plugin.routing import RoutedAttention
from mlx_kvq_plugin.ruler import measure

PREFILL, STEPS = 180, 76  # past the windows of the sliding models, and more steps than LAST
DISTANCES = ("kl_mean", "kl_median", "kl_p99", "kl_max", "kl_last")

Floats = npt.NDArray[np.float64]


def texts(count: int = 2, tokens: int = PREFILL + STEPS) -> dict[str, list[int]]:
    draws = np.random.RandomState(5).randint(1, tiny_models.VOCAB, (count, tokens))
    return {f"text {i}": row.tolist() for i, row in enumerate(draws)}


def measured(model: Any, schemes: Sequence[str], **options: Any) -> dict[str, SchemeResult]:
    asked = {"prefill": PREFILL, "steps": STEPS, **options}
    given = asked.pop("texts", texts())
    found = list(measure(model, given, schemes, **asked))
    assert [row.scheme for row in found] == list(schemes)
    return {row.scheme: row for row in found}


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_models.llama()


@pytest.fixture(scope="module")
def rows(llama: Any) -> dict[str, SchemeResult]:
    """A wide spread of schemes, measured together."""
    return measured(llama, ["tq1", "tq2", "fp16", "tq3", "mlx-affine4", "tq4", "identity", "tq6", "rvq1,edges=1"])


# ---- what loses nothing ----------------------------------------------------------------------------------------------

EXACT_MODELS = ("llama", "llama_sliding", "gemma2", "falcon_h1", "qwen3_next")


@pytest.mark.parametrize("name", EXACT_MODELS)
def test_lossless_schemes_read_exactly_zero(name):
    model = getattr(tiny_models, name)()
    found = measured(model, ["tq4", "fp16", "identity"], texts=texts(2, 200), prefill=180, steps=20)
    for scheme in ("fp16", "identity"):
        row = found[scheme]
        assert row.overall is not None
        for fidelity in (row.overall, *(text.fidelity for text in row.texts.values())):
            assert [getattr(fidelity, distance) for distance in DISTANCES] == [0.0] * 5
            assert fidelity.top1 == 1.0
            assert fidelity.perplexity == fidelity.reference_perplexity
        assert row.greedy == 20 and all(text.greedy == 20 for text in row.texts.values())
    assert found["tq4"].overall is not None and found["tq4"].overall.kl_mean > 0


def test_fp16_holds_what_mlx_lm_holds(rows):
    row = rows["fp16"]
    assert row.bits == 16.0 and row.note == ""
    assert row.nbytes == 2 * row.nbytes_16bit == 2 * 256 * 3 * 2 * 128 * 4  # mlx-lm's caches grow by 256 tokens
    assert row.fp16_nbytes == 2 * (PREFILL + STEPS) * 3 * 2 * 128 * 2


# ---- the figures, computed in another way ----------------------------------------------------------------------------


def step_logprobs(model: Any, scheme: str, tokens: list[int]) -> Floats:
    """Log probabilities of single-token steps of one text alone, in float64."""
    with kvq.compress(model, scheme):
        found = kvq.step_logprobs(model, kvq.make_prompt_cache(model), tokens, PREFILL)
    wide = np.array(found).astype(np.float64)
    return wide - np.log(np.sum(np.exp(wide), axis=-1, keepdims=True))


def expected_fidelity(reference: Sequence[Floats], run: Sequence[Floats], given: Sequence[list[int]]) -> dict[str, Any]:
    """The fields of `Fidelity` over some texts."""
    kl = [np.sum(np.exp(a) * (a - b), axis=-1) for a, b in zip(reference, run, strict=True)]
    ordered = np.sort(np.concatenate(kl))
    same = np.concatenate([np.argmax(a, -1) == np.argmax(b, -1) for a, b in zip(reference, run, strict=True)])

    def perplexity(logprobs: Sequence[Floats]) -> float:
        following = [
            [row[token] for row, token in zip(rows, tokens[PREFILL + 1 :], strict=False)]
            for rows, tokens in zip(logprobs, given, strict=True)
        ]
        assert {len(row) for row in following} == {STEPS - 1}
        return float(np.exp(-np.mean(following)))

    return {
        "kl_mean": np.mean(ordered),
        "kl_median": ordered[len(ordered) // 2],
        "kl_p99": ordered[int(0.99 * len(ordered))],
        "kl_max": ordered[-1],
        "top1": np.mean(same),
        "perplexity": perplexity(run),
        "reference_perplexity": perplexity(reference),
        "positions": len(ordered),
        "kl_last": np.mean([row[-LAST:] for row in kl]),
    }


@pytest.mark.parametrize("scheme", ["tq3", "rvq1"])
def test_figures_equal_those_of_separate_runs_in_float64(llama, scheme):
    given = texts()
    reference = {name: step_logprobs(llama, "fp16", tokens) for name, tokens in given.items()}
    run = {name: step_logprobs(llama, scheme, tokens) for name, tokens in given.items()}
    overall = expected_fidelity(list(reference.values()), list(run.values()), list(given.values()))
    assert overall["kl_last"] != pytest.approx(overall["kl_mean"], rel=1e-2)
    for joint in (True, False):
        row = measured(llama, ["tq1", scheme], joint=joint)[scheme]
        assert row.overall is not None
        assert asdict(row.overall) == pytest.approx(overall, rel=2e-3)
        for name, tokens in given.items():
            expected = expected_fidelity([reference[name]], [run[name]], [tokens])
            assert asdict(row.texts[name].fidelity) == pytest.approx(expected, rel=2e-3), name


def test_compare_of_two_runs_gives_the_same_figures(llama):
    (tokens,) = texts(1).values()
    found = [kvq.step_logprobs(llama, kvq.make_prompt_cache(llama), tokens, PREFILL)]
    with kvq.compress(llama, "tq3"):
        found.append(kvq.step_logprobs(llama, kvq.make_prompt_cache(llama), tokens, PREFILL))
    row = measured(llama, ["tq3"], texts={"only": tokens}, joint=False)["tq3"]
    assert row.overall == kvq.compare(*found, tokens[PREFILL:])


def greedy(model: Any, scheme: str, tokens: list[int]) -> list[int]:
    """What a free run says after the first token that follows the prefill."""
    with kvq.compress(model, scheme):
        caches = kvq.make_prompt_cache(model)
        model(mx.array([tokens[:PREFILL]]), cache=caches)
        mx.eval([cache.state for cache in caches])
        said = [tokens[PREFILL]]
        for _ in range(STEPS):
            said.append(int(mx.argmax(model(mx.array([said[-1:]]), cache=caches)[0, -1]).item()))
    return said[1:]


def test_greedy_is_where_free_runs_part(llama):
    given, schemes, lengths = texts(), ["tq2", "tq4"], {}
    for name, tokens in given.items():
        expected = greedy(llama, "fp16", tokens)
        for scheme in schemes:
            said = greedy(llama, scheme, tokens)
            parting = (i for i, (a, b) in enumerate(zip(expected, said, strict=True)) if a != b)
            lengths[scheme, name] = next(parting, STEPS)
    assert len(set(lengths.values())) > 2
    for joint in (True, False):
        found = measured(llama, schemes, joint=joint)
        assert {(scheme, name): found[scheme].texts[name].greedy for scheme, name in lengths} == lengths


def test_more_bits_cost_less_and_take_more(rows):
    order = [rows[name] for name in ("tq1", "tq2", "tq3", "tq4", "tq6")]
    for low, high in pairwise(order):
        assert low.overall is not None and high.overall is not None
        assert low.overall.kl_mean > 2 * high.overall.kl_mean > 0
        assert low.bits < high.bits and low.nbytes < high.nbytes and low.nbytes_16bit < high.nbytes_16bit
    assert [row.bits for row in order] == [1.25, 2.25, 3.25, 4.25, 6.25]
    edges = rows["rvq1,edges=1"]
    assert edges.bits == pytest.approx((2.25 + 2 * 16) / 3) and "2 of 3 layers stay" in edges.note


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_bytes_are_those_that_the_cache_report_counts(llama, rows):
    given = mx.array(list(texts().values()))
    for scheme in ("tq4", "rvq1,edges=1"):
        with kvq.compress(llama, scheme):
            caches = kvq.make_prompt_cache(llama)
            llama(given[:, :PREFILL], cache=caches)
            mx.eval([cache.state for cache in caches])
            for i in range(PREFILL, PREFILL + STEPS):
                mx.eval(llama(given[:, i : i + 1], cache=caches))
        report = kvq.cache_report(caches)
        assert (rows[scheme].nbytes, rows[scheme].fp16_nbytes) == (report.nbytes, report.fp16_nbytes)
        assert rows[scheme].ratio == report.ratio


BYTES = {
    "llama": ["tq4", "rvq1,frame=off", "affine4", "turbo0v4", "kivi2", "qjl1", "fp16", "mlx-affine4", "mlx-affine3"],
    "llama_sliding": ["tq3,edges=1,compress_after=prefill", "mlx-affine4"],
    "falcon_h1": ["tq4", "fp16"],
}


@pytest.mark.parametrize("name", list(BYTES))
def test_bytes_of_a_16bit_model_are_those_that_it_holds(name):
    asked = {"texts": texts(2, 192), "prefill": 180, "steps": 12}
    wide = measured(getattr(tiny_models, name)(), BYTES[name], **asked)
    half = getattr(tiny_models, name)()
    half.set_dtype(mx.float16)
    for scheme, row in measured(half, BYTES[name], **asked).items():
        if name != "falcon_h1":  # whose recurrent states count as they are held
            assert wide[scheme].nbytes_16bit == row.nbytes, scheme
            assert wide[scheme].fp16_nbytes == row.fp16_nbytes
        assert row.nbytes_16bit == row.nbytes, scheme
        assert row.ratio_16bit == row.ratio and wide[scheme].ratio < wide[scheme].ratio_16bit


# ---- mlx-lm's quantized caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_mlx_affine_is_mlx_lms_own_quantized_cache(llama, bits):
    (tokens,) = texts(1).values()
    caches = mlx_cache.make_prompt_cache(llama)
    reference = kvq.step_logprobs(llama, mlx_cache.make_prompt_cache(llama), tokens, PREFILL)
    llama(mx.array([tokens[:PREFILL]]), cache=caches)
    maybe_quantize_kv_cache(caches, quantized_kv_start=0, kv_group_size=64, kv_bits=bits)
    assert all(isinstance(cache, mlx_cache.QuantizedKVCache) for cache in caches)
    run = kvq.step_logprobs(llama, caches, tokens[PREFILL:], 0)
    row = measured(llama, [f"mlx-affine{bits}"], texts={"only": tokens}, joint=False)[f"mlx-affine{bits}"]
    assert row.overall == kvq.compare(reference, run, tokens[PREFILL:])
    assert row.nbytes == sum(cache.nbytes for cache in caches)
    assert row.bits == bits + 0.5 and row.note == ""


def test_mlx_affine_takes_groups_that_fit_and_says_what_stays():
    row = measured(tiny_models.phi3(), ["mlx-affine4"], texts=texts(1, 60), prefill=50, steps=10)["mlx-affine4"]
    assert row.bits == 4 + 32 / 32  # head size 96: groups of 32
    row = measured(tiny_models.llama_sliding(), ["mlx-affine4"], texts=texts(1, 60), prefill=50, steps=10)[
        "mlx-affine4"
    ]
    assert row.note == "3 of 4 layers stay as they are: mlx-lm cannot quantize a RotatingKVCache"
    assert row.bits == (3 * 16 + 4.5) / 4


# ---- what cannot be done ---------------------------------------------------------------------------------------------


def test_what_the_model_cannot_do_gives_a_row_with_the_reason():
    found = measured(
        tiny_models.llama_head_dim_80(),
        ["mlx-affine4", "tq2", "kivi4,seed=1", "tq@2.5"],
        texts=texts(1, 60),
        prefill=50,
        steps=10,
    )
    assert "multiple of 32, got [80]" in found["mlx-affine4"].error
    assert "calibrat" in found["tq@2.5"].error
    for row in found.values():
        assert (row.overall is None) == bool(row.error) and "\n" not in row.error
        if row.error:
            assert row.to_dict() == {"scheme": row.scheme, "error": row.error}
    assert not found["tq2"].error


def test_quantized_keys_that_a_model_cannot_read_give_a_row():
    found = measured(tiny_models.gpt_oss(), ["mlx-affine4", "tq4"], texts=texts(1, 60), prefill=50, steps=10)
    assert found["mlx-affine4"].error == (
        "mlx-lm's quantized caches do not run on this model: ValueError: Quantized SDPA does not support attention "
        "sinks."
    )
    assert found["tq4"].overall is not None


def test_unknown_schemes_and_models_raise(llama):
    for name, message in (
        ("mlx-affine7", "must be one of mlx-affine8, mlx-affine6, .* got 'mlx-affine7'"),
        ("rvq9", "rvq9"),
    ):
        with pytest.raises(SchemeError, match=message):
            ruler.check_scheme(name)
    with kvq.compress(llama, "tq4"), pytest.raises(UnsupportedModelError, match="compressed once"):
        measured(llama, ["tq4"])


def test_short_texts_are_named():
    with pytest.raises(kvq.KVQError, match=r"180 \+ 76 = 256 tokens, got 255 in short"):
        measured(None, ["tq4"], texts={"long": [1] * 300, "short": [1] * 255})


def test_all_schemes_are_lossy_and_have_mlx_lms():
    names = ruler.all_schemes(64)
    assert {"tq1", "tq6", "rvq3", "affine8", "turbo4v2", "kivi2", "qjl1", *AFFINE_SCHEMES} <= set(names)
    assert not {"fp16", "identity"} & set(names) and len(set(names)) == len(names)
    for name in names:
        ruler.check_scheme(name)


def test_head_dim_is_the_first_layers(llama):
    assert ruler.head_dim(llama) == 64
    assert ruler.head_dim(tiny_models.qwen3_next()) == tiny_models.qwen3_next().args.head_dim


# ---- groups, and the model afterwards --------------------------------------------------------------------------------


def test_groups_keep_the_order_and_do_not_change_figures(llama, monkeypatch):
    schemes = ["tq4", "mlx-affine4", "fp16", "tq@2.5", "tq2"]
    asked = {"texts": texts(2, 200), "prefill": 180, "steps": 20, "joint": False}
    together = measured(llama, schemes, **asked)
    monkeypatch.setattr(ruler, "TOGETHER", 2)
    assert measured(llama, schemes, **asked) == together


def state_of(model: Any) -> tuple[Any, ...]:
    """What compressing changes; other models of this process may have their module routed."""
    gc.collect()  # of those that are gone
    attention = llama_file.scaled_dot_product_attention
    users = attention.users if isinstance(attention, RoutedAttention) else 0
    return "make_cache" in vars(model), attention, users, len(stock_caches(model))


@pytest.mark.parametrize("joint", [True, False])
def test_the_model_is_as_before_even_after_an_error(llama, monkeypatch, joint):
    before = state_of(llama)
    assert not before[0]
    asked = {"prefill": 20, "steps": 4, "joint": joint}
    monkeypatch.setattr(ruler, "TOGETHER", 1)
    results = measure(llama, texts(1, 24), ["tq4", "tq3"], **asked)
    next(results)
    assert state_of(llama) == before
    monkeypatch.setattr(ruler, "divergence", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert state_of(llama) == before
    with kvq.compress(llama, "tq4"):
        assert state_of(llama) != before


def test_progress_is_told(llama):
    told: list[tuple[str, int, int]] = []
    measured(llama, ["tq4", "tq3"], texts=texts(1, 30), prefill=20, steps=10, progress=lambda *said: told.append(said))
    assert ("2 schemes: steps", 9, 10) in told and all(done < of for _, done, of in told)
