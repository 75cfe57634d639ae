"""Every code block of README.md and docs/ is run, or checked, or says why not."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from doc_blocks import (
    ADDED,
    HUB_MODELS,
    PAGES,
    PARSED,
    ROOT,
    RUN,
    SHOWN,
    Block,
    blocks_of,
    commands,
    read_blocks,
    short,
)
from doc_commands import check, takes_options
from mlx.utils import tree_flatten

import mlx_kvq_plugin as kvq
import mlx_kvq_plugin.cli.serve as serve_command
from mlx_kvq_plugin.cli import _parser, main

BLOCKS = {page: blocks_of(page) for page in PAGES}
WITH_BLOCKS = [page for page, blocks in BLOCKS.items() if any(b.language in RUN and not b.reason for b in blocks)]
SERVER_HELP = "options of mlx_lm.server"


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with links to the demo models' files: what blocks write beside a model stays in it."""
    folder = tmp_path_factory.mktemp("cache")
    for name in kvq.DEMO_MODELS:
        source = kvq.demo_model_path(name, progress=False)
        copy = folder / "models" / source.name
        copy.mkdir(parents=True)
        for file in source.iterdir():
            if not file.name.startswith("kvq_calibration"):  # made anew by the pages that need one
                (copy / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="session")
def float32_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2 with float32 weights: what names of hub models stand for."""
    source = kvq.demo_model_path("smollm2", progress=False)
    folder = tmp_path_factory.mktemp("hub") / "model"
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    model, _ = mlx_lm.load(str(source))
    model.set_dtype(mx.float32)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return str(folder)


@pytest.fixture(autouse=True)
def own_place(cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Folders for what blocks write; plain arithmetic, since kernels take seconds to compile on a CPU."""
    monkeypatch.setenv("KVQ_CACHE_DIR", str(cache_folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["page"])
    mx.disable_compile()
    yield
    mx.enable_compile()


def run_python(block: Block, module: types.ModuleType, folder: str) -> None:
    for code in (block.prelude, block.code):
        padded = "\n" * (block.line - 1) + short(code, folder)
        exec(compile(padded, str(ROOT / block.page), "exec"), module.__dict__)


def run_shell(block: Block, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.prelude:
        subprocess.run(["bash", "-euc", block.prelude], check=True)
    for line in commands(block):
        parts = re.split(r"\s&&\s", line)
        for part in parts:
            words = [folder if word in HUB_MODELS else word for word in shlex.split(part, comments=True)]
            if words[0] == "cd":
                continue
            if words[0] != "kvq":
                words = check(words, block.page)
            if words:
                kvq_command(words[1:], monkeypatch)


def kvq_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of kvq in this process; a server is not started."""
    name = words[0] if words[0] != "run" else f"run {words[words.index('--') + 1]}"
    if name in PARSED:
        _parser().parse_args(words)  # raises UsageError
        return
    options = [f"{name} {word}" for word in words if word.startswith("--")]
    words = [*words, *(word for key in (name, *options) for word in shlex.split(ADDED.get(key, "")))]
    if words[0] == "serve":
        monkeypatch.setattr(serve_command, "serve", lambda argv, hook, store: takes_options(argv, server_help()))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello.\n/quit\n" if words[0] == "chat" else "Hello.\nq\n"))
    assert main(words) == 0, words


def server_help() -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main(["serve", "--help"])
    return out.getvalue().partition(SERVER_HELP)[2]


@pytest.mark.real_model
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_blocks_run(page: Path, float32_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, with one module for the page; a line of a traceback is that of the page."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for block in BLOCKS[page]:
        if block.reason or block.language not in RUN:
            continue
        try:
            if block.language == "python":
                run_python(block, module, float32_folder)
            else:
                run_shell(block, float32_folder, monkeypatch)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error


def test_every_block_has_a_language_that_is_run_or_only_shown() -> None:
    for block in (block for blocks in BLOCKS.values() for block in blocks):
        assert block.language in RUN + SHOWN, f"{block.place}: {block.language!r}"


def test_blocks_that_are_not_run_say_why(record_property: Any) -> None:
    reasons = {block.place: block.reason for blocks in BLOCKS.values() for block in blocks if block.reason}
    for place, reason in reasons.items():
        print(f"{place}: {reason}")
        assert len(reason.split()) >= 3, f"{place}: {reason!r} is no reason"
    marks = sum(page.read_text().count("<!-- not run:") for page in PAGES)
    assert marks == len(reasons), "a comment that belongs to no block"


def test_scripts_named_in_the_text_exist() -> None:
    for page in PAGES:
        for script in re.findall(r"python ((?:benchmarks|examples|tests)/\w+\.py)", page.read_text()):
            assert (ROOT / script).is_file(), f"{page.name}: {script}"


# ---- the collector ---------------------------------------------------------------------------------------------------

PAGE = """\
<!-- prelude: a = 1 -->
```python
print(a)
```
<!-- prelude:
b = 2
-->
<!-- not run: needs three machines -->

```sh
kvq one \\
  --two
# a remark
make x
```
```console
$ kvq three
output
```
"""


def test_blocks_are_read_with_what_stands_before_them() -> None:
    first, second, third = read_blocks(PAGE, "page.md")
    assert first == Block("page.md", 3, "python", "print(a)\n", "a = 1")
    assert (second.line, second.prelude, second.reason) == (11, "b = 2", "needs three machines")
    assert [line.split() for line in commands(second)] == [["kvq", "one", "--two"], ["make", "x"]]
    assert commands(third) == ["kvq three"] and not third.reason and not third.prelude


def test_what_is_slow_or_far_away_is_replaced() -> None:
    code = 'load("mlx-community/Qwen3-8B-4bit", max_tokens=200, min_new_tokens=3, max_new_tokens=9)'
    assert short(code, "/here") == 'load("/here", max_tokens=6, min_new_tokens=3, max_new_tokens=6)'


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "make demo WRONG=1",
        "pip install .[nothing]",
        "pip uninstall x",
        "python benchmarks/nothing.py",
        "python benchmarks/decode.py --nothing",
        "python -m pytest tests/test_nothing.py",
        "mlx.launch --nothing -- python x.py",
        "curl localhost",
    ],
)
def test_commands_that_do_not_exist_are_found(command: str) -> None:
    with pytest.raises(AssertionError):
        check(shlex.split(command), "README.md")


def test_commands_that_exist_pass() -> None:
    for command in ("make demo MODEL=gemma3", "pip install .[cpu,dev]", "python benchmarks/decode.py --tokens 1 2"):
        assert check(shlex.split(command), "README.md") == []
    assert check(["mlx.launch", "-n", "2", "--", "kvq", "serve", "m"], "README.md") == ["kvq", "serve", "m"]
    assert os.getcwd() != str(ROOT)
