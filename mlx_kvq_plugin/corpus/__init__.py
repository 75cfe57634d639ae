"""Texts for calibration and evaluation that ship with the package, written for it: no download, the same everywhere.

`prose` is narrative and expository English, `code` is mostly Python, `chat` is dialogues of a user and an assistant in
four languages. Each is about 10 KB, 2,300 to 3,200 tokens.
"""

from __future__ import annotations

from importlib.resources import files

from ..errors import CorpusError

CORPUS = ("prose", "code", "chat")


def corpus_text(name: str) -> str:
    """The text called `name`, one of `CORPUS`, as it is in the package; raises `CorpusError` for another name."""
    if name not in CORPUS:
        raise CorpusError(f"a corpus text must be one of {', '.join(CORPUS)}, got {name!r}; read a file of your own")
    return files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
