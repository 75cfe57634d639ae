"""Schemes for a context: the newest tokens that layers keep dense, and that bytes are those that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm.generate import generate_step
from test_auto import calibration
from test_batch import Batch, alone, prompts
from test_planning import held_bytes
from test_speculative import prompt_of, speculative

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.auto import choose
from mlx_kvq_plugin.checking import EXACT, OK, check_model
from mlx_kvq_plugin.dense_tokens import NEWEST, newest_tokens
from mlx_kvq_plugin.errors import AllocationError, SchemeError
from mlx_kvq_plugin.planning import SchemePlan, adapter_of, head_bits, plan_caches, plan_scheme
from mlx_kvq_plugin.rates import auto_codecs
from mlx_kvq_plugin.ruler import measure


@pytest.mark.parametrize(
    ("tokens", "bits", "newest"),
    [
        (512, 3.25, 16),
        (2048, 3.25, 16),
        (4096, 3.25, 48),
        (16384, 3.25, 144),
        (2048, 2.25, 16),
        (4096, 8.0, 112),
        (256, 16.0, 144),
        (10**6, 1.25, 144),
    ],
)
def test_the_law(tokens: int, bits: float, newest: int) -> None:
    assert newest_tokens(tokens, bits) == newest
    assert newest == min(NEWEST, key=lambda r: (r + 8) ** -0.3 * 4 ** ((16 - bits) * r / tokens))


def test_fewer_where_there_is_no_room() -> None:
    assert [newest_tokens(10**6, 3.25, most) for most in (144, 143, 100, 17, 16, 3)] == [144, 112, 80, 16, 16, 16]


@pytest.mark.parametrize("scheme", ["auto@3.25,context=4096", "auto@3,family=rvq,per=head,context=256"])
def test_schemes_are_read_and_written(scheme: str) -> None:
    config = kvq.parse_scheme(scheme)
    assert kvq.format_scheme(config) == scheme and config.context in (4096, 256)
    assert kvq.KVQConfig.from_json(config.to_json()) == config
    assert kvq.format_scheme(kvq.parse_scheme("auto@3,context=0,recent=16")) == "auto@3"


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("tq4,context=4096", "context must go with bits of auto, got context=4096 with k=tq4,v=tq4; write"),
        ("tq@3,context=4096", "context must go with bits of auto"),
        ("auto:kl<=0.02,context=4096", "context must go with bits of auto"),
        ("auto@3,context=255", "context must be at least 256 tokens, got 255"),
        ("auto@3,context=-1", "context in a scheme must be a non-negative integer"),
        ("auto@3,context=4096,sinks=0", "dense tokens must be left to auto .* drop either these or the context"),
        ("auto@4,context=4096,recent=64", "got sinks=4 and recent=64 with context=4096"),
    ],
)
def test_wrong_schemes_have_their_sentence(scheme: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        kvq.parse_scheme(scheme)


BITS_OF = {name: bits for bits, name in auto_codecs("tq").items()}
WINDOWS = {i: 512 for i in range(10) if i % 3}


def spent(config: kvq.KVQConfig, windows: dict[int, int], codecs: Callable[[int], tuple[str, str, int]]) -> float:
    """Bits of all tokens that 10 layers of two KV heads of 64 hold at the scheme's context, packed and dense."""
    total = 0.0
    for layer in range(10):
        *names, recent = codecs(layer)
        tokens, sinks = min(config.context, windows.get(layer, config.context)), 0 if layer in windows else 4
        stored = sum(config.layer_spec(*names).bits_per_element(64, 64))
        total += 128 * (stored * (tokens - sinks - recent) + 2 * 16 * (sinks + recent))
    return total


@pytest.mark.parametrize("context", [256, 2048, 8192, 65536])
@pytest.mark.parametrize("windows", [{}, WINDOWS], ids=["full", "sliding"])
@pytest.mark.parametrize("options", ["", ",family=tcq", ",per=head"])
def test_bits_are_those_of_an_even_scheme(context: int, windows: dict[int, int], options: str) -> None:
    config = kvq.parse_scheme(f"auto@3.25{options},context={context}")
    allocation, choice = choose(calibration(), config, range(10), windows, "tests")

    def chosen(layer: int) -> tuple[str, str, int]:
        return allocation.codec("key", layer), allocation.codec("value", layer), allocation.recent[layer]

    even = spent(config, windows, lambda _: ("tq3", "tq3", 16))
    step = 2 * 128 * context  # one bit more for a side of the largest layer
    assert even - step < spent(config, windows, chosen) <= even
    newest = {layer: newest_tokens(min(context, windows.get(layer, context)), 3.25) for layer in range(10)}
    assert allocation.recent == newest == {layer.index: layer.recent for layer in choice.layers}
    shown = sorted({*newest.values()})
    assert f"{shown[0]} to {shown[-1]} last" in choice.lines()[1] or len(shown) == 1
    assert f"of packed tokens at {context} tokens" in choice.summary() and "dense newest" in choice.lines()[2]


def test_bits_go_where_they_go_without_a_context() -> None:
    """At a length where dense tokens are as usual, so that equal bits are left."""
    own = calibration({("key", 1): 40.0, ("value", 3): 9.0})
    for bits in (2.25, 3.25):
        usual = choose(own, kvq.parse_scheme(f"auto@{bits}"), range(10), {}, "tests")[1]
        there = choose(own, kvq.parse_scheme(f"auto@{bits},context=2000"), range(10), {}, "tests")[1]
        assert (there.layers, there.kl, there.even_kl) == (usual.layers, usual.kl, usual.even_kl)

    def found(scheme: str) -> list[kvq.LayerChoice]:
        return list(choose(own, kvq.parse_scheme(scheme), range(10), WINDOWS, "tests")[1].layers)

    for usual_layer, short, long in zip(
        *map(found, ("auto@3.25", "auto@3.25,context=2000", "auto@3.25,context=99999")), strict=True
    ):
        for side in ("key", "value"):
            bits, near, far = (BITS_OF[getattr(layer, side)] for layer in (usual_layer, short, long))
            assert abs(near - bits) <= 1
            assert far >= bits - 1 if usual_layer.index in WINDOWS else abs(far - bits) <= 1  # what is left fits there


def test_dense_tokens_never_take_the_fewest_bits_away() -> None:
    """At the lowest bits there is nothing to take more dense tokens from."""
    for bits, newest in (("1.25", {16}), ("1.27", {16, 48}), ("1.5", {144})):
        config = kvq.parse_scheme(f"auto@{bits},context=16384")
        allocation, choice = choose(calibration(), config, range(10), {}, "tests")
        assert {*allocation.recent.values()} <= newest and choice.bits >= 1.25
    with pytest.raises(AllocationError, match=r"must be in 1\.25 to 16 on this model, all-in, got 1\.2;"):
        choose(calibration(), kvq.parse_scheme("auto@1.2,context=16384"), range(10), {}, "tests")


# ---- models ---------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("auto_folder")

SCHEME = "auto@3.25,context=8192"
MODELS = {"llama": {144}, "llama_sliding": {16, 144}, "gemma3_text": {16, 144}, "gemma4_text": {16, 144}}


def newest_of(plan: SchemePlan) -> list[int | None]:
    return [layer.spec and layer.spec.recent for layer in plan.layers]


@pytest.mark.parametrize("name", ["llama", "llama_sliding", "gemma3_text"])
def test_bytes_at_the_context_are_at_most_those_of_even_bits(name: str) -> None:
    model = getattr(tiny_models, name)()
    adapter, tokens = adapter_of(model), 8192
    even = plan_scheme(model, kvq.parse_scheme("tq3"), adapter)
    (bits,) = {bits for layer in even.layers for side in head_bits(layer) for bits in side}
    config = kvq.parse_scheme(f"auto@{bits},context={tokens}")
    before = plan_scheme(model, config, adapter)
    with kvq.compress(model, config) as compression:
        plan = plan_caches(compression.maker)
    for steps in (1, 9, 256):
        most = even.nbytes(tokens, steps=steps)
        assert 0.95 * most < plan.nbytes(tokens, steps=steps) <= most
        assert 0.95 * most < before.nbytes(tokens, steps=steps) <= most
    assert newest_of(before) == newest_of(plan) and {*newest_of(plan)} == MODELS[name]


@pytest.mark.parametrize("name", list(MODELS))
def test_planned_bytes_are_those_that_caches_hold(name: str) -> None:
    model, tokens = getattr(tiny_models, name)(), 400
    with kvq.compress(model, SCHEME) as compression:
        plan, cache = plan_caches(compression.maker, 4), kvq.make_prompt_cache(model)
        held, most = held_bytes(plan, cache, tokens, 9, mx.float32)
    assert (plan.nbytes(tokens, steps=9), plan.peak_nbytes(tokens, steps=9)) == (held, most)
    assert {*newest_of(plan)} == MODELS[name]


@pytest.mark.parametrize("name", list(MODELS))
def test_every_way_of_using_a_cache(name: str) -> None:
    """Steps, chunks, trims, files, copies, threads, uneven batches and late joiners, past windows too."""
    model = getattr(tiny_models, name)()
    report = check_model(model, None, [SCHEME], tokens=tiny_models.WINDOW + 60)
    assert report.passed, str(report)
    cells = {check.name: check.status for check in report.checks if check.scheme == SCHEME}
    assert cells["save and load"] == EXACT and cells["single steps"] == OK
    same = {check.name: check.status in (EXACT, OK) for check in report.checks if check.scheme == "identity"}
    assert {row: status in (EXACT, OK) for row, status in cells.items()} == same  # refused where identity is


@pytest.mark.parametrize("name", ["llama_sliding", "gemma3_text"])
def test_batches_give_every_row_what_it_has_alone(name: str) -> None:
    model, given = getattr(tiny_models, name)(), prompts([230, 97, 171])
    with kvq.compress(model, SCHEME):
        assert {cache.spec.recent for cache in kvq.make_prompt_cache(model)} == {16, 144}
        expected = [alone(model, prompt, steps) for prompt, steps in zip(given, (20, 40, 30), strict=True)]
        batch = Batch(model)
        batch.add(given[:2], [20, 40])
        batch.run(7)
        batch.add(given[2:], [30])
        assert list(batch.run().tokens.values()) == expected
        assert all({cache.spec.recent for cache in caches} == {16, 144} for caches in batch.caches.values())


@pytest.mark.parametrize("name", ["llama_sliding", "gemma3_text"])
def test_speculative_decoding_gives_the_tokens_of_greedy_decoding(name: str) -> None:
    model, draft, prompt = getattr(tiny_models, name)(), tiny_models.llama(seed=3), prompt_of(130)
    with kvq.compress(model, SCHEME), kvq.compress(draft, SCHEME):
        expected = [int(token) for token, _ in generate_step(prompt, model, max_tokens=80)]
        assert speculative(model, draft, prompt, 3)[0] == expected


def test_a_saved_prompt_keeps_its_dense_tokens_in_a_model_of_another_scheme(tmp_path: Path) -> None:
    path, prompt, more = tmp_path / "prompt.safetensors", prompt_of(230), range(5, 30)
    model = tiny_models.gemma3_text()
    with kvq.compress(model, SCHEME):
        cache = kvq.make_prompt_cache(model)
        model(prompt[None], cache=cache)
        kvq.save_prompt_cache(path, cache, model=model, token_ids=prompt.tolist())
        expected = [model(mx.array([[token]]), cache=cache) for token in more]
    resumed = tiny_models.gemma3_text()
    with kvq.compress(resumed, "tq4"):
        loaded, info = kvq.load_prompt_cache(path, resumed)
        assert info.scheme == SCHEME and [c.spec for c in loaded] == [c.spec for c in cache]
        assert {c.spec.recent for c in loaded} == {16, 144}
        for token, logits in zip(more, expected, strict=True):
            assert mx.array_equal(resumed(mx.array([[token]]), cache=loaded), logits)
    assert [c.packed_tokens for c in loaded] == [c.packed_tokens for c in cache]


def test_runs_in_lockstep_compute_what_they_compute_alone() -> None:
    model = tiny_models.gemma3_text()
    tokens = {"text": prompt_of(260).tolist()}
    apart, joint = (
        measure(model, tokens, [SCHEME, "tq3"], prefill=230, steps=30, joint=joint) for joint in (False, True)
    )
    for one, other in zip(apart, joint, strict=True):
        assert one.overall is not None and other.overall is not None, (one.error, other.error)
        assert one.overall.kl_mean == pytest.approx(other.overall.kl_mean, rel=1e-2) and one.nbytes == other.nbytes
