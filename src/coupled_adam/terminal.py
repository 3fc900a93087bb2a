"""What the command line prints: every text escaped, in any encoding, as wide as the reader's terminal."""

import functools
import io
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

from coupled_adam.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

#: Columns of a table that goes to a file or a pipe, where COLUMNS does not say otherwise.
WIDE = 130

#: The lines of ``rich.box.SIMPLE``.
SIMPLE_IN_ASCII = "\n".join(["    ", "    ", " -- ", "    ", "    ", " -- ", "    ", "    "]) + "\n"

Justify = Literal["left", "right"]


#: Characters of ours that some encodings lack, and how they are written there.
PLAIN = str.maketrans(
    {
        "‖": "||",
        "μ": "mu",
        "ʳ": "^r",
        "\u0304": "",  # the bar of r̄
        "\u0302": "",  # the hat of m̂
        "α": "alpha",
        "β": "beta",
        "η": "eta",
        "ν": "nu",
        "κ": "kappa",
        "λ": "lambda",
        "ε": "eps",
        "σ": "sigma",
        "Σ": "sum",
        "√": "sqrt",
        "²": "^2",
        "·": "*",
        "×": "x",
        "±": "+/-",
        "−": "-",
        "–": "-",
        "—": "-",
        "…": "...",
        "→": "->",
        "≤": "<=",
        "≥": ">=",
        "≈": "~",
        "∞": "inf",
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "⌈": "",
        "⌉": "",
    }
)


def survive_encoding() -> None:
    """Have a character that the encoding of standard output or error lacks written as an escape, not end the program.

    Files and pipes have the encoding of the locale, which is not UTF-8 everywhere.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def plain(text: str, encoding: str | None) -> str:
    """Write the characters of ``PLAIN`` that ``encoding`` lacks with those that it has.

    Examples:
        >>> plain("‖μ‖ – 0.3 ± 0.1…", "ascii"), plain("‖μ‖ – 0.3 ± 0.1…", "cp1252")
        ('||mu|| - 0.3 +/- 0.1...', '||mu|| – 0.3 ± 0.1…')
    """
    if text.isascii():
        return text
    return "".join(c if _has(encoding or "ascii", c) else c.translate(PLAIN) for c in text)


@functools.cache
def _has(encoding: str, character: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def print_line(text: object) -> None:
    """Print lines of ours on standard output."""
    print(plain(printable(str(text), keep="\n"), sys.stdout.encoding))


def print_error(text: object, stream: TextIO | None = None) -> None:
    """Print one line on standard error, or ``stream``, at once."""
    stream = stream or sys.stderr
    print(plain(printable(str(text)), stream.encoding), file=stream, flush=True)


def print_json(value: Any) -> None:
    """Print JSON, in ASCII: every program reads it, whatever the encoding and whatever stands in names."""
    print(json.dumps(value))


def print_table(
    headings: Sequence[tuple[str, Justify]],
    rows: Iterable[Sequence[str]],
    caption: str | None = None,
    optional: Sequence[str] = (),
) -> None:
    """Print a table, as wide as it needs to be, up to the width of the terminal.

    Where that is too narrow, the columns ``optional`` are left out, in their order, as far as needed; then cells wrap.
    """
    from rich import box
    from rich.table import Table

    content = [list(map(_text, row)) for row in rows]
    names = [_text(heading) for heading, _ in headings]
    widths = {
        heading: max(
            text.cell_len for cell in (names[i], *(row[i] for row in content)) for text in cell.split() or [cell]
        )
        for i, (heading, _) in enumerate(headings)
    }
    left_out = list[str]()
    for heading in (name for name in optional if name in widths):
        if sum(width + 2 for name, width in widths.items() if name not in left_out) <= _width():
            break
        left_out.append(heading)
    if left_out:
        caption = f"{caption or ''}; a wider terminal also shows {', '.join(left_out)}".removeprefix("; ")
    shown = _text(caption, "dim italic") if caption else None
    # In other encodings rich would take a box with borders instead.
    utf = (sys.stdout.encoding or "").lower().startswith("utf")
    lines = box.SIMPLE if utf else box.Box(SIMPLE_IN_ASCII, ascii=True)
    table = Table(caption=shown, box=lines, pad_edge=False, collapse_padding=True)
    kept = [i for i, (heading, _) in enumerate(headings) if heading not in left_out]
    for i in kept:
        table.add_column(names[i], justify=headings[i][1], overflow="fold")
    for row in content:
        table.add_row(*(row[i] for i in kept))
    _show(table)


def print_styled(*parts: tuple[str, str]) -> None:
    """Print texts, each with a style, as a paragraph on a terminal, and as one line elsewhere."""
    from rich.text import Text

    shown = ((plain(printable(text), sys.stdout.encoding), style) for text, style in parts)
    _show(Text.assemble(*shown), paragraph=True)


def _text(text: str, style: str = "") -> "Text":
    from rich.text import Text

    return Text(plain(printable(text, keep="\n"), sys.stdout.encoding), style)


def _show(content: Any, paragraph: bool = False) -> None:
    """Print what rich draws, without the blanks at the ends of its lines."""
    console = _console()
    with console.capture() as captured:
        console.print(content, soft_wrap=paragraph and not console.is_terminal)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _console() -> "Console":
    from rich.console import Console

    return Console(width=_width(), highlight=False, markup=False, emoji=False)


def _width() -> int:
    return shutil.get_terminal_size((WIDE, 24)).columns
