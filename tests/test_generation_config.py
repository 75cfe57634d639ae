"""The table of GenerationConfig's fields against the installed transformers, and against docs/generation.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from refusals import message_of
from transformers import GenerationConfig

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.errors import GenerationError
from mlx_kvq_plugin.generation import FIELDS, parity_table
from mlx_kvq_plugin.generation.config import read_settings
from mlx_kvq_plugin.generation.fields import HARMLESS, REFUSED, SUPPORTED

DOC = Path(__file__).resolve().parent.parent / "docs" / "generation.md"

# A value away from the default for every field that is refused.
ASKED: dict[str, Any] = {
    "num_beams": 2,
    "use_mtp": True,
    "use_cache": False,
    "max_cache_len": 64,
    "top_h": 0.4,
    "typical_p": 0.9,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 3e-4,
    "encoder_repetition_penalty": 1.2,
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 1,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (2, 1.1),
    "sequence_bias": {(3,): 1.0},
    "token_healing": True,
    "guidance_scale": 1.5,
    "watermarking_config": {"greenlist_ratio": 0.25},
    "output_attentions": True,
    "output_hidden_states": True,
    "encoder_no_repeat_ngram_size": 2,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.8,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash",
    "continuous_batching_config": {},
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
    "constraints": [],
    "force_words_ids": [[1]],
}


def test_every_field_of_the_installed_transformers_is_in_the_table() -> None:
    assert set(GenerationConfig().to_dict()) <= set(FIELDS)
    assert {field.status for field in FIELDS.values()} == {SUPPORTED, REFUSED, HARMLESS}


def test_defaults_are_those_of_transformers() -> None:
    """A model or call that sets nothing asks for these; None is no default of theirs."""
    for name, value in GenerationConfig._get_default_generation_params().items():
        assert FIELDS[name].default == value, name
    for name, value in GenerationConfig().to_dict().items():
        assert value is None or name == "transformers_version"
        assert FIELDS[name].asks_for_nothing(None)


def test_a_config_of_nothing_but_defaults_generates() -> None:
    defaults = GenerationConfig(**GenerationConfig._get_default_generation_params())
    lm = kvq.CausalLM(tiny_models.llama(), kv_scheme="tq4")
    assert lm.generate([1, 2], defaults, max_new_tokens=3).tolist() == lm.generate([1, 2], max_new_tokens=3).tolist()


def test_the_config_that_ships_with_gemma_is_read() -> None:
    fields = {"bos_token_id": 2, "cache_implementation": "hybrid", "do_sample": True, "eos_token_id": [1, 106]}
    settings = read_settings({**fields, "pad_token_id": 0, "top_k": 64, "top_p": 0.95}, 1)
    assert settings.scheme is None and settings.ends == (1, 106) and settings.pad == 0
    assert settings.sampling is not None and (settings.sampling.top_k, settings.sampling.top_p) == (64, 0.95)


def test_the_refused_fields_are_all_tried() -> None:
    assert set(ASKED) == {name for name, field in FIELDS.items() if field.status == REFUSED}


@pytest.mark.parametrize("name", ASKED)
def test_a_refused_field_is_refused_by_name(name: str) -> None:
    field = FIELDS[name]
    for value in (None, field.default, *field.neutral):
        read_settings({name: value}, 1)
    with pytest.raises(GenerationError) as caught:
        read_settings({name: ASKED[name]}, 1)
    text = str(caught.value)
    assert text.startswith(f"{name} must be left at {field.default!r}, got {ASKED[name]!r}")
    assert field.note and field.note in text and "\n" not in text


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.status == HARMLESS])
def test_a_harmless_field_changes_nothing(name: str) -> None:
    assert FIELDS[name].note
    assert read_settings({name: 3}, 1) == read_settings({}, 1)


# A value away from the default for every supported field that a settings object must show.
CHANGES: dict[str, Any] = {
    "max_length": 40,
    "max_new_tokens": 7,
    "min_length": 9,
    "min_new_tokens": 2,
    "max_time": 1.0,
    "stop_strings": ["end"],
    "do_sample": True,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[3]],
    "renormalize_logits": True,
    "suppress_tokens": [3],
    "begin_suppress_tokens": [3],
    "num_return_sequences": 2,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 3,
    "eos_token_id": 3,
    "num_assistant_tokens": 5,
    "prefill_chunk_size": 16,
}
ELSEWHERE = {"bos_token_id", "cache_implementation", "cache_config"}  # read before, and tested in test_generation.py


def test_the_supported_fields_are_all_tried() -> None:
    assert set(CHANGES) | ELSEWHERE == {name for name, field in FIELDS.items() if field.status == SUPPORTED}


@pytest.mark.parametrize("name", CHANGES)
def test_a_supported_field_is_read(name: str) -> None:
    base = {"do_sample": True} if name in ("temperature", "top_k", "top_p", "min_p") else {}
    assert read_settings({**base, name: CHANGES[name]}, 1) != read_settings(base, 1)


@pytest.mark.parametrize("where", ["call", "config", "model"])
def test_an_unknown_field_is_refused_wherever_it_comes_from(where: str) -> None:
    strange = GenerationConfig(frobnicate=3)
    lm = kvq.CausalLM(tiny_models.llama(), generation_config=strange if where == "model" else None)
    with pytest.raises(GenerationError, match=r"frobnicate=3"):
        lm.generate([1], strange if where == "config" else None, **({"frobnicate": 3} if where == "call" else {}))


def test_the_table_in_the_document_is_the_tables_own() -> None:
    found = re.search(r"<!-- parity: begin -->\n(.*?)\n<!-- parity: end -->", DOC.read_text(), re.DOTALL)
    assert found is not None and found[1] == parity_table()


@pytest.mark.real_model
def test_the_code_in_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert len(blocks) >= 9
    names: dict[str, Any] = {"__name__": "document"}
    for block in blocks:
        exec(compile(block, str(DOC), "exec"), names)
    printed = capsys.readouterr().out
    assert "num_beams must be left at 1, got 4" in printed and "'role': 'assistant'" in printed
    assert (tmp_path / "tower.safetensors").is_file()


def test_what_the_document_points_to_exists() -> None:
    text = DOC.read_text()
    paths = re.findall(r"`((?:tests|mlx_kvq_plugin|docs)/[\w./]+)`|\b(docs/\w+\.md)", text)
    assert paths and all((DOC.parent.parent / (a or b)).is_file() for a, b in paths)


def test_numbers_of_numpy_are_numbers() -> None:
    lm = kvq.CausalLM(tiny_models.llama(), kv_scheme="tq4")
    prompt = list(range(1, 12))
    expected = lm.generate(prompt, max_new_tokens=6, eos_token_id=[3, 4], suppress_tokens=[5, 6]).tolist()
    fields = {
        "max_new_tokens": np.int64(6),
        "eos_token_id": np.array([3, 4]),
        "suppress_tokens": [np.int32(5), np.uint8(6)],
        "do_sample": np.bool_(False),
        "temperature": np.float32(1.0),
    }
    assert lm.generate(prompt, **fields).tolist() == expected
    config = GenerationConfig(max_new_tokens=6, eos_token_id=[3, 4])
    config.suppress_tokens, config.max_new_tokens = [np.int64(5), np.int64(6)], np.int64(6)
    assert lm.generate(prompt, config).tolist() == expected
    assert "integer" in message_of(lambda: lm.generate(prompt, max_new_tokens=np.float64(6.0)))
    assert "integer" in message_of(lambda: lm.generate(prompt, max_new_tokens=np.bool_(True)))
