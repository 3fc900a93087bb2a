"""Files of text, and which files of a directory are read."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from coupled_adam.errors import InputError, printable
from coupled_adam.lm.opening import COMPRESSED, NOT_PROSE, TABLES, TEXT, read_text, suffix_of
from coupled_adam.progress import say

#: Files that a message names at most.
NAMED = 5

#: Files beside the tables of a dataset that describe it.
_DESCRIPTIONS = re.compile(r"(readme|licen[cs]e|changelog|notice|citation|dataset_?card)([^a-z].*)?", re.IGNORECASE)
_METADATA = frozenset({"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})

#: How files and directories of a split are called, as the library ``datasets`` has it.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Found:
    """What is read of a path, and in words what is not.

    ``kind`` is ``"text"``, or that of a table, see ``TABLES``.
    """

    kind: str
    files: list[Path]
    left_out: str = ""


def find_files(root: Path) -> Found:
    """Return the files of a source: ``root`` itself, or those below it.

    Of a directory, names that begin with a dot are skipped; of files that name splits, those of the training split are
    read.

    Raises:
        InputError: there is nothing to read, it is of several kinds, or a single file is of none.
    """
    if not root.is_dir():
        return Found(_kind(root), [root])
    by_kind: dict[str, list[Path]] = {}
    others: Counter[str] = Counter()
    for path in _below(root):
        suffix = suffix_of(path)
        if suffix in TEXT:
            by_kind.setdefault("text", []).append(path)
        elif suffix in TABLES and path.name not in _METADATA:
            by_kind.setdefault(TABLES[suffix], []).append(path)
        else:
            others[suffix or "without a suffix"] += 1
    if len(by_kind) > 1 and "text" in by_kind and all(_DESCRIPTIONS.match(path.name) for path in by_kind["text"]):
        others.update(suffix_of(path) for path in by_kind.pop("text"))
    if len(by_kind) > 1:
        held = ", ".join(
            f"{len(files):,} {kind} ({files[0].name}{', …' if len(files) > 1 else ''})"
            for kind, files in sorted(by_kind.items())
        )
        raise InputError(f"{root}: contains files of several kinds: {held}; pass a directory or a file of one kind")
    if not by_kind:
        held = f"; it contains {_listed(others)}" if others else ""
        raise InputError(f"{root}: no .txt or .md files and no tables ({', '.join(TABLES)}) in this directory{held}")
    ((kind, files),) = by_kind.items()
    if kind != "text" and len(configurations := _configurations(root / "README.md")) > 1:
        raise InputError(
            f"{root}: a dataset with the configurations "
            f"{', '.join(configurations[:NAMED])}{', …' if len(configurations) > NAMED else ''}; pass the directory "
            "or the file of one"
        )
    kept, splits = _training_split(root, kind, files)
    return Found(kind, kept, ", ".join(_listed(left) for left in (splits, others) if left))


def _kind(file: Path) -> str:
    """Kind of a single file. Raises InputError if it is known to be neither prose nor a table."""
    suffix = suffix_of(file)
    if suffix in NOT_PROSE and file.exists():
        raise InputError(f"{file}: {suffix} files are not read as text; {NOT_PROSE[suffix]}")
    return TABLES.get(suffix, "text")


def _below(root: Path) -> Iterator[Path]:
    """Files below a directory in the order of their names, without those whose name begins with a dot."""
    found = []
    for directory, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [Path(directory, name) for name in names if not name.startswith(".")]
    yield from sorted(found)


def _configurations(card: Path) -> list[str]:
    """Names of the configurations that the card of a dataset of the hub declares."""
    if not card.is_file():
        return []
    _, _, after = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    found = re.findall(r"^[ -]*config_name: *['\"]?([^'\"\n]+)", after.partition("\n---")[0], re.MULTILINE)
    return sorted({name.strip() for name in found})


def _training_split(root: Path, kind: str, files: list[Path]) -> tuple[list[Path], Counter[str]]:
    """Files of the training split, if names say which those are, and how many were left out, by split."""
    splits = {path: _split(path.relative_to(root), strict=kind == "text") for path in files}
    named = set(splits.values()) - {None}
    # Texts are called all sorts of things: only a directory that is clearly divided is taken for one.
    if not named or (kind == "text" and not ("train" in named and len(named) > 1)):
        return files, Counter()
    kept = [path for path in files if splits[path] == "train"]
    if not kept:
        raise InputError(
            f"{root}: its files belong to the split {' and '.join(sorted(filter(None, named)))}, none to the split "
            "train; pass a file, or rename them to train on them"
        )
    return kept, Counter(f"split {split}" if split else "no split" for split in splits.values() if split != "train")


def _split(name: PurePath, strict: bool) -> str | None:
    """Split of a file by its path: of a directory that names one, else of its own name.

    As in ``datasets`` the word may stand anywhere between separators; ``strict``: alone, or before numbers.
    """
    sep = r"[-._ 0-9]"
    numbers = r"(?:[-._]?\d+|-of)*"
    own = re.sub(rf"\.[^.]*?({'|'.join(map(re.escape, COMPRESSED))})?$", "", name.name) if strict else name.name
    for split, words in _SPLITS.items():
        word = f"(?:{'|'.join(words)})"
        if any(
            re.fullmatch(word if strict else rf"(?:.*{sep})?{word}(?:{sep}.*)?", part, re.IGNORECASE)
            for part in name.parent.parts
        ):
            return split
    for split, words in _SPLITS.items():
        word = f"(?:{'|'.join(words)})"
        if re.fullmatch(rf"(?:.*{sep})?{word}{numbers if strict else f'{sep}.*'}", own, re.IGNORECASE):
            return split
    return None


def _listed(counts: Counter[str]) -> str:
    shown = ", ".join(f"{what} ({count:,})" for what, count in sorted(counts.items())[:NAMED])
    return shown + (", …" if len(counts) > NAMED else "")


class TextFiles:
    """A text file, whose paragraphs separated by blank lines are the documents, or a directory, whose files are.

    Text is UTF-8, or as a byte-order mark says; it may be compressed with gzip, Zstandard, bzip2 or xz.

    Args:
        path: the file or directory.

    Examples:
        >>> TextFiles(Path("text.txt")).name
        'text.txt'
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = printable(str(path))
        self.paths = (path,)
        self._texts: list[tuple[str, str]] | None = None
        self._characters = 0

    def _read(self) -> list[tuple[str, str]]:
        if self._texts is None:
            found = find_files(self.path)
            if found.kind != "text":
                raise InputError(f"{self.path}: contains tables, not text")
            if found.left_out:
                say(f"{self.path}: left out: {found.left_out}")
            self._texts = _texts(self.path, found.files)
        return self._texts

    def fingerprint(self) -> str:
        """Digest of the names and contents of the files."""
        digest = hashlib.sha256()
        for name, text in self._read():
            for part in (name, text):
                encoded = part.encode("utf-8", "surrogateescape")
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()

    def documents(self) -> list[str]:
        """Return the files of a directory, or the paragraphs of a file (its lines, if there is but one paragraph)."""
        texts = [text for _, text in self._read()]
        self._characters = sum(map(len, texts))
        if len(texts) > 1:
            return [text.strip() for text in texts]
        paragraphs = [p.strip() for p in re.split(r"\n\s*\n", texts[0]) if p.strip()]
        return paragraphs if len(paragraphs) > 1 else [line for line in texts[0].splitlines() if line.strip()]

    def share(self, characters: int) -> float | None:
        """Return what share of the text ``characters`` of it are, from 0 to 1; None if it is not known yet."""
        return characters / self._characters if self._characters else None


def _texts(root: Path, files: list[Path]) -> list[tuple[str, str]]:
    """Names and texts of files. Raises InputError that names all files that cannot be read."""
    texts, empty, bad = [], [], []
    for path in files:
        try:
            text = read_text(path)
        except InputError as error:
            bad.append(str(error))
        else:
            if text.strip():
                texts.append((str(path.relative_to(root)), text))
            else:
                empty.append(path)
    if bad:
        more = f"; and {len(bad) - NAMED:,} more files" if len(bad) > NAMED else ""
        raise InputError("; ".join(bad[:NAMED]) + more)
    if not texts:
        raise InputError(f"{root}: the file is empty" if files == [root] else f"{root}: all text files are empty")
    if empty:
        names = ", ".join(path.name for path in empty[:NAMED]) + (", …" if len(empty) > NAMED else "")
        say(f"{root}: {len(empty):,} empty files skipped ({names})")
    return texts
