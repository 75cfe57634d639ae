"""`kvq eval` and `kvq frontier`: lists of schemes, what is printed and written, what is refused before any work."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from test_cli import LONG, Run, model_folder, refused

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.cli import evaluate, main
from mlx_kvq_plugin.cli.evaluate import split_schemes
from mlx_kvq_plugin.contenders import AFFINE_SCHEMES
from mlx_kvq_plugin.corpus import corpus_text
from mlx_kvq_plugin.results import Measurement

SHORT = ("--prefill", 120, "--steps", 8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


# ---- lists of schemes ------------------------------------------------------------------------------------------------

LISTS = {
    "tq4": ["tq4"],
    "tq4 rvq1": ["tq4", "rvq1"],
    "tq4,tq3,rvq1": ["tq4", "tq3", "rvq1"],
    "tq4 rvq1,edges=2": ["tq4", "rvq1,edges=2"],
    "tq4,rvq1,edges=2,recent=64,tq3": ["tq4", "rvq1,edges=2,recent=64", "tq3"],
    "k=tq4,v=tq2": ["k=tq4,v=tq2"],
    "tq4,k=tq4,v=tq2,sinks=8,k=tq3,v=tq1,tq3": ["tq4", "k=tq4,v=tq2,sinks=8", "k=tq3,v=tq1", "tq3"],
    "v=tq2,k=tq4": ["v=tq2,k=tq4"],
    "edges=2,tq4": ["edges=2,tq4"],
    "frame=off,k=tq4,v=tq2,tq3": ["frame=off,k=tq4,v=tq2", "tq3"],
    "tq4, tq3": ["tq4", "tq3"],
    "tq@2.5,sensitivity=activation,mlx-affine4,fp16": ["tq@2.5,sensitivity=activation", "mlx-affine4", "fp16"],
    "tq4,tq3 tq3 tq4": ["tq4", "tq3"],
}


@pytest.mark.parametrize("text", list(LISTS))
def test_commas_part_schemes_and_their_parts(text):
    assert split_schemes(text.split(" ")) == LISTS[text]
    for scheme in LISTS[text]:
        assert scheme.startswith("mlx-affine") or kvq.parse_scheme(scheme)


def test_spaces_after_commas_do_no_harm():
    assert split_schemes([" tq4 , edges = 2,  k = tq3 , v=tq2 "]) == ["tq4,edges = 2", "k = tq3,v=tq2"]
    assert kvq.parse_scheme("tq4,edges = 2").edges == 2


# ---- what is refused -------------------------------------------------------------------------------------------------

WRONG = {
    "unknown scheme": (["--schemes", "tq4,rvq9"], "codec rvq9 does not exist"),
    "unknown affine": (["--schemes", "mlx-affine7"], "'mlx-affine7'"),
    "setting without a scheme": (["--schemes", "edges=2"], "must name one codec"),
    "half a scheme": (["--schemes", "k=tq4,tq3"], "must name one codec", "'k=tq4'"),
    "empty list": (["--schemes", ","], "a list of schemes must name one", "','"),
    "missing text": (["--text", "{tmp}/none.txt"], "must be readable", "none.txt"),
    "folder as text": (["--text", "{tmp}"], "must be readable"),
    "binary text": (["--text", "{tmp}/binary"], "must be UTF-8", "binary"),
    "text twice": (["--text", "{tmp}/short.txt", "{tmp}/short.txt"], "given once"),
    "short text": (["--text", "{tmp}/short.txt"], "200 + 200 = 400 tokens", "short.txt"),
    "json in no folder": (["--json", "{tmp}/no/x.json"], "the folder of an output file must exist", "no'"),
    "json is a folder": (["--json", "{tmp}"], "must not be a folder"),
    "plot in no folder": (["--plot", "{tmp}/no/x.png"], "the folder of an output file must exist"),
    "plot of no format": (["--plot", "{tmp}/x.jpg"], "must end in one of .png, .svg, .pdf", "'x.jpg'"),
    "no steps": (["--steps", "1"], "--steps", "at least 2"),
    "no prefill": (["--prefill", "0"], "--prefill"),
}
WRONG_EVAL = {
    "depth beyond": (["--needle", "--depths", "1.5"], "from 0 to 1", "'1.5'"),
    "depth of no needle": (["--depths", "0.5"], "must come with --needle"),
    "tokens of no needle": (["--needle-tokens", "500"], "must come with --needle"),
    "hay too short": (["--needle", "--needle-tokens", "3"], "at most 3 tokens"),
}
NEEDS_MODEL = ("short text", "hay too short")


@pytest.mark.parametrize(
    ("command", "case"), [*((c, w) for c in ("eval", "frontier") for w in WRONG), *(("eval", w) for w in WRONG_EVAL)]
)
def test_mistakes_are_one_sentence_before_anything_runs(run: Run, tiny, tmp_path, monkeypatch, command, case):
    options, *fragments = {**WRONG, **WRONG_EVAL}[case]
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    if case not in NEEDS_MODEL:
        monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("the model was loaded"))
    refused(run(command, tiny, *(option.format(tmp=tmp_path) for option in options)), *fragments)


@pytest.mark.parametrize("command", ["eval", "frontier"])
def test_missing_matplotlib_is_said_before_anything_runs(run: Run, tiny, tmp_path, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("the model was loaded"))
    refused(run(command, tiny, "--plot", tmp_path / "x.png"), "matplotlib must be installed", "pip install")


def test_an_unknown_model_type_is_refused(run: Run, tmp_path):
    config = {"model_type": "seed_oss", "attention_bias": False, "attention_out_bias": False, "mlp_bias": False}
    folder = model_folder(tmp_path / "strange", "seed_oss", **config, head_dim=64, rope_theta=1e4)
    refused(run("eval", folder, *SHORT), "seed_oss")


# ---- eval ------------------------------------------------------------------------------------------------------------


def test_eval_prints_a_line_a_scheme_and_text_and_writes_json(run: Run, tiny, tmp_path):
    json_file = tmp_path / "cost.json"
    code, out, err = run("eval", tiny, "--schemes", "tq2,rvq1,edges=1", "fp16", *SHORT, "--json", json_file)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{tiny}: 3 texts (prose, code, chat), 120 tokens of prefill and 8 steps"
    assert lines[2].split()[:6] == ["scheme", "text", "bits", "MiB", "ratio", "16-bit"]
    names = [line.split()[:2] for line in lines[3:15]]
    texts = ["prose", "code", "chat"]
    assert [name[0] for name in names] == ["tq2", *texts, "rvq1,edges=1", *texts, "fp16", *texts]
    assert names[0] == ["tq2", "all"] and names[4] == ["rvq1,edges=1", "all"]
    assert lines[11].split()[6:12] == [*"00000", "100.0%"]
    assert "rvq1,edges=1: 2 of 3 layers stay as they are: edge layer (edges=1)" in lines
    assert "tokens kept dense (float32 here, 4 bytes an element)" in out and "16-bit ratio" in out
    found = Measurement.from_json(json_file.read_text())
    assert [row.scheme for row in found.rows] == ["tq2", "rvq1,edges=1", "fp16"]
    assert (found.model, found.texts, found.prefill, found.steps, found.dtype, found.joint) == (
        str(tiny),
        ("prose", "code", "chat"),
        120,
        8,
        "float32",
        True,
    )
    assert f"mlx {mx.__version__}" in found.machine
    (row, _, exact_row) = found.rows
    assert row.overall is not None and exact_row.overall is not None
    assert row.overall.positions == 24 and row.overall.kl_mean > 0 == exact_row.overall.kl_max
    assert f"{row.overall.kl_mean:.3g}" in lines[3].split() and f"{row.ratio:.2f}x" in lines[3].split()


def test_eval_reads_files_alone_and_one_by_one(run: Run, tiny, tmp_path):
    text, json_file = tmp_path / "long.txt", tmp_path / "x.json"
    text.write_text(LONG * 3)
    asked = ("--text", text, "--schemes", "tq3", "--json", json_file, *SHORT)
    code, out, err = run("eval", tiny, *asked, "--one-by-one")
    assert (code, err) == (0, "") and out.startswith(f"{tiny}: {text}, 120 tokens")
    alone = Measurement.from_json(json_file.read_text())
    assert not alone.joint and alone.texts == (str(text),)
    assert run("eval", tiny, *asked)[0] == 0
    joint = Measurement.from_json(json_file.read_text())
    pairs = [(row.overall, row.nbytes) for row in (alone.rows[0], joint.rows[0])]
    assert pairs[0][1] == pairs[1][1] and pairs[0][0] is not None and pairs[1][0] is not None
    assert pairs[0][0].kl_mean == pytest.approx(pairs[1][0].kl_mean, rel=1e-3)


def test_eval_draws_and_retrieves(run: Run, tiny, tmp_path):
    plot, json_file = tmp_path / "x.png", tmp_path / "x.json"
    asked = ("--needle", "--depths", "0.2", "0.8", "--needle-tokens", "200", "--plot", plot, "--json", json_file)
    code, out, err = run("eval", tiny, "--schemes", "tq4,fp16", *SHORT, *asked)
    assert (code, err) == (0, "")
    assert re.search(r", needle in 2\d\d tokens$", out.splitlines()[0])
    assert "needle 0.2 (fp16)  needle 0.8 (fp16)" in out and "likelier the right key" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    lossy, exact = Measurement.from_json(json_file.read_text()).rows
    assert exact.needle == exact.reference_needle == lossy.reference_needle != lossy.needle
    assert [found.depth for found in lossy.needle] == [0.2, 0.8]


def test_eval_has_defaults(run: Run, tiny):
    code, out, _ = run("eval", tiny, "--prefill", 60, "--steps", 2)
    first = [line.split()[0] for line in out.splitlines()[3:] if line and not line.startswith(" ")]
    assert code == 0 and first[:4] == list(evaluate.DEFAULT_SCHEMES)


def test_half_precision_models_hold_what_16_bits_hold(run: Run, tmp_path):
    folder, json_file = model_folder(tmp_path / "half", dtype=mx.bfloat16), tmp_path / "x.json"
    code, out, _ = run("eval", folder, "--schemes", "tq4", *SHORT, "--no-float32", "--json", json_file)
    assert code == 0 and "tokens kept dense (bfloat16 here)" in out
    found = Measurement.from_json(json_file.read_text())
    assert found.dtype == "bfloat16" and found.rows[0].nbytes == found.rows[0].nbytes_16bit


# ---- frontier --------------------------------------------------------------------------------------------------------


def test_frontier_has_mlx_lms_caches_and_marks_the_front(run: Run, tiny, tmp_path):
    plot, json_file = tmp_path / "frontier.svg", tmp_path / "frontier.json"
    asked = ("--schemes", "tq6,tq2,mlx-affine3,kivi2", *SHORT, "--plot", plot, "--json", json_file)
    code, out, err = run("frontier", tiny, *asked)
    assert (code, err) == (0, "")
    found = Measurement.from_json(json_file.read_text())
    names = [row.scheme for row in found.rows]
    assert names == ["tq6", "tq2", "mlx-affine3", "kivi2", *(name for name in AFFINE_SCHEMES if name != "mlx-affine3")]
    lines = out.splitlines()[3 : 3 + len(names)]
    marked = {line.split()[1]: line.startswith("*") for line in lines if line.startswith("*")}
    shown = [line.split()[1] if line.startswith("*") else line.split()[0] for line in lines]
    costs = [next((row.bits, row.overall.kl_mean) for row in found.rows if row.scheme == name) for name in shown]
    assert costs == sorted(costs) and sorted(shown) == sorted(names)
    best = [name for name, (bits, kl) in zip(shown, costs, strict=True) if all(kl < k for b, k in costs if b < bits)]
    assert set(marked) <= set(best) and "tq2" in marked
    assert plot.read_bytes().startswith(b"<?xml")


def test_frontier_sweeps_all_schemes(run: Run, tiny, monkeypatch):
    asked: list[str] = []

    def measure(model, texts, schemes, **options):
        asked.extend(schemes)
        return iter(())

    monkeypatch.setattr(evaluate, "measure", measure)
    monkeypatch.setattr(evaluate, "table", lambda rows, texts: [["scheme"]])
    assert run("frontier", tiny, *SHORT)[0] == 0
    assert {"tq1", "tq6", "rvq3", "qjl1", "turbo4v2", *AFFINE_SCHEMES} <= set(asked) and len(asked) > 40


def test_help_says_how_schemes_are_parted(capsys):
    for command in ("eval", "frontier"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "a part without = or k= begins the next scheme" in text and "--one-by-one" in text


# ---- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_eval_of_a_real_model(run: Run, tmp_path):
    text, json_file = tmp_path / "prose.txt", tmp_path / "cost.json"
    text.write_text(corpus_text("prose"), encoding="utf-8")
    asked = ("--text", text, "--prefill", 150, "--steps", 8, "--json", json_file)
    assert run("eval", "demo:smollm2", "--schemes", "tq4,tq2,mlx-affine4,fp16", *asked)[0] == 0
    tq4, tq2, affine, exact = Measurement.from_json(json_file.read_text()).rows
    assert tq4.overall and tq2.overall and affine.overall and exact.overall
    assert exact.overall.kl_max == 0.0 and exact.greedy == 8
    assert 0 < tq4.overall.kl_mean < 0.02 < tq2.overall.kl_mean
    assert tq4.overall.kl_mean < affine.overall.kl_mean / 4
    assert 5 < tq4.overall.reference_perplexity < 100
    assert tq4.bits == 4.25 and 1.5 < tq4.ratio < tq4.ratio_16bit < 16 / 4.25
