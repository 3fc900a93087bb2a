"""Tables on this machine: their text column, read as a stream."""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from coupled_adam.errors import InputError, one_line, printable
from coupled_adam.lm.opening import bytes_read, find_not_text, open_bytes, open_text, suffix_of
from coupled_adam.lm.text_files import NAMED, Found, find_files
from coupled_adam.progress import say

#: Column that holds the text, where nothing else is said. An array of strings is taken for one, too.
COLUMN = "text"

#: Rows without the column after which a file is taken to lack it.
ROWS_WITHOUT_COLUMN = 10_000

#: Characters of a JSON array that are read at a time.
CHARACTERS = 2**20

#: Characters of one element of a JSON array.
LONGEST = 2**30

#: The names of JSON for types of Python.
_TYPES = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bytes: "binary data",
}


_DECODER = json.JSONDecoder()

#: What JSON can write and no encoding has.
_SURROGATE = re.compile("[\ud800-\udfff]")


class Absent:
    """The value of a row that lacks the column; ``columns`` are those that it has."""

    def __init__(self, *columns: str) -> None:
        self.columns = columns


class Reading:
    """How far a file of ``size`` bytes is read: its ``share``, from 0 to 1."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.share: Callable[[], float] = lambda: 0.0


class TableFiles:
    """A column of local tables: ``.parquet``, JSON lines or a JSON array, ``.csv`` or ``.tsv``, compressed or not.

    Args:
        path: the file or directory.
        column: the column with the text.

    Examples:
        >>> TableFiles(Path("text.jsonl"), column="text").name
        'text.jsonl'
    """

    def __init__(self, path: Path, column: str = COLUMN) -> None:
        self.path, self.column = path, column
        self.name = printable(str(path))
        self.paths = (path,)
        self._found: Found | None = None
        self._said = set[str]()
        self._bytes_read, self._reading = 0, Reading(0)

    def _files(self) -> Found:
        if self._found is None:
            self._found = find_files(self.path)
        return self._found

    def fingerprint(self) -> str:
        """Digest of the column, and of the names, sizes and times of the files: there may be terabytes of them."""
        stats = []
        for path in self._files().files:
            if not path.exists():
                raise InputError(f"{path}: no such file or directory")
            status = path.stat()
            stats.append((path.relative_to(self.path).as_posix(), status.st_size, status.st_mtime_ns))
        return hashlib.sha256(repr((self.column, stats)).encode("utf-8", "surrogateescape")).hexdigest()

    def documents(self) -> Iterator[str]:
        """Yield the texts of the column, without empty ones, which are counted."""
        found, left_out, rows, empty = self._files(), Counter[str](), 0, list[str]()
        self._bytes_read = 0
        if found.left_out:
            self._say_once(f"left out: {found.left_out}")
        for file in found.files:
            read, self._reading = 0, Reading(file.stat().st_size if file.exists() else 0)
            for text in _texts(file, self.column, left_out, self._reading):
                read += 1
                if text is not None:
                    yield text
            rows += read
            self._bytes_read, self._reading = self._bytes_read + self._reading.size, Reading(0)
            if not read:
                empty.append(file.name)
        if not rows:
            raise InputError(f"{self.name}: has no rows")
        if empty:
            names = ", ".join(empty[:NAMED]) + (", …" if len(empty) > NAMED else "")
            self._say_once(f"{len(empty):,} of {len(found.files):,} files have no rows ({names})")
        if left_out:
            self._say_once(said(left_out, rows))

    def share(self, characters: int) -> float | None:
        """Return how much of the files has been read, from 0 to 1, whatever ``characters`` of it are done."""
        size = sum(file.stat().st_size for file in self._files().files)
        return (self._bytes_read + self._reading.share() * self._reading.size) / max(size, 1)

    def _say_once(self, text: str) -> None:
        if text not in self._said:  # the documents are read twice where a tokenizer is trained on them
            self._said.add(text)
            say(f"{self.name}: {text}")


def said(left_out: Counter[str], rows: int) -> str:
    """Return a line about the rows that are not among the documents."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))
    return f"{left_out.total():,} of {rows:,} rows left out: {reasons}"


def _texts(file: Path, column: str, left_out: Counter[str], reading: Reading) -> Iterator[str | None]:
    row = 0
    try:
        for text in checked(_values(file, column, reading), str(file), column, left_out):
            row += 1
            yield text
    except InputError:
        raise
    except UnicodeDecodeError as error:
        if suffix_of(file) == ".parquet":
            raise InputError(
                f"{file}: after row {row:,}: the column {column!r} is not UTF-8 ({error.reason})"
            ) from None
        raise find_not_text(file) from None
    except Exception as error:  # of every kind: each library has errors of its own for damaged files
        what = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
        after = f" after row {row:,}" if row else ""
        raise InputError(f"{file}: cannot be read as a table{after}: {what}") from None


def checked(values: Iterable[Any], name: str, column: str, left_out: Counter[str]) -> Iterator[str | None]:
    """Yield the text of each row; None if it has none, which is counted.

    Args:
        values: of the column, or ``Absent``.
        name: of the table, for messages.
        column: for messages.
        left_out: how many rows have no text, by the reason.

    Raises:
        InputError: a value is not text, or no row has the column.
    """
    row, missing, columns = 0, 0, dict[str, None]()
    for row, value in enumerate(values, 1):
        text = None
        if isinstance(value, Absent):
            missing += 1
            columns |= dict.fromkeys(value.columns)
            left_out[f"without the column {column!r}"] += 1
        elif value is None:
            left_out["null"] += 1
        elif not isinstance(value, str):
            held = _TYPES.get(type(value), type(value).__name__)
            raise InputError(f"{name}: row {row:,}: the column {column!r} holds {held}, not text")
        elif not value.strip():
            left_out["empty"] += 1
        elif not value.isascii() and _SURROGATE.search(value):
            raise InputError(f"{name}: row {row:,}: half of a surrogate pair, which is not a character")
        else:
            text = value
        if missing == row == ROWS_WITHOUT_COLUMN:
            break
        yield text
    if row and missing == row:
        there = f"; the columns are {', '.join(map(printable, columns))}" if columns else ""
        raise InputError(f"{name}: no column {column!r}{there}")


def _values(file: Path, column: str, reading: Reading) -> Iterator[Any]:
    """Yield the value of the column of each row; ``Absent`` where there is none."""
    match suffix_of(file):
        case ".parquet":
            yield from _parquet(file, column, reading)
        case ".csv" | ".tsv" as suffix:
            with open_text(file, newline="") as lines:
                _follow(lines, reading)
                yield from _csv(lines, file, column, "\t" if suffix == ".tsv" else ",")
        case _:
            for row in _json(file, reading):
                if isinstance(row, dict):
                    yield row[column] if column in row else Absent(*row)
                else:
                    yield row if isinstance(row, str) and column == COLUMN else Absent()


def _follow(text: TextIO, reading: Reading) -> None:
    reading.share = lambda: bytes_read(text) / max(reading.size, 1)


def _parquet(file: Path, column: str, reading: Reading) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    open_bytes(file).close()  # says what is not there, not a file, or not downloaded
    with ParquetFile(file) as table:
        schema = table.schema_arrow
        if column not in schema.names:
            raise InputError(f"{file}: no column {column!r}; the columns are {', '.join(map(printable, schema.names))}")
        kind = schema.field(column).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
        if not any(check(value) for check in texts):
            raise InputError(f"{file}: row 1: the column {column!r} holds {one_line(kind)}, not text")
        rows, read = table.metadata.num_rows, 0
        reading.share = lambda: read / rows
        if rows:
            for batch in table.iter_batches(batch_size=1_000, columns=[column]):
                read += len(batch)
                yield from batch.column(0).to_pylist()


def _csv(lines: TextIO, file: Path, column: str, delimiter: str) -> Iterator[Any]:
    csv.field_size_limit(2**31 - 1)  # 131,072 characters by default, and a document may be a book
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header = next(rows, None)
    if header is None:
        return
    if column not in header:
        raise InputError(f"{file}: no column {column!r}; the columns are {', '.join(map(printable, header))}")
    position = header.index(column)
    for number, row in enumerate(filter(None, rows), 1):
        if len(row) > len(header):  # a delimiter in a text without quotes: what stands in the column is a part of it
            raise InputError(f"{file}: row {number:,} has {len(row)} fields, but the header has {len(header)}")
        yield row[position] if position < len(row) else Absent(*header)


def _json(file: Path, reading: Reading) -> Iterator[Any]:
    """Yield the values of JSON lines, or of an array."""
    with open_text(file) as text:
        first = ""
        while not first and (read := text.read(CHARACTERS)):
            first = read.lstrip()
        if first.startswith("["):
            _follow(text, reading)
            yield from _array(text, first)
            return
    with open_text(file) as text:
        _follow(text, reading)
        for number, line in enumerate(filter(str.strip, text)):
            try:
                value = _decoded(line)
            except json.JSONDecodeError:
                if number == 0 and line.lstrip().startswith("{") and line.strip()[-1] != "}":
                    raise ValueError("neither an array of objects nor one object per line") from None
                raise
            yield value


def _decoded(line: str) -> Any:
    """Return what ``json.loads`` returns, in about half of the time where the line is short."""
    content = line.strip(" \t\r\n")
    try:
        value, end = _DECODER.raw_decode(content)
    except json.JSONDecodeError:
        end = -1
    return value if end == len(content) else json.loads(line)


def _array(text: TextIO, buffer: str) -> Iterator[Any]:
    """Yield the elements of a JSON array whose beginning is in ``buffer``, without holding all of it."""
    decoder, position, wanted, first = json.JSONDecoder(), 1, CHARACTERS, True
    while True:
        try:
            position = _after_space(buffer, position)
            if buffer[position : position + 1] == "]":
                if _after_space(rest := buffer[position + 1 :] + text.read(CHARACTERS)) < len(rest):
                    raise ValueError("more text after the end of the array")
                return
            start = position
            if not first:
                if buffer[position : position + 1] not in (",", ""):
                    raise ValueError(f"',' or ']' expected, not {buffer[position]!r}")
                start = _after_space(buffer, position + 1)
            value, end = decoder.raw_decode(buffer, start)
            if end == len(buffer):  # a number may go on in what was not read yet
                raise json.JSONDecodeError("unterminated", buffer, end)
        except json.JSONDecodeError:
            more = text.read(wanted)
            if not more or wanted > LONGEST:
                raise
            buffer, position, wanted = buffer[position:] + more, 0, 2 * wanted
            continue
        yield value
        position, wanted, first = end, CHARACTERS, False
        if position > CHARACTERS:
            buffer, position = buffer[position:], 0


def _after_space(text: str, position: int = 0) -> int:
    while position < len(text) and text[position] in " \t\r\n\ufeff":
        position += 1
    return position
