"""A reply while it is generated: a bar while the prompt is read, text on stdout, and a meter of the cache below it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from ..progress import progress_bar, shows_bars
from ..report import CacheReport, cache_report
from .arguments import note

LONG = 512  # tokens of a prompt from which on a bar says how much of it is read
REFRESH = 0.05  # seconds between two drawings of the meter, at least
BAR_WIDTH = 48  # cells
METER_ROWS = 4  # that are left free for the meter below a line that is longer than the terminal


def meter_text(report: CacheReport, tokens_per_second: float) -> str:
    """One line: tokens, bytes held, what fp16 would hold, speed."""
    return (
        f"{report.tokens} tokens, {report.nbytes / 2**20:.2f} MiB held, {report.fp16_nbytes / 2**20:.2f} MiB in fp16, "
        f"ratio {report.ratio:.2f}, {tokens_per_second:.1f} tokens/s"
    )


class ReplyStream:
    """A context in which a reply is shown: `prefilled` while the prompt is read, `add` for each of mlx-lm's responses.

    On a terminal, with the meter, finished lines are printed once and stay; the line that grows is drawn together with
    the meter and printed when it ends. Anywhere else the text is printed as it comes.
    """

    def __init__(self, caches: Callable[[], list[Any]], *, live: bool = False, progress: bool = True):
        """
        Args:
            caches: gives the prompt cache.
            live: show the meter while generating; where stdout is no terminal, its last state on stderr.
            progress: show the bar.
        """
        self._caches, self._live, self._progress = caches, live, progress
        self._bar: ExitStack | None = ExitStack()
        self._show: Callable[[str, int, int], None] | None = None
        self._console = Console(file=sys.stdout)
        self._display: Live | None = None
        self._line = ""  # of the text, not ended yet
        self._meter = ""
        self._drawn = 0.0
        self._begun = False

    def __enter__(self) -> ReplyStream:
        return self

    def prefilled(self, done: int, of: int) -> None:
        """The bar: so many tokens of the prompt are read."""
        if of < LONG or self._bar is None:
            return
        if self._show is None:
            self._show = self._bar.enter_context(progress_bar(self._progress))
        self._show("reading the prompt", done, of)

    def add(self, response: Any) -> None:
        """Show what a response adds to the text."""
        self._end_bar()
        self._begun = True
        if not self._live or not shows_bars(self._console):
            print(response.text, end="", flush=True)
            if self._live:
                self._meter = meter_text(cache_report(self._caches()), response.generation_tps)
            return
        report = cache_report(self._caches())
        if self._display is None:
            self._display = Live(console=self._console, auto_refresh=False, transient=True)
            self._display.start()
        self._print_lines(response.text)
        self._meter = meter_text(report, response.generation_tps)
        now = time.monotonic()
        if now - self._drawn >= REFRESH:
            self._drawn = now
            self._display.update(self._drawing(report), refresh=True)

    def _print_lines(self, text: str) -> None:
        """Print what has ended, and of a line that fills the terminal all but its last words."""
        *ended, self._line = (self._line + text).split("\n")
        for line in ended:
            self._console.out(line, highlight=False)
        room = self._console.width * max(1, self._console.height - METER_ROWS)
        while cell_len(self._line) > room:
            cut = self._line.rfind(" ", 1, room // 2) + 1 or room // 2
            self._console.out(self._line[:cut], highlight=False)
            self._line = self._line[cut:]

    def _drawing(self, report: CacheReport) -> RenderableType:
        share = ProgressBar(
            total=max(report.fp16_nbytes, 1),
            completed=min(report.nbytes, report.fp16_nbytes),
            width=min(BAR_WIDTH, self._console.width),
        )
        return Group(Text(self._line, overflow="fold"), Text(self._meter, style="dim"), share)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_bar()
        if self._display is not None:
            self._display.update(Text(""), refresh=False)
            self._display.stop()
            print(self._line, end="")
        if kind is None or self._begun:
            print(flush=True)
        if self._meter and kind is None:
            note(self._meter)
