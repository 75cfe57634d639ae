"""Progress: a callback that library functions take, and the bars that the commands show for it on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


def silent(what: str, done: int, of: int) -> None:
    """Shows nothing: the default of functions that take a `Progress`."""


def within(progress: Progress, stage: str) -> Progress:
    """The progress of a part: its texts come after the name of the stage."""
    return lambda what, done, of: progress(f"{stage}: {what}" if what else stage, done, of)


def new_bars(console: Console, show: bool, *, transient: bool = False) -> Bars:
    """An empty display of `rich` with the columns that all bars of this package have."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    shared = sys.stdout is not None and sys.stdout.isatty()  # else what is printed would go to the console, not there
    return Bars(*columns, console=console, disable=not show, transient=transient, redirect_stdout=shared)


def shows_bars(console: Console) -> bool:
    """Whether a console can move its cursor: a terminal that is not `TERM=dumb`."""
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def progress_bar(show: bool = True) -> Iterator[Progress]:
    """One bar on stderr for the time of the context, gone at its end.

    Args:
        show: `False` shows none. There is none either where stderr is no terminal or `TERM` is `dumb`; with `NO_COLOR`
            it has no colours.

    Yields:
        What to call with the state; the bar appears at the first call.
    """
    console = Console(stderr=True)
    bars = new_bars(console, show and shows_bars(console), transient=True)
    task = bars.add_task("", total=None)

    def update(what: str, done: int, of: int) -> None:
        bars.update(task, description=what, completed=done, total=of)
        if not bars.live.is_started:
            bars.start()

    try:
        yield update
    finally:
        bars.stop()
