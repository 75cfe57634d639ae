"""`kvq validate` and `kvq precompute`: tables, JSON, exit codes and wrong input."""

import json
import os

import mlx.core as mx
import pytest

from mlx_kvq_plugin.codecs.turboquant import TurboQuant
from mlx_kvq_plugin.sphere import gaussian_codebook, sphere_codebook, sphere_mse

QUICK = ("--pairs", 4096, "--dim", 64)
COLUMNS = (
    "codec bits codes pairs mse band bound paper x4^-bits x4^-codes D*ip bound paper bias slope-1 corr"  # of the table
)


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def narrow(monkeypatch):
    """`tq` codecs state a band that they are below of."""
    band = TurboQuant.expected_mse

    def higher(self, dim):
        low, high = band(self, dim)
        return 1.05 * low, 1.05 * high

    monkeypatch.setattr(TurboQuant, "expected_mse", higher)


def rows(out: str) -> dict[str, list[str]]:
    """Rows of a table by codec."""
    lines = out.split("\n\n")[0].splitlines()[2:]
    return {line.split()[0]: line.split() for line in lines}


def test_the_table_shows_codecs_against_theory(run):
    code, out, err = run("validate", "--codecs", "tq2", "tqprod3", "affine4", *QUICK)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "head size 64, rotation hadamard, scaling least_squares, seeds 0 to 15"
    assert lines[1].split() == COLUMNS.split()
    table = rows(out)
    assert list(table) == ["tq2", "tqprod3", "affine4"]
    bits, codes, pairs, mse, band, bound, paper, over, over_codes, product, *more = table["tq2"][1:]
    assert (bits, codes, pairs, bound, paper) == ("2.25", "2.00", "4096", "0.17", "0.117")
    low, high = (float(edge) for edge in band.split("-"))
    assert low <= float(mse) <= high and 0.112 < low < high < 0.114
    assert float(over) == pytest.approx(float(mse) * 4**2.25, abs=0.02)
    assert float(over_codes) == pytest.approx(float(mse) * 16, abs=0.02)
    assert float(product) == pytest.approx(float(mse), rel=0.1)
    assert more[:2] == ["-", "-"]
    assert float(more[5]) == pytest.approx(-float(mse), abs=0.01)  # slope
    assert table["tqprod3"][11:13] == ["0.267", "0.18"]
    assert table["affine4"][6:8] == ["-", "-"]
    assert lines[-1] == "3 of 3 within theory"


def test_without_codecs_all_of_the_asked_rates_are_measured(run):
    code, out, _ = run("validate", "--bits", 1, *QUICK)
    assert code == 0
    assert list(rows(out)) == ["qjl1", "tcq1", "tq1"]
    code, out, _ = run("validate", "--bits", 3, "--codecs", "tq3", "tq2", "rvq1", "polar4", *QUICK)
    assert list(rows(out)) == ["tq3", "polar4"]


def test_head_sizes_have_a_table_each(run):
    code, out, _ = run("validate", "--codecs", "tq2", "polar3", "--dim", 24, 32, "--pairs", 4096)
    assert code == 0
    first, second = out.split("\n\n")[:2]
    assert first.startswith("head size 24") and second.startswith("head size 32")
    assert "polar3   not possible: polar3 must have heads of a multiple of 16 channels, got 24" in first
    assert "not possible" not in second
    assert out.endswith("3 of 3 within theory\n")


def test_a_codec_outside_its_band_fails(run, narrow):
    code, out, err = run("validate", "--codecs", "tq2", "qjl1", *QUICK)
    assert (code, err) == (1, "")
    assert rows(out)["tq2"][-1] == "FAIL" and rows(out)["qjl1"][-1] != "FAIL"
    (line,) = (line for line in out.splitlines() if line.startswith("FAIL"))
    assert line.startswith("FAIL tq2 at D = 64 must have a mean squared error within its band 0.1")
    assert out.endswith("1 of 2 within theory\n")


def test_json_has_every_number(run, narrow):
    code, out, _ = run("validate", "--codecs", "tq2", "polar3", "qjl1", "--dim", 24, "--pairs", 4096, "--json")
    facts = json.loads(out)
    assert code == 1 and not facts["passed"]
    assert (facts["seed"], facts["rotation"]) == (0, "hadamard")
    tq2, qjl1 = facts["results"]
    assert facts["failures"] == tq2["failures"] and len(tq2["failures"]) == 1 and qjl1["failures"] == []
    assert (tq2["codec"], tq2["dim"], tq2["pairs"], tq2["unbiased"]) == ("tq2", 24, 4096, False)
    assert tq2["shannon"] == pytest.approx(4 ** -tq2["bits"])
    assert tq2["over_shannon"] == pytest.approx(tq2["mse"] / tq2["shannon"])
    assert tq2["over_shannon_codes"] == pytest.approx(tq2["mse"] * 16)
    assert tq2["published"]["mse"] == 0.117 and tq2["published"]["source"].endswith("theorem 1")
    assert {"mse_se", "product", "product_se", "bias", "bias_se", "slope", "slope_se", "correlation"} < set(qjl1)
    assert [skipped["codec"] for skipped in facts["skipped"]] == ["polar3"]


def test_passing_codecs_pass_in_json(run):
    code, out, _ = run("validate", "--codecs", "tq2", *QUICK, "--json")
    assert code == 0 and json.loads(out)["passed"]


def test_rotation_scaling_and_seed_reach_the_codecs(run):
    found = {}
    for options in ((), ("--rotation", "dense"), ("--scaling", "norm"), ("--seed", 7)):
        code, out, _ = run("validate", "--codecs", "tq2", *QUICK, "--json", *options)
        assert code == 0
        found[options] = json.loads(out)
    assert len({facts["results"][0]["mse"] for facts in found.values()}) == 4
    assert found["--rotation", "dense"]["rotation"] == "dense" and found["--seed", 7]["seed"] == 7
    assert found["--scaling", "norm"]["scaling"] == "norm"
    code, out, _ = run("validate", "--codecs", "tq2", "--dim", 72, "--pairs", 4096, "--rotation", "dense")
    assert code == 0 and out.startswith("head size 72, rotation dense")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--codecs", "tq9"), "codec tq9 does not exist; choose one of tq1, tq2"),
        (("--codecs", "identity"), "must be lossy and one, got identity"),
        (("--codecs", "tq2+tq3"), "must be lossy and one, got tq2+tq3"),
        (("--codecs", "tq2", "--dim", "72"), "--codecs must name one that can do one of the head sizes, got none"),
        (("--bits", "7"), "--bits must be the rates of some codec at these head sizes, got those of none"),
        (("--bits", "2", "--codecs", "tq1"), "--bits must be the rates of some codec"),
        (("--bits", "9"), "argument --bits: must be at most 8, got '9'"),
        (("--bits", "two"), "argument --bits: must be an integer of at least 1, got 'two'"),
        (("--dim", "3"), "argument --dim: must be at least 4, got '3'"),
        (("--pairs", "0"), "argument --pairs: must be an integer of at least 1, got '0'"),
        (("--seed", "-1"), "argument --seed: must be an integer of at least 0, got '-1'"),
        (("--rotation", "fourier"), "argument --rotation: invalid choice: 'fourier'"),
        (("--scaling", "none"), "argument --scaling: invalid choice: 'none'"),
    ],
)
def test_wrong_input_is_told_in_one_sentence(run, options, said):
    code, _, err = run("validate", "--pairs", "4096", *options)
    assert code == 2
    assert err.startswith("kvq: error: ") and said in err and err.count("\n") == 1


# ---- precompute ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVQ_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "codebooks"


def test_precompute_stores_what_it_prints(run, folder):
    code, out, err = run("precompute")
    assert (code, err) == (0, "")
    assert len(list(folder.iterdir())) == 12
    lines = [line.split() for line in out.splitlines()[3:]]
    assert [(line[0], line[1]) for line in lines] == [(b, d) for d in ("64", "128", "256") for b in "1234"]
    for bits, dim, mse, normal, shannon, file in lines:
        book = sphere_codebook(int(bits), int(dim))
        assert float(mse) == pytest.approx(book.mse, abs=1e-7)
        levels = tuple(level / int(dim) ** 0.5 for level in gaussian_codebook(int(bits)).levels)
        assert float(normal) == pytest.approx(sphere_mse(levels, int(dim)), abs=1e-7)
        assert float(mse) < float(normal) and float(shannon) == pytest.approx(4.0 ** -int(bits), abs=1e-7)
        assert file == str(folder / f"sphere-{bits}bit-{dim}.safetensors") and os.path.exists(file)


def test_precompute_in_json_reads_what_is_stored(run, folder):
    run("precompute", "--bits", 2, "--dim", 80)
    (file,) = folder.iterdir()
    written = file.stat().st_mtime_ns
    code, out, _ = run("precompute", "--bits", 2, "--dim", 80, "--json")
    (row,) = json.loads(out)["codebooks"]
    assert code == 0 and file.stat().st_mtime_ns == written
    assert row["file"] == str(file)
    assert (row["bits"], row["dim"], row["mse"], row["shannon"]) == (2, 80, sphere_codebook(2, 80).mse, 0.0625)


def test_precompute_names_a_damaged_file_and_a_folder_that_cannot_be_used(run, folder):
    run("precompute", "--bits", 2, "--dim", 80)
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    code, out, err = run("precompute", "--bits", 1, 2, "--dim", 80)
    assert (code, out) == (2, "") and str(file) in err and err.endswith("it is damaged: delete it\n")
    file.unlink()
    for left in folder.iterdir():
        left.unlink()
    folder.rmdir()
    folder.write_text("")
    code, _, err = run("precompute", "--bits", 1, "--dim", 80)
    assert (
        code == 2 and "must be readable and writable" in err and err.endswith("set KVQ_CACHE_DIR to another folder\n")
    )


@pytest.mark.parametrize("options", [("--bits", 0), ("--bits", 9), ("--dim", 3), ("--dim", "x")])
def test_precompute_refuses_rates_and_dimensions_without_codebooks(run, folder, options):
    code, _, err = run("precompute", *options)
    assert code == 2 and err.startswith(f"kvq: error: argument {options[0]}: must be")
    assert not folder.exists()
