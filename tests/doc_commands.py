"""Checks of commands in the docs that are not run: what they name must exist and take the options."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

from doc_blocks import ROOT

BIN = Path(sys.executable).parent


@cache
def help_of(*command: str) -> str:
    """What a program prints for --help."""
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def takes_options(words: list[str], text: str) -> None:
    """Every option among `words` must be in the help text."""
    for word in words:
        name = word.partition("=")[0]
        if re.match(r"--?[A-Za-z]", name):
            assert re.search(rf"(^|[\s,\[|]){re.escape(name)}\b", text), f"{name} is no option: {text}"


def make(words: list[str]) -> None:
    """Targets of the Makefile, variables that it has."""
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _ = word.partition("=")
        pattern = rf"^ *{name} \?=" if equals else rf"^{name}:"
        assert re.search(pattern, text, re.MULTILINE), f"make has no {word}"


def pip(words: list[str]) -> None:
    """This package, with extras that it has."""
    command, *targets = words
    assert command == "install", words
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for target in targets:
        found = re.fullmatch(r"(?:\.|mlx-kvq-plugin)(?:\[([\w,]+)\])?|-e|[a-z-]+(==[\d.]+)?", target)
        assert found, target
        assert set((found[1] or "").split(",")) <= {"", *extras}, target


def python(words: list[str], page: str) -> None:
    """Scripts of the repository, or one that the page shows; pytest on tests that exist."""
    if words[:2] == ["-m", "pytest"]:
        files = [word for word in words[2:] if word.startswith("tests/")]
        assert files and all((ROOT / file).is_file() for file in files), words
        return
    script, *rest = words
    if (ROOT / script).is_file():
        takes_options(rest, help_of(sys.executable, script))
    else:
        assert f"`{script}`" in (ROOT / page).read_text(), f"{script} is neither a file nor named in {page}"


def check(words: list[str], page: str) -> list[str]:
    """Check a command that is not run, or raise; returns a kvq command that it starts, to be checked too."""
    program, *rest = words
    if program == "make":
        make(rest)
    elif program == "pip":
        pip(rest)
    elif program == "python":
        python(rest, page)
    elif program == "apt-get":
        assert rest[0] == "install" and len(rest) > 1, words
    elif program == "git":
        assert rest[0] in ("clone", "checkout"), words
    elif program in ("mlx.launch", "mlx.distributed_config"):
        own, _, started = (
            (rest[: rest.index("--")], "--", rest[rest.index("--") + 1 :]) if "--" in rest else (rest, "", [])
        )
        takes_options(own, help_of(str(BIN / program)))
        if started[:1] == ["kvq"]:
            return started
        if started:
            check(started, page)
    else:
        raise AssertionError(f"{program} is not known to the test of the docs: say why its block is not run")
    return []
