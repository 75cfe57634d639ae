"""The example plugin is installed for real and used; two owners of one name are named; the example script runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

USE_PLUGIN = """
import sys
sys.path.insert(0, {tests!r})
import mlx.core as mx
import mlx_kvq_plugin as kvq
import tiny_models
assert "seed_oss" in kvq.list_adapters() and "absmax" in kvq.list_codecs()
assert "kvq_plugin_example" not in sys.modules, "plugins are loaded when asked for"
model = tiny_models.seed_oss()
tokens = mx.arange(90)[None] % 64
expected = model(tokens, cache=kvq.make_prompt_cache(model))
with kvq.compress(model, "absmax64") as compression:
    assert compression.maker.adapter.name == "seed_oss"
    caches = kvq.make_prompt_cache(model)
    found = model(tokens, cache=caches)
    step = model(mx.array([[5]]), cache=caches)
assert mx.array_equal(found, expected)  # nothing was packed yet when the prompt was read
print(kvq.cache_report(caches).compressed, len(caches), caches[0].packed_tokens)
"""

CLASH = """
import mlx_kvq_plugin as kvq
try:
    kvq.adapters.load_adapter("llama")
except kvq.KVQError as error:
    print(error)
"""


def install(plugin: Path, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "--target", target, plugin], check=True, capture_output=True)


def run(code: str, target: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    """A copy of the example, so that building it leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("plugin") / "source"
    shutil.copytree(ROOT / "examples" / "kvq-plugin-example", copy)
    return copy


def test_example_plugin_is_found_loaded_late_and_used(plugin, tmp_path):
    install(plugin, tmp_path)
    compressed, layers, packed = run(USE_PLUGIN.format(tests=str(ROOT / "tests")), tmp_path).split()
    assert compressed == layers and int(packed) > 0


def test_the_example_plugin_passes_its_own_tests_and_is_listed(plugin, tmp_path):
    install(plugin, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(plugin / "tests")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    listed = json.loads(run("from mlx_kvq_plugin.cli import main; main(['plugins', '--json'])", tmp_path))
    own = {(row["kind"], row["name"]): row for row in listed if row["distribution"] == "kvq-plugin-example"}
    assert set(own) == {("adapter", "seed_oss"), ("codec", "absmax"), ("schemes", "absmax")}
    assert all(row["version"] == "0.1.0" and not row["problem"] for row in own.values())
    assert own["codec", "absmax"]["offers"] == ["absmax4", "absmax6"]
    assert own["schemes", "absmax"]["offers"] == ["absmax64"]


def test_a_plugin_that_claims_a_taken_name_is_named(plugin, tmp_path):
    settings = plugin / "pyproject.toml"
    text = settings.read_text()
    settings.write_text(text.replace('seed_oss = "', 'llama = "'))
    try:
        install(plugin, tmp_path)
    finally:
        settings.write_text(text)
    message = run(CLASH, tmp_path)
    assert "'llama'" in message and "mlx-kvq-plugin" in message and "kvq-plugin-example" in message
    assert "uninstall one" in message and "\n" not in message


def test_standalone_example_prints_what_it_promises():
    command = [sys.executable, ROOT / "examples" / "standalone_codecs.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codecs, curves, caches = ([line.split() for line in part.splitlines()[1:]] for part in done.stdout.split("\n\n"))
    errors = {line[0]: float(line[2]) for line in codecs}
    assert 0.11 < errors["tq2"] == errors["rvq1"] < 0.12 and errors["affine4"] < errors["tq4"] < 0.01
    assert [line[0] for line in curves] == ["affine", "grouped", "tq"]
    assert all(3 < float(line[2]) < 7 for line in curves)
    with_rope, without, exact = ([float(x) for x in line[-3:]] for line in caches)
    assert with_rope[0] < 0.35 and with_rope[1] < 0.3 * without[1] and with_rope[2] < without[2]
    assert exact[0] > 1 and exact[1:] == [0.0, 0.0]


@pytest.mark.real_model
def test_generation_example_answers_from_a_file():
    command = [sys.executable, ROOT / "examples" / "generate_hf.py", "--kv-scheme", "tq3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("Answers from the file are those from memory: True\n")
    assert "The lighthouse stood on" in done.stdout and "30 of 30 layers compressed" in done.stdout
    assert "{'role': 'assistant', 'content': '" in done.stdout


# ---- the outside judge -----------------------------------------------------------------------------------------------

JUDGE = ROOT / "examples" / "outside_judge.py"


@pytest.fixture
def judge(monkeypatch) -> ModuleType:
    """The example as a module."""
    monkeypatch.setattr(sys, "argv", [str(JUDGE)])
    spec = importlib.util.spec_from_file_location("outside_judge", JUDGE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "outside_judge", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("found", ["none", "0.9.0"])
def test_a_missing_judge_is_one_sentence_and_exit_code_2(judge, monkeypatch, capsys, found):
    def installed(name: str) -> str:
        assert name == judge.JUDGE
        if found == "none":
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(judge, "version", installed)
    monkeypatch.setattr(judge, "run", lambda _: pytest.fail("it ran"))
    assert judge.main() == 2
    assert capsys.readouterr() == (
        "",
        f"outside_judge: mlx-quant-fidelity 0.10.0 must be installed, got {found}; install it with: "
        "pip install --no-deps mlx-quant-fidelity==0.10.0\n",
    )


def judge_is_missing() -> bool:
    try:
        return version("mlx-quant-fidelity") != "0.10.0"
    except PackageNotFoundError:
        return True


@pytest.mark.real_model
@pytest.mark.skipif(judge_is_missing(), reason="the outside judge is no dependency: see examples/outside_judge.py")
def test_the_two_rulers_agree():
    command = [sys.executable, JUDGE, "--schemes", "tq4", "rvq1", "turbo4v2", "--length", "160", "--prefix", "120"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the two rulers agree\n")
    rows = [line.split() for line in done.stdout.splitlines()[3:7]]
    assert [row[0] for row in rows] == ["tq4", "rvq1", "turbo4v2", "mlx-lm"]
    assert all(float(row[-5]) > 0 for row in rows)


# ---- scripts on a real model -----------------------------------------------------------------------------------------


def printed(name: str, *arguments: str) -> str:
    """What an example prints; it must end well."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.real_model
def test_generate_streams_a_text_and_reports():
    text = printed("generate", "--max-tokens", "8")
    assert re.search(r"30 of 30 layers compressed, \d+ tokens, .* ratio [23]\.\d+\n$", text)


@pytest.mark.real_model
def test_chat_resumed_answers_in_another_process_from_what_was_read_before():
    text = printed("chat_resumed")
    resumed = text.partition("2. Another process")[2].partition("3. The same")[0]
    assert "1871" in resumed
    seconds = [float(x) for x in re.findall(r"([\d.]+) s to the first token", text)]
    assert len(seconds) == 3 and seconds[1] < seconds[2]


@pytest.mark.real_model
def test_long_document_qa_answers_from_forks():
    text = printed("long_document_qa")
    assert "1871" in text and "1988" in text
    assert len(re.findall(r"s from the cache, [\d.]+ s reading the document again", text)) == 3
    assert float(re.search(r"ratio ([\d.]+)", text).group(1)) > 3


@pytest.mark.real_model
def test_batch_gives_the_texts_of_single_runs():
    assert printed("batch").endswith("the same texts: True\n")


@pytest.mark.real_model
def test_server_client_streams_an_answer_and_the_report():
    text, _, report = printed("server_client").partition("\n\n{")
    assert len(text.split()) > 3
    assert json.loads("{" + report)["scheme"] == "tq4"


def test_server_client_says_why_a_server_does_not_start():
    command = [sys.executable, str(ROOT / "examples" / "server_client.py"), "--model", "no/such/model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 1 and "the server must start" in done.stderr and "'no/such/model'" in done.stderr


@pytest.mark.real_model
def test_calibrate_and_allocate_loses_less_at_equal_bytes():
    text = printed("calibrate_and_allocate", "--sequences", "1")
    found = re.findall(r"^(tq@?\d) +KL ([\d.]+) nats.* ([\d.]+) MiB held", text, re.MULTILINE)
    assert [name for name, *_ in found] == ["tq2", "tq@2", "tq3", "tq@3", "tq4", "tq@4"]
    for plain, allocated in zip(found[::2], found[1::2], strict=True):
        assert float(allocated[1]) < float(plain[1]) and float(allocated[2]) <= 1.01 * float(plain[2])


@pytest.mark.real_model
def test_compare_schemes_measures_what_is_lost():
    text = printed("compare_schemes", "--schemes", "identity", "tq4", "rvq1")
    rows = [line.split() for line in text.splitlines()[3:]]
    assert [row[0] for row in rows] == ["identity", "tq4", "rvq1"]
    held, kl = ([float(row[i]) for row in rows] for i in (1, 3))
    assert held[0] > held[1] > held[2] and kl[0] == 0 < kl[1] < kl[2]


def test_every_example_is_listed():
    table = (ROOT / "examples" / "README.md").read_text()
    for path in (ROOT / "examples").iterdir():
        if path.suffix == ".py" and path.name != "loading.py":
            assert f"[`{path.name}`]({path.name})" in table, path.name
