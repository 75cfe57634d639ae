"""MkDocs hook: files of the repository that pages link to become pages of the site.

On GitHub `../examples/demo.py` is a link to the file. In the site it is a page with the file's text, so that links work
in both places and without another host.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "sh", ".json": "json", ".md": "markdown"}


def site_path(target: str) -> str:
    """Where a file of the repository is in the site's pages, both as paths below their roots."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return PAGES.get(target, f"sources/{target}.md")


def targets(text: str, page: str) -> list[str]:
    """Files and folders of the repository that `page`, itself a path of the repository, links to."""
    folder = posixpath.dirname(page)
    plain = CODE.sub(lambda code: code[0] if "](" in code[0] and "```" not in code[0] else "", text)
    return [posixpath.normpath(posixpath.join(folder, match[2])) for match in LINK.finditer(plain)]


def for_site(text: str, page: str, place: str) -> str:
    """`text` of `page` with links as they are from `place`, a path of the site's pages."""

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[2]))
        return match[1] + posixpath.relpath(site_path(target), posixpath.dirname(place) or ".") + match[3]

    return "".join(
        part if part.startswith("```") or part.lstrip().startswith("```") else LINK.sub(moved, part)
        for part in re.split(r"(^ *```.*?^ *```)", text, flags=re.MULTILINE | re.DOTALL)
    )


def source_page(target: str) -> str:
    """The text of a file, or of all files of a folder, as a page."""
    path = ROOT / target
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in LANGUAGES)
    parts = [f"---\nsearch:\n  exclude: true\n---\n\n# {target}\n"]
    for file in files:
        title = "" if file == path else f"## {file.relative_to(path)}\n\n"
        text = file.read_text(encoding="utf-8").rstrip()
        parts.append(f"{title}``````{LANGUAGES.get(file.suffix, 'text')}\n{text}\n``````\n")
    return "\n".join(parts)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from files outside of docs/."""
    pages = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for root_file, place in PAGES.items():
        text = pages[root_file] = (ROOT / root_file).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=for_site(text, root_file, place)))
    wanted = {target for page, text in pages.items() for target in targets(text, page)}
    for target in sorted(wanted):
        if not target.startswith("docs/") and target not in PAGES and (ROOT / target).exists():
            files.append(File.generated(config, site_path(target), content=source_page(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository into links to their pages."""
    if page.file.generated_by is not None:
        return markdown
    return for_site(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
