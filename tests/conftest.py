"""Fixtures for tests on real models: small ones made from Python packages, cached outside the checkout.

Also prints the table of test_conformance.py at the end of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import kept, self_calibration
from mlx_kvq_plugin.cli import main

TEXT = """\
A cache keeps what was computed once so that it need not be computed again. In a language model the keys and values
of every token are such results: each new token attends to all earlier ones, and without a cache the whole text would
run through the network for every word. The price is memory. A model with thirty layers and three key heads of
sixty-four numbers stores 11,520 numbers a token; at sixteen bits that is 22.5 kilobytes, and a book of 100,000 words
takes three gigabytes. It is no wonder that people look for smaller ways to write these numbers down.

Rounding is the oldest of them. A ruler with sixteen marks tells a length to within a thirty-second part of its own;
four bits are enough to name the mark. If the lengths follow a bell curve the marks should be dense in the middle and
sparse at the ends, and Lloyd and Max found where exactly: each mark at the centre of mass of what it stands for, each
border halfway between two marks. But coordinates of keys do not follow a bell curve. A few are huge, most are small,
and the huge ones are the same for every token. Turning the whole vector by a random rotation spreads what is huge over
all coordinates, and by the law of large numbers each becomes a sum of many small parts: nearly a bell curve again.

def lloyd_max(levels, density, rounds=100):
    for _ in range(rounds):
        borders = [(a + b) / 2 for a, b in zip(levels, levels[1:])]
        cells = split(density, borders)
        levels = [centre_of_mass(cell) for cell in cells]
    return levels

Position is the second difficulty. Rotary embeddings turn every pair of coordinates by an angle that grows with the
position of the token, fast for the first pairs and slowly for the last. What all keys of a head have in common before
the turning, they no longer have in common after it, at least not as one fixed vector: it has become a vector that
turns with the position. Whoever subtracts the average of the turned keys removes only the slow part. Whoever turns the
average itself removes all of it, at any position, and what is left to write down is small and says something.
"""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table architectures x paths, of what was run."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    cells = [value for report in reports for name, value in report.user_properties if name == "conformance"]
    if not cells:
        return
    results = {(architecture, path): cell for architecture, path, cell in cells}
    names, paths = (list(dict.fromkeys(key[i] for key in results)) for i in (0, 1))
    reasons = list(dict.fromkeys(cell for cell in results.values() if ": " in cell))
    width = max(map(len, names))
    columns = [max(len(path), len("as mlx-lm[9]")) for path in paths]
    write = terminalreporter.write_line
    terminalreporter.section("lossless caches against mlx-lm's own")
    write(" " * width + "".join(f"  {path:{w}s}" for path, w in zip(paths, columns, strict=True)).rstrip())
    for name in names:
        row = []
        for path in paths:
            cell = results.get((name, path), "-")
            row.append(f"{cell.split(':')[0]}[{reasons.index(cell) + 1}]" if cell in reasons else cell)
        write(f"{name:{width}s}" + "".join(f"  {c:{w}s}" for c, w in zip(row, columns, strict=True)).rstrip())
    for i, reason in enumerate(reasons):
        write(f"[{i + 1}] {reason}")


@cache
def _load(name: str) -> tuple[Any, Any]:
    model, tokenizer = mlx_lm.load(str(kvq.demo_model_path(name, progress=False)))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model, tokenizer


@pytest.fixture(scope="module")
def auto_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For `auto` schemes of a module: a cache folder of its own, and few texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVQ_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(self_calibration, "SEQUENCES", 2)
        patch.setattr(kept, "_known", {})
        yield


@pytest.fixture
def real_model() -> Callable[[str], tuple[Any, Any]]:
    """`real_model("smollm2")` is a float32 model and its tokenizer, loaded once per run."""
    return _load


@pytest.fixture
def text_ids() -> Callable[[Any, int], list[int]]:
    """`text_ids(tokenizer, n)` is n tokens of English prose and code (repeated when n is large)."""

    def encode(tokenizer: Any, count: int) -> list[int]:
        ids = list(tokenizer.encode(TEXT))
        return (ids * (count // len(ids) + 1))[:count]

    return encode


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of one command."""

    def command(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        return (code, *capsys.readouterr())

    return command
