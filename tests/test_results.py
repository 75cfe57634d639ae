"""Rows of the ruler: JSON both ways, the Pareto front, the table."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest

from mlx_kvq_plugin.evaluation import Fidelity
from mlx_kvq_plugin.needle import Retrieval
from mlx_kvq_plugin.results import HEAD, ROUNDING, Measurement, SchemeResult, TextResult, pareto_front, remarks, table

FIDELITY = Fidelity(
    kl_mean=0.0123,
    kl_median=0.004,
    kl_p99=0.21,
    kl_max=1.5,
    top1=0.957,
    perplexity=13.279,
    reference_perplexity=13.261,
    positions=600,
    kl_last=0.0151,
)


def row(scheme: str, bits: float, kl: float, **changes: object) -> SchemeResult:
    found = SchemeResult(
        scheme,
        bits=bits,
        nbytes=3 << 20,
        nbytes_16bit=2 << 20,
        fp16_nbytes=6 << 20,
        overall=replace(FIDELITY, kl_mean=kl),
        texts={"prose": TextResult(FIDELITY, 200), "code": TextResult(replace(FIDELITY, top1=0.5), 7)},
    )
    return replace(found, **changes)  # type: ignore[arg-type]


NEEDLE = (Retrieval(0.1, 12.5, -0.25), Retrieval(0.9, -1.0, -3.0))
STOCK = (Retrieval(0.1, 12.75, -0.2), Retrieval(0.9, 2.0, -0.5))


def measurement(*rows: SchemeResult) -> Measurement:
    return Measurement("demo:x", ("prose", "code"), 200, 100, "a machine", "float32", rows, joint=False)


def test_json_gives_back_every_field():
    rows = (
        row("tq4", 4.25, 0.01, note="2 of 3 layers stay", needle=NEEDLE, reference_needle=STOCK),
        SchemeResult("kivi4", error="a head size must fit, got 80"),
    )
    found = measurement(*rows)
    text = found.to_json()
    assert Measurement.from_json(text) == found
    data = json.loads(text)
    first, second = data["rows"]
    assert second == {"scheme": "kivi4", "error": "a head size must fit, got 80"}
    assert (first["nbytes"], first["nbytes_16bit"], first["fp16_nbytes"]) == (3 << 20, 2 << 20, 6 << 20)
    assert (first["ratio"], first["ratio_16bit"], first["greedy"]) == (2.0, 3.0, 103.5)
    assert first["kl_mean"] == 0.01 and first["texts"]["code"]["greedy"] == 7
    assert first["needle"][1] == {"depth": 0.9, "margin": -1.0, "logprob": -3.0}
    assert {key: data[key] for key in ("prefill", "steps", "joint", "dtype")} == {
        "prefill": 200,
        "steps": 100,
        "joint": False,
        "dtype": "float32",
    }


def test_numbers_that_are_not_finite_are_null_in_json_and_nan_again():
    bad = replace(FIDELITY, kl_mean=math.nan, kl_max=math.inf)
    found = measurement(
        row("tq1", 1.25, math.nan, texts={"prose": TextResult(bad, 0)}, needle=(Retrieval(0.5, math.nan, -math.inf),))
    )
    text = found.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (back,) = Measurement.from_json(text).rows
    assert back.overall is not None and math.isnan(back.overall.kl_mean)
    fidelity = back.texts["prose"].fidelity
    assert math.isnan(fidelity.kl_mean) and math.isnan(fidelity.kl_max) and fidelity.kl_p99 == FIDELITY.kl_p99
    assert math.isnan(back.needle[0].margin) and math.isnan(back.needle[0].logprob) and back.needle[0].depth == 0.5


def test_ratios_of_nothing_are_one():
    assert SchemeResult("x", error="no").ratio == SchemeResult("x", error="no").ratio_16bit == 1.0
    assert SchemeResult("x", error="no").greedy == 0.0


# ---- the front -------------------------------------------------------------------------------------------------------


def front(*rows: SchemeResult) -> list[str]:
    return [found.scheme for found in pareto_front(rows)]


def test_front_is_what_nothing_beats_by_growing_bits():
    rows = [row("d", 8, 0.001), row("b", 3, 0.1), row("a", 2, 0.5), row("worse", 3.5, 0.2), row("c", 4, 0.01)]
    assert front(*rows) == ["a", "b", "c", "d"]
    assert front(rows[3]) == ["worse"] and front() == []


def test_front_has_equals_side_by_side():
    twins = [row("one", 3, 0.1), row("two", 3, 0.1), row("nearly", 3, 0.1 * (1 + ROUNDING / 2))]
    assert front(*twins) == ["one", "two", "nearly"]
    assert front(*twins, row("apart", 3, 0.1 * (1 + 2 * ROUNDING))) == ["one", "two", "nearly"]
    assert front(*twins, row("same KL, more bits", 4, 0.1)) == ["one", "two", "nearly"]
    assert front(row("same bits, more KL", 3, 0.2), *twins) == ["one", "two", "nearly"]
    assert front(*twins, row("fewer bits", 2, 0.1)) == ["fewer bits"]


def test_front_leaves_out_what_has_no_figure():
    rows = [SchemeResult("failed", error="no"), row("nan", 1, math.nan), row("inf", 1, math.inf), row("a", 2, 0.5)]
    assert front(*rows) == ["a"]
    assert front(row("exact", 16, 0.0), rows[3]) == ["a", "exact"]


# ---- the table -------------------------------------------------------------------------------------------------------


def test_table_has_a_line_for_all_texts_and_one_for_each():
    head, *lines = table([row("tq4", 4.25, 0.0123), SchemeResult("failed", error="no")])
    assert head == list(HEAD)
    cells = ["0.0123", "0.004", "0.21", "1.5", "0.0151", "95.7%", "13.28 (13.26)"]
    assert lines == [
        ["tq4", "all", "4.25", "3.00", "2.00x", "3.00x", *cells, "104"],
        ["", "prose", "", "", "", "", *cells, "200"],
        ["", "code", "", "", "", "", *cells[:-2], "50.0%", cells[-1], "7"],
    ]
    assert table([row("tq4", 4.25, 0.0123)], texts=False)[1:] == lines[:1]


def test_table_of_one_text_has_its_name():
    one = row("tq4", 4.25, 0.0123, texts={"prose": TextResult(FIDELITY, 200)})
    (line,) = table([one])[1:]
    assert line[:2] == ["tq4", "prose"] and line[-1] == "200"


def test_table_ends_with_margins():
    head, *lines = table([row("tq4", 4.25, 0.0123, needle=NEEDLE, reference_needle=STOCK)])
    assert head[-2:] == ["needle 0.1 (fp16)", "needle 0.9 (fp16)"]
    assert lines[0][-2:] == ["12.50 (12.75)", "-1.00 (2.00)"] and lines[1][-2:] == ["", ""]
    assert {len(line) for line in lines} == {len(head)}


def test_remarks_say_what_failed_and_what_stays():
    rows = [row("tq4", 4.25, 0.01), row("rvq1", 2.25, 0.1, note="one layer stays"), SchemeResult("x", error="no")]
    assert remarks(rows) == ["rvq1: one layer stays", "x: no"]


def test_every_field_of_a_fidelity_is_in_the_json():
    assert asdict(FIDELITY).items() <= {**row("a", 1, FIDELITY.kl_mean).to_dict()}.items()
