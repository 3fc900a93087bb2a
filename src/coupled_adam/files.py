"""Files are written whole or not at all, replace only what this package made, and are checked when they are read."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from coupled_adam.errors import InputError, one_line, printable

if TYPE_CHECKING:
    from filelock import FileLock
    from numpy.typing import NDArray
    from pydantic import TypeAdapter

T = TypeVar("T")

#: Bytes that are hashed at a time.
CHUNK = 2**22

#: Size and time of the files of a directory when they were verified.
VERIFIED = ".verified.json"

#: In a directory that this package made: its kind, and the sizes of its files.
MANIFEST = ".coupled-adam.json"

#: How the text begins that a clone without Git LFS holds in the place of a large file.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

#: Key under which a sealed JSON file holds the digest of all its other keys.
SEAL = "sha256"

#: What a process that was killed leaves beside the file or directory that it was writing.
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<process>[1-9][0-9]{0,6})\.(?:tmp|old)")

#: The same of all files that this process has verified.
_intact: dict[Path, list[int]] = {}


def output_path(path: Path, *sources: Path) -> Path:
    """Return where to write what a user wants at ``path``: absolute, links resolved, so it has a name.

    Args:
        path: as the user gave it; ``.``, ``..`` and links too.
        sources: what is read meanwhile. The output may not be, hold, or lie in one of them.

    Raises:
        InputError: it overlaps a source, or is the root of the file system.
    """
    resolved = path.resolve()
    if not resolved.name:
        raise InputError(f"{path}: the root of the file system; choose another place")
    for source in sources:
        read = source.resolve()
        if resolved == read or resolved in read.parents or (read in resolved.parents and read.is_dir()):
            how = "is" if resolved == read else "holds" if resolved in read.parents else "lies in"
            raise InputError(f"{path}: {how} {source}, which is an input; choose another place for the output")
    return resolved


def check_replaceable(path: Path, kind: str) -> None:
    """Raise InputError unless a directory may be written at ``path``.

    It may where there is nothing, an empty directory, or one that ``put_in_place`` made of the same ``kind`` in
    which nothing was added or changed since.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path}: not a directory; choose another place")
    if not any(path.iterdir()):
        return
    try:
        manifest = read_json(path / MANIFEST, dict[str, Any])
    except InputError:
        manifest = {}
    if manifest.get("kind") != kind:
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:3])
        raise InputError(
            f"{path}: exists and is not a {kind} made by coupled-adam (it holds {held}); choose another place"
        )
    recorded, found = manifest.get("files"), _sizes(path)
    if foreign := sorted(name for name in found if not _as_recorded(recorded, name, found[name])):
        raise InputError(
            f"{path}: {foreign[0]} was added or changed since this {kind} was made; move it away, or choose another"
        )


def check_outside_made(path: Path) -> None:
    """Raise InputError if ``path`` is the root of the file system, or is or lies in what ``put_in_place`` made."""
    resolved = output_path(path)
    for place in (resolved, *resolved.parents):
        if (place / MANIFEST).is_file():
            how = "is" if place == resolved else f"lies in {place},"
            raise InputError(f"{path}: {how} a corpus or model made by coupled-adam; choose another place")


def put_in_place(aside: Path, path: Path, kind: str) -> None:
    """Move the complete directory ``aside`` to ``path``; it becomes one of that ``kind``, which may replace another.

    Raises:
        InputError: as ``check_replaceable``. Nothing has changed.
    """
    check_replaceable(path, kind)
    (aside / MANIFEST).unlink(missing_ok=True)
    (aside / MANIFEST).write_text(json.dumps({"kind": kind, "files": _sizes(aside)}, indent=2) + "\n", encoding="utf-8")
    swap(aside, path)


def swap(aside: Path, path: Path) -> None:
    """Put a directory that is complete on the disk in the place of another, whatever that holds.

    For directories within our own alone, such as the checkpoints of a run: where a user has named the place, see
    ``put_in_place``.
    """
    _sync(aside)
    if not path.exists():
        aside.replace(path)
        return
    # os.replace replaces no directory that holds anything. What was there is removed once the new one stands.
    old = _ours_alone(path.with_name(f".{path.name}.{os.getpid()}.old"))
    path.replace(old)
    aside.replace(path)
    shutil.rmtree(old, ignore_errors=True)


def _ours_alone(aside: Path) -> Path:
    """Return a name that holds our process's number, freed from what one that was killed left under that number."""
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    return aside


def update_file(directory: Path, name: str, text: str) -> None:
    """Write a file of a directory that ``put_in_place`` made, unless the user has changed that file since.

    Raises:
        InputError: the directory is none of ours, or its description is damaged.
    """
    manifest = read_json(directory / MANIFEST, dict[str, Any])
    files, path = manifest.get("files"), directory / name
    if not isinstance(files, dict):
        raise InputError(f"{directory / MANIFEST}: damaged (no files); delete {directory} if you do not need it")
    before, after = path.stat().st_size if path.exists() else None, len(text.encode())
    if before is not None and not _as_recorded(files, name, before):
        return
    if before == after == files.get(name) and path.read_bytes() == text.encode():
        return
    # Both sizes count meanwhile: a process that is killed in between leaves a directory that is still ours.
    write_json(directory / MANIFEST, {**manifest, "files": {**files, name: [before, after]}})
    write_text(path, text)
    write_json(directory / MANIFEST, {**manifest, "files": {**files, name: after}})


def is_whole(directory: Path, besides: str) -> bool:
    """Whether a directory that ``put_in_place`` made still has all its files; one of them may have changed.

    Args:
        directory: one without a description, from an older version, counts as whole.
        besides: name of the file that may have changed.
    """
    if not (directory / MANIFEST).exists():
        return True
    files, found = read_json(directory / MANIFEST, dict[str, Any]).get("files"), _sizes(directory)
    return isinstance(files, dict) and all(
        name == besides or (name in found and _as_recorded(files, name, found[name])) for name in files
    )


def check_file_replaceable(path: Path, mark: str) -> None:
    """Raise InputError unless a file may be written at ``path``: nothing is there, or a file that begins with ours.

    Args:
        path: as the user gave it.
        mark: what stands in the first 4,096 bytes of all such files of this package, and of no others.
    """
    if path.is_dir():
        raise InputError(f"{path}: a directory; choose a name for the file")
    check_writable(path.parent, path)
    if not path.exists() and not path.is_symlink():
        return
    try:
        head = b""
        if ours := path.is_file():  # else a device, a named pipe, or a link to nothing
            with path.open("rb") as file:
                head = file.read(4096)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; choose another name") from None
    if not ours or (head and mark.encode() not in head):
        raise InputError(f"{path}: exists and was not made by coupled-adam; choose another name, or move it away")


def check_writable(directory: Path, named: Path | None = None) -> None:
    """Raise InputError unless files can be made in ``directory``, which need not exist yet; nothing is left there.

    Args:
        directory: where something will be written, once it has been computed.
        named: what the message calls it; None for ``directory``.
    """
    existing = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise InputError(f"{named or directory}: {existing} is not a directory; choose another place")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"{named or directory}: cannot be written ({error.strerror}); choose another place") from None


def check_no_pointer(path: Path, head: bytes) -> None:
    """Raise InputError if a file that begins with ``head`` is what Git LFS leaves in the place of one."""
    if head.startswith(LFS_POINTER):
        raise InputError(f"{path}: a Git LFS pointer, not the file: run git lfs pull in its directory")


def lock_in(directory: Path) -> "FileLock":
    """Return the lock that keeps other processes out of a directory; it is not acquired.

    Raises:
        InputError: there is a file of that name, ``.lock``, which was not made by this package.
    """
    from filelock import FileLock

    path = directory / ".lock"
    # Older versions of filelock empty the file that they lock.
    if path.is_symlink() or (path.exists() and not (path.is_file() and path.stat().st_size == 0)):
        raise InputError(f"{path}: exists and was not made by coupled-adam; choose another directory, or move it away")
    return FileLock(path, timeout=0)


def remove_leftovers(directory: Path, ours: Callable[[str], bool]) -> None:
    """Remove what processes that were killed were writing in ``directory``; what a live process writes stays.

    For directories within our own, under the lock that keeps other writers out.

    Args:
        directory: where they wrote; it need not exist.
        ours: whether this package writes a file or directory of that name there.
    """
    for path in directory.iterdir() if directory.is_dir() else ():
        found = LEFTOVER.fullmatch(path.name)
        if found is None or not ours(found["name"]) or path.is_symlink() or _alive(int(found["process"])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def _alive(process: int) -> bool:
    """Whether another process has this number. Our own was given to us after the one that was killed had it."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _as_recorded(files: object, name: str, size: int) -> bool:
    """Whether a file is one that was recorded, with its size; or what a killed process left of writing it."""
    if not isinstance(files, dict):
        return False
    folder, _, last = name.rpartition("/")
    if (left := LEFTOVER.fullmatch(last)) and (
        left["name"] == MANIFEST or f"{folder}/{left['name']}".lstrip("/") in files
    ):
        return not _alive(int(left["process"]))
    return size in files[name] if isinstance(files.get(name), list) else files.get(name) == size


def _sizes(directory: Path) -> dict[str, int]:
    """Sizes of all files below a directory by their relative names; -1 for what is neither file nor directory."""
    found = {}
    for entry in sorted(directory.rglob("*")):
        name = entry.relative_to(directory).as_posix()
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            found[name] = -1
        elif entry.is_file() and name not in (MANIFEST, VERIFIED):
            found[name] = entry.stat().st_size
    return found


@contextlib.contextmanager
def written_whole(path: Path, kind: str | None = None) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to. On success it becomes ``path``.

    Args:
        path: of a file, which is replaced; or of a directory.
        kind: of a directory that may replace one of ours, see ``check_replaceable``. Without it there must be none.

    Raises:
        InputError: ``path`` lies in a file, or there is something that may not be replaced: a directory where a file
            was written, or for directories see ``check_replaceable``.
        OSError: the disk is full; the message names ``path``.
    """
    if kind is not None:
        check_replaceable(path, kind)
    elif path.is_dir():
        raise InputError(f"{path}: a directory; choose a name for the file")
    with full_disk_named(path):
        make_directory(path.parent)
    # The process ID: two processes that write the same file do not write into each other's.
    aside = _ours_alone(path.with_name(f".{path.name}.{os.getpid()}.tmp"))
    try:
        with full_disk_named(path):
            yield aside
            if kind is not None:
                put_in_place(aside, path, kind)
            else:
                _sync(aside)
                aside.replace(path)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


#: What libraries say that report a full disk as an error of their own.
FULL = ("No space left", "Disk quota exceeded", "File too large", "os error 28", "requested and")


@contextlib.contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Raise OSError naming ``path`` and the remedy for what libraries raise on a full or read-only disk."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        number, file = getattr(error, "errno", None), getattr(error, "filename", None)
        own = file is None or Path(os.fsdecode(file)).absolute().is_relative_to(path.absolute().parent)
        if number in (errno.EROFS, errno.EACCES, errno.EPERM) and own:
            raise OSError(f"{path}: cannot be written ({os.strerror(number)}); choose another place") from None
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(sign in str(error) for sign in FULL):
            raise OSError(
                f"{path}: the disk is full; existing files are intact. Free some space, then rerun the same command"
            ) from None
        raise


def write_text(path: Path, text: str) -> None:
    r"""Write ``text`` as UTF-8, whole or not at all; bytes in a file's name that are not UTF-8 as \udc80."""
    with written_whole(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all. NaN and infinity are refused: JSON lacks them."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_array(path: Path, array: "NDArray[Any]") -> None:
    """Write an array in the format of ``numpy.save``, whatever the suffix of ``path``.

    Into a file, NumPy writes past Python: what does not fit on a full disk is missing, without an error.
    """
    import numpy as np

    with path.open("wb") as file:
        np.lib.format.write_array(SimpleNamespace(write=file.write), array, allow_pickle=False)


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with a digest of itself, which ``read_sealed`` compares."""
    plain = json.loads(json.dumps(value, allow_nan=False))  # as it will be read: lists for tuples, strings for keys
    write_json(path, {**plain, SEAL: _digest(plain)})


def read_json(path: Path, schema: type[T], remedy: str = "") -> T:
    """Read JSON of a known shape.

    Args:
        path: of the file.
        schema: what pydantic can validate: a model, a TypedDict, ``dict[str, Any]`` for any object. Values are not
            converted: a string is no number.
        remedy: what to do about a damaged file.

    Raises:
        InputError: the file cannot be read or holds something else; the message names the file and the value.
    """
    after = f"; {remedy}" if remedy else ""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}{after}") from None
    return validated(path, content, schema, remedy)


def read_sealed(path: Path, schema: type[T], remedy: str = "", *, older: bool = False) -> T:
    """As ``read_json``, of a file that ``write_sealed`` wrote.

    Args:
        path, schema, remedy: as of ``read_json``.
        older: also take a file from before such files were sealed: one with neither a digest nor a ``format``.

    Raises:
        InputError: also if a value is not the one that was written.
    """
    after = f"; {remedy}" if remedy else ""
    content = read_json(path, dict[str, Any], remedy)
    if not (older and SEAL not in content and "format" not in content) and content.pop(SEAL, None) != _digest(content):
        raise InputError(f"{path}: damaged (its checksum is not the recorded one){after}")
    return validated(path, json.dumps(content).encode(), schema, remedy)


def validated(name: object, content: bytes, schema: type[T], remedy: str = "") -> T:
    """Parse JSON of a known shape; ``name`` says in messages where it is from. As ``read_json`` otherwise."""
    from pydantic import ValidationError

    try:
        found: T = _adapter(schema).validate_json(content, strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = "".join(f"{key}: " for key in [".".join(map(str, first["loc"]))] if key)
        value = first["input"]
        got = "" if isinstance(value, bytes | dict) else f", got {one_line(repr(value), 60)}"
        after = f"; {remedy}" if remedy else ""
        raise InputError(f"{name}: damaged ({printable(where)}{one_line(first['msg'])}{got}){after}") from None
    return found


@functools.cache
def _adapter(schema: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def make_directory(path: Path) -> None:
    """Create a directory and its parents. Raises InputError if there is a file in its place, or it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path}: not a directory; choose another place") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{path}: cannot be created ({error.strerror}); choose another place") from None


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
        return read_json(path, dict[str, Any])
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
