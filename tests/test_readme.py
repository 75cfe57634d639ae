"""README and public names agree with the code and with the stored measurements."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

sys.path.insert(0, str(ROOT / "benchmarks"))
import summary  # noqa: E402


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_public_names_are_sorted_exist_and_are_all_of_them():
    assert kvq.__all__ == sorted(kvq.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    imported = {
        alias.asname or alias.name
        for node in ast.parse(Path(kvq.__file__).read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name in imported if not name.startswith("_")} == set(kvq.__all__)


def test_python_examples_parse_and_use_public_names_only():
    blocks = code_blocks("python")
    assert blocks
    for block in blocks:
        ast.parse(block)
        for name in re.findall(r"\bkvq\.(\w+)", block):
            assert name in kvq.__all__, name


def test_schemes_in_the_readme_parse():
    found = set(re.findall(r'kv_scheme="([^"]+)"', README)) | set(re.findall(r"--kv-scheme (\S+)", README))
    assert len(found) >= 3
    for scheme in found:
        kvq.parse_scheme(scheme.strip("`\"'"))


def test_commands_in_the_readme_exist(capsys):
    commands = {tuple(line.split()[:3]) for block in code_blocks("sh") for line in block.splitlines() if line}
    words = [command[1:] for command in commands if command[0] == "kvq"]
    assert words
    for command in words:
        path = [word for word in command if re.fullmatch(r"[a-z-]+", word)][: 2 if command[0] == "cache" else 1]
        with pytest.raises(SystemExit) as done:
            main([*path, "--help"])
        assert done.value.code == 0 and "usage: kvq " + path[0] in capsys.readouterr().out


def test_make_targets_in_the_readme_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (\w+)", README)) <= targets


@pytest.mark.parametrize("name", list(summary.TABLES))
def test_tables_are_those_of_the_stored_measurements(name):
    text = (ROOT / name).read_text()
    assert summary.inserted(text, summary.TABLES[name]()) == text


def test_adapters_named_in_the_readme_are_installed():
    (line,) = (line for line in README.splitlines() if line.startswith("Model types:"))
    assert re.findall(r"`(\w+)`", line) == kvq.list_adapters()


def test_links_in_the_readme_exist():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
