"""What a file is by its first bytes, whatever its name says."""

import re
import stat
import zipfile
from pathlib import Path
from typing import Literal

from coupled_adam.audit.word_vectors import WordFormat, word_format_of
from coupled_adam.errors import InputError, printable
from coupled_adam.files import check_no_pointer

Format = Literal["safetensors", "gguf", "onnx", "numpy", "pickle"] | WordFormat

#: Bytes that are looked at: the first line of a text file with thousands of figures.
HEAD = 16384

#: Formats without embeddings that are read here, by how their files begin.
FOREIGN = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras)",
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it",
    b"BZh": "compressed with bzip2; unpack it",
    b"\xfd7zXZ\x00": "compressed with xz; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"PAR1": "a Parquet file",
    b"%PDF": "a PDF file",
}

#: How pickles begin: by the number of their protocol, or, in protocol 0, with a dictionary, a list or a class in text.
PICKLE = re.compile(rb"\x80[\x01-\x05]|\([dl]p\d+\n|c[\w.]+\n[\w.]+\n")

#: How an ONNX model begins: with the version of the format, and one of the fields that come next.
ONNX = re.compile(rb"\x08[\x01-\x1f](\x12.[\w. -]|\x1a.[\w. -]|[\x22\x28\x32\x3a\x42])", re.DOTALL)

#: How a page of a web site begins.
PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml")


def check_regular(path: Path) -> None:
    """Raise InputError unless there is a file: reading a pipe or a device may take for ever."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: not found") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: a {'directory' if stat.S_ISDIR(mode) else 'pipe or device'}, not a file")


def check_downloaded(path: Path) -> bytes:
    """Return how a file begins.

    Raises:
        InputError: there is none, or what stands in its place: a Git LFS pointer, or the page of a web site.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    check_no_pointer(path, head)
    if head[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(PAGE):
        raise InputError(f"{path}: a web page, not the file: download the file itself")
    return head


def format_of(path: Path) -> Format | None:
    """Return the format of a file with tensors by its first bytes; None if they tell nothing.

    Raises:
        InputError: as ``check_downloaded``; or the file is of a format that is known and not read.
    """
    head = check_downloaded(path)
    if head.startswith(b"GGUF"):  # programs that manage models name the file after a digest
        return "gguf"
    if head.startswith(b"\x93NUMPY"):
        return "numpy"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return "safetensors"
    if PICKLE.match(head):
        return word_format_of(head) or "pickle"  # gensim's own, or of torch.save
    if ONNX.match(head):
        return "onnx"
    if head.startswith(b"PK\x03\x04"):
        return _format_of_archive(path)
    for beginning, what in FOREIGN.items():
        if head.startswith(beginning):
            raise InputError(f"{path}: {what}; {READ}")
    if (words := word_format_of(head)) is not None:
        return words
    if head and len(head) < HEAD and (text := _text(head)) is not None:
        raise InputError(
            f"{path}: a text file, which is not supported; it begins with {printable(text[:60])!r}. Save an array of "
            "numbers with numpy.save, as .npy"
        )
    return None


#: What is read, for messages.
READ = (
    "supported are .safetensors, .gguf, .onnx, .npy, .npz, files written by torch.save, and word vectors of word2vec, "
    "GloVe, fastText and gensim"
)


def _format_of_archive(path: Path) -> Format | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # damaged in one of many ways, which the reader will tell
        return None
    if any(name.endswith(".npy") for name in names):
        return "numpy"
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return "pickle"
    raise InputError(f"{path}: a zip archive without arrays or tensors (it holds {printable(str(names[:3]))}); {READ}")


def _text(head: bytes) -> str | None:
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return None
    return " ".join(text.split()) if not re.search(r"[\x00-\x08\x0e-\x1f]", text) else None
