"""The hook of the site; needs mkdocs, which `make docs` installs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is installed by `make docs`")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import hooks  # noqa: E402


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
    assert "pyproject.toml" in hooks.source_page("examples/kvq-plugin-example")


def test_the_built_site_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    """Scripts, styles, fonts and pictures of all pages; links that a reader follows may lead elsewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]* href=\"([^\"]+)\"", text)
        assert loaded and not [target for target in loaded if re.match(r"(https?:)?//", target)], page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style
