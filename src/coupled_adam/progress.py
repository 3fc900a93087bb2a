"""What a user sees of long work: a bar on a terminal, plain lines elsewhere.

Lines go to the logger ``coupled_adam``, which a program may show, redirect or leave silent; the command line shows it
on standard error.
"""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Literal, Protocol, TextIO

from coupled_adam.errors import printable
from coupled_adam.terminal import plain, print_error

LOGGER = logging.getLogger("coupled_adam")

#: Seconds between two plain lines.
LINE_EVERY = 10.0

#: Seconds of work before it is said how much is left.
SETTLED = 5.0

#: Characters of a name beside a bar.
NAME_WIDTH = 24


def say(text: str) -> None:
    """Log one line about what is being done."""
    LOGGER.info(printable(text))


def warn(text: str) -> None:
    """Log one line about something that went wrong without stopping the work."""
    LOGGER.warning(printable(text))


def show_log(quiet: bool = False) -> None:
    """Show the lines on standard error, as the command line does; if ``quiet``, warnings alone, and no bars."""
    if not any(isinstance(handler, _StandardError) for handler in LOGGER.handlers):
        LOGGER.addHandler(_StandardError())
    LOGGER.setLevel(logging.WARNING if quiet else logging.INFO)
    LOGGER.propagate = False


def is_quiet() -> bool:
    """Return whether the program has silenced the lines: then nothing else should show progress either."""
    return LOGGER.level > logging.INFO


class _StandardError(logging.Handler):
    """Writes to what standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print_error(record.getMessage(), _shown())


#: Standard error, while that of the libraries is dropped.
_ours: TextIO | None = None


def _shown() -> TextIO:
    return _ours or sys.stderr


@contextmanager
def libraries_silenced() -> Iterator[None]:
    """Drop what is printed, bars included; lines and bars of this module still show."""
    global _ours
    before, _ours = _ours, _shown()
    try:
        with Path(os.devnull).open("w") as sink, redirect_stdout(sink), redirect_stderr(sink):
            yield
    finally:
        _ours = before


class Update(Protocol):
    """Reports how many steps are done, None if that is not known, and what to show beside the bar."""

    def __call__(self, done: int | None, text: str = "") -> None: ...


@contextmanager
def progress_bar(
    name: str, done: int, total: int, shown: bool = True, unit: str = "step", passing: bool = False
) -> Iterator[Update]:
    """Show how far work is, and how long it will take.

    Args:
        name: of the work.
        done: what was done before, of ``total``.
        total: when it is at its end.
        shown: False for nothing at all, as if the program were quiet.
        unit: of ``total``; ``"%"`` for a share.
        passing: for a part of the work, often short: the bar is removed at its end, and lines come only if it is long.
    """
    if not shown or is_quiet():
        yield lambda done, text="": None
        return
    if _shown().isatty():
        with _bar(name, done, total, unit, passing) as update:
            yield update
        return
    start, began = done, time.monotonic()
    last_line = began if passing else -LINE_EVERY

    def line(done: int | None, text: str = "") -> None:
        nonlocal last_line
        now = time.monotonic()
        if now - last_line >= LINE_EVERY or (done == total and not passing):
            last_line = now
            share = rest = ""
            if done is not None:
                share = f"{done}%" if unit == "%" else f"{unit} {done:,} of {total:,} ({done / total:.0%})"
            if done is not None and start < done < total and now - began >= SETTLED:
                rest = f"about {duration((now - began) / (done - start) * (total - done))} left"
            say(f"{name}: " + ", ".join(part for part in (share, rest, text) if part))

    yield line


@contextmanager
def waiting(show: Update, text: str) -> Iterator[None]:
    """Show, with what a library does that does not say how far it is, for how long it has been doing it."""
    began, ended = time.monotonic(), threading.Event()

    def tick() -> None:
        while not ended.wait(1.0):
            show(None, f"{text}, {duration(time.monotonic() - began)} so far")

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _bar(name: str, done: int, total: int, unit: str, passing: bool) -> Iterator[Update]:
    """Draw a bar that fits a line of any terminal: what is not there on a narrow one is the text at its end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Left
    from rich.table import Column

    console = Console(file=_shown(), highlight=False)
    overflow: Literal["ellipsis", "crop"] = "ellipsis" if plain("…", console.encoding) == "…" else "crop"
    columns = (
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(no_wrap=True, overflow=overflow, max_width=min(NAME_WIDTH, console.width // 4)),
        ),
        BarColumn(bar_width=max(min(console.width // 5, 40), 4)),
        TaskProgressColumn(markup=False) if unit == "%" else MofNCompleteColumn(table_column=Column(no_wrap=True)),
        Left(compact=True, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow=overflow, ratio=1)),
    )
    with Progress(*columns, console=console, transient=passing, expand=True) as bar:
        task = bar.add_task(plain(printable(name), console.encoding), completed=done, total=total, text="")
        yield lambda done, text="": bar.update(task, completed=done, text=plain(text, console.encoding))


def duration(seconds: float) -> str:
    """Format a time that is not known exactly.

    Examples:
        >>> [duration(seconds) for seconds in (0.4, 50, 100, 3500, 5000, 200000)]
        ['1 s', '50 s', '2 min', '58 min', '1 h 23 min', '56 h']
    """
    if seconds < 90:
        return f"{max(math.ceil(seconds), 1)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{round(seconds / 3600)} h"
