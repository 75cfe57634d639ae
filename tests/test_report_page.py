"""`kvq report`: the page says what the other commands say, loads nothing, and escapes what comes from the model."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from test_cli import model_folder, refused
from test_results import measurement, row

from mlx_kvq_plugin.cli import main
from mlx_kvq_plugin.page import gather, render_page
from mlx_kvq_plugin.page.facts import Request
from mlx_kvq_plugin.results import SchemeResult

Run = Callable[..., tuple[int, str, str]]

QUICK = ("--quick", "--tokens", 100)
TEXT = "It was the best of times, it was the worst of times. " * 12
EMPTY = {"meta", "link", "path", "use", "rect", "circle"}


class Page(HTMLParser):
    """The text, tables and elements of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.text, self.ids = html, "", Counter[str]()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if found.get("id"):
            self.ids[str(found["id"])] += 1
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in EMPTY and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY and self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self._open):
            self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """Cells of the first row that begins so."""
        return next(cells for cells in self.rows if cells[0] == name)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, two of them with a window, in a folder with an unpleasant name."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    folder = tmp_path_factory.mktemp("models") / '<img src=x onerror="alert(1)"> & $x$'
    options: dict[str, Any] = {"layer_types": kinds, "sliding_window": tiny_models.WINDOW, "num_hidden_layers": 4}
    return model_folder(folder, **options, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def made(tiny: Path) -> Page:
    out = tiny.parent / "report.html"
    schemes = ("tq4", "tq3,edges=1", "kivi2")
    argv = ["report", tiny, *QUICK, "--out", out, "--context", 512, 4096]
    assert main([str(a) for a in [*argv, *(part for s in schemes for part in ("--kv-scheme", s))]]) == 0
    return Page(out.read_text(encoding="utf-8"))


def test_the_page_is_one_file(made: Page) -> None:
    assert made.html.startswith("<!DOCTYPE html>") and made.html.count("</html>") == 1
    loaded = [value for _, found in made.elements for name, value in found.items() if name in ("src", "href")]
    assert loaded and all(str(value).startswith(("#", "data:")) for value in loaded)
    assert not re.findall(r"@import|url\((?!#)", made.html)
    assert max(made.ids.values()) == 1  # pictures do not share ids
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', made.html)
    assert used and set(used) <= set(made.ids)


def test_what_comes_from_the_model_is_escaped(made: Page, tiny: Path) -> None:
    assert str(tiny) in made.text
    assert "img" not in {tag for tag, _ in made.elements}
    assert all("onerror" not in found for _, found in made.elements)


def test_every_picture_says_what_it_shows_and_has_its_numbers_beside_it(made: Page) -> None:
    pictures = [found for tag, found in made.elements if tag == "svg"]
    assert len(pictures) == 6 and all(len(str(found["aria-label"])) > 40 for found in pictures)
    assert all(found["role"] == "img" and found["viewbox"] for found in pictures)
    tables = [found for tag, found in made.elements if tag == "table"]
    assert len(tables) >= 10 and all(found["aria-label"] for found in tables)
    assert not re.findall("#(010203|1f5fa8|dddddd)", made.html.partition("</style>")[2])  # colours are the theme's


def test_bytes_are_those_of_kvq_plan(run: Run, made: Page, tiny: Path) -> None:
    argv = ("--context", 512, 4096, "--kv-scheme", "tq4", "--kv-scheme", "tq3,edges=1", "--kv-scheme", "kivi2")
    found = json.loads(run("plan", tiny, *argv, "--json")[1])
    for scheme in found["schemes"]:
        cells = made.row(scheme["scheme"])
        assert [cell.split()[0] for cell in cells[1:]] == [f"{n:,}" for n in scheme["nbytes"].values()]
    assert ["scheme", "512", "4,096*"] in made.rows and "* is more than the 2048 positions" in made.text


def test_bits_say_what_stays(made: Page) -> None:
    text = " ".join(made.text.split())
    assert "4 of 4 layers with keys and values are packed. Every KV head has 4.25 bits per element." in text
    assert "2 of 4 layers with keys and values are packed. Left to mlx-lm: edge layer (edges=1)." in text
    assert ["0", "16 16", "16 16"] in made.rows and ["1", "3.25 3.25", "3.25 3.25"] in made.rows
    assert "kvq calibrate" in text and "none used" in text


def test_quality_names_what_was_measured_and_how(made: Page, tiny: Path) -> None:
    text = " ".join(made.text.split())
    assert "prose: 84 tokens are read in one go, then 16 one by one" in text
    made_at = next(str(found["datetime"]) for tag, found in made.elements if tag == "time")
    assert f"mlx-kvq-plugin {version('mlx-kvq-plugin')}" in text and f"mlx-lm {version('mlx-lm')}" in text
    assert re.match(r"20\d\d-\d\d-\d\dT\d\d:", made_at) and f"kvq report {shlex.quote(str(tiny))} --quick" in text
    assert f"Measured for this page, {made_at}, by the command above." in text
    rows = {cells[0]: cells for cells in made.rows if len(cells) == 7}
    assert {"tq4", "tq3,edges=1", "kivi2", "mlx-affine4"} <= set(rows)
    assert float(rows["tq4"][1]) == 4.25 and float(rows["tq4"][3]) > 0


def test_errors_of_layers_that_stay_are_left_out(made: Page) -> None:
    heads = [i for i, cells in enumerate(made.rows) if cells == ["layer", "tq4", "tq3,edges=1", "kivi2"]]
    assert len(heads) == 4  # of keys, values, scores and outputs
    for start in heads:
        layers = made.rows[start + 1 : start + 5]
        assert [cells[0] for cells in layers] == ["0", "1", "2", "3"]
        assert [cells[2] == "–" for cells in layers] == [True, False, False, True]
        assert all(float(cells[1]) > 0 for cells in layers)


def test_average_bits_have_a_picture_with_their_calibration(run: Run, tmp_path: Path) -> None:
    folder, out = model_folder(tmp_path / "model"), tmp_path / "page.htm"
    assert run("calibrate", folder, "--sequences", 1, "--length", 128)[0] == 0
    code, printed, err = run("report", folder, *QUICK, "--out", out)
    assert code == 0 and printed == f"{out}\n" and "attention" in err
    page = Page(out.read_text(encoding="utf-8"))
    allocated = [cells for cells in page.rows if re.fullmatch(r"\d", cells[0]) and len(cells) == 3 and " " in cells[1]]
    bits = [float(b) for cells in allocated for side in cells[1:] for b in side.split()]
    assert len(allocated) == 3 and len(set(bits)) > 1
    assert sum(bits) / len(bits) == pytest.approx(3.25, abs=0.01)
    assert str(folder / "kvq_calibration.safetensors") in page.text and "kvq calibrate makes one" not in page.text
    moved = tmp_path / "moved.safetensors"
    (folder / "kvq_calibration.safetensors").rename(moved)
    argv = ("report", folder, *QUICK, "--out", out, "--kv-scheme", "tq@3")
    refused(run(*argv), "average bits must come with a calibration")
    assert run(*argv, "--calibration", moved)[0] == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert str(moved) in page.text and page.row("tq@3")  # the path is no part of the scheme's name
    assert [cells for cells in page.rows if re.fullmatch(r"\d", cells[0]) and len(cells) == 3][:3] == allocated
    assert "calibration=" not in {cell for cells in page.rows for cell in cells}


def test_two_calibrations_of_one_scheme_are_told_apart(run: Run, tmp_path: Path) -> None:
    folder, out = model_folder(tmp_path / "model"), tmp_path / "page.html"
    schemes = []
    for seed in (0, 1):
        path = tmp_path / f"${seed}$<i>.safetensors"
        assert run("calibrate", folder, "--sequences", 1, "--length", 128, "--seed", seed, "--out", path)[0] == 0
        schemes.append(f"tq@3,calibration={path}")
    argv = ("report", folder, *QUICK, "--kv-scheme", schemes[0], "--kv-scheme", schemes[1], "--out", out)
    assert run(*argv)[0] == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert all(page.row(scheme) for scheme in schemes) and "i" in {tag for tag, _ in page.elements}
    assert sum(tag == "i" for tag, _ in page.elements) == 1  # that of the page's own text


def test_a_stored_quality_is_shown_as_such(run: Run, tmp_path: Path) -> None:
    folder, out, file = model_folder(tmp_path / "model"), tmp_path / "page.html", tmp_path / "quality.json"
    failed = SchemeResult("kivi4", error="a head size must fit, got 80")
    file.write_text(measurement(row("stored<b>", 4.25, 0.0125), row("mlx-affine4", 4.5, 0.5), failed).to_json())
    argv = ("report", folder, *QUICK, "--kv-scheme", "tq4", "--out", out)
    assert run(*argv, "--frontier", file)[0] == 0
    page = Page(out.read_text(encoding="utf-8"))
    text = " ".join(page.text.split())
    assert f"Read from {file}, not measured for this page: model demo:x, a machine, the file does not say when" in text
    assert page.row("stored<b>")[3] == "0.0125" and "kivi4: a head size must fit, got 80" in text
    assert "quality" not in " ".join(re.findall(r"s of measuring \((.*?)\)", text))
    stored = tmp_path / "eval.json"
    assert run("eval", folder, "--schemes", "tq4", "--prefill", 80, "--steps", 4, "--json", stored)[0] == 0
    found = json.loads(stored.read_text())
    assert found["command"].startswith("kvq eval ") and re.match(r"20\d\d-\d\d-\d\dT", found["measured"])
    assert run(*argv, "--frontier", stored)[0] == 0
    text = " ".join(Page(out.read_text(encoding="utf-8")).text.split())
    assert f"{found['measured']}, by {found['command']}" in text


def test_a_model_that_stays_as_it_is_has_a_true_page(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert run("report", tiny, *QUICK, "--kv-scheme", "fp16", "--out", out)[0] == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert page.text.count("No scheme compresses a layer of this model.") == 2
    assert "0 of 4 layers with keys and values are packed" in page.text and page.row("fp16")


def test_schemes_that_a_model_cannot_do_are_named(run: Run, tmp_path: Path) -> None:
    folder, out = model_folder(tmp_path / "d72", head_dim=72), tmp_path / "page.html"
    assert run("report", folder, *QUICK, "--kv-scheme", "tq4", "--kv-scheme", "affine4", "--out", out)[0] == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert "tq4: the head size must be" in page.text
    assert "Every KV head has 8 bits per element of keys, 6.67 of values." in page.text
    assert page.row("affine4") and "tq4" not in {cell for cells in page.rows for cell in cells}


def test_mistakes_are_one_sentence(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("report", tiny, "--out", tmp_path / "page.html")
    refused(run("report", tiny, "--out", tmp_path / "page.pdf"), "a report must end in .html or .htm, got 'page.pdf'")
    refused(run(*argv, "--tokens", 20), "--tokens must be", "got 20")
    refused(run(*argv, "--frontier", tmp_path / "none.json"), "a measurement must be readable")
    (tmp_path / "wrong.json").write_text('{"rows": 1}')
    refused(run(*argv, "--frontier", tmp_path / "wrong.json"), "kvq eval --json or kvq frontier --json wrote")
    refused(run(*argv, "--calibration", tmp_path / "none.safetensors"), "a calibration file must exist")
    refused(run(*argv, "--calibration", "owner/name"), "a calibration must be a .safetensors file")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    refused(run(*argv, "--text", short), "must have the 384 tokens of the report, got 10")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(run(*argv), "pip install 'mlx-kvq-plugin[plot]'")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("name", ["falcon_h1", "gemma2", "gemma3n", "gpt_oss", "llama4", "nemotron_h"])
def test_layers_of_all_kinds_have_a_true_page(name: str) -> None:
    """Recurrent and chunked layers, shared keys, capped scores, sinks: what stays is named, the rest is measured."""
    model = getattr(tiny_models, name)()
    ids = [(7 * i * i + 3 * i) % tiny_models.VOCAB for i in range(120)]
    about = {"positions": None, "float32": True, "dtype": "float32", "itemsize": 2}
    texts = dict.fromkeys(("model", "model_type", "measured_file", "calibration", "command", "made"), "x")
    facts = gather(model, Request(["tq4"], [], [1024], 120, {"text": ids}, 110, 10), {**about, **texts})
    (part,) = facts.parts
    packed = [layer.index for layer in part.plan.layers if layer.spec is not None]
    assert part.attention is not None and list(part.attention.layers) == packed
    assert part.live is not None and len(part.live.norms) == facts.entries
    page = Page(render_page(facts))
    assert all(reason in page.text for reason in part.left)
    assert f"{len(packed)} of {len(part.bits)} layers with keys and values are packed" in page.text
    assert page.row("tq4")[1].split()[0] == f"{part.plan.nbytes(1024):,}" and "make_cache" not in vars(model)
