"""What the package offers: every public name says what it is, and the stability page names every kind of promise."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import pytest

import mlx_kvq_plugin as kvq

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "stability.md").read_text()


@pytest.mark.parametrize("name", kvq.__all__)
def test_public_names_are_there_and_say_what_they_are(name: str) -> None:
    found = getattr(kvq, name)
    if not callable(found):
        assert name.isupper()  # a constant
        return
    assert inspect.getdoc(found), f"{name} must have a docstring"
    if inspect.isclass(found):
        for member, value in vars(found).items():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, (property, classmethod))):
                assert inspect.getdoc(getattr(found, member)), f"{name}.{member} must have a docstring"


def test_the_stability_page_names_every_entry_point_group() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group in project["entry-points"]:
        assert f"`{group}`" in PAGE


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {project['version']} " in (ROOT / "CHANGELOG.md").read_text()
