"""The hook of the site; needs mkdocs, which `make docs` installs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is installed by `make docs`")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))
import hooks


def test_links_to_the_repository_become_pages() -> None:
    text = "[a](../examples/demo.py) [b](../README.md#use) [c](kernels.md) [d](https://x.y/z.md) [`e`](../CHANGELOG.md)"
    assert hooks.for_site(text, "docs/x.md", "x.md") == (
        "[a](sources/examples/demo.py.md) [b](readme.md#use) [c](kernels.md) [d](https://x.y/z.md) [`e`](changelog.md)"
    )
    assert hooks.for_site("[a](docs/kernels.md)", "CONTRIBUTING.md", "contributing.md") == "[a](kernels.md)"
    code = "```sh\n[a](../b.py)\n```"
    assert hooks.for_site(code, "docs/x.md", "x.md") == code


def test_files_that_pages_link_are_found() -> None:
    assert hooks.targets("see [`x`](../examples/demo.py)\n```\n[a](../b.py)\n```\n", "docs/x.md") == [
        "examples/demo.py"
    ]
    assert "def main" in hooks.source_page("examples/demo.py")
    assert "pyproject.toml" in hooks.source_page("examples/kvq-seed-oss-adapter")
