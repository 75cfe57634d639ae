"""docs/kernels.md says what the code does, and its tables are made of runs on a GPU only."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from mlx_kvq_plugin import attention, batch, growth
from mlx_kvq_plugin.kernels import attend, codes, dispatch, lanes

ROOT = Path(__file__).resolve().parent.parent
TEXT = " ".join((ROOT / "docs" / "kernels.md").read_text().split())

sys.path.insert(0, str(ROOT / "benchmarks"))
import stored  # noqa: E402
import summary  # noqa: E402

# One row of each benchmark, with the keys that it stores.
ROWS = {
    "decode_gpu": {"tokens": 16384, "batch": 8, "scheme": "tq4", "ms": 16.0, "median_ms": 15.5, "ratio": 1.25},
    "prefill_memory": {
        "tokens": 32768,
        "scheme": "tq4",
        "seconds": 4.5,
        "time_ratio": 1.125,
        "peak_mib": 1700.0,
        "peak_ratio": 0.375,
        "packing_share": 0.02,
    },
    "attention": {
        "tokens": 4096,
        "scheme": "tq4",
        "us": 31.0,
        "host_us": 9.0,
        "ratio": 1.1,
        "gpu_us": 25.0,
        "gpu_ratio": 1.4,
        "tb_s": 1.5,
        "of_copy": 0.5,
    },
    "kernel_encode_decode": {
        "kernel": "encode",
        "scheme": "tq4",
        "tokens": 2048,
        "us": 21.0,
        "host_us": 9.0,
        "plain_us": 310.0,
        "tb_s": 1.0,
        "of_copy": 0.25,
    },
}


def test_limits_are_those_of_the_code() -> None:
    assert f"| head sizes | {', '.join(map(str, codes.HEAD_SIZES))}," in TEXT
    assert set(lanes.HEAD_SIZES) - set(codes.HEAD_SIZES) == {32} and "(encoding and decoding: 32 too)" in TEXT
    assert f"1 to {attend.MAX_QUERIES} new tokens, 1 to {attend.MAX_REPEAT} query heads of a KV head" in TEXT
    assert f"{attend.MAX_ROWS} query rows of both" in TEXT
    assert f"packs every {growth.GPU_BLOCK} tokens ({growth.BLOCK} on CPUs)" in TEXT
    assert f"planes grow by {growth.GPU_STEP} tokens" in TEXT
    assert f"workspace stays below {attention.WORKSPACE_NBYTES >> 20} MiB" in TEXT
    assert f"one launch for up to {dispatch.ROWS_OF_LAUNCH} rows on CUDA" in TEXT
    assert f"wait, up to {batch.PENDING} steps, in one array of all rows" in TEXT


def test_files_that_are_named_exist() -> None:
    folders = [ROOT, *(ROOT / name for name in ("mlx_kvq_plugin", "mlx_kvq_plugin/kernels", "tests", "benchmarks"))]
    names = set(re.findall(r"[\w/]+\.(?:h|py|json)\b", TEXT))
    assert len(names) > 10
    for name in names:
        assert any((folder / name).exists() for folder in folders), name


@pytest.mark.parametrize("name", list(ROWS))
def test_tables_are_made_of_runs_on_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    assert summary.kernels() == ""
    for machine, shown in (("Device(cpu, 0), x86_64 Linux", False), ("Device(gpu, 0), x86_64 Linux", True)):
        row = {"device": "A card", **ROWS[name]} if name in ("decode_gpu", "prefill_memory") else ROWS[name]
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": [row]}))
        text = summary.kernels()
        assert bool(text) == shown
        if shown:
            assert machine in text and "`tq4`" in text and f"benchmarks/{name}.py" in text
            assert ("A card" in text) == ("device" in row)


def test_batches_are_counted_in_tokens_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "RESULTS", tmp_path)
    (tmp_path / "decode_gpu.json").write_text(json.dumps({"machine": "Device(gpu, 0)", "rows": [ROWS["decode_gpu"]]}))
    assert "| 16,384 x 8 | `tq4` | 16.00 | 500 | 1.25x |" in summary.kernels()
