"""Progress: bars on terminals only, one for all commands, and library functions that print nothing."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx_lm
import pytest
from test_cli import LONG, model_folder

from mlx_kvq_plugin.checking import check_model
from mlx_kvq_plugin.progress import progress_bar, silent, within

Run = Callable[..., tuple[int, str, str]]

COMMANDS = {
    "generate": ("generate", "{}", "--prompt", LONG, "--max-tokens", "2"),
    "create": ("cache", "create", "{}", "--prompt", LONG, "--out", "{}/a.safetensors"),
    "calibrate": ("calibrate", "{}", "--sequences", "1", "--length", "128"),
    "check": ("check", "{}", "--tokens", "128"),
    "eval": ("eval", "{}", "--schemes", "tq4", "--prefill", "80", "--steps", "2"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


def on_terminal(code: str, *arguments: object, **environment: str) -> str:
    """What a Python program prints with stdout and stderr on one terminal."""
    host, terminal = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "20", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        env=env,
        cwd=Path(__file__).parent,
    )
    os.close(terminal)
    parts = []
    try:
        while part := os.read(host, 65536):
            parts.append(part)
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(host)
    assert process.wait() == 0, b"".join(parts)
    return b"".join(parts).decode()


MAIN = "import sys; from mlx_kvq_plugin.cli import main; sys.exit(main(sys.argv[1:]))"
BAR = """
import sys
from mlx_kvq_plugin.progress import progress_bar
with progress_bar(sys.argv[1] == "yes") as progress:
    for step in range(3):
        progress("[weighing]", step, 3)
        print(f"line {step}")
print("end")
"""


def test_a_bar_is_drawn_on_a_terminal_and_gone_at_the_end() -> None:
    shown = on_terminal(BAR, "yes")
    assert "[weighing]" in shown and "━" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is back
    assert shown.rstrip().endswith("end") and shown.rfind("[weighing]") < shown.rfind("\x1b[2K")
    for step in range(3):
        assert f"line {step}\r\n" in shown


@pytest.mark.parametrize(("show", "environment"), [("no", {}), ("yes", {"TERM": "dumb"})])
def test_there_are_terminals_without_bars(show: str, environment: dict[str, str]) -> None:
    assert on_terminal(BAR, show, **environment) == "line 0\r\nline 1\r\nline 2\r\nend\r\n"


def test_no_color_leaves_the_colours_out() -> None:
    colors = [code for code in ("\x1b[38;5", "\x1b[3", "\x1b[1;3") if code in on_terminal(BAR, "yes")]
    plain = on_terminal(BAR, "yes", NO_COLOR="1")
    assert colors and "━" in plain and not any(code in plain for code in colors)


def test_nothing_is_printed_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        progress("weighing", 1, 2)
    silent("weighing", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_what_is_printed_goes_to_a_file_while_a_bar_is_on_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "out.txt"
    code = f"import sys; sys.stdout = open({str(file)!r}, 'w')\n{BAR}"
    assert "line 1" not in on_terminal(code, "yes")
    assert file.read_text() == "line 0\nline 1\nline 2\nend\n"


def test_parts_name_their_stage() -> None:
    told: list[tuple[str, int, int]] = []
    progress = within(lambda *said: told.append(said), "quality")
    progress("tq4", 1, 2)
    progress("", 2, 2)
    assert told == [("quality: tq4", 1, 2), ("quality", 2, 2)]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_commands_show_no_bars_in_pipes(run: Run, tiny: Path, name: str) -> None:
    argv = [argument.format(tiny) for argument in COMMANDS[name]]
    code, out, err = run(*argv)
    assert code == 0 and "━" not in out + err and "\x1b" not in out + err
    assert run(*argv, "--no-progress")[0] == 0


def test_a_long_prompt_has_a_bar_and_no_progress_leaves_it_out(tiny: Path) -> None:
    argv = ("cache", "create", tiny, "--prompt", LONG, "--out", tiny / "b.safetensors")
    assert "reading the prompt" in on_terminal(MAIN, *argv)
    shown = on_terminal(MAIN, *argv, "--no-progress")
    assert "reading" not in shown and "\x1b" not in shown


def test_checks_are_counted(tiny: Path) -> None:
    told: list[tuple[str, int, int]] = []
    model, tokenizer = mlx_lm.load(str(tiny))
    check_model(model, tokenizer, ["tq4"], tokens=128, progress=lambda *said: told.append(said))
    assert told[0] == ("identity", 0, told[0][2]) and {of for _, _, of in told} == {told[0][2]}
    assert list(dict.fromkeys(scheme for scheme, *_ in told)) == ["identity", "tq4"]
    counts = [done for _, done, _ in told]
    assert counts == sorted(counts) and counts[-1] <= told[0][2]
