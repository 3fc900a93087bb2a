"""Files are written whole or not at all, and damage to them is noticed."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from coupled_adam.errors import InputError

#: Bytes that are hashed at a time.
CHUNK = 2**22

#: Size and time of the files of a directory when they were verified.
VERIFIED = ".verified.json"

#: The same of all files that this process has verified.
_intact: dict[Path, list[int]] = {}


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write a file or directory to. It replaces ``path`` if the block succeeds.

    Raises:
        InputError: ``path`` lies in a file, or is a directory where a file was written.
        OSError: the disk is full; the message names ``path``.
    """
    make_directory(path.parent)
    # The process ID: two processes that write the same file do not write into each other's.
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        move_into_place(aside, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                f"{path}: the disk is full; what was there is intact. Make space, then rerun the same command"
            ) from None
        raise
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def move_into_place(aside: Path, path: Path) -> None:
    """Replace ``path`` by what is complete on the disk. Raises InputError for a file in the place of a directory."""
    _sync(aside)
    if path.is_dir() and not aside.is_dir():
        raise InputError(f"{path}: a directory; choose a name for the file")
    if path.is_dir():
        shutil.rmtree(path)  # os.replace does not replace a directory that holds anything
    aside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with written_whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all. NaN and infinity are refused: JSON lacks them."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file cannot be read or holds something else; ``remedy`` says what to do about it.
    """
    after = f"; {remedy}" if remedy else ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}{after}") from None
    except ValueError as error:  # of JSON, or of UTF-8
        raise InputError(f"{path}: damaged ({error}){after}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged (not a JSON object){after}")
    return content


def make_directory(path: Path) -> None:
    """Create a directory and its parents. Raises InputError if there is a file in its place."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path}: not a directory; choose another place") from None


def checksums(root: Path, files: Iterable[Path], remember: bool = False) -> dict[str, dict[str, Any]]:
    """Record size and checksum (XXH3, 128 bits) of ``files`` by their path relative to ``root``.

    With ``remember`` they count as verified by ``verify``.
    """
    recorded, seen = {}, {}
    for file in files:
        name = file.relative_to(root).as_posix()
        seen[name] = _stamp(file)
        recorded[name] = {"bytes": seen[name][0], "xxh3_128": _checksum(file)}
    if remember:
        write_json(root / VERIFIED, seen)
    return recorded


def verify(root: Path, recorded: Mapping[str, Mapping[str, Any]], remedy: str, remember: bool = False) -> None:
    """Raise InputError naming the first file that is not what ``checksums`` recorded.

    Args:
        root: the directory that the names are relative to.
        recorded: what ``checksums`` returned; other files are not looked at.
        remedy: what to do about a damaged file.
        remember: skip files that were verified before and have the size and time that they had then.
    """
    known = _notes(root / VERIFIED) if remember else {}
    seen: dict[str, list[int]] = {}
    for name, expected in recorded.items():
        file = (root / name).resolve()
        try:
            seen[name] = _stamp(file)
            if seen[name][0] != expected["bytes"]:
                raise InputError(
                    f"{root / name}: damaged ({seen[name][0]:,} bytes instead of {expected['bytes']:,}); {remedy}"
                )
            if seen[name] not in (known.get(name), _intact.get(file)) and _checksum(file) != expected["xxh3_128"]:
                raise InputError(f"{root / name}: damaged (its checksum is not the recorded one); {remedy}")
        except OSError as error:
            raise InputError(f"{root / name}: cannot be read: {error.strerror}; {remedy}") from None
        _intact[file] = seen[name]
    if remember and seen != known:
        with contextlib.suppress(OSError):  # a directory that may not be written to is verified every time
            write_json(root / VERIFIED, seen)


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _notes(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except InputError:
        return {}


def _checksum(path: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the disk hold what was written before the rename makes it visible."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
