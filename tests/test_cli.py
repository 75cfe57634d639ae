"""The `kvq` command: what it prints, what it refuses and with which exit code, how files go on."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
import tiny_models
from huggingface_hub.errors import LocalEntryNotFoundError
from mlx.utils import tree_flatten
from mlx_lm.generate import generate, generate_step
from mlx_lm.generate import main as mlx_lm_main
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.cli import main
from mlx_kvq_plugin.growth import BLOCK

LLAMA = {**tiny_models.BASE, "model_type": "llama", "head_dim": 64, "eos_token_id": 96}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and m.content == 'forbidden' %}"
    "{{ raise_exception('this system message is refused. Sorry.') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
LONG = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "

Run = Callable[..., tuple[int, str, str]]


def tokenizer_files(folder: Path, template: str | None) -> None:
    """A token per printable character and newline, and `<e>` (96) for the end."""
    characters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<e>", special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | ({"chat_template": template} if template else {}))
    )


def model_folder(
    folder: Path, file: str = "llama", template: str | None = TEMPLATE, dtype: mx.Dtype = mx.float32, **config: Any
) -> Path:
    """A folder that mlx-lm loads, with a tiny random model."""
    folder.mkdir()
    config = {**LLAMA, **config}
    model = tiny_models.build(file, config)
    model.set_dtype(dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer_files(folder, template)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def prompt_file(tiny: Path) -> Path:
    """A tq4 prompt cache of the tiny model, with packed tokens; copy it to change it."""
    path = tiny.parent / "prompt.safetensors"
    assert main(["cache", "create", str(tiny), "--prompt", LONG, "--out", str(path)]) == 0
    return path


# ---- mistakes ------------------------------------------------------------------------------------------------------


def refused(result: tuple[int, str, str], *fragments: str, code: int = 2) -> None:
    """The exit code, nothing on stdout, and one sentence on stderr that has the fragments."""
    found, out, err = result
    assert (found, out) == (code, "")
    assert err.startswith("kvq: error: ") and err.endswith("\n") and err.count("\n") == 1
    assert ". " not in err and "Traceback" not in err
    for fragment in fragments:
        assert fragment in err


WRONG = {
    "no command": ([], "COMMAND"),
    "unknown command": (["compress"], "'compress'"),
    "unknown option": (["schemes", "--bits", "4"], "--bits"),
    "no prompt": (["generate"], "--prompt"),
    "empty prompt": (["generate", "{tiny}", "--prompt", " \n"], "must have text"),
    "unreadable prompt file": (["generate", "{tiny}", "--prompt", "@{tmp}/none.txt"], "none.txt"),
    "folder as prompt file": (["generate", "{tiny}", "--prompt", "@{tmp}"], "must be readable"),
    "negative max-tokens": (["generate", "{tiny}", "--prompt", "x", "--max-tokens", "-3"], "--max-tokens", "'-3'"),
    "word as max-tokens": (["generate", "{tiny}", "--prompt", "x", "--max-tokens", "few"], "--max-tokens", "'few'"),
    "negative temp": (["generate", "{tiny}", "--prompt", "x", "--temp", "-1"], "--temp"),
    "temp not a number": (["generate", "{tiny}", "--prompt", "x", "--temp", "nan"], "--temp"),
    "top-p above 1": (["generate", "{tiny}", "--prompt", "x", "--top-p", "1.5"], "--top-p"),
    "bad scheme": (["generate", "{tiny}", "--prompt", "x", "--kv-scheme", "rvq9"], "rvq9"),
    "bad modifier": (["inspect", "{tiny}", "--kv-scheme", "tq4,edges=-1"], "edges", "'-1'"),
    "unknown folder": (["generate", "./nowhere", "--prompt", "x"], "'./nowhere'"),
    "unknown demo": (["generate", "demo:gpt", "--prompt", "x"], "'gpt'"),
    "unknown demo model": (["demo-model", "smollm2", "gpt"], "'gpt'"),
    "folder without config": (["inspect", "{tmp}"], "config.json"),
    "missing cache file": (["generate", "--prompt", "x", "--prompt-cache", "{tmp}/none.safetensors"], "must exist"),
    "missing file to verify": (["cache", "verify", "{tmp}/none.safetensors"], "must exist"),
    "wrong suffix": (["cache", "create", "{tiny}", "--prompt", "x", "--out", "{tmp}/x.npz"], ".safetensors"),
    "missing folder": (["cache", "create", "{tiny}", "--prompt", "x", "--out", "{tmp}/no/x.safetensors"], "folder"),
    "foreign file": (["cache", "info", "{tiny}/model.safetensors"], "kvq.save_prompt_cache"),
    "system for plain": (["generate", "{tiny}", "--prompt", "x", "--system", "s", "--no-chat-template"], "--system"),
    "system refused": (["generate", "{tiny}", "--prompt", "x", "--system", "forbidden"], "this system message"),
    "head size 0": (["schemes", "--head-dim", "0"], "--head-dim"),
    "context 0": (["inspect", "{tiny}", "--contexts", "0"], "--contexts"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_mistake_is_one_sentence_and_exit_code_2(case: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    argv, *fragments = WRONG[case]
    refused(run(*(argument.format(tiny=tiny, tmp=tmp_path) for argument in argv)), *fragments)


def test_a_wrong_scheme_and_a_wrong_output_fail_before_the_model_is_read(
    run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlx_lm, "load", lambda *_, **__: pytest.fail("loaded"))
    refused(run("generate", tiny, "--prompt", "x", "--kv-scheme", "no"), "'no'")
    refused(run("generate", tiny, "--prompt", "x", "--save-prompt-cache", "x.bin"), "'x.bin'")


def test_prompts_that_are_not_utf8_are_refused(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    refused(run("generate", tiny, "--prompt", f"@{tmp_path / 'latin1.txt'}"), "UTF-8")


def test_unknown_architectures(run: Run, tmp_path: Path) -> None:
    plain = model_folder(tmp_path / "seed_oss", "seed_oss", model_type="seed_oss")
    refused(run("generate", plain, "--prompt", "x"), "'seed_oss'", "--unknown-arch generic")
    code, out, _ = run("inspect", plain, "--unknown-arch", "generic", "--kv-scheme", "tq4")
    assert code == 0 and "layers 0-2: tq4" in out
    sizes = {"moe_intermediate_size": 32, "n_routed_experts": 2, "num_experts_per_tok": 1, "num_attention_heads": 4}
    ranks = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
    latent = model_folder(tmp_path / "mla", "deepseek_v3", model_type="deepseek_v3", **sizes, **ranks)
    refused(run("inspect", latent, "--unknown-arch", "generic"), "'deepseek_v3'", "MLA", "without compression")
    (plain / "config.json").write_text(json.dumps({**LLAMA, "model_type": "nosuch"}))
    refused(run("inspect", plain), "nosuch")


def test_damaged_model_folders_are_named(run: Run, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 40)
    refused(run("generate", folder, "--prompt", "x"), "damaged")
    (folder / "model.safetensors").unlink()
    refused(run("generate", folder, "--prompt", "x"), "No safetensors found")
    (folder / "config.json").write_text("{")
    refused(run("inspect", folder), "JSONDecodeError")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    refused(run("inspect", folder), "damaged")


def test_a_repository_that_cannot_be_had(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("Cannot find a snapshot. To enable downloads, go online.\n\nMore help.")

    monkeypatch.setattr("mlx_lm.utils.snapshot_download", offline)
    refused(run("generate", "nobody/nothing", "--prompt", "x"), "'nobody/nothing'", "Cannot find a snapshot")


def test_what_is_unexpected_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_kvq_plugin.cli.schemes.list_schemes", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["schemes"])


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_kvq_plugin.cli.schemes.list_schemes", interrupt)
    assert main(["schemes"]) == 130


def test_the_console_script_ends_quietly_when_nobody_reads() -> None:
    script = Path(sys.executable).with_name("kvq")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([script, "schemes"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


COMMANDS = ["generate", "chat", "cache create", "cache info", "cache verify", "schemes", "inspect", "demo-model"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_of_the_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    out = capsys.readouterr().out
    examples = out.split("examples:")[1]
    assert stop.value.code == 0
    assert 2 <= examples.count(f"kvq {command}") + examples.count("\n  kvq generate --prompt-cache") <= 4


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("kvq 0.1.0 (mlx-lm ")


# ---- schemes and inspect -------------------------------------------------------------------------------------------


def test_schemes_lists_all_in_rates_and_every_modifier(run: Run) -> None:
    code, out, _ = run("schemes", "--head-dim", 80)
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert code == 0
    assert lines["tq4"][1:] == ["4.200", "3.81x"]  # 40 bytes of codes and a 2-byte norm
    assert lines["fp16"][1:3] == ["16.000", "1.00x"]
    default = kvq.KVQConfig()
    assert f"sinks={default.sinks} first" in out and f"recent={default.recent} last" in out
    assert {"frame=on|off", "edges=N", "sinks=N", "recent=N", "compress_after=chunk|prefill", "seed=N"} <= set(lines)


def test_schemes_as_json_are_the_librarys(run: Run) -> None:
    found = json.loads(run("schemes", "--json")[1])
    expected = [
        {"name": row.name, "bits": row.bits, "note": row.note, "ratio": row.ratio} for row in kvq.list_schemes(128)
    ]
    assert found["head_dim"] == 128 and found["schemes"] == expected
    assert found["modifiers"]["recent=N"].endswith(f"(default: {kvq.KVQConfig().recent})")


@pytest.mark.real_model
def test_inspect_a_real_model(run: Run) -> None:
    folder = kvq.demo_model_path("smollm2", progress=False)
    argv = ("inspect", "demo:smollm2", "--kv-scheme", "rvq1,edges=2,sinks=4,recent=32", "--contexts", 1024)
    code, out, err = run(*argv)
    assert code == 0 and err == ""
    assert out.startswith(f"{folder}: model type llama, 30 cache entries")
    assert out.count("RoPE, base 100000, 32 pairs, half") == 30
    assert "layers 0-1: fp16 (edge layer (edges=2))" in out and "layers 2-27: rvq1\n" in out
    report = json.loads(run(*argv, "--json")[1])
    layer = report["layers"][7]
    assert (layer["kind"], layer["heads"], layer["kv_heads"], layer["key_dim"], layer["window"]) == (
        "full",
        9,
        3,
        64,
        None,
    )
    dense = 2 * 3 * 128  # bytes of a token and layer
    packed = 3 * 2 * (16 + 2)  # rvq1: 2 bits an element and a norm
    fp16, rvq1 = (scheme["nbytes"]["1024"] for scheme in report["schemes"])
    frame = 4 * 3 * (64 + 64 + 32)  # the mean key, what of it does not turn, and a scale a rotary pair
    scales = 4 * 3 * 64  # of value channels
    assert fp16 == 30 * 1024 * dense
    assert rvq1 == 4 * 1024 * dense + 26 * ((36 + BLOCK) * dense + (1024 - 36) * packed + frame + scales)


def test_inspect_gives_the_window_and_other_head_sizes(run: Run, tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = {"head_dim": 80, "hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = model_folder(tmp_path / "d80", layer_types=kinds, sliding_window=160, **config)
    report = json.loads(
        run("inspect", folder, "--kv-scheme", "tq4,sinks=4,recent=32", "--contexts", 100, 1000, "--json")[1]
    )
    assert [(layer["kind"], layer["window"]) for layer in report["layers"]] == [
        ("sliding", 160), ("full", None), ("sliding", 160)
    ]  # fmt: skip
    assert {layer["key_dim"] for layer in report["layers"]} == {80}
    assert {layer["rope"]["pairs"] for layer in report["layers"]} == {40}
    fp16, tq4 = (scheme["nbytes"]["1000"] for scheme in report["schemes"])
    dense, packed = 2 * 160, 2 * 42
    frame = 4 * (80 + 40)
    assert fp16 == dense * (160 + 1024 + 160)  # mlx-lm's full cache grows by 256 tokens
    held = 2 * ((32 + BLOCK) * dense + 128 * packed) + (36 + BLOCK) * dense + 964 * packed + 3 * frame
    assert held <= tq4 <= held + 2 * 128 * packed  # rows of the windows' planes whose tokens have slid out


ROPE = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def test_rope_parameters_that_mlx_lm_ignores_are_warned_about(run: Run, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "new", rope_parameters=ROPE)
    code, out, err = run("inspect", folder)
    assert code == 0 and "base 10000, 32 pairs" in out
    assert err.startswith("kvq: warning: ") and err.count("\n") == 1
    assert "base 500000, type llama3" in err and "with base 10000," in err and "model type llama" in err
    assert json.loads(run("inspect", folder, "--json")[1])["warnings"] == [err.strip().removeprefix("kvq: warning: ")]


def test_rope_parameters_by_layer_type_are_compared_too(run: Run, tmp_path: Path) -> None:
    nested = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    err = run("inspect", model_folder(tmp_path / "nested", rope_parameters=nested))[2]
    assert "base 10000 and 1000000)" in err


def test_rope_parameters_without_effect_are_not_warned_about(run: Run, tmp_path: Path) -> None:
    same = model_folder(tmp_path / "same", rope_theta=2e4, rope_parameters={"rope_theta": 2e4, "rope_type": "default"})
    assert run("inspect", same)[2] == ""
    parameters = {"rope_theta": 3e4, "rope_type": "default"}  # qwen3 reads them
    read = model_folder(
        tmp_path / "read",
        "qwen3",
        model_type="qwen3",
        rope_parameters=parameters,
        max_position_embeddings=512,
    )
    code, out, err = run("inspect", read)
    assert (code, err) == (0, "") and "base 30000" in out


# ---- generate and prompt-cache files -------------------------------------------------------------------------------


def texts(err: str) -> dict[str, str]:
    """The statistics on stderr by their first word."""
    return dict(line.split(": ", 1) for line in err.splitlines() if ": " in line)


def test_statistics_go_to_stderr_and_count_what_the_cache_holds(run: Run, tiny: Path) -> None:
    argv = ("--max-tokens", 9, "--no-chat-template", "--report", "--kv-scheme", "tq4,sinks=4,recent=32")
    code, out, err = run("generate", tiny, "--prompt", LONG, *argv)
    found = texts(err)
    assert code == 0 and len(out) == 10  # a character a token
    assert found["prompt"].startswith(f"{len(LONG)} tokens, ")
    assert found["generation"].startswith("9 tokens, ")
    packed = len(LONG) - 1 - 36 + BLOCK  # the prefill without sinks and recent tokens, then one block of the steps
    assert f"3 of 3 layers compressed, {packed} of {len(LONG) + 9} tokens packed" in found["cache"]
    assert found["peak memory"].endswith(" GiB")
    assert err.count("KVQCache         tq4") == 3


def test_prompts_from_stdin_and_from_a_file_are_the_same(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text(LONG)
    monkeypatch.setattr(sys, "stdin", io.StringIO(LONG))
    results = [
        run("generate", tiny, "--prompt", p, "--max-tokens", 6)[1] for p in (LONG, "-", f"@{tmp_path}/prompt.txt")
    ]
    assert len(results[0]) > 1 and results == results[:1] * 3


def test_sampling_follows_the_seed(run: Run, tiny: Path) -> None:
    def sampled(*options: object) -> str:
        return run("generate", tiny, "--prompt", "abc", "--max-tokens", 12, *options)[1]

    greedy, first = sampled(), sampled("--temp", 5, "--seed", 3)
    assert sampled("--temp", 5, "--seed", 3) == first != greedy
    assert sampled("--temp", 5, "--seed", 4) != first
    assert sampled("--temp", 5, "--seed", 4, "--top-p", 1e-6) == greedy


@pytest.mark.parametrize("plain", [True, False])
def test_create_and_resume_equal_an_unbroken_run(plain: bool, run: Run, tiny: Path, tmp_path: Path) -> None:
    """With a lossless scheme: how the prompt is cut must not matter."""
    options = ["--no-chat-template"] if plain else ["--system", "be brief"]
    path = tmp_path / "c.safetensors"
    common = ("--kv-scheme", "identity", *options)
    unbroken = run("generate", tiny, "--prompt", LONG + "Why?", "--max-tokens", 20, *common)[1]
    assert run("cache", "create", tiny, "--prompt", LONG, "--out", path, *common)[0] == 0
    code, out, err = run("generate", "--prompt-cache", path, "--prompt", "Why?", "--max-tokens", 20)
    assert (code, out) == (0, unbroken)
    held = kvq.read_prompt_cache_info(path).tokens
    assert f"({held} more were in the cache)" in err and held >= len(LONG)


def test_a_resumed_lossy_cache_goes_on_exactly(run: Run, tiny: Path, prompt_file: Path) -> None:
    """The file against the same cache in memory, where most tokens are packed."""
    model, tokenizer = mlx_lm.load(str(tiny))
    opened = f"[user]{LONG}"
    with kvq.compress(model, "tq4"):
        caches = kvq.make_prompt_cache(model)
        for _ in generate_step(mx.array(tokenizer.encode(opened)), model, max_tokens=0, prompt_cache=caches):
            pass
        assert kvq.cache_report(caches).layers[0].packed > 60
        rest = tokenizer.encode("Why?<e>[assistant]")
        unbroken = generate(model, tokenizer, rest, max_tokens=40, prompt_cache=caches)
    assert run("generate", "--prompt-cache", prompt_file, "--prompt", "Why?", "--max-tokens", 40)[1] == unbroken + "\n"


def test_a_saved_reply_is_followed_by_a_new_turn(run: Run, tiny: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    argv = ("--max-tokens", 7, "--kv-scheme", "identity")
    answer = run("generate", tiny, "--prompt", "One?", "--save-prompt-cache", first, *argv)[1].removesuffix("\n")
    info = kvq.read_prompt_cache_info(first)
    model, tokenizer = mlx_lm.load(str(tiny))
    held = tokenizer.decode(info.token_ids)
    assert info.tokens == len(info.token_ids) and held.removesuffix("<e>") == f"[user]One?<e>[assistant]{answer}"
    again = run("generate", "--prompt", "Two?", "--prompt-cache", first, "--save-prompt-cache", second, *argv)[1]
    rendered = f"[user]One?<e>[assistant]{answer}<e>[user]Two?<e>[assistant]"
    expected = generate(model, tokenizer, tokenizer.encode(rendered), max_tokens=7)
    assert again == expected + "\n"
    messages = json.loads(kvq.read_prompt_cache_info(second).metadata["messages"])
    assert [m["content"] for m in messages] == ["One?", answer, "Two?", expected]


def test_turns_that_the_template_rewrites_are_read_again(run: Run, tmp_path: Path) -> None:
    """Templates of reasoning models shorten earlier replies: trimmed, or anew where a window is full."""
    template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{{ m.content if m.role == 'user' else '...' }}<e>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    path = tmp_path / "c.safetensors"
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sliding = {"layer_types": kinds, "sliding_window": 160}
    for name, question, config in (("full", "One?", {}), ("sliding", LONG + LONG, sliding)):
        folder = model_folder(tmp_path / name, template=template, **config)
        argv = ("--max-tokens", 7, "--kv-scheme", "identity")
        run("generate", folder, "--prompt", question, "--save-prompt-cache", path, *argv)
        _, out, err = run("generate", "--prompt", "Two?", "--prompt-cache", path, *argv)
        model, tokenizer = mlx_lm.load(str(folder))
        rendered = tokenizer.encode(f"[user]{question}<e>[assistant]...<e>[user]Two?<e>[assistant]")
        assert out == generate(model, tokenizer, rendered, max_tokens=7) + "\n"
        kept = 0 if config else len("[user]One?<e>[assistant]") - 2
        assert texts(err)["prompt"].startswith(f"{len(rendered) - kept} tokens")


def test_mlx_lm_generate_reads_the_file(
    run: Run, prompt_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = run("generate", "--prompt-cache", prompt_file, "--prompt", "Why?", "--max-tokens", 12)[1]
    argv = [
        "mlx_lm.generate",
        "--prompt-cache-file",
        prompt_file,
        "--prompt",
        "Why?",
        "--max-tokens",
        12,
        "--verbose",
        "F",
    ]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in argv])
    mlx_lm_main()
    assert capsys.readouterr().out == ours


def test_resuming_checks_scheme_system_and_token_ids(run: Run, tiny: Path, prompt_file: Path, tmp_path: Path) -> None:
    argv = ("generate", "--prompt", "x", "--prompt-cache")
    refused(run(*argv, prompt_file, "--kv-scheme", "rvq1"), "'tq4'", "'rvq1'")
    refused(run(*argv, prompt_file, "--system", "s"), "--system")
    assert run(*argv, prompt_file, "--kv-scheme", "k=tq4,v=tq4", "--max-tokens", 1)[0] == 0
    bare = tmp_path / "bare.safetensors"
    model, _ = mlx_lm.load(str(tiny))
    caches = kvq.make_prompt_cache(model)
    model(mx.array([[1, 2, 3]]), cache=caches)
    kvq.save_prompt_cache(bare, caches, model=model, metadata={"model": str(tiny)})
    refused(run(*argv, bare), "token ids")


def test_info_shows_the_header(run: Run, tiny: Path, prompt_file: Path) -> None:
    info = kvq.read_prompt_cache_info(prompt_file)
    found = json.loads(run("cache", "info", prompt_file, "--json")[1])
    assert found["token_ids"] == list(info.token_ids) and len(info.token_ids) == info.tokens == len(LONG) + 6
    assert (found["scheme"], found["model"], found["nbytes"]) == ("tq4", str(tiny), info.nbytes)
    out = run("cache", "info", prompt_file)[1]
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["scheme"] == "tq4" and rows["tokens"] == f"{info.tokens} (ids stored)" and rows["model"] == str(tiny)


def test_verify_tells_good_files_from_bad_ones(run: Run, tiny: Path, prompt_file: Path, tmp_path: Path) -> None:
    code, out, err = run("cache", "verify", prompt_file, "--model", tiny)
    assert (code, err) == (0, "") and out.startswith("ok: ") and out.endswith("made by this model\n")
    other = model_folder(tmp_path / "other", rms_norm_eps=1e-6, num_hidden_layers=2)
    refused(run("cache", "verify", prompt_file, "--model", other), "this very model", code=1)
    content = bytearray(prompt_file.read_bytes())
    content[-5] ^= 1
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    refused(run("cache", "verify", bad), "digest", code=1)
    refused(run("generate", "--prompt-cache", bad, "--prompt", "x"), "digest")
    bad.write_bytes(content[:-100])
    refused(run("cache", "verify", bad), "truncated", code=1)
    refused(run("cache", "verify", prompt_file, "--model", "./none"), "'./none'")


def test_half_precision_weights_become_float32_on_the_cpu_unless_told_otherwise(run: Run, tmp_path: Path) -> None:
    folder, path = model_folder(tmp_path / "half", dtype=mx.float16), tmp_path / "c.safetensors"
    argv = ("cache", "create", folder, "--prompt", LONG, "--out", path, "--kv-scheme", "fp16")
    dense = 3 * 2 * 2 * 128 * 256  # bytes; mlx-lm's cache grows by 256 tokens
    code, out, err = run(*argv, "--no-float32")
    assert (code, err) == (0, "") and f"{dense / 2**20:.2f} MiB held" in out
    assert run("cache", "verify", path, "--model", folder)[0] == 0  # as the file says
    refused(run("cache", "verify", path, "--model", folder, "--float32"), "dtype", code=1)
    _, out, err = run(*argv, "--float32")
    assert err == "" and f"{2 * dense / 2**20:.2f} MiB held" in out
    _, default, err = run(*argv)
    if mx.default_device() == mx.cpu:
        assert err.count("\n") == 1 and "--no-float32" in err and default == out


@pytest.mark.real_model
def test_a_real_model_creates_verifies_and_resumes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kvq.demo_model_path("smollm2", progress=False)
    monkeypatch.setattr(mlx_lm, "load", cache(mlx_lm.load))  # the weights once for all commands
    path = tmp_path / "real.safetensors"
    prompt = "The capital of France is Paris. "
    argv = ("--kv-scheme", "fp16", "--max-tokens", 8)
    unbroken = run("generate", folder, "--prompt", prompt + "What is the capital of France?", *argv)[1]
    assert "Paris" in unbroken
    code, out, _ = run("cache", "create", "demo:smollm2", "--prompt", prompt, "--out", path, "--kv-scheme", "fp16")
    assert code == 0 and "scheme fp16" in out
    assert run("cache", "verify", path, "--model", "demo:smollm2")[1].startswith("ok: ")
    assert json.loads(run("cache", "info", path, "--json")[1])["model"] == str(folder)
    resumed = run("generate", "--prompt-cache", path, "--prompt", "What is the capital of France?", "--max-tokens", 8)
    assert resumed[1] == unbroken
    printed = run("demo-model", "smollm2")
    assert printed[1] == f"{folder}\n" and "Apache-2.0" in printed[2]


# ---- chat ----------------------------------------------------------------------------------------------------------


def chatted(run: Run, monkeypatch: pytest.MonkeyPatch, lines: list[str], *argv: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return run("chat", *argv, "--max-tokens", 6, "--kv-scheme", "identity")


def test_chat_keeps_what_was_said(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chat.safetensors"
    lines = [
        "One?",
        f"/save {path}",
        "",
        "Two?",
        "/clear",
        "Two?",
        f"/load {path}",
        "Two?",
        "/report",
        "/quit",
        "Three?",
    ]
    code, out, err = chatted(run, monkeypatch, lines, tiny)
    assert code == 0
    one, two, alone, again = out.splitlines()
    model, tokenizer = mlx_lm.load(str(tiny))

    def expected(text: str) -> str:
        return generate(model, tokenizer, tokenizer.encode(text), max_tokens=6)

    assert one == expected("[user]One?<e>[assistant]")
    assert two == again == expected(f"[user]One?<e>[assistant]{one}<e>[user]Two?<e>[assistant]")
    assert alone == expected("[user]Two?<e>[assistant]")
    held = len(kvq.read_prompt_cache_info(path).token_ids)
    assert f"saved {held} tokens" in err and f"loaded {held} tokens, 2 messages" in err
    assert "3 of 3 layers compressed" in err


def test_chat_survives_mistakes_and_ends_with_the_input(
    run: Run, tiny: Path, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain.safetensors"
    argv = ("--kv-scheme", "identity", "--no-chat-template")
    run("cache", "create", tiny, "--prompt", "abc", "--out", plain, *argv)
    lines = ["/nope", "/save", "/load none", f"/save {tmp_path}/x.npz", f"/save {tmp_path}/x.safetensors"]
    lines += [f"/load {prompt_file}", f"/load {plain}", "Hello"]
    code, out, err = chatted(run, monkeypatch, lines, tiny)
    assert code == 0 and len(out.splitlines()) == 1
    errors = err.splitlines()
    assert len(errors) == 7 and all(line.startswith("kvq: error: ") for line in errors)
    for line, fragment in zip(
        errors,
        ["'/nope'", "'/save'", "'none'", "'x.npz'", "empty caches", "--kv-scheme tq4", "plain text"],
        strict=True,
    ):
        assert fragment in line


def test_chat_needs_a_chat_template(run: Run, tmp_path: Path) -> None:
    refused(run("chat", model_folder(tmp_path / "base", template=None)), "chat template")


# ---- speculative decoding ------------------------------------------------------------------------------------------


def test_a_draft_model_changes_no_token(run, tiny, tmp_path):
    """And the saved cache goes on as one without a draft model."""
    other = model_folder(tmp_path / "other", num_hidden_layers=1)
    for scheme in ("tq4", "identity"):
        replies, more = [], []
        for draft in ([], ["--draft-model", tiny], ["--draft-model", other, "--num-draft-tokens", "5"]):
            file = tmp_path / f"{scheme}{len(replies)}.safetensors"
            options = ("--kv-scheme", scheme, "--max-tokens", "40")
            code, out, err = run("generate", tiny, "--prompt", LONG, "--save-prompt-cache", file, *options, *draft)
            assert code == 0 and ("draft model: proposed" in err) == bool(draft)
            replies.append(out)
            code, out, _ = run("generate", "--prompt-cache", file, "--prompt", "And then?", *options)
            assert code == 0
            more.append(out)
        assert replies[0] == replies[1] == replies[2] and more[0] == more[1] == more[2]


def test_a_draft_model_after_a_full_window(run, tiny, tmp_path):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sliding = model_folder(tmp_path / "sliding", sliding_window=160, layer_types=kinds)
    file = tmp_path / "full.safetensors"
    assert run("cache", "create", sliding, "--prompt", LONG * 3, "--out", file)[0] == 0
    argv = ("generate", "--prompt-cache", file, "--prompt", "x", "--max-tokens", "30")
    (_, plain, _), (code, drafted, _) = run(*argv), run(*argv, "--draft-model", sliding)
    assert code == 0 and drafted == plain
    file = tmp_path / "fp16.safetensors"
    assert run("cache", "create", sliding, "--kv-scheme", "fp16", "--prompt", LONG * 3, "--out", file)[0] == 0
    argv = ("generate", "--prompt-cache", file, "--prompt", "x", "--draft-model", tiny)
    refused(run(*argv), "can be trimmed")
