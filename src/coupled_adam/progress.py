"""What a user sees of long work: a bar on a terminal, plain lines elsewhere.

Lines go to the logger ``coupled_adam``, which a program may show, redirect or leave silent; the command line shows it
on standard error.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from coupled_adam.errors import printable
from coupled_adam.terminal import print_error

LOGGER = logging.getLogger("coupled_adam")

#: Seconds between two plain lines.
LINE_EVERY = 10.0


def say(text: str) -> None:
    """Log one line about what is being done."""
    LOGGER.info(printable(text))


def warn(text: str) -> None:
    """Log one line about something that went wrong without stopping the work."""
    LOGGER.warning(printable(text))


def show_log() -> None:
    """Show the lines on standard error, as the command line does."""
    if not any(isinstance(handler, _StandardError) for handler in LOGGER.handlers):
        LOGGER.addHandler(_StandardError())
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


class _StandardError(logging.Handler):
    """Writes to what standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print_error(record.getMessage())


class Update(Protocol):
    """Reports how many steps are done, and what to show beside the bar."""

    def __call__(self, done: int, text: str) -> None: ...


@contextmanager
def progress_bar(name: str, done: int, total: int, shown: bool = True) -> Iterator[Update]:
    """Show a bar over ``total`` steps, ``done`` of which were done before; nothing unless ``shown``."""
    if not shown:
        yield lambda done, text: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<14}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(printable(name), completed=done, total=total, text="")
            yield lambda done, text: bar.update(task, completed=done, text=text)
        return
    last_line = 0.0

    def line(done: int, text: str) -> None:
        nonlocal last_line
        if done == total or time.monotonic() - last_line >= LINE_EVERY:
            last_line = time.monotonic()
            say(f"{name}: step {done} of {total}, {text}")

    yield line
