"""What a user sees of long work: a bar on a terminal, plain lines elsewhere. All of it goes to standard error."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: Seconds between two plain lines.
LINE_EVERY = 10.0


class Update(Protocol):
    """Tells how far the work is, in steps done, and what to show beside the bar."""

    def __call__(self, done: int, text: str) -> None: ...


def say(text: str) -> None:
    """One line about what is being done."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(name: str, done: int, total: int, shown: bool = True) -> Iterator[Update]:
    """A bar over ``total`` steps, of which ``done`` were done before; nothing, if it is not to be ``shown``."""
    if not shown:
        yield lambda done, text: None
        return
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(name, completed=done, total=total, text="")
            yield lambda done, text: bar.update(task, completed=done, text=text)
        return
    last_line = 0.0

    def line(done: int, text: str) -> None:
        nonlocal last_line
        if done == total or time.monotonic() - last_line >= LINE_EVERY:
            last_line = time.monotonic()
            say(f"{name}: step {done} of {total}, {text}")

    yield line
