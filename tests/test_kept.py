"""What automatic bits go by is measured once and kept: read back, made again where it is not what it says it is."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny_models

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import auto, kept, self_calibration
from mlx_kvq_plugin.bound import ROUNDS, Checked, meet
from mlx_kvq_plugin.calibration_files import load_calibration, save_calibration
from mlx_kvq_plugin.errors import AllocationError

KL = "auto:kl<=0.02"


def begin(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in a new process with a cache folder of its own and a short self-calibration; the folder of what is kept."""
    monkeypatch.setenv("KVQ_CACHE_DIR", str(cache))
    monkeypatch.setattr(self_calibration, "SEQUENCES", 2)
    monkeypatch.setattr(kept, "_known", {})
    monkeypatch.setattr(kept, "_warned", [])
    return cache / kept.FOLDER


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return begin(tmp_path / "cache", monkeypatch)


@pytest.fixture(scope="module")
def first_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, bytes]]]:
    """The choice of `KL` on the model, and the files that it keeps."""
    with pytest.MonkeyPatch.context() as patch:
        folder = begin(tmp_path_factory.mktemp("first"), patch)
        yield choice_of(KL), {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def filled(folder: Path, first_files: tuple[Any, dict[str, bytes]]) -> Any:
    """The choice whose files are in the folder."""
    choice, files = first_files
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return replace(choice, kept=tuple(str(folder / Path(path).name) for path in choice.kept))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every drawing of texts, measuring of gradients, and checking of a bound."""
    made: list[str] = []

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in ((self_calibration, "drawn_texts"), (self_calibration, "calibrate_on"), (auto, "meet")):
        counted(module, name)
    return made


def forget() -> None:
    """What a new process does not know."""
    kept._known.clear()


def choice_of(scheme: str, model: Any = None) -> Any:
    with kvq.compress(model or tiny_models.llama(), scheme) as compression:
        return compression.maker.choice


def test_what_is_measured_is_kept(folder: Path, drawn: list[str], first_files: tuple[Any, dict[str, bytes]]) -> None:
    model, state = tiny_models.llama(), [x.tolist() for x in mx.random.state]
    choice = choice_of(KL, model)
    assert drawn == ["drawn_texts", "calibrate_on", "meet"]
    assert [x.tolist() for x in mx.random.state] == state
    assert {path.name for path in folder.iterdir()} == set(first_files[1])
    assert choice == replace(first_files[0], kept=choice.kept)  # the same in every run
    assert {Path(path).name.split("-")[0] for path in choice.kept} == {"bound", "calibration"}
    assert all(f"kept in {path}" in choice.lines() for path in choice.kept)
    assert f"measured {choice.measured_kl:.4f}" in choice.summary()
    assert choice_of(KL) == choice and len(drawn) == 3


def test_a_second_process_reads_it(filled: Any, drawn: list[str]) -> None:
    assert choice_of(KL) == filled and drawn == []
    bits = choice_of("auto@3.25")
    assert bits.measured_kl is None and len(bits.kept) == 1 and drawn == []


@pytest.mark.parametrize(
    ("scheme", "calls"),
    [
        ("auto@3.25,family=rvq", ["calibrate_on"]),
        ("auto@3.25,recent=32", ["calibrate_on"]),
        ("auto@3.25,sinks=0", ["calibrate_on"]),
        ("auto:kl<=0.01", ["meet"]),
        ("auto:kl<=0.02,frame=off", ["meet"]),
        ("auto:kl<=0.02,per=head", ["meet"]),
        ("auto@2,per=head", []),
        ("auto@3.25,context=4096", []),
    ],
)
def test_other_settings_measure_what_depends_on_them(
    scheme: str, calls: list[str], filled: Any, drawn: list[str]
) -> None:
    choice_of(scheme)
    assert drawn == calls
    forget()
    assert choice_of(KL) == filled and drawn == calls  # in files of their own


def test_another_release_measures_anew(filled: Any, drawn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "version", lambda name: f"{name} 9.9")
    choice_of("auto@3.25")
    assert drawn == ["drawn_texts", "calibrate_on"]


def test_other_weights_and_dtypes_have_files_of_their_own(folder: Path, drawn: list[str]) -> None:
    choice_of("auto@3.25")
    choice_of("auto@3.25", tiny_models.llama(seed=1))
    half = tiny_models.llama()
    half.set_dtype(mx.bfloat16)
    choice_of("auto@3.25", half)
    assert len(list(folder.iterdir())) == 6


def content_of(path: Path) -> Any:
    return json.loads(path.read_text()) if path.suffix == ".json" else load_calibration(path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_other_weights(path: Path) -> None:
    """A well-formed file in the wrong place."""
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, "identity": {**found["identity"], "model": "another"}}))
    else:
        calibration = load_calibration(path)
        save_calibration(path, replace(calibration, fingerprint="another"))


def of_other_content(path: Path) -> None:
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        bound = path.name.startswith("bound")
        content = {**found["content"], "limit": math.nan} if bound else [[1, -2], "x"]
        path.write_text(json.dumps({**found, "content": content}))
    else:
        calibration = load_calibration(path)
        save_calibration(path, replace(calibration, curves={}))


@pytest.mark.parametrize("spoil", [truncated, emptied, of_other_weights, of_other_content])
def test_files_that_are_not_what_they_should_be_are_made_again(
    spoil: Callable[[Path], None], filled: Any, folder: Path, drawn: list[str]
) -> None:
    contents = {path: content_of(path) for path in folder.iterdir()}
    for path in contents:
        spoil(path)
    assert choice_of(KL) == filled and len(drawn) == 3
    assert {path: content_of(path) for path in folder.iterdir()} == contents


def test_a_folder_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, drawn: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVQ_CACHE_DIR", str(tmp_path / "file"))
    first = choice_of(KL)
    assert first.kept == () and choice_of(KL) == first and len(drawn) == 3
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "set KVQ_CACHE_DIR to a folder that can be written" in warnings[0]


def test_no_home_folder_costs_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kept, "default_cache_dir", homeless)
    assert choice_of("auto@3.25").kept == ()
    assert sum("set KVQ_CACHE_DIR" in record.getMessage() for record in caplog.records) == 1


def test_it_is_said_where_things_are_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mlx_kvq_plugin")
    choice_of("auto@3.25")
    assert sum(record.getMessage().startswith(f"kvq: kept {folder}") for record in caplog.records) == 2
    forget()
    caplog.clear()
    choice_of("auto@3.25")
    assert sum(record.getMessage().startswith(f"kvq: read {folder}") for record in caplog.records) == 1


PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import tiny_models
import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import self_calibration
self_calibration.SEQUENCES = 2
with kvq.compress(tiny_models.llama(), "auto@3.25") as compression:
    print(compression.maker.choice.to_dict())
"""


def test_two_processes_at_once_keep_the_same(folder: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1] and "'kept': ('" in outputs[0]
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
    assert os.listdir(folder.parent) == [kept.FOLDER]


# ---- bounds --------------------------------------------------------------------------------------------------------

GRID = [0.0002 * 1.1**i for i in range(80)]  # predicted KL of 80 choices


def chosen(limit: float) -> float:
    return max(kl for kl in GRID if kl <= limit * (1 + 1e-9))


@pytest.mark.parametrize("power", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("scale", [0.4, 0.6, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("bound", [0.005, 0.02, 0.05])
def test_a_bound_is_met_by_nearly_the_fewest_bits(bound: float, scale: float, power: float) -> None:
    calls: list[float] = []

    def measured(limit: float) -> float:
        calls.append(limit)
        return scale * chosen(limit) * (chosen(limit) / 0.02) ** (power - 1)

    checked = meet(bound, (GRID[0], GRID[-1]), chosen, measured)
    assert checked.kl <= bound and len(calls) == len(checked.rounds) <= ROUNDS + 1
    assert checked.kl == measured(checked.limit)
    met = [kl for kl in GRID if measured(kl) <= bound]
    assert met.index(chosen(checked.limit)) >= len(met) - 2


@pytest.mark.parametrize("noise", [1.05, 1.3, 2.0, 4.0])
@pytest.mark.parametrize("bound", [0.005, 0.02, 0.05])
def test_a_bound_is_met_where_fewer_bits_are_sometimes_better(bound: float, noise: float) -> None:
    def measured(limit: float) -> float:
        return chosen(limit) * (noise if GRID.index(chosen(limit)) % 3 else 1.0) * (noise if limit < bound else 1.0)

    checked = meet(bound, (GRID[0], GRID[-1]), chosen, measured)
    assert checked.kl == measured(checked.limit) <= bound


def test_a_bound_out_of_reach_says_what_the_most_bits_cost() -> None:
    with pytest.raises(AllocationError, match=r"must be at least 0\.0004 nats a token, .* got 0\.0001"):
        meet(0.0001, (GRID[0], GRID[-1]), chosen, lambda limit: 2 * chosen(limit))


def test_a_bound_that_only_exact_caches_meet_takes_them() -> None:
    def exact(limit: float) -> float:
        return 0.0 if limit < GRID[0] else chosen(limit)

    def measured(limit: float) -> float:
        return 3 * exact(limit)

    checked = meet(0.0001, (0.0, GRID[-1]), exact, measured)
    assert checked.kl == 0.0 and Checked.from_json(asdict(checked)) == checked
    with pytest.raises(AllocationError, match=r"must be at least 0\.01 nats"):
        meet(0.0001, (0.0, GRID[-1]), exact, lambda limit: 0.01 + measured(limit))


def test_a_bound_that_the_fewest_bits_meet_takes_them() -> None:
    checked = meet(5.0, (GRID[0], GRID[-1]), chosen, chosen)
    assert checked.limit == GRID[-1] and len(checked.rounds) == 1


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "llama_sliding"])
def test_the_measured_divergence_is_that_of_the_caches_that_a_model_gets(name: str) -> None:
    """Against single steps through the caches of the compressed model, as the ruler feeds them."""
    from mlx_kvq_plugin.bound import PREFILL
    from mlx_kvq_plugin.evaluation import divergence, step_logprobs

    model = tiny_models.ADAPTED[name]()
    with kvq.compress(model, "auto:kl<=0.03") as compression:
        choice = compression.maker.choice
        assert choice is not None and choice.measured_kl is not None and choice.measured_kl <= 0.03
        texts = self_calibration.own_texts(model, None)
        runs = [step_logprobs(model, compression.maker(), text, PREFILL) for text in texts]
    plain = [step_logprobs(model, kvq.make_prompt_cache(model), text, PREFILL) for text in texts]
    mean = mx.mean(mx.stack([divergence(a, b) for a, b in zip(plain, runs, strict=True)])).item()
    assert mean == pytest.approx(choice.measured_kl, rel=0.005)
    assert choice.measured_kl != pytest.approx(choice.kl, rel=1e-3)


def test_a_bound_that_short_texts_cannot_show_is_refused() -> None:
    with pytest.raises(AllocationError, match="must come with at most 192 dense tokens"):
        choice_of("auto:kl<=0.02,recent=192")


@pytest.mark.parametrize("bound", [0.02, 0.01])
def test_a_choice_is_the_one_that_was_measured(bound: float) -> None:
    """Here the prediction is too low, so that the bound is not met by the first choice."""
    choice = choice_of(f"auto:kl<={bound}", tiny_models.gemma3_text())
    (path,) = (Path(path) for path in choice.kept if "bound-" in path)
    rounds = content_of(path)["content"]["rounds"]
    assert rounds[0][1] > bound >= rounds[-1][1] and [choice.kl, choice.measured_kl] == rounds[-1]


def test_a_bound_by_a_calibration_is_measured_too(filled: Any, folder: Path, tmp_path: Path, drawn: list[str]) -> None:
    (kept_file,) = folder.glob("calibration-*")
    kept_file.rename(tmp_path / "own.safetensors")
    choice = choice_of(f"{KL},calibration={tmp_path / 'own.safetensors'}")
    assert choice.basis == "gradients of the calibration own.safetensors" and drawn == ["meet"]
    assert (choice.layers, choice.measured_kl) == (filled.layers, filled.measured_kl)
    assert [Path(path).name.split("-")[0] for path in choice.kept] == ["bound"]


@pytest.mark.parametrize("bound", ["0.00002", "0.000000001"])
def test_bounds_that_codes_do_not_meet_take_sixteen_bits(bound: str) -> None:
    with pytest.raises(AllocationError, match="must be at least"):
        choice_of(f"auto:kl<={bound},per=head")
    choice = choice_of(f"auto:kl<={bound}")
    assert 6.25 < choice.bits <= 16.0 and choice.measured_kl <= float(bound)
    assert choice_of(f"auto:kl<={bound}") == choice


def test_a_prompt_that_is_packed_late_is_measured_packed(filled: Any) -> None:
    assert choice_of("auto:kl<=0.02,compress_after=prefill").measured_kl > 0.005
