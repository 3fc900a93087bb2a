"""Opening files of text: what their names say, compression, and encodings."""

import codecs
import io
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from coupled_adam.errors import InputError, one_line
from coupled_adam.files import CHUNK, LFS_POINTER, check_no_pointer

#: Suffixes of compression. Whether a file is compressed is read from its first bytes.
COMPRESSED = frozenset({".gz", ".zst", ".zstd", ".bz2", ".xz"})

#: Suffixes of the files that are the documents of a directory.
TEXT = frozenset({".txt", ".md"})

#: Suffixes of tables, and what the table is called; a directory may hold one of these.
TABLES = {
    ".parquet": "parquet",
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".json": "JSON",
    ".csv": "csv",
    ".tsv": "tsv",
}

_MARKUP = "extract its text to a .txt file first"
_CODE = "to train on it anyway, copy it to a .txt file"
_PACKED = "unpack it and pass the directory"
_OTHER_TABLE = "convert it to .parquet or .jsonl"
_DOCUMENT = "save it as plain text (.txt)"

#: Suffixes of what is neither prose nor a table that is read, and what to do about it.
NOT_PROSE = {
    suffix: remedy
    for suffixes, remedy in (
        (".html .htm .xhtml .xml .svg .tex .bib .ipynb .wiki .mediawiki .tei .srt .vtt", _MARKUP),
        (".py .js .ts .css .c .h .cc .cpp .hpp .cs .java .go .rs .rb .php .pl .r .jl .lua .sh .sql .swift .kt", _CODE),
        (".yaml .yml .toml .ini .cfg .conf .lock", _CODE),
        (".zip .tar .tgz .tbz2 .txz .7z .rar .lz4 .lzma .br .z", _PACKED),
        (".arrow .feather .orc .avro .xls .xlsx .ods .db .sqlite .h5 .hdf5 .npy .npz .pkl .pickle .warc", _OTHER_TABLE),
        (".pdf .doc .docx .odt .rtf .epub .mobi .ppt .pptx .odp", _DOCUMENT),
    )
    for suffix in suffixes.split()
}

#: Encodings by the byte-order mark at the beginning; UTF-32 before UTF-16, whose mark it begins with.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

#: Bytes with which a file begins that says what it is.
HEAD = 16


def suffix_of(path: Path) -> str:
    """Return the suffix in lower case, without that of a compression: ``.jsonl`` of ``A.JSONL.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed if its first bytes say that it is compressed.

    Raises:
        InputError: no such file, or a device, a pipe, a directory or a pointer of Git LFS.
        OSError: it cannot be read.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file; write its contents to a file first")
    with path.open("rb") as file:
        head = file.read(max(HEAD, len(LFS_POINTER)))
    check_no_pointer(path, head)
    if head.startswith(b"\x1f\x8b\x08"):
        import gzip

        return cast(BinaryIO, gzip.open(path))
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        import bz2

        return cast(BinaryIO, bz2.open(path))
    if head.startswith(b"\xfd7zXZ\0"):
        import lzma

        return cast(BinaryIO, lzma.open(path))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return cast(BinaryIO, _Zstandard(path))
    return path.open("rb")


class _Zstandard(io.BufferedReader):
    """A file that is decompressed as it is read; ``fileobj`` is the file itself, as of the standard library's."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.fileobj = path.open("rb")
        super().__init__(pyarrow.CompressedInputStream(self.fileobj, "zstd"))

    def close(self) -> None:
        super().close()
        self.fileobj.close()


def encoding_of(head: bytes) -> str:
    """Return the encoding of a text by the first bytes of it: UTF-8, unless a byte-order mark says otherwise."""
    return next((encoding for mark, encoding in BYTE_ORDER_MARKS if head.startswith(mark)), "utf-8")


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a file as text, decompressed and in the encoding of its byte-order mark. Raises as ``open_bytes``."""
    with open_bytes(path) as file:
        encoding = encoding_of(file.read(HEAD))
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, newline=newline)


def bytes_read(text: TextIO) -> int:
    """Return how far a file that ``open_text`` opened is read, in its own bytes; 0 if that cannot be told."""
    buffer = text.buffer
    for name in ("fileobj", "_fp"):  # of the decompressed ones
        buffer = getattr(buffer, name, buffer)
    return buffer.tell() if isinstance(getattr(buffer, "raw", None), io.FileIO) else 0


def read_text(path: Path) -> str:
    """Return the text of a file. Raises InputError if it cannot be read or is not text; the message says why."""
    try:
        with open_bytes(path) as file:
            content = file.read()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from None
    except Exception as error:  # a damaged or truncated archive: each library has errors of its own
        raise InputError(f"{path}: cannot be decompressed ({one_line(error)})") from None
    encoding = encoding_of(content[:HEAD])
    if encoding.startswith("utf-8") and b"\0" in content:
        raise InputError(f"{path}: a binary file, not text")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise not_text(path, encoding, error.start) from None


def not_text(path: Path, encoding: str, position: int) -> InputError:
    """Return the error for a file that is not in its encoding, with the first byte that is not."""
    name = "UTF-8" if encoding.startswith("utf-8") else f"valid {encoding.upper()}, which its first bytes announce"
    return InputError(f"{path}: not {name} (byte {position:,}); convert it, for instance with iconv")


def find_not_text(path: Path) -> InputError:
    """Return the error for a file that ``open_text`` could not decode to its end."""
    position = 0
    try:
        with open_bytes(path) as file:
            encoding = encoding_of(file.read(HEAD))
        decoder = codecs.getincrementaldecoder(encoding)()
        with open_bytes(path) as file:
            while chunk := file.read(CHUNK):
                held = len(decoder.getstate()[0])
                try:
                    decoder.decode(chunk)
                except UnicodeDecodeError as error:
                    return not_text(path, encoding, position - held + error.start)
                position += len(chunk)
        return not_text(path, encoding, position)  # it ends in half a character
    except Exception as error:  # what was decompressed before the damage is no text either
        return InputError(f"{path}: cannot be decompressed ({one_line(error)})")
