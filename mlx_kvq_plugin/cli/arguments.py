"""Options that several commands share, their checks, and how wrong input is reported."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..errors import KVQError

DEFAULT_SCHEME = "tq4"


class UsageError(KVQError):
    """The command line asks for something that cannot be done."""


class Parser(argparse.ArgumentParser):
    """argparse, with every mistake in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UsageError(f"{message}; see {self.prog} --help")


def one_line(error: BaseException) -> str:
    """The first sentence of an error's message."""
    text = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())
    return text.split(". ")[0].rstrip(".")


def complain(error: KVQError) -> None:
    """Report an error on stderr."""
    print(f"kvq: error: {' '.join(str(error).split())}", file=sys.stderr)


def note(text: str) -> None:
    """A remark on stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, examples: str
) -> argparse.ArgumentParser:
    """Add a command that `run` serves."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary.split(".")[0],
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _number(text: str, kind: type[int] | type[float], low: float, high: float, what: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = kind(low - 1)
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return value


def positive(text: str) -> int:
    """An integer of at least 1."""
    return int(_number(text, int, 1, float("inf"), "an integer of at least 1"))


def _natural(text: str) -> int:
    return int(_number(text, int, 0, 2**63 - 1, "an integer of at least 0"))


def _temperature(text: str) -> float:
    return float(_number(text, float, 0.0, 1e6, "a number of at least 0"))


def _fraction(text: str) -> float:
    return float(_number(text, float, 1e-6, 1.0, "a number above 0 and at most 1"))


MODEL_HELP = "folder, Hugging Face repository, demo:smollm2 or demo:gemma3"


def add_weight_options(parser: argparse.ArgumentParser) -> None:
    """How the weights are held."""
    parser.add_argument(
        "--float32",
        action=argparse.BooleanOptionalAction,
        help="convert half precision weights to float32 (default: only on the CPU, where half precision is slow)",
    )


def add_progress_option(parser: argparse.ArgumentParser) -> None:
    """Whether bars are shown."""
    parser.add_argument(
        "--no-progress",
        dest="progress",
        action="store_false",
        help="no progress bars on stderr; there are none anyway where it is not a terminal",
    )


def add_arch_option(parser: argparse.ArgumentParser) -> None:
    """What happens to architectures without a model adapter."""
    parser.add_argument(
        "--unknown-arch",
        choices=("error", "generic"),
        default="error",
        help="generic tries an architecture without a model adapter, after an exactness check",
    )


def add_scheme_options(parser: argparse.ArgumentParser) -> None:
    """Scheme, architecture, weights."""
    parser.add_argument(
        "--kv-scheme",
        metavar="SCHEME",
        help=f"see kvq schemes (default: {DEFAULT_SCHEME}, or that of the prompt-cache file)",
    )
    add_arch_option(parser)
    add_weight_options(parser)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """The prompt and how it is put to the model."""
    parser.add_argument("--prompt", required=True, metavar="TEXT|-|@FILE", help="text, - for stdin, @FILE for a file")
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    parser.add_argument("--no-chat-template", action="store_true", help="give the model the prompt as it is")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen."""
    parser.add_argument("--max-tokens", type=positive, default=256, metavar="N", help="of a reply (default: 256)")
    parser.add_argument("--temp", type=_temperature, default=0.0, metavar="T", help="0 takes the likeliest (default)")
    parser.add_argument("--top-p", type=_fraction, default=1.0, metavar="P", help="nucleus sampling (default: 1, off)")
    parser.add_argument("--seed", type=_natural, default=0, metavar="N", help="of the sampling (default: 0)")


def read_prompt(value: str) -> str:
    """The text behind `--prompt`: itself, `-` for stdin, `@FILE` for a file; raises `UsageError` if it is empty."""
    try:
        if value == "-":
            text = sys.stdin.read()
        elif value.startswith("@"):
            text = Path(value[1:]).expanduser().read_text(encoding="utf-8")
        else:
            text = value
    except OSError as error:
        raise UsageError(
            f"the prompt file must be readable, got {error.strerror} for {value[1:]!r}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt must be UTF-8 text, got {error}; convert it first") from error
    if not text.strip():
        raise UsageError("the prompt must have text, got an empty one; give --prompt TEXT, - or @FILE")
    return text


def output_file(value: str, what: str = "prompt-cache file", suffixes: tuple[str, ...] = (".safetensors",)) -> Path:
    """A path that `what` can be written to, checked before any work is done."""
    path = Path(value).expanduser()
    if path.suffix not in suffixes:
        raise UsageError(f"a {what} must end in {' or '.join(suffixes)}, got {path.name!r}; rename it")
    if not path.parent.is_dir():
        raise UsageError(f"the folder of a {what} must exist, got {str(path.parent)!r}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"the folder of a {what} must be writable, got {str(path.parent)!r}; choose another one")
    return path


def input_file(value: str) -> Path:
    """The path of an existing file."""
    path = Path(value).expanduser()
    if not path.is_file():
        raise UsageError(f"a prompt-cache file must exist, got {value!r}; check the path")
    return path
