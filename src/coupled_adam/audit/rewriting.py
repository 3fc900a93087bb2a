"""Copies of models, arrays and word vectors with other rows, each in the format of the original."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from coupled_adam.audit import spacy_vectors, static_embeddings, tensor_files, word_vectors
from coupled_adam.audit.embedding_files import Origin
from coupled_adam.audit.model_copy import files_to_copy
from coupled_adam.audit.word_vectors import is_word_format
from coupled_adam.errors import InputError
from coupled_adam.files import write_array, written_whole

#: Rows that are held in float64 at a time.
ROWS = 4096

Made = Callable[[Tensor], Tensor]
"""What becomes of some rows, float64 (n, H) → float64 (n, H)."""


def write_copy(origin: Origin, out: Path, made: Made) -> float:
    """Write a copy in which each row r is ``made(r)``, rounded to the stored dtype. Nothing else changes.

    Args:
        origin: of the output embedding, if it has a ``head``; else of the vectors.
        out: the copy, which must not exist; written completely or not at all.
        made: as above.

    Returns:
        The largest norm of the rounding error of a row.

    Raises:
        InputError: parts of the model are missing, or a link in its directory points out of it.
    """
    rewritten = _Rewritten(made)
    if origin.kind == "numpy":
        _write_array(origin.path, out, rewritten)
    elif is_word_format(origin.kind):
        vectors, _ = word_vectors.read_vectors(origin.path, origin.kind)
        for start, rows in rewritten(torch.from_numpy(vectors.vectors)):
            vectors.vectors[start : start + len(rows)] = rows.numpy()
        with written_whole(out) as aside:
            word_vectors.write_vectors(vectors, aside, origin.kind)
    elif origin.kind == "spaCy":
        _write_vocabulary(origin, out, rewritten)
    else:
        _write_model(origin, out, rewritten)
    return rewritten.rounding


class _Rewritten:
    """Rows as they become, some at a time: index of the first, and the rows in their dtype."""

    def __init__(self, made: Made) -> None:
        self.made, self.rounding = made, 0.0

    def __call__(self, rows: Tensor, weights: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(rows), ROWS):
            wide = rows[start : start + ROWS].double()
            if weights is not None:
                wide = wide * weights[start : start + ROWS, None].double()
            exact = self.made(wide)
            rounded = exact.to(rows.dtype)
            self.rounding = max(self.rounding, (rounded.double() - exact).norm(dim=1).max().item())
            yield start, rounded


def _write_array(source: Path, out: Path, rewritten: _Rewritten) -> None:
    result = np.empty_like(np.load(source, allow_pickle=False, mmap_mode="r"))
    for start, rows in rewritten(tensor_files.arrays_in(source).stored("embedding")):
        result[start : start + len(rows)] = rows.numpy()
    with written_whole(out) as aside:
        write_array(aside, result)


def _write_vocabulary(origin: Origin, out: Path, rewritten: _Rewritten) -> None:
    ((name, file),) = origin.files.items()
    found = spacy_vectors.read_vocabulary(file.parent)
    all_rows = found.tensors.stored(name)
    for start, rows in rewritten(all_rows[found.rows]):
        all_rows[found.rows[start : start + len(rows)]] = rows
    copied = files_to_copy(origin.path, None)
    with written_whole(out) as aside:
        _copy(copied, aside)
        write_array(aside / file.relative_to(origin.path), all_rows.numpy())


def _write_model(origin: Origin, out: Path, rewritten: _Rewritten) -> None:
    source, name = origin.path, origin.head or origin.static
    assert name is not None
    if missing := sorted({path.name for path in origin.files.values() if not path.exists()}):
        raise InputError(
            f"{source}: lacks {', '.join(missing[:3])}; download the whole model (hf download NAME --local-dir DIR)"
        )
    file, whole = origin.files[name], source.is_dir()
    held = {path.relative_to(source).as_posix() for path in origin.files.values()} if whole else set()
    copied = files_to_copy(source, held) if whole else []
    tensors = tensor_files.safetensors_in({n: path for n, path in origin.files.items() if path == file})
    rows, weights = tensors.stored(name), None
    if origin.static:
        weights = static_embeddings.weights_of_tokens(tensors, name)
    with written_whole(out) as aside:
        if whole:
            _copy(copied, aside)
        else:
            shutil.copyfile(source, aside)
        place = aside / file.relative_to(source) if whole else aside
        _overwrite(place, name, (rows for _, rows in rewritten(rows, weights)))
        if weights is not None:  # they are in the rows now
            _overwrite(place, static_embeddings.WEIGHTS, [torch.ones_like(weights)])


def _copy(files: Sequence[tuple[Path, Path]], target: Path) -> None:
    """Copy contents without their permissions: what the cache of the hub holds is not to be written to."""
    for name, content in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(content, target / name, follow_symlinks=False)


def _overwrite(path: Path, name: str, pieces: Iterable[Tensor]) -> None:
    """Put rows in the place of those of a tensor of a safetensors file.

    In place, so that the order, the metadata and all other tensors stay as they are, and none of them is read.
    """
    with path.open("r+b") as file:
        file.seek(_place(file, name))
        for rows in pieces:
            file.write(rows.contiguous().view(torch.uint8).numpy().tobytes())


def _place(file: IO[bytes], name: str) -> int:
    """Find where the bytes of a tensor begin: after the header's length (8 bytes), the header, and its offset there."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    return 8 + length + int(header[name]["data_offsets"][0])
