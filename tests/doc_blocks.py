"""Code blocks of README.md and docs/, and what is put in place of slow or far away things when they are run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("python", "sh", "console")
SHOWN = ("text", "json", "toml", "yaml")  # are read, not run

# A name on the hub becomes a folder with SmolLM2 in float32, which CPUs are fast with.
HUB_MODELS = ("mlx-community/Qwen3-8B-4bit",)
# What takes long becomes short: pattern and replacement in Python blocks, arguments that are added to commands.
SHORTER = ((r"\b(max_tokens|max_new_tokens)=\d+", r"\1=6"),)
ADDED = {
    "generate": "--max-tokens 4",
    "chat": "--max-tokens 4",
    "eval": "--prefill 100 --steps 3",
    "eval --needle": "--needle-tokens 120 --depths 0.5",
    "frontier": "--prefill 100 --steps 3 --schemes tq4 rvq1",
    "calibrate": "--sequences 1 --length 128",
    "validate": "--pairs 256",
    "run mlx_lm.generate": "--max-tokens 4",
    "run mlx_lm.chat": "--max-tokens 4",
    "run mlx_lm.benchmark": "-p 64 -g 2 -b 1 -n 1",
}
# Commands of minutes: only their arguments are read. tests/test_check.py and tests/test_report_page.py run them.
PARSED = ("check", "report")

_BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_BEFORE = re.compile(r"<!-- (prelude|not run):\s*((?:(?!-->).)*?)\s*-->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: path below the checkout.
        line: of its first line of code, counted from 1.
        language: as written after the fence.
        code: without the fence.
        prelude: what the comment before it runs first; may be empty.
        reason: why it is not run; empty for blocks that are.
    """

    page: str
    line: int
    language: str
    code: str
    prelude: str = ""
    reason: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(text: str, page: str) -> list[Block]:
    """The blocks of a page in their order."""
    blocks = []
    for match in _BLOCK.finditer(text):
        notes = {}
        before = text[: match.start()]
        while (found := _BEFORE.search(before)) is not None:
            notes[found[1]] = found[2]
            before = before[: found.start()]
        line = text.count("\n", 0, match.start()) + 2
        code = re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)
        blocks.append(Block(page, line, match[2], code, notes.get("prelude", ""), notes.get("not run", "")))
    return blocks


def blocks_of(path: Path) -> list[Block]:
    """The blocks of a file."""
    return read_blocks(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))


def commands(block: Block) -> list[str]:
    """The command lines of a shell block, continued lines joined; of a console block those after `$ `."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def short(code: str, folder: str) -> str:
    """Python code with a model that is here, and few tokens."""
    for name in HUB_MODELS:
        code = code.replace(name, folder)
    for pattern, replacement in SHORTER:
        code = re.sub(pattern, replacement, code)
    return code
