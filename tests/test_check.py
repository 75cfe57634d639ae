"""`kvq check`: sound models pass every row; a cache that is wrong in one respect fails in the row that says so."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm.models import llama
from test_cli import model_folder

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import checking, errors
from mlx_kvq_plugin.batch import BatchKVQCache
from mlx_kvq_plugin.checking import EXACT, FAIL, OK, REFUSED, Check, check_model
from mlx_kvq_plugin.cli import main
from mlx_kvq_plugin.codecs.identity import Identity
from mlx_kvq_plugin.codecs.turboquant import TurboQuant

TOKENS = 144
EXACT_ROWS = ["prefill", "chunked prefill", "single steps", "trim and continue", "verify and trim"]
SELF_ROWS = ["save and load", "deep copy", "another thread", "undo"]
OK_ROWS = ["bytes", "uneven batch", "late joiner"]


def one_layer(**changes: Any) -> Any:
    return tiny_models.llama(num_hidden_layers=1, **changes)


def statuses(report: checking.CheckReport, scheme: str) -> dict[str, str]:
    return {check.name: check.status for check in report.checks if check.scheme == scheme}


def failed(model: Any, scheme: str | None = None, **options: Any) -> dict[str, set[str]]:
    """Failed rows by scheme."""
    report = check_model(model, None, [scheme] if scheme else [], tokens=TOKENS, **options)
    found: dict[str, set[str]] = {}
    for check in report.failures:
        found.setdefault(check.scheme, set()).add(check.name)
    assert report.passed == (not found)
    return found


def test_a_sound_model_passes_and_is_left_as_it_was():
    model, before = one_layer(), llama.scaled_dot_product_attention
    seen: list[Check] = []
    report = check_model(model, None, ["tq4", "identity"], tokens=TOKENS, done=seen.append)
    assert report.passed and list(report.checks) == seen
    expected = dict.fromkeys(EXACT_ROWS + SELF_ROWS, EXACT) | dict.fromkeys(OK_ROWS, OK)
    assert statuses(report, "identity") == expected
    assert statuses(report, "tq4") == expected | dict.fromkeys(EXACT_ROWS, OK)
    assert len(report.checks) == 2 * len(expected)  # identity is not checked twice
    assert "make_cache" not in vars(model) and llama.scaled_dot_product_attention is before
    details = {check.name: check.detail for check in report.checks if check.scheme == "tq4"}
    assert details["single steps"].startswith("KL ") and "ratio" in details["bytes"]
    assert details["uneven batch"].startswith("same tokens as alone, KL up to")
    lines = str(report).splitlines()
    assert lines[0].split() == ["identity", "prefill", "exact"] and lines[-1] == report.summary()
    assert report.summary() == "24 checks: 13 exact, 11 ok, 0 refused, 0 FAIL"


def test_sliding_windows_are_checked_past_their_end():
    model = tiny_models.build("gemma3_text", {**tiny_models.GEMMA, "model_type": "gemma3_text", "num_hidden_layers": 3})
    report = check_model(model, None, ["tq4"], tokens=tiny_models.WINDOW + 30)
    assert report.passed
    assert statuses(report, "identity")["past the window"] == EXACT
    assert statuses(report, "tq4")["past the window"] == OK
    short = {check.name: check for check in check_model(model, None, [], tokens=TOKENS).checks}
    assert short["past the window"].status == REFUSED and "--tokens" in short["past the window"].detail


def test_half_precision_is_exact_too():
    model = one_layer()
    model.set_dtype(mx.float16)
    report = check_model(model, None, [], tokens=TOKENS)
    assert report.passed and {statuses(report, "identity")[name] for name in EXACT_ROWS} == {EXACT}
    assert "(rounding: 0.01)" in next(check.detail for check in report.checks if check.name == "uneven batch")


def test_what_a_model_cannot_do_is_refused_by_name():
    report = check_model(tiny_models.llama(num_hidden_layers=2), None, ["tq4,edges=1", "fp16"], tokens=TOKENS)
    assert report.passed
    details = {(check.scheme, check.name): check.detail for check in report.checks if check.status == REFUSED}
    assert details["fp16", "bytes"].startswith("no layer is compressed: scheme fp16")
    assert details["tq4,edges=1", "bytes"].startswith("no layer is compressed: edge layer")


def test_batches_that_an_adapter_refuses_are_no_failures(monkeypatch):
    model = tiny_models.ARCHITECTURES["nemotron_h"]()
    found = {check.name: check for check in check_model(model, None, [], tokens=TOKENS).checks}
    assert found["uneven batch"].status == found["late joiner"].status == REFUSED
    assert "nemotron_h.py" in found["uneven batch"].detail
    assert found["trim and continue"].detail == "ArraysCache cannot be trimmed"

    def refuse(*_: object, **__: object) -> None:
        raise errors.CacheStateError("not in the adapter's name")

    monkeypatch.setattr(BatchKVQCache, "prepare", refuse)
    assert failed(one_layer())["identity"] == {"uneven batch", "late joiner"}


def test_a_scheme_that_the_model_refuses_does_not_end_the_check(monkeypatch):
    def compress(model: Any, config: kvq.KVQConfig, **options: Any) -> Any:
        if config.key == "tq4":
            raise errors.CodecError("a head must be even, got 63; use another codec")
        return original(model, config, **options)

    original = checking.compress
    monkeypatch.setattr(checking, "compress", compress)
    report = check_model(one_layer(), None, ["tq4", "affine8"], tokens=TOKENS)
    assert report.passed and statuses(report, "tq4") == {"compress": REFUSED}
    assert "bytes" in statuses(report, "affine8")


# ---- broken caches -------------------------------------------------------------------------------------------------


def test_a_wrong_decode_fails_wherever_packed_tokens_are_read(monkeypatch):
    original = Identity.decode
    monkeypatch.setattr(Identity, "decode", lambda *arguments: 1.01 * original(*arguments))
    found = failed(one_layer())["identity"]
    assert {"chunked prefill", "single steps", "trim and continue"} <= found
    assert "prefill" not in found and not found & set(SELF_ROWS)


def test_a_lossy_scheme_fails_beyond_the_limit(monkeypatch):
    assert "single steps" in failed(one_layer(), "tq4", max_kl=1e-9)["tq4"]
    original = TurboQuant.encode
    monkeypatch.setattr(TurboQuant, "encode", lambda codec, x, *rest: original(codec, mx.roll(x, 1, axis=-1), *rest))
    assert "single steps" in failed(one_layer(), "tq4", max_kl=0.5)["tq4"]


def test_a_batch_that_differs_from_its_rows_fails(monkeypatch):
    original = BatchKVQCache.update_and_fetch

    def update_and_fetch(batch: BatchKVQCache, keys: mx.array, values: mx.array) -> Any:
        return original(batch, keys, values if len(batch.rows) == 1 else values[::-1])

    monkeypatch.setattr(BatchKVQCache, "update_and_fetch", update_and_fetch)
    assert failed(one_layer()) == {"identity": {"uneven batch", "late joiner"}}


def test_wrong_trims_copies_and_files_fail(monkeypatch):
    monkeypatch.setattr(kvq.KVQCache, "__deepcopy__", lambda cache, memo: cache, raising=False)
    assert failed(one_layer()) == {"identity": {"deep copy"}}
    monkeypatch.undo()
    original = kvq.KVQCache.trim
    monkeypatch.setattr(kvq.KVQCache, "trim", lambda cache, n: original(cache, n - 1) + 1)
    assert failed(one_layer()) == {"identity": {"trim and continue", "verify and trim"}}
    monkeypatch.undo()
    restore = kvq.KVQCache._restore_kind

    def forgetful(cache: kvq.KVQCache, meta: dict[str, Any]) -> None:
        restore(cache, meta)
        cache.offset += 1

    monkeypatch.setattr(kvq.KVQCache, "_restore_kind", forgetful)
    assert failed(one_layer()) == {"identity": {"save and load"}}


def test_what_cannot_cross_threads_fails(monkeypatch):
    encode, lazy = Identity.encode, mx.zeros(1) + 0  # as a codebook that was not evaluated when it was made
    monkeypatch.setattr(Identity, "encode", lambda codec, x, *rest: encode(codec, x + lazy, *rest))
    assert failed(one_layer()) == {"identity": {"another thread"}}


def test_what_undo_leaves_behind_fails(monkeypatch):
    undone = kvq.Compression.undo

    def undo(compression: kvq.Compression) -> None:
        undone(compression)
        compression.model.make_cache = list

    monkeypatch.setattr(kvq.Compression, "undo", undo)
    assert failed(one_layer()) == {"identity": {"undo"}}


def test_an_exception_is_a_failure_of_its_row(monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by chance")

    monkeypatch.setattr(kvq.KVQCache, "is_trimmable", broken)
    report = check_model(one_layer(), None, [], tokens=TOKENS)
    assert {check.name for check in report.failures} == {"trim and continue", "verify and trim"}
    assert report.failures[0].detail == "ZeroDivisionError: by chance"


# ---- wrong input, and the command ----------------------------------------------------------------------------------


def test_what_cannot_be_checked_is_refused():
    model = one_layer()
    with pytest.raises(errors.SchemeError):
        check_model(model, None, ["tq99"])
    with pytest.raises(errors.KVQError, match="at least 128 tokens, got 50"):
        check_model(model, None, [], tokens=50)
    with kvq.compress(model, "tq4"), pytest.raises(errors.UnsupportedModelError, match="call undo"):
        check_model(model, None, [])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("check") / "tiny", num_hidden_layers=1)


def test_the_command_prints_a_table_and_says_whether_all_is_well(tiny, capsys, monkeypatch):
    assert main(["check", str(tiny), "--tokens", str(TOKENS), "--kv-scheme", "rvq1"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines()[-1] == "24 checks: 13 exact, 11 ok, 0 refused, 0 FAIL"
    assert "identity  single steps       exact\n" in out and "rvq1      single steps       ok, KL" in out
    original = Identity.decode
    monkeypatch.setattr(Identity, "decode", lambda *arguments: 1.01 * original(*arguments))
    assert main(["check", str(tiny), "--tokens", str(TOKENS), "--kv-scheme", "fp16", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False and found["tokens"] == TOKENS and found["model"] == str(tiny)
    row = next(check for check in found["checks"] if check["name"] == "single steps")
    assert row["scheme"] == "identity" and row["status"] == FAIL and "logits differ by up to" in row["detail"]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--kv-scheme", "tq4", "tq99"], "tq99"),
        (["--tokens", "64"], "at least 128"),
        (["--max-kl", "-1"], "--max-kl"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(arguments, fragment, tiny, capsys):
    assert main(["check", str(tiny), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kvq: error: ") and err.count("\n") == 1 and fragment in err


def test_an_unknown_architecture_is_refused_or_tried(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kvq.adapters, "list_adapters", lambda: ["llama"])
    folder = model_folder(tmp_path / "olmo2", "olmo2", model_type="olmo2", num_hidden_layers=1)
    assert main(["check", str(folder)]) == 2
    assert "olmo2" in capsys.readouterr().err
    options = ["--unknown-arch", "generic", "--tokens", str(TOKENS), "--kv-scheme", "identity"]
    assert main(["check", str(folder), *options]) == 0


@pytest.mark.real_model
def test_real_weights_pass(real_model):
    """The first layers of SmolLM2 and its head: the text is English, the rows are those of the whole model."""
    model, tokenizer = real_model("smollm2")
    model = copy.deepcopy(model)
    model.model.layers = model.model.layers[:4]
    report = check_model(model, tokenizer, [], tokens=checking.LEAST_TOKENS)
    assert report.passed and report.summary() == "12 checks: 9 exact, 3 ok, 0 refused, 0 FAIL"
