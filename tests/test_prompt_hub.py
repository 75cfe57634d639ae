"""Prompt caches in repositories, against a stand-in of the hub: pushed, pulled, resumed; whatever is wrong is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import yaml
from huggingface_hub import constants
from local_hub import COMMIT, Hub, local_hub
from refusals import message_of

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.cli import main
from mlx_kvq_plugin.errors import PromptCacheCorruptError, PromptCacheError, PromptCacheHubError
from mlx_kvq_plugin.prompt_hub import CARD_NAME, FILE_NAME

REPOSITORY = "me/story"
PROMPT = np.random.default_rng(5).integers(1, tiny_models.VOCAB, 150).tolist()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with local_hub(monkeypatch, tmp_path / "hub-cache") as found:
        yield found


@pytest.fixture(scope="module")
def lm() -> kvq.CausalLM:
    return kvq.CausalLM(tiny_models.llama(), kv_scheme="tq3")


@pytest.fixture
def file(lm: kvq.CausalLM, tmp_path: Path) -> Path:
    path = tmp_path / "story.safetensors"
    lm.prefill(PROMPT).save(path)
    return path


@pytest.mark.filterwarnings("ignore:Use 'content=<...>'")  # of the hub's library, on its own LFS uploads
@pytest.mark.parametrize("large", [1, 2**62], ids=["lfs", "regular"])
def test_a_cache_goes_on_from_a_repository_as_it_goes_on_here(lm: kvq.CausalLM, hub: Hub, large: int) -> None:
    hub.large = large
    cache = lm.prefill(PROMPT)
    address = cache.push_to_hub(REPOSITORY, metadata={"title": "a story"}, token="hf_secret")
    assert address == f"{hub.address}/{REPOSITORY}/commit/{COMMIT}"
    assert set(hub.files[REPOSITORY]) == {FILE_NAME, CARD_NAME} and bool(hub.objects) == (large == 1)
    assert hub.messages == ["Prompt cache of 149 tokens, scheme tq3"] and hub.tokens == {"hf_secret"}
    pulled = kvq.PromptCache.from_hub(REPOSITORY, lm)
    assert pulled.token_ids == cache.token_ids == PROMPT
    ids = [*PROMPT, 3, 4, 5]
    here = lm.generate(ids, past_key_values=cache, max_new_tokens=20, return_dict_in_generate=True, output_logits=True)
    there = lm.generate(
        ids, past_key_values=pulled, max_new_tokens=20, return_dict_in_generate=True, output_logits=True
    )
    assert here.sequences.tolist() == there.sequences.tolist()
    assert all((a == b).all().item() for a, b in zip(here.logits, there.logits, strict=True))


def test_a_new_repository_gets_a_card_that_is_true(lm: kvq.CausalLM, hub: Hub, file: Path) -> None:
    kvq.push_prompt_cache(file, REPOSITORY, private=True, filename="a/b.safetensors")
    assert hub.private == {REPOSITORY}
    _, facts, text = hub.files[REPOSITORY][CARD_NAME].decode().split("---\n", 2)
    assert yaml.safe_load(facts) == {"library_name": "mlx-kvq-plugin", "tags": ["mlx", "kv-cache", "prompt-cache"]}
    info = kvq.read_prompt_cache_info(file)
    assert "`tq3`" in text and "149" in text and f"{info.nbytes:,}" in text and info.fingerprint in text
    assert f"kvq cache pull {REPOSITORY} --filename a/b.safetensors" in text
    assert kvq.pull_prompt_cache(REPOSITORY, filename="a/b.safetensors").read_bytes() == file.read_bytes()


def test_a_repository_that_exists_keeps_its_card(hub: Hub, file: Path) -> None:
    hub.files[REPOSITORY] = {CARD_NAME: b"mine"}
    address = kvq.push_prompt_cache(file, REPOSITORY, commit_message="more", create_pr=True)
    assert address == f"{hub.address}/{REPOSITORY}/discussions/1" and hub.messages == ["more"]
    assert hub.files[REPOSITORY] == {CARD_NAME: b"mine", FILE_NAME: file.read_bytes()}


def test_what_must_not_be_used_is_not_pushed(hub: Hub, file: Path, tmp_path: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[-10] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    assert "must" in message_of(
        lambda: kvq.push_prompt_cache(tmp_path / "damaged.safetensors", REPOSITORY), PromptCacheCorruptError
    )
    assert "'cache.bin'" in message_of(
        lambda: kvq.push_prompt_cache(file, REPOSITORY, filename="cache.bin"), PromptCacheHubError
    )
    assert not hub.files


def test_refusals_of_the_hub_are_one_sentence(lm: kvq.CausalLM, hub: Hub, file: Path) -> None:
    assert f"{'me/nothing'!r}" in message_of(lambda: kvq.PromptCache.from_hub("me/nothing", lm), PromptCacheHubError)
    hub.files[REPOSITORY] = {CARD_NAME: b"mine"}
    text = message_of(lambda: kvq.pull_prompt_cache(REPOSITORY), PromptCacheHubError)
    assert FILE_NAME in text and "got none" in text
    assert "other" in message_of(lambda: kvq.pull_prompt_cache(REPOSITORY, revision="other"), PromptCacheHubError)
    hub.password = "hf_right"
    for action in (
        lambda: kvq.push_prompt_cache(file, REPOSITORY, token="hf_wrong"),
        lambda: kvq.pull_prompt_cache(REPOSITORY, token="hf_wrong"),
    ):
        assert "token" in message_of(action, PromptCacheHubError)
    kvq.push_prompt_cache(file, REPOSITORY, token="hf_right")
    hub.refusal = (403, "You may not.")
    assert "You may not" in message_of(
        lambda: kvq.push_prompt_cache(file, REPOSITORY, token="hf_right"), PromptCacheHubError
    )


def test_a_download_that_ends_early_is_no_cache(
    lm: kvq.CausalLM, hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts of the hub's library
    kvq.push_prompt_cache(file, REPOSITORY)
    hub.cut[FILE_NAME] = 1000
    message_of(lambda: kvq.PromptCache.from_hub(REPOSITORY, lm), PromptCacheError)
    hub.cut.clear()
    assert kvq.PromptCache.from_hub(REPOSITORY, lm).token_ids == PROMPT
    damaged = bytearray(file.read_bytes())
    damaged[-10] ^= 1
    hub.files["me/damaged"] = {FILE_NAME: bytes(damaged)}
    message_of(lambda: kvq.pull_prompt_cache("me/damaged"), PromptCacheCorruptError)


def test_offline_only_what_was_downloaded_is_used(
    lm: kvq.CausalLM, hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kvq.push_prompt_cache(file, REPOSITORY)
    kvq.pull_prompt_cache(REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert kvq.PromptCache.from_hub(REPOSITORY, lm).token_ids == PROMPT
    text = message_of(lambda: kvq.pull_prompt_cache(REPOSITORY, filename="other.safetensors"), PromptCacheHubError)
    assert "'other.safetensors'" in text and "HF_HUB_OFFLINE" in text
    message_of(lambda: kvq.push_prompt_cache(file, REPOSITORY), PromptCacheHubError)


def test_a_revision_can_be_named(lm: kvq.CausalLM, hub: Hub, file: Path) -> None:
    kvq.push_prompt_cache(file, REPOSITORY)
    assert kvq.PromptCache.from_hub(REPOSITORY, lm, revision=COMMIT).token_ids == PROMPT


def test_a_cache_of_another_model_is_refused(hub: Hub, file: Path) -> None:
    kvq.push_prompt_cache(file, REPOSITORY)
    other = kvq.CausalLM(tiny_models.llama(seed=9), kv_scheme="tq3")
    message_of(lambda: kvq.PromptCache.from_hub(REPOSITORY, other), PromptCacheError)


def test_the_command_line_pushes_and_pulls(
    hub: Hub, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "push", str(file), REPOSITORY, "--private", "--message", "a story"]) == 0
    assert capsys.readouterr().out == f"{hub.address}/{REPOSITORY}/commit/{COMMIT}\n"
    assert hub.private == {REPOSITORY} and hub.messages == ["a story"]
    out = tmp_path / "pulled.safetensors"
    assert main(["cache", "pull", REPOSITORY, "--out", str(out)]) == 0
    assert "149 tokens, scheme tq3" in capsys.readouterr().out
    assert out.read_bytes() == file.read_bytes() and not out.is_symlink()
    assert main(["cache", "pull", "me/nothing", "--out", str(tmp_path / "none.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'me/nothing'" in error and not (tmp_path / "none.safetensors").exists()
