"""docs/codecs.md says what the code does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_kvq_plugin.rotation import ROTATIONS

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "codecs.md").read_text()

sys.path.insert(0, str(ROOT / "benchmarks"))
import rotations  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic():
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def test_the_table_of_rotations_is_what_its_command_prints():
    """To 2%: sums differ between platforms."""
    table = re.search(r"<!-- rotations: begin -->\n(.*?)\n<!-- rotations: end -->", TEXT, re.DOTALL)
    assert table is not None
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines())
    assert head[2:] == [f"`{rotation}`" for rotation in ROTATIONS]
    printed = rotations.rows()
    assert [line[:2] for line in lines] == [row[:2] for row in printed]
    for line, row in zip(lines, printed, strict=True):
        assert [float(x) for x in line[2:]] == pytest.approx([float(x) for x in row[2:]], rel=0.02), line[:2]


def test_every_rotation_is_described():
    section = TEXT[TEXT.index("## Rotations") :]
    described = set(re.findall(r"`(\w+)`", "\n".join(line for line in section.splitlines() if line.startswith("| `"))))
    assert set(ROTATIONS) <= described
