"""The documentation site: its names, links and errors are those of the code and the repository."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mlx_kvq_plugin as kvq

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if "://" in link:
            assert link.startswith("https://"), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_public_name_is_in_the_reference_once() -> None:
    named = [
        name
        for page in sorted((DOCS / "api").glob("*.md"))
        for name in re.findall(r"^::: mlx_kvq_plugin\.(\w+)$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(named) == sorted(kvq.__all__)


def test_the_list_of_names_is_that_of_the_pages() -> None:
    rows = re.findall(r"^\| \[.*?\]\((.*?)\) \| (.*) \|$", (DOCS / "api" / "index.md").read_text(), re.MULTILINE)
    assert rows
    for page, names in rows:
        shown = re.findall(r"^::: mlx_kvq_plugin\.(\w+)$", (DOCS / "api" / page).read_text(), re.MULTILINE)
        assert re.findall(r"`(\w+)`", names) == shown, page
    assert {page for page, _ in rows} == {page.name for page in (DOCS / "api").glob("*.md")} - {"index.md"}


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"^ +- (?:\w+: )?(\S+\.md)$", text[text.index("\nnav:") :], re.MULTILINE))
    made = {"readme.md", "changelog.md", "contributing.md"}  # by the hook
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} == listed - made


def messages() -> list[str]:
    """Texts of the package's code: strings, and the fixed parts of f-strings in one line each."""
    found = []
    for path in (ROOT / "mlx_kvq_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_error_messages_of_the_page_are_in_the_code() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    known = messages()
    quoted = re.findall(r"^\| `([^`]+)` \|", text[text.index("## Errors") :], re.MULTILINE)
    assert len(quoted) > 30
    for message in quoted:
        assert any(message in other for other in known), message


def test_the_site_asks_no_other_host() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in text and "://" not in text
