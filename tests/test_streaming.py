"""`kvq generate --live`: text as it is, a meter below it, and a clean terminal however it ends."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from test_cli import LLAMA, LONG, model_folder
from test_progress import MAIN, on_terminal

Run = Callable[..., tuple[int, str, str]]

SHOWN, HIDDEN = "\x1b[?25h", "\x1b[?25l"
METER = re.compile(r"(\d+) tokens, ([\d.]+) MiB held, ([\d.]+) MiB in fp16, ratio ([\d.]+), ([\d.]+) tokens/s")
STREAM = """
import sys
from types import SimpleNamespace
import mlx.core as mx
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.cli import streaming
from mlx_kvq_plugin.config import LayerSpec

streaming.REFRESH = 0.0
cache = KVQCache(LayerSpec("tq4", "tq4"))
try:
    with streaming.ReplyStream(lambda: [cache], live=True) as stream:
        for i, text in enumerate(eval(sys.argv[1])):
            cache.update_and_fetch(*[mx.zeros((1, 1, 1 if i else 200, 64))] * 2)
            cache.settle()
            if text is None:
                raise KeyboardInterrupt
            stream.add(SimpleNamespace(text=text, generation_tps=12.5))
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


def screen(shown: str, columns: int = 100) -> list[str]:
    """The lines that a terminal shows in the end, of what rich and Python print."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", shown):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            for character in part:
                if column == columns:
                    row, column = row + 1, 0
                    lines += [""] * (row + 1 - len(lines))
                lines[row] = lines[row].ljust(column)[:column] + character + lines[row][column + 1 :]
                column += 1
    return [line.rstrip() for line in lines]


def test_text_stays_as_it_is_and_the_meter_goes() -> None:
    parts = ["Hello", " [bold]wor", "ld[/bold]\n\n  1 < 2", " and ", "äöü 漢字\n", "last", " line"]
    shown = on_terminal(STREAM, repr(parts))
    assert "━" in shown and len(METER.findall(shown)) >= len(parts)
    end = screen(shown)
    assert end[:4] == ["Hello [bold]world[/bold]", "", "  1 < 2 and äöü 漢字", "last line"]
    assert METER.fullmatch(end[4]) and not any(end[5:])
    tokens, held, fp16, ratio, speed = METER.findall(shown)[-1]
    assert (tokens, speed) == ("206", "12.5")
    assert float(ratio) == pytest.approx(206 * 64 * 2 * 2 / 2**20 / float(held), rel=0.5) and float(held) < float(fp16)
    assert shown.count(HIDDEN) == shown.count(SHOWN) == 1 and shown.rfind(HIDDEN) < shown.rfind(SHOWN)


def test_lines_longer_than_the_terminal_lose_nothing() -> None:
    words = [f"word{i} " for i in range(600)]
    end = screen(on_terminal(STREAM, repr(words)))
    assert "".join("".join(end).split()).startswith("".join("".join(words).split()))


def test_an_interrupt_leaves_the_text_and_the_cursor() -> None:
    shown = on_terminal(STREAM, repr(["one\ntwo", " three", None]))
    assert [line for line in screen(shown) if line] == ["one", "two three", "stopped"]
    assert shown.rfind(HIDDEN) < shown.rfind(SHOWN)


def test_terminals_that_cannot_draw_get_plain_text() -> None:
    shown = on_terminal(STREAM, repr(["one\n", "two"]), TERM="dumb")
    assert "\x1b" not in shown and shown.startswith("one\r\ntwo\r\n") and len(METER.findall(shown)) == 1


def test_pipes_get_the_text_alone_and_a_last_line_on_stderr(run: Run, tiny: Path) -> None:
    argv = ("generate", tiny, "--prompt", LONG, "--max-tokens", 12, "--kv-scheme", "tq4")
    _, plain, _ = run(*argv)
    code, out, err = run(*argv, "--live")
    assert (code, out) == (0, plain) and "\x1b" not in err
    (found,) = METER.findall(err)
    report = re.findall(r"cache: ([\d.]+) MiB held, ([\d.]+) MiB in fp16, ratio ([\d.]+)", err)
    assert report == [found[1:4]] and float(found[3]) > 1.5


def test_a_command_on_a_terminal_shows_how_the_cache_grows(run: Run, tiny: Path) -> None:
    argv = ("generate", tiny, "--prompt", LONG, "--max-tokens", 40)
    shown = on_terminal(MAIN, *argv, "--live")
    tokens = [int(found[0]) for found in METER.findall(shown)]
    assert len(set(tokens)) > 1 and tokens == sorted(tokens)
    text = run(*argv)[1]
    assert "".join("".join(screen(shown)).split()).startswith("".join(text.split())[:40])


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose text does not end, a race otherwise: the logit of its end token is 0, others are larger."""
    folder = model_folder(tmp_path_factory.mktemp("models") / "endless")
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    head = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    weights[head][LLAMA["eos_token_id"]] = 0
    mx.eval(weights)  # of the file that is written over
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def test_an_interrupted_command_ends_with_130_and_a_cursor(endless: Path) -> None:
    host, terminal = pty.openpty()
    argv = ("generate", str(endless), "--prompt", LONG, "--max-tokens", "100000", "--live")
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *argv],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    os.close(terminal)
    shown, sent, end = b"", False, time.monotonic() + 120
    while time.monotonic() < end:
        if select.select([host], [], [], 1.0)[0]:
            try:
                shown += os.read(host, 65536)
            except OSError:
                break
        if b"tokens/s" in shown and not sent:
            process.send_signal(signal.SIGINT)
            sent = True
    os.close(host)
    assert process.wait(10) == 130
    text = shown.decode(errors="replace")
    assert text.rfind(HIDDEN) < text.rfind(SHOWN) and "Traceback" not in text
