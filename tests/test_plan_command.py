"""`kvq plan`: contexts, budgets and weights from config.json alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
import tiny_models
from huggingface_hub.errors import LocalEntryNotFoundError
from test_planning import GEMMA3_27B, LLAMA_70B, QWEN3_8B

from mlx_kvq_plugin.cli import main
from mlx_kvq_plugin.cli.plan import byte_size, read_config, token_count

Run = Callable[..., tuple[int, str, str]]


def config_folder(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with a config and nothing else."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return config_folder(tmp_path / "qwen", {**QWEN3_8B, "quantization": {"group_size": 64, "bits": 4}})


def report_of(run: Run, *argv: object) -> dict[str, Any]:
    code, out, err = run("plan", *argv, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def schemes_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {scheme["scheme"]: scheme for scheme in report["schemes"]}


def test_bytes_and_the_longest_context_of_a_memory(run: Run, qwen: Path) -> None:
    report = report_of(run, qwen, "--memory", "8GB", "--context", "8k", "32k")
    found = schemes_of(report)
    token = 36 * 8 * 256 * 2
    assert report["model_type"] == "qwen3" and report["positions"] == 40960 and report["itemsize"] == 2
    assert report["weights"]["parameters"] == 8_190_735_360
    assert 4.6e9 < report["weights"]["nbytes"] < 4.62e9  # what such a checkpoint has on the disk
    assert report["memory"] == 8_000_000_000
    assert report["cache_memory"] == 8_000_000_000 - report["weights"]["nbytes"]
    assert list(found) == ["fp16", "tq4", "rvq1"]
    assert found["fp16"]["nbytes"] == {"8192": 8192 * token, "32768": 32768 * token}
    assert 3.8 < found["fp16"]["nbytes"]["32768"] / found["tq4"]["nbytes"]["32768"] < 3.9
    budget = report["cache_memory"]
    longest = found["fp16"]["longest"]
    assert longest["limit"] == "memory" and longest["tokens"] == budget // token // 256 * 256
    assert found["tq4"]["longest"] == {"tokens": 40960, "limit": "positions"}


def test_the_table_says_the_same(run: Run, qwen: Path) -> None:
    code, out, err = run("plan", qwen, "--memory", "8GB", "--context", "8k", "128k", "--kv-scheme", "tq4,edges=2")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == f"{qwen}: model type qwen3, 36 cache entries, 40960 positions"
    assert lines[1].startswith("weights: about 4.61 GB (8.19 billion parameters of 4.50 bits, 4 bits in groups of 64)")
    assert lines[2].startswith("memory: 8.00 GB, 3.39 GB of them for the cache")
    assert lines[5].split() == ["scheme", "8192", "131072*", "longest", "context"]
    assert lines[6].split()[:4] == ["fp16", "1.21", "GB", "(1.00x)"] and lines[6].endswith("  22784")
    assert lines[7].startswith("tq4,edges=2 ") and lines[7].endswith("  40960 (all positions)")
    assert "* more than the 40960 positions" in out


def test_without_a_memory_there_is_no_longest_context(run: Run, qwen: Path) -> None:
    assert "longest" not in run("plan", qwen)[1]
    report = report_of(run, qwen)
    assert report["memory"] is report["cache_memory"] is report["schemes"][0]["longest"] is None
    assert list(report["schemes"][0]["nbytes"]) == ["8192", "32768", "131072"]


def test_a_memory_below_the_weights_fits_nothing(run: Run, qwen: Path) -> None:
    out = run("plan", qwen, "--memory", "4GiB")[1]
    assert "4.29 GB, too little for the weights" in out and out.count("does not fit") == 3
    assert {s["longest"]["tokens"] for s in report_of(run, qwen, "--memory", "4GiB")["schemes"]} == {0}


def test_memory_of_the_cache_alone_batches_and_replies(run: Run, qwen: Path) -> None:
    argv = (qwen, "--context", "8k", "--kv-scheme", "tq4", "--cache-memory", "4GiB")
    one, four = report_of(run, *argv), report_of(run, *argv, "--batch", "4")
    assert one["cache_memory"] == 2**32
    alone, together = schemes_of(one)["tq4"], schemes_of(four)["tq4"]
    assert together["nbytes"]["8192"] == 4 * alone["nbytes"]["8192"]
    assert together["longest"]["tokens"] < 40960 == alone["longest"]["tokens"]
    short = schemes_of(report_of(run, *argv, "--generated", "1"))["tq4"]
    assert 0 < alone["nbytes"]["8192"] - short["nbytes"]["8192"] < alone["nbytes"]["8192"] / 256


def test_sliding_windows_count_once_and_prompts_beside_them(run: Run, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "gemma", GEMMA3_27B)
    report = report_of(run, folder, "--context", "32k", "128k", "--cache-memory", "20GB", "--kv-scheme", "tq4")
    fp16, tq4 = report["schemes"]
    token = 16 * 256 * 2
    assert fp16["nbytes"]["131072"] - fp16["nbytes"]["32768"] == 10 * (131072 - 32768) * token
    chunk = 52 * 2048 * token  # rotating caches hold the newest one beside the window until the first step
    assert 0.8 * chunk < fp16["peak_nbytes"]["32768"] - fp16["nbytes"]["32768"] < chunk
    assert tq4["nbytes"] == tq4["peak_nbytes"]
    assert report["positions"] is None and fp16["longest"]["limit"] == "memory"
    assert tq4["longest"]["tokens"] > 3.8 * fp16["longest"]["tokens"]
    assert "positions not said in config.json" in run("plan", folder)[1]


def test_a_70b_model_takes_no_memory(run: Run, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "llama", LLAMA_70B)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    report = report_of(run, folder, "--memory", "192GB", "--kv-scheme", "rvq1")
    assert report["weights"] == {
        "parameters": 70_553_706_496, "nbytes": 141_107_412_992, "quantization": "", "bits": 16.0
    }  # fmt: skip
    assert mx.get_peak_memory() - before < 20e6
    assert schemes_of(report)["rvq1"]["longest"] == {"tokens": 131072, "limit": "positions"}


def test_float32_models_have_float32_caches(run: Run, tmp_path: Path) -> None:
    config = {**tiny_models.BASE, "model_type": "llama", "head_dim": 64}
    half = report_of(run, config_folder(tmp_path / "half", config), "--context", "4k")
    full = report_of(run, config_folder(tmp_path / "full", {**config, "dtype": "float32"}), "--context", "4k")
    assert (half["itemsize"], full["itemsize"]) == (2, 4)
    assert full["schemes"][0]["nbytes"]["4096"] == 2 * half["schemes"][0]["nbytes"]["4096"]
    assert full["weights"]["nbytes"] == 2 * half["weights"]["nbytes"]


def test_head_sizes_that_a_codec_cannot_do(run: Run, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "odd", {**tiny_models.BASE, "model_type": "llama", "head_dim": 36})
    code, out, _ = run("plan", folder, "--cache-memory", "1GB", "--kv-scheme", "tq4", "--kv-scheme", "identity")
    assert code == 0 and "scheme tq4 is not possible: " in out
    rows = schemes_of(report_of(run, folder, "--kv-scheme", "tq4"))
    assert rows["tq4"]["error"] and rows["tq4"]["nbytes"] == {} and rows["fp16"]["nbytes"]


def test_without_positions_in_the_config_the_search_ends_somewhere(run: Run, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "llama", {**tiny_models.BASE, "model_type": "llama", "head_dim": 64})
    code, out, _ = run("plan", folder, "--cache-memory", "1TB", "--generated", "1", "--kv-scheme", "tq4")
    assert code == 0 and out.count("16777216 or more") == 2


def test_recurrent_states_are_said_not_to_count(run: Run, tmp_path: Path) -> None:
    text = {**tiny_models.BASE, **tiny_models.LINEAR, "model_type": "qwen3_5_text"}
    folder = config_folder(tmp_path / "hybrid", {"model_type": "qwen3_5", "text_config": text})
    assert report_of(run, folder)["uncounted_entries"] == 2
    assert "2 entries have recurrent states" in run("plan", folder)[1]


def test_unknown_architectures(run: Run, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "seed", {**tiny_models.TWO, "model_type": "seed_oss", "head_dim": 64})
    code, _, err = run("plan", folder)
    assert code == 2 and "--unknown-arch generic" in err
    assert report_of(run, folder, "--unknown-arch", "generic")["schemes"][1]["nbytes"]["8192"] > 0


def test_of_a_repository_only_the_config_is_downloaded(run: Run, qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(*arguments: str) -> str:
        asked.append(arguments)
        return str(qwen / "config.json")

    monkeypatch.setattr("mlx_kvq_plugin.cli.plan.hf_hub_download", download)
    monkeypatch.setattr(mlx_lm, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("mlx_lm.utils.snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    report = report_of(run, "mlx-community/Qwen3-8B-4bit", "--context", "8k")
    assert asked == [("mlx-community/Qwen3-8B-4bit", "config.json")]
    assert report["model"] == "mlx-community/Qwen3-8B-4bit" and report["positions"] == 40960


def test_a_config_in_the_local_cache_serves_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library honours its cache and HF_HUB_OFFLINE: nothing is asked."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(QWEN3_8B))
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source, config = read_config("owner/name")
    assert source == "owner/name" and config["num_hidden_layers"] == 36


def refused(result: tuple[int, str, str], *fragments: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "") and err.startswith("kvq: error: ") and err.count("\n") == 1
    for fragment in fragments:
        assert fragment in err


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--context", "8kb"], ["--context", "'8kb'"]),
        (["--context", "0"], ["--context", "'0'"]),
        (["--context", "17M"], ["--context", "16M"]),
        (["--memory", "24"], ["--memory", "'24'", "24GB"]),
        (["--memory", "-1GB"], ["--memory"]),
        (["--memory", "1GB", "--cache-memory", "1GB"], ["not allowed with"]),
        (["--batch", "0"], ["--batch"]),
        (["--kv-scheme", "no"], ["'no'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(argv: list[str], fragments: list[str], run: Run, qwen: Path) -> None:
    refused(run("plan", qwen, *argv), *fragments)


def test_configs_that_cannot_be_used(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    refused(run("plan", broken), "config.json", "JSONDecodeError")
    (broken / "config.json").write_text("[]")
    refused(run("plan", broken), "JSON object")
    refused(run("plan", config_folder(tmp_path / "other", {"model_type": "nosuch"})), "'nosuch'", "mlx-lm")
    refused(run("plan", "./nowhere"), "'./nowhere'")

    def offline(*_: object) -> None:
        raise LocalEntryNotFoundError("Cannot find the file. Go online.")

    monkeypatch.setattr("mlx_kvq_plugin.cli.plan.hf_hub_download", offline)
    refused(run("plan", "nobody/nothing"), "'nobody/nothing'", "Cannot find the file")


def test_units() -> None:
    assert [token_count(text) for text in ("100", "8k", "128K", "1M", "1m")] == [100, 8192, 131072, 2**20, 2**20]
    sizes = {"24GB": 24 * 10**9, "24 GiB": 24 * 2**30, "1.5gb": 1_500_000_000, "512MiB": 2**29, "2tb": 2 * 10**12}
    assert {text: byte_size(text) for text in sizes} == sizes


def test_help_has_examples_and_says_what_the_units_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and out.count("kvq plan") >= 4
    assert "24 * 10^9" in out and "24 * 2^30" in out and "1024 * 1024" in out


@pytest.mark.real_model
def test_a_demo_model(run: Run) -> None:
    report = report_of(run, "demo:smollm2", "--context", "1k", "--kv-scheme", "rvq1")
    inspected = json.loads(run("inspect", "demo:smollm2", "--kv-scheme", "rvq1", "--contexts", "1024", "--json")[1])
    assert report["weights"]["parameters"] == 134_515_008
    for planned, seen in zip(report["schemes"], inspected["schemes"], strict=True):
        assert planned["nbytes"] == seen["nbytes"]
