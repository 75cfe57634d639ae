"""`kvq run` and the load hook: mlx-lm's tools on compressed caches, and what is refused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import pytest
import tiny_models
from mlx_lm.models import cache as mlx_cache
from test_cli import LONG, Run, model_folder

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import hook as hook_module
from mlx_kvq_plugin.cli import main
from mlx_kvq_plugin.cli.run import TOOLS, option_value
from mlx_kvq_plugin.errors import UnsupportedModelError
from mlx_kvq_plugin.hook import LoadHook, compressed_loading, describe_plan


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def updated(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Classes of the caches that got keys and values."""
    seen: set[str] = set()

    def watch(kind: Any) -> None:
        original = kind.update_and_fetch

        def update_and_fetch(self: Any, keys: mx.array, values: mx.array) -> Any:
            if keys.shape[-1]:  # the ledger of a batch stores tokens of no size
                seen.add(type(self).__name__)
            return original(self, keys, values)

        monkeypatch.setattr(kind, "update_and_fetch", update_and_fetch)

    for kind in (kvq.KVQCache, mlx_cache.KVCache, mlx_cache.BatchKVCache):
        watch(kind)
    return seen


# ---- tools ---------------------------------------------------------------------------------------------------------


def test_generate(tiny: Path, run: Run, updated: set[str]) -> None:
    argv = ("--model", tiny, "--prompt", LONG, "--max-tokens", 8)
    code, out, err = run("run", "--kv-scheme", "tq4", "--", "mlx_lm.generate", *argv)
    assert code == 0 and "Generation: 8 tokens" in out
    assert "kvq: scheme tq4, 3 of 3 layers compressed" in err
    assert updated == {"KVQCache"}
    assert run("run", "--kv-scheme", "identity", "generate", *argv, "--verbose", "False")[0] == 0


def test_output_with_identity_is_that_of_mlx_lm(
    tiny: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--model", str(tiny), "--prompt", LONG, "--max-tokens", "20", "--verbose", "False"]
    _, out, _ = run("run", "--kv-scheme", "identity", "--", "mlx_lm.generate", *argv)
    monkeypatch.setattr(sys, "argv", ["mlx_lm.generate", *argv])
    from mlx_lm.generate import main as generate_main

    generate_main()
    assert capsys.readouterr().out == out != ""


def test_cache_prompt_and_its_continuation(tiny: Path, tmp_path: Path, run: Run, updated: set[str]) -> None:
    path = tmp_path / "prompt.safetensors"
    argv = ("--model", tiny, "--prompt-cache-file", path, "--prompt", LONG)
    assert run("run", "--kv-scheme", "tq4", "--", "mlx_lm.cache_prompt", *argv)[0] == 0
    caches = mlx_cache.load_prompt_cache(str(path))
    assert [type(cache) for cache in caches] == [kvq.KVQCache] * 3 and caches[0].packed_tokens > 0
    argv = ("--model", tiny, "--prompt-cache-file", path, "--prompt", "Go on.", "--max-tokens", 4)
    code, out, _ = run("run", "--kv-scheme", "tq4", "--", "mlx_lm.generate", *argv)
    assert code == 0 and "Generation: 4 tokens" in out
    assert updated == {"KVQCache"}


@pytest.mark.parametrize("batch", [1, 3])
def test_benchmark(tiny: Path, run: Run, updated: set[str], batch: int) -> None:
    argv = ("--model", tiny, "-p", 40, "-g", 4, "-n", 1, "-b", batch)
    code, out, _ = run("run", "--", "mlx_lm.benchmark", *argv)
    assert code == 0 and "Averages" in out
    assert updated == {"KVQCache"}  # in a batch, those of its rows


def test_chat(tiny: Path, run: Run, updated: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([LONG, "q"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    code, _, _ = run("run", "--", "mlx_lm.chat", "--model", tiny, "--max-tokens", 6)
    assert code == 0 and updated == {"KVQCache"}


def test_draft_model_stays_as_it_is(tiny: Path, run: Run, updated: set[str]) -> None:
    """Also when it is the same folder: the model loaded first is the target."""
    argv = ("--model", tiny, "--draft-model", tiny, "--prompt", LONG, "--max-tokens", 8)
    code, out, err = run("run", "--", "mlx_lm.generate", *argv)
    assert code == 0 and "Generation: 8 tokens" in out
    assert err.count("layers compressed") == 1 and "is left to mlx-lm" in err
    assert updated == {"KVQCache", "KVCache"}


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_evaluate_without_its_requirements(run: Run) -> None:
    code, _, err = run("run", "--", "mlx_lm.evaluate", "--model", "x", "--tasks", "y")
    assert code == 2 and "must be importable" in err and "lm_eval" in err


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["mlx_lm.perplexity", "--model", "x"], "never uses a cache"),
        (["mlx_lm.server"], "kvq serve"),
        (["mlx_lm.convert"], "must be one of"),
        ([], "must follow --"),
        (["mlx_lm.generate", "--kv-bits", "4"], "choose the bits with --kv-scheme"),
        (["mlx_lm.generate", "--kv-bit=4"], "choose the bits with --kv-scheme"),  # argparse completes it
        (["mlx_lm.generate", "--max-kv-size", "64"], "ignores --max-kv-size"),
    ],
)
def test_refusals(run: Run, argv: list[str], fragment: str) -> None:
    code, out, err = run("run", "--", *argv)
    assert (code, out) == (2, "") and fragment in err
    assert err.startswith("kvq: error: ") and err.count("\n") == 1


def test_wrong_schemes_fail_before_loading(run: Run) -> None:
    code, _, err = run("run", "--kv-scheme", "bogus", "--", "mlx_lm.generate", "--model", "/nowhere")
    assert code == 2 and "codec name" in err


def test_tools_own_errors_and_help(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "--", "mlx_lm.generate", "--bogus")[0] == 2
    assert run("run", "--", "mlx_lm.generate", "--help")[0] == 0
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    assert all(tool in text for tool in TOOLS)


# ---- the hook ------------------------------------------------------------------------------------------------------


def test_hook_is_removed_also_after_an_error(tiny: Path) -> None:
    before = mlx_lm.utils.load_model

    def fail() -> None:
        with compressed_loading(LoadHook("tq4")):
            assert mlx_lm.utils.load_model is not before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert mlx_lm.utils.load_model is before
    assert kvq.compression_of(mlx_lm.load(str(tiny))[0]) is None


def test_models_stay_compressed_and_are_evaluated(tiny: Path) -> None:
    with compressed_loading(LoadHook("rvq1", float32=True, source="name")):
        model = mlx_lm.load(str(tiny))[0]
    maker = kvq.compression_of(model)
    assert maker is not None and (maker.scheme, maker.source) == ("rvq1", "name")


def test_half_precision_is_converted_as_asked(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "half", dtype=mx.float16)
    for float32, dtype in ((True, mx.float32), (False, mx.float16)):
        with compressed_loading(LoadHook("tq4", float32=float32)):
            model = mlx_lm.load(str(folder))[0]
        assert model.model.embed_tokens.weight.dtype == dtype


def test_unsupported_models_fail_loud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedModelError("not this one")

    folder = model_folder(tmp_path / "other")
    monkeypatch.setattr(hook_module, "compress", refuse)
    with pytest.raises(UnsupportedModelError), compressed_loading(LoadHook("tq4")):
        mlx_lm.load(str(folder))


def test_plans_are_described() -> None:
    model = tiny_models.llama()
    with kvq.compress(model, "tq4,edges=1") as compression:
        text = describe_plan(compression.maker.plan())
    assert text == "1 of 3 layers compressed, left to mlx-lm 2: edge layer (edges=1)"


def test_option_values() -> None:
    assert option_value(["--model", "a", "--model=b"], "--model") == "b"
    assert option_value(["--models", "a", "--model"], "--model") is None
