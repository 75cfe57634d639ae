"""`kvq completion`: scripts that shells take, and what bash makes of one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mlx_kvq_plugin.cli import main
from mlx_kvq_plugin.cli.completion import SHELLS


@pytest.fixture
def script(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    shell = getattr(request, "param", "bash")
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert main(["completion", shell]) == 0
    path = tmp_path / f"kvq.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize("script", SHELLS, indirect=True)
def test_shells_take_their_script(script: Path) -> None:
    shell = script.suffix[1:]
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def completed(script: Path, *words: str, cwd: Path | None = None) -> list[str]:
    """What bash offers for the last of the words."""
    line = " ".join(f"'{word}'" for word in words)
    text = (
        f"source {script}; COMP_WORDS=(kvq {line}); COMP_CWORD={len(words)}\n"
        '_shtab_kvq kvq "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"\n'
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bash_completes_commands_options_schemes_and_folders(script: Path, tmp_path: Path) -> None:
    assert completed(script, "cal") == ["calibrate"]
    assert {"generate", "chat", "eval", "serve"} <= set(completed(script, ""))
    assert completed(script, "generate", "m", "--kv-sch") == ["--kv-scheme"]
    schemes = completed(script, "generate", "m", "--kv-scheme", "rvq")
    assert schemes == ["rvq1", "rvq2", "rvq3"]
    assert "turbo4v2" in completed(script, "chat", "m", "--kv-scheme", "turbo4")
    (tmp_path / "models").mkdir()
    assert [name.rstrip("/") for name in completed(script, "inspect", "mod", cwd=tmp_path)] == ["models"]


def test_shells_that_are_not_known_are_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "cmd"]) == 2
    error = capsys.readouterr().err
    assert "'cmd'" in error and "bash" in error and error.count("\n") == 1
