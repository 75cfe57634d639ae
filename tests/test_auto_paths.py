"""Models with `auto` schemes do what mlx-lm does with them: every layer has codecs of its own on every path."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm.generate import generate_step
from test_cli import model_folder
from test_planning import held_bytes
from test_sensitivity import Stubborn
from test_server import greedy, ids, in_process, sentence
from test_speculative import prompt_of, speculative

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import self_calibration
from mlx_kvq_plugin.calibration_files import load_calibration, save_calibration
from mlx_kvq_plugin.checking import EXACT, OK, check_model
from mlx_kvq_plugin.errors import CalibrationError, UnsupportedModelError
from mlx_kvq_plugin.planning import adapter_of, plan_caches, plan_scheme

Run = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.usefixtures("auto_folder")

SCHEME = "auto@3"
MODELS = {
    "llama": tiny_models.llama,
    "sliding windows": tiny_models.gemma3_text,
    "shared layers": tiny_models.gemma4_text,
    "recurrent layers": tiny_models.qwen3_next,
    "attention beside recurrence": tiny_models.falcon_h1,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


def labels(cache: list[Any]) -> list[str]:
    return [entry.spec.label for entry in cache]


@pytest.mark.parametrize("name", list(MODELS))
def test_every_way_of_using_a_cache(name: str) -> None:
    """Steps, chunks, trims, files, copies, threads, uneven batches and late joiners, past windows too."""
    model = MODELS[name]()
    with kvq.compress(model, SCHEME) as compression:
        choice = compression.maker.choice
    assert choice is not None and len({codec for layer in choice.layers for codec in (layer.key, layer.value)}) > 1
    report = check_model(model, None, [SCHEME], tokens=tiny_models.WINDOW + 30)
    assert report.passed, str(report)
    cells = {check.name: check.status for check in report.checks if check.scheme == SCHEME}
    assert cells["save and load"] == EXACT and cells["single steps"] == OK
    same = {check.name: check.status in (EXACT, OK) for check in report.checks if check.scheme == "identity"}
    assert {row: status in (EXACT, OK) for row, status in cells.items()} == same  # refused where identity is


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], str]:
    """The scheme that goes by a model's self-calibration with the keys of one layer, and a whole layer, 1e5 times."""

    def scheme_of(name: str, model: Any) -> str:
        with kvq.compress(model, SCHEME) as compression:
            (path,) = compression.maker.choice.kept
            layers = [layer.index for layer in compression.maker.choice.layers]
        calibration = load_calibration(path)
        weights = {side: dict(found) for side, found in calibration.sensitivities["gradient"].items()}
        sensitive = (("key", layers[0]), ("key", layers[1]), ("value", layers[1]))
        for side, layer in sensitive:
            weights[side][layer] = tuple(1e5 * weight for weight in weights[side][layer])
        own = tmp_path_factory.mktemp("loud") / f"{name}.safetensors"
        kinds = {**calibration.sensitivities, "gradient": weights}
        save_calibration(own, replace(calibration, sensitivities=kinds))
        sizes = {(c.side, c.layer): c.elements for c in calibration.components("gradient", layers)}
        share = sum(sizes[one] for one in sensitive) / sum(sizes.values())
        return f"auto@{4 + 12 * share:.4f},calibration={own}"

    return scheme_of


@pytest.mark.parametrize("name", list(MODELS))
def test_layers_that_need_sixteen_bits(name: str, loud: Callable[[str, Any], str]) -> None:
    """Exact keys beside coded values, and a layer that stays as mlx-lm makes it, on every path."""
    model = MODELS[name]()
    scheme = loud(name, model)
    with kvq.compress(model, scheme) as compression:
        first, second, *others = compression.maker.choice.layers
        plans = {plan.index: plan for plan in compression.maker.plan()}
    assert first.key == second.key == second.value == "identity" and first.value != "identity"
    assert plans[second.index].spec is None and plans[second.index].reason == "16 bits by need"
    assert all((layer.key, layer.value) != ("identity", "identity") for layer in others)
    report = check_model(model, None, [scheme], tokens=tiny_models.WINDOW + 30)
    assert report.passed, str(report)


@pytest.mark.parametrize("draft_scheme", [SCHEME, None])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_speculative_decoding_gives_the_tokens_of_greedy_decoding(name: str, draft_scheme: str | None) -> None:
    model, draft, prompt = tiny_models.ADAPTED[name](), tiny_models.llama(seed=3), prompt_of(130)
    with kvq.compress(model, SCHEME):
        expected = [int(token) for token, _ in generate_step(prompt, model, max_tokens=80)]
        if draft_scheme is None:
            assert speculative(model, draft, prompt, 3)[0] == expected
        else:
            with kvq.compress(draft, draft_scheme):
                assert speculative(model, draft, prompt, 3)[0] == expected


@pytest.mark.filterwarnings("ignore:mlx_lm.server is not recommended:UserWarning")
def test_served_answers_are_those_of_one_at_a_time(tiny: Path) -> None:
    prompts = [("user", f"{i * 7919} {sentence(random.Random(i), 30)}") for i in range(4)]
    with in_process(tiny, SCHEME) as served, ThreadPoolExecutor(4) as pool:
        together = [ids(answer) for answer in pool.map(lambda prompt: served.chat(prompt), prompts)]
        assert served.report()["scheme"] == SCHEME
    assert together == [greedy(tiny, [prompt], SCHEME) for prompt in prompts]


@pytest.mark.parametrize("other", [None, "tq4", "auto@2"])
def test_a_saved_prompt_goes_on_in_a_model_of_another_scheme(other: str | None, tmp_path: Path) -> None:
    path, prompt, more = tmp_path / "prompt.safetensors", prompt_of(140), [5, 6, 7]
    model = tiny_models.llama()
    with kvq.compress(model, SCHEME):
        cache = kvq.make_prompt_cache(model)
        model(prompt[None], cache=cache)
        kvq.save_prompt_cache(path, cache, model=model, token_ids=prompt.tolist())
        saved = labels(cache)
        expected = [model(mx.array([[token]]), cache=cache) for token in more]
    resumed = tiny_models.llama()
    compression = kvq.compress(resumed, other) if other else None
    cache, info = kvq.load_prompt_cache(path, resumed)
    assert info.scheme == SCHEME and labels(cache) == saved
    if compression is not None:
        assert labels(kvq.make_prompt_cache(resumed)) != saved
    for token, logits in zip(more, expected, strict=True):
        assert mx.array_equal(resumed(mx.array([[token]]), cache=cache), logits)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_planned_bytes_are_those_that_caches_hold(name: str) -> None:
    model, tokens = tiny_models.ADAPTED[name](), 400
    before = plan_scheme(model, kvq.parse_scheme(SCHEME), adapter_of(model), 4)
    with kvq.compress(model, SCHEME) as compression:
        plan, cache = plan_caches(compression.maker, 4), kvq.make_prompt_cache(model)
        assert [layer.spec and layer.spec.label for layer in plan.layers] == labels(cache)
        held, most = held_bytes(plan, cache, tokens, 9, mx.float32)
    assert (plan.nbytes(tokens, steps=9), plan.peak_nbytes(tokens, steps=9)) == (held, most)
    assert before.nbytes(tokens, steps=9) == pytest.approx(held, rel=0.05)  # which layer gets what is not known there


def test_inspect_prints_what_was_predicted_and_measured(tiny: Path, run: Run) -> None:
    code, out, _ = run("inspect", tiny, "--kv-scheme", "auto:kl<=0.05")
    assert code == 0 and out.count("  kept in ") == 2
    code, out, _ = run("inspect", tiny, "--kv-scheme", "auto:kl<=0.05", "--json")
    choice = json.loads(out)["schemes"][-1]["choice"]
    assert code == 0 and 0.0 < choice["measured_kl"] <= 0.05 and choice["kl"] > 0.0


def test_commands_say_what_was_chosen_and_where_it_is_kept(tiny: Path, run: Run) -> None:
    code, _, err = run("generate", tiny, "--kv-scheme", SCHEME, "--prompt", "one", "--max-tokens", "2")
    assert code == 0 and f"kvq: {SCHEME}: 2.917 bits an element" in err and err.count("kvq: kept in ") == 1


def test_plan_knows_the_bytes_of_bits_and_not_those_of_a_bound(tiny: Path, run: Run) -> None:
    code, out, _ = run("plan", tiny, "--context", "1k", "--kv-scheme", SCHEME, "--kv-scheme", "auto:kl<=0.05", "--json")
    schemes = {row["scheme"]: row for row in json.loads(out)["schemes"]}
    assert code == 0 and not schemes[SCHEME]["error"]
    assert "must be asked of a model with its weights" in schemes["auto:kl<=0.05"]["error"]


def test_models_of_transformers_names(tiny: Path) -> None:
    lm = kvq.AutoModelForCausalLM.from_pretrained(str(tiny), kv_scheme=SCHEME)
    prompts = [prompt_of(140).tolist(), prompt_of(90).tolist()]
    alone = [lm.generate(prompt, max_new_tokens=20)[0, len(prompt) :].tolist() for prompt in prompts]
    padded = mx.array([prompts[0], [0] * 50 + prompts[1]])
    mask = mx.array([[1] * 140, [0] * 50 + [1] * 90])
    together = lm.generate(padded, attention_mask=mask, max_new_tokens=20)[:, 140:].tolist()
    assert [row[: len(tokens)] for row, tokens in zip(together, alone, strict=True)] == alone  # then padding
    assert len(set(labels(kvq.make_prompt_cache(lm.model)))) > 1


def test_a_model_without_gradients_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_calibration, "LEAST_PAIRS", 0.0)
    model = tiny_models.llama()
    model.model.layers[0].mlp = Stubborn([])
    model.eval()
    for scheme in (SCHEME, "auto:kl<=0.05"):
        with pytest.raises(CalibrationError, match=r"gradients must pass .* calibrate where they do .* like tq4"):
            kvq.compress(model, scheme)
    assert "make_cache" not in vars(model)
    with kvq.compress(model, "tq4"):
        assert len(kvq.make_prompt_cache(model)) == 3


def test_a_part_of_a_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole, message = (
        tiny_models.llama(),
        tiny_models.llama(),
        "several ranks must have a scheme of whole bits, got",
    )
    monkeypatch.setattr(model.model, "pipeline_size", 2, raising=False)
    for scheme in (SCHEME, "tq@2.5"):
        with pytest.raises(UnsupportedModelError, match=f"{message} '{scheme}'"):
            kvq.compress(model, scheme)
    with kvq.compress(whole, SCHEME):  # before it is split: its layers would be counted anew
        monkeypatch.setattr(whole.model, "pipeline_size", 2, raising=False)
        with pytest.raises(UnsupportedModelError, match=message):
            kvq.make_prompt_cache(whole)
