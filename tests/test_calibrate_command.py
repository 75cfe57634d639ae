"""`kvq calibrate`, `kvq push-calibration`, `kvq inspect --allocation`, and commands that use a calibration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from local_hub import local_hub
from test_cli import model_folder, refused

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.allocation import ACTIVATION, GRADIENT, KEY, SIDES, VALUE, predicted_gain
from mlx_kvq_plugin.calibration_files import FILE_NAME
from mlx_kvq_plugin.cli import main

Run = Callable[..., tuple[int, str, str]]

SHORT = ("--sequences", 2, "--length", 128)
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without a calibration."""
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def calibrated(bare: Path) -> Path:
    """The same with one."""
    folder = bare.parent / "calibrated"
    shutil.copytree(bare, folder)
    assert main(["calibrate", str(folder), *map(str, SHORT)]) == 0
    return folder


def report_of(run: Run, *argv: object) -> dict[str, Any]:
    code, out, err = run("inspect", "--allocation", *argv, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


# ---- calibrate -------------------------------------------------------------------------------------------------------


def test_a_calibration_goes_next_to_the_model_and_is_used_there(run: Run, bare: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(bare, folder)
    ask = ("generate", folder, "--prompt", "x" * 60, "--kv-scheme", "tq@2.5", "--max-tokens", 4)
    refused(run(*ask), f"average bits must come with a calibration of the model, got none next to {folder}")
    code, out, err = run("calibrate", folder, *SHORT)
    assert code == 0 and out.splitlines()[-1] == f"written to {folder / FILE_NAME}"
    assert err.startswith("kvq: 2 sequences of 128 tokens (prose, code, chat) in ") and err.count("\n") == 1
    lines = [line.split() for line in out.splitlines()[1:5]]
    assert [line[:3] for line in lines] == [[k, s, "6"] for k in (GRADIENT, ACTIVATION) for s in SIDES]
    found = kvq.load_calibration(folder / FILE_NAME)
    weights = [c.weight for c in found.components(GRADIENT, found.layers()) if c.side == KEY]
    assert float(lines[0][3]) == pytest.approx(predicted_gain(weights), abs=0.006)
    assert run(*ask)[0] == 0
    code, out, _ = run("inspect", folder, "--kv-scheme", "tq@2.5", "--contexts", 1000)
    assert code == 0 and "scheme tq@2.5" in out and "\n  layers 0" in out


def test_texts_sequences_seed_and_path_are_those_asked_for(run: Run, bare: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("All that is written here is read as one character after another, again. " * 4)
    out = tmp_path / "own.safetensors"
    assert run("calibrate", bare, "--text", text, "--sequences", 1, "--length", 130, "--seed", 3, "--out", out)[0] == 0
    model, tokenizer = mlx_lm.load(str(bare))
    arguments = {"texts": [text.read_text()], "sequences": 1, "length": 130, "seed": 3, "source": str(bare)}
    assert kvq.load_calibration(out) == kvq.calibrate(model, tokenizer, **arguments)
    assert not (bare / FILE_NAME).exists()


WRONG = {
    "no model": (["calibrate"], "MODEL"),
    "no such model": (["calibrate", "./nowhere"], "'./nowhere'"),
    "short sequences": (
        ["calibrate", "{bare}", "--out", "{tmp}/a.safetensors", "--length", "64"],
        "at least 128 tokens",
    ),
    "no sequences": (["calibrate", "{bare}", "--sequences", "0"], "--sequences"),
    "missing text": (["calibrate", "{bare}", "--text", "{tmp}/none.txt"], "UTF-8 file", "none.txt"),
    "wrong suffix": (["calibrate", "{bare}", "--out", "{tmp}/a.npz"], "a calibration file must end in .safetensors"),
    "missing folder": (["calibrate", "{bare}", "--out", "{tmp}/no/a.safetensors"], "the folder of a calibration file"),
    "repository without a path": (["calibrate", "me/model"], "--out must say", f"--out {FILE_NAME}"),
    "missing file": (["inspect", "--allocation", "{tmp}/none.safetensors"], "must exist"),
    "another file": (["inspect", "--allocation", "{bare}/model.safetensors"], "another safetensors file"),
    "whole bits": (["inspect", "--allocation", "{file}", "--kv-scheme", "tq3"], "average bits, got tq3", "tq@3"),
    "two schemes": (
        ["inspect", "--allocation", "{file}", "--kv-scheme", "tq@3", "--kv-scheme", "tq@2"],
        "got tq@3 and tq@2",
    ),
    "too many bits": (["inspect", "--allocation", "{file}", "--kv-scheme", "tq@7"], "in 1 to 6, got 7"),
    "nothing left": (["inspect", "--allocation", "{file}", "--kv-scheme", "tq@3,edges=2"], "at least one component"),
    "a model too": (["inspect", "{bare}", "--allocation", "{file}"], "without a MODEL"),
    "live too": (["inspect", "--live", "--allocation", "{file}"], "--live"),
    "no model and no file": (["inspect"], "a model must be named"),
    "plot alone": (["inspect", "{bare}", "--plot", "{tmp}/a.png"], "--plot must go with --allocation"),
    "plot of no kind": (["inspect", "--allocation", "{file}", "--plot", "{tmp}/a.txt"], "a plot must end in .png or"),
    "plot nowhere": (["inspect", "--allocation", "{file}", "--plot", "{tmp}/no/a.png"], "folder of a plot must exist"),
    "nothing to push": (["push-calibration", "{tmp}/none.safetensors", "me/model"], "must exist"),
    "nowhere to push": (["push-calibration", "{file}"], "OWNER/NAME"),
    "no calibration": (["inspect", "{bare}", "--kv-scheme", "tq@3"], "make one with: kvq calibrate {bare}"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_sentence(case: str, run: Run, bare: Path, calibrated: Path, tmp_path: Path) -> None:
    argv, *fragments = WRONG[case]
    names = {"bare": bare, "tmp": tmp_path, "file": calibrated / FILE_NAME}
    refused(run(*(part.format(**names) for part in argv)), *(part.format(**names) for part in fragments))
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_not_utf8_is_refused(run: Run, bare: Path, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    refused(run("calibrate", bare, "--text", tmp_path / "latin1.txt"), "UTF-8", "latin1.txt")


def test_a_wrong_path_fails_before_the_model_is_read(run: Run, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_lm, "load", lambda *_, **__: pytest.fail("loaded"))
    refused(run("calibrate", bare, "--out", "/proc/none/a.safetensors"), "folder")
    monkeypatch.setattr("os.access", lambda *_: False)
    refused(run("calibrate", bare), "must be writable", str(bare))


def test_checks_find_the_calibration(run: Run, calibrated: Path) -> None:
    report = json.loads(run("check", calibrated, "--kv-scheme", "tq@4.5", "--tokens", 160, "--json")[1])
    found = {check["name"]: check["status"] for check in report["checks"] if check["scheme"] == "tq@4.5"}
    assert "compress" not in found
    assert {found[name] for name in ("save and load", "deep copy", "another thread", "undo")} == {"exact"}


# ---- inspect --allocation --------------------------------------------------------------------------------------------


def test_an_allocation_is_printed_by_layer_and_head(run: Run, calibrated: Path) -> None:
    code, out, err = run("inspect", "--allocation", calibrated / FILE_NAME, "--kv-scheme", "tq@2.5")
    found = kvq.load_calibration(calibrated / FILE_NAME)
    allocation = found.allocate(kvq.parse_scheme("tq@2.5"))
    lines = out.splitlines()
    assert (code, err) == (0, "") and all(line == line.rstrip() for line in lines)
    assert lines[0] == ("tq@2.5 on calibrated, calibrated on 2 sequences of 128 tokens for sinks=4,recent=16")
    assert lines[2].startswith("relative error of keys in b bits of tq: about ") and "^-b" in lines[2]
    table = lines.index("layer  bits of key heads (optimum)  bits of value heads (optimum)") + 1
    for layer, line in enumerate(lines[table : table + 3]):
        cells = [
            f"{b}({r:.1f})"
            for side in SIDES
            for b, r in zip(allocation.bits[side][layer], allocation.optimum[side][layer], strict=True)
        ]
        assert line.split() == [str(layer), *cells]
    assert lines[-1] == "both: 2.500 bits on average"
    mean = sum(b for heads in allocation.bits[KEY].values() for b in heads) / 6
    assert lines[-3].startswith(f"keys: {mean:.3f} bits on average; heads: ")


def test_the_report_is_the_allocation(run: Run, calibrated: Path) -> None:
    path = calibrated / FILE_NAME
    report = report_of(run, path, "--kv-scheme", "k=tq@3,v=tq@2,edges=1")
    found = kvq.load_calibration(path).allocate(kvq.parse_scheme("k=tq@3,v=tq@2,edges=1"))
    assert report["model"] == "calibrated" and report["scheme"] == "k=tq@3,v=tq@2,edges=1"
    assert report["average"] == {KEY: 3.0, VALUE: 2.0}
    assert report["bits"] == {side: {"1": list(found.bits[side][1])} for side in SIDES}
    assert report["optimum"][KEY]["1"] == pytest.approx(list(found.optimum[KEY][1]))
    assert list(report_of(run, path, "--kv-scheme", "k=tq4,v=tq@2")["bits"]) == [VALUE]
    assert report_of(run, path)["scheme"] == "tq@3"


def test_gradients_predict_less_distortion_than_activations(run: Run, calibrated: Path) -> None:
    """By construction: both allocations are weighed by gradients."""
    path = calibrated / FILE_NAME
    report = report_of(run, path, "--kv-scheme", "tq@3")
    by_gradient, by_activation = (report["distortion"][kind] for kind in (GRADIENT, ACTIVATION))
    assert by_gradient < 1 and by_gradient < by_activation
    other = report_of(run, path, "--kv-scheme", "tq@3,sensitivity=activation")
    assert other["distortion"] == report["distortion"] and other["bits"] != report["bits"]
    found = kvq.load_calibration(path)
    errors = [(c, found.curves["tq", c.side]) for c in found.components(GRADIENT, [0, 1, 2])]
    equal = sum(c.weight * curve.measured(3) for c, curve in errors)
    allocated = sum(c.weight * curve.measured(report["bits"][c.side][str(c.layer)][c.head]) for c, curve in errors)
    assert by_gradient == pytest.approx(allocated / equal)


def test_an_allocation_is_drawn(run: Run, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    titles, texts = [], []
    suptitle, text = Figure.suptitle, Axes.text
    monkeypatch.setattr(Figure, "suptitle", lambda f, t, **k: (titles.append(t), suptitle(f, t, **k))[1])
    monkeypatch.setattr(Axes, "text", lambda a, x, y, s, **k: (texts.append(s), text(a, x, y, s, **k))[1])
    plot = tmp_path / "bits.png"
    code, out, _ = run("inspect", "--allocation", calibrated / FILE_NAME, "--kv-scheme", "tq@2.5", "--plot", plot)
    assert code == 0 and out and plot.read_bytes().startswith(PNG)
    assert titles == ["tq@2.5 on calibrated: bits of each KV head"]
    bits = kvq.load_calibration(calibrated / FILE_NAME).allocate(kvq.parse_scheme("tq@2.5")).bits
    assert texts == [str(bits[side][layer][head]) for side in SIDES for head in (0, 1) for layer in range(3)]


def test_layers_with_fewer_heads_are_drawn_without_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    from mlx_kvq_plugin.plots import plot_allocation

    texts: list[str] = []
    text = Axes.text
    monkeypatch.setattr(Axes, "text", lambda a, x, y, s, **k: (texts.append(s), text(a, x, y, s, **k))[1])
    plot_allocation({KEY: {0: (3, 2), 5: (4,)}}, tmp_path / "a.svg", "title")
    assert texts == ["3", "4", "2"] and (tmp_path / "a.svg").read_text().startswith("<?xml")


# ---- push-calibration ------------------------------------------------------------------------------------------------


def test_a_calibration_is_pushed(run: Run, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_hub(monkeypatch, tmp_path / "cache") as hub:
        push = ("push-calibration", calibrated / FILE_NAME, "me/tiny")
        refused(run(*push), "the hub must accept the file", "'me/tiny'", "your token")
        hub.files["me/tiny"] = {}
        code, out, err = run(*push)
        assert (code, err) == (0, "") and out.startswith(f"{hub.address}/me/tiny/commit/")
        assert hub.files["me/tiny"][FILE_NAME] == (calibrated / FILE_NAME).read_bytes()
        hub.refusal = (401, "Invalid credentials in Authorization header")
        refused(run(*push), "401 Unauthorized")


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["calibrate", "push-calibration"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"\n  kvq {command} " in capsys.readouterr().out.split("examples:")[1]
