"""Texts of kinds that neither the other benchmarks nor the calibrations have: what they are, and their tokens.

german       the beginning of Kafka's Die Verwandlung (1915, public domain)
poetry       five of Shakespeare's sonnets (public domain)
mathematics  LaTeX, written for the benchmarks
chat         a dialogue in the model's own template, written for the benchmarks; Gemma's where it has none
json         HTTP's status codes, as Python's standard library describes them
log          lines of a web server, made up from a seed: times, addresses, sizes
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

from common import LONG_TEXTS, TEXTS

FOLDER = Path(__file__).resolve().parent / "texts"
TURNS = (  # Gemma's template, which its base models lack
    "{{ bos_token }}{% for turn in messages %}<start_of_turn>{{ 'model' if turn.role == 'assistant' else turn.role }}\n"
    "{{ turn.content | trim }}<end_of_turn>\n{% endfor %}"
)


def _file(name: str) -> Callable[[], str]:
    return lambda: (FOLDER / name).read_text(encoding="utf-8")


def status_codes() -> str:
    """Data: a list of objects."""
    found = [{"code": int(one), "name": one.name, "phrase": one.phrase, "about": one.description} for one in HTTPStatus]
    return json.dumps(found, indent=2)


def server_log() -> str:
    """Lines of a log in the combined format."""
    chance = random.Random(0)
    when, lines = datetime(2024, 3, 9, 6, 25, 1, tzinfo=UTC), []
    for _ in range(60):
        when += timedelta(seconds=chance.randrange(1, 40))
        address = ".".join(str(chance.randrange(1, 255)) for _ in range(4))
        path = chance.choice(["/", "/index.html", "/api/v1/items/%d", "/static/app.%06x.js", "/search?q=%d"])
        path = path % chance.randrange(1 << 20) if "%" in path else path
        status, size = chance.choice([200, 200, 200, 304, 404, 500]), chance.randrange(100, 99999)
        stamp = when.strftime("%d/%b/%Y:%H:%M:%S %z")
        lines.append(f'{address} - - [{stamp}] "GET {path} HTTP/1.1" {status} {size} "-" "Mozilla/5.0"')
    return "\n".join(lines)


def _dialogue(tokenizer: Any) -> list[int]:
    turns = json.loads(_file("chat.json")())
    template = tokenizer.chat_template or TURNS
    return list(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=True, return_dict=False))


OTHER_TEXTS: dict[str, Callable[[], str]] = {
    **{name: _file(f"{name}.txt") for name in ("german", "poetry", "mathematics")},
    "json": status_codes,
    "log": server_log,
}
CHAT = "chat"
NAMES = [*dict.fromkeys([*TEXTS, *LONG_TEXTS]), *OTHER_TEXTS, CHAT]


def tokens_of(name: str, tokenizer: Any) -> list[int]:
    """The tokens of the text called `name`, one of `NAMES`."""
    if name == CHAT:
        return _dialogue(tokenizer)
    return list(tokenizer.encode({**TEXTS, **LONG_TEXTS, **OTHER_TEXTS}[name]()))
