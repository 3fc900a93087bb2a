"""Which files the copy of a model directory consists of. Links do not lead out of the model."""

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from coupled_adam.errors import InputError

#: Weights in other forms, which would stay as they were, and so are not copied.
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".bin.index.json")

REMEDY = "delete it, or replace it with the file itself"


def files_to_copy(source: Path, weights: Collection[str] | None) -> list[tuple[Path, Path]]:
    """List what a copy of a model consists of: each file's name relative to ``source``, and where its content lies.

    Hidden files and weights in other forms than those named are left out. A link counts as the file that it points at,
    if that lies in the model, or among the blobs of the cache of the hub that the model is a snapshot of.

    Args:
        source: directory of the model.
        weights: the files in ``source`` that hold the weights, relative to it; None to leave out nothing.

    Raises:
        InputError: a link points at a directory, at nothing, at a hidden file, or out of the model; or there is
            something that is neither file nor directory, or that cannot be read.
    """
    root = source.resolve()
    return [(name, _content(source / name, root)) for name in _names(source, Path(), weights)]


def _names(source: Path, below: Path, weights: Collection[str] | None) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(source / below), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{source / below}: not copied: {error.strerror}") from None
    for entry in entries:
        name = below / entry.name
        if entry.name.startswith("."):
            continue
        if weights is not None and entry.name.endswith(OTHER_WEIGHTS) and name.as_posix() not in weights:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _names(source, name, weights)
        else:
            yield name


def _content(path: Path, root: Path) -> Path:
    """Return the regular file that is at a path, or that a link there points at."""
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:  # a loop of links is the latter up to Python 3.12
        reason = "a link loop" if isinstance(error, RuntimeError) else "a broken link or a link loop"
        raise InputError(f"{path}: not copied: {reason}; {REMEDY}") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: not copied: a link to a directory ({real}); {REMEDY}")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not copied: neither a file nor a directory; {REMEDY}")
    if path.is_symlink() and not _belongs(real, root):
        raise InputError(f"{path}: not copied: a link to a file outside the model ({real}); {REMEDY}")
    if not os.access(real, os.R_OK):
        raise InputError(f"{path}: not copied: no permission to read it")
    return real


def _belongs(real: Path, root: Path) -> bool:
    """Return whether the target of a link is part of a model: in its directory and not hidden, or a blob of its cache.

    Git keeps the address of a clone in .git/config, with the token where there is one.
    """
    if real.is_relative_to(root):
        return not any(part.startswith(".") for part in real.relative_to(root).parts)
    # models--x--y/snapshots/REVISION. ``real`` has no links left, so a "blobs" that is one itself leads nowhere.
    return root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
