"""What the command line prints: every text escaped, in any encoding, as wide as the reader's terminal."""

import io
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from coupled_adam.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

#: Columns of a table that goes to a file or a pipe, where COLUMNS does not say otherwise.
WIDE = 130

Justify = Literal["left", "right"]


def survive_encoding() -> None:
    """Have a character that the encoding of standard output or error lacks written as an escape, not end the program.

    Files and pipes have the encoding of the locale, which is not UTF-8 everywhere.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_line(text: object) -> None:
    """Print lines of ours on standard output."""
    print(printable(str(text), keep="\n"))


def print_error(text: object) -> None:
    """Print one line on standard error, at once."""
    print(printable(str(text)), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print JSON, in ASCII: every program reads it, whatever the encoding and whatever stands in names."""
    print(json.dumps(value))


def print_table(
    headings: Sequence[tuple[str, Justify]], rows: Iterable[Sequence[str]], caption: str | None = None
) -> None:
    """Print a table, as wide as it needs to be, up to the width of the terminal."""
    from rich import box
    from rich.table import Table

    shown = _text(caption, "dim italic") if caption else None
    table = Table(caption=shown, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for heading, justify in headings:
        table.add_column(_text(heading), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(_text, row))
    _show(table)


def print_styled(*parts: tuple[str, str]) -> None:
    """Print texts, each with a style, as a paragraph on a terminal, and as one line elsewhere."""
    from rich.text import Text

    _show(Text.assemble(*((printable(text), style) for text, style in parts)), paragraph=True)


def _text(text: str, style: str = "") -> "Text":
    from rich.text import Text

    return Text(printable(text, keep="\n"), style)


def _show(content: Any, paragraph: bool = False) -> None:
    """Print what rich draws, without the blanks at the ends of its lines."""
    console = _console()
    with console.capture() as captured:
        console.print(content, soft_wrap=paragraph and not console.is_terminal)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _console() -> "Console":
    from rich.console import Console

    return Console(width=shutil.get_terminal_size((WIDE, 24)).columns, highlight=False, markup=False, emoji=False)
