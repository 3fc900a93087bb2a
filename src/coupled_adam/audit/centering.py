"""A copy of a model whose output embedding has its mean at the origin, where that changes no prediction."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from zipfile import is_zipfile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coupled_adam.audit import model_directories, tensor_files, word_vectors
from coupled_adam.audit.embedding_files import Embeddings, Origin
from coupled_adam.audit.model_copy import files_to_copy
from coupled_adam.audit.word_vectors import WordFormat, is_word_format
from coupled_adam.errors import InputError
from coupled_adam.files import output_path, write_array, written_whole
from coupled_adam.geometry import Statistics
from coupled_adam.geometry.post_processing import all_but_the_top, isotropy_components, principal_components

__all__ = ["Centered", "WithoutTop", "center", "remove_top"]

if TYPE_CHECKING:
    from gensim.models import KeyedVectors

#: Rows that are held in float64 at a time.
ROWS = 4096

#: Keys of a configuration that cap the logits, and those that cap something else.
CAPS, OTHER_CAPS = re.compile(r"soft_?cap|logits?_cap"), re.compile(r"att(entio)?n|router|mlp")


@dataclass(frozen=True)
class Centered:
    """What ``center`` wrote."""

    path: Path
    """The copy."""
    tensor: str
    """The name of the centered tensor."""
    norm_of_mean: float
    """‖μ‖ of the row μ that was subtracted."""
    rounding: float
    """The largest norm of the rounding error of a row. With a hidden state h, and logits that the model multiplies by c
    (1 for most models), no log-probability changes by more than 2·c·‖h‖ times this."""
    condition: str | None
    """What must hold for the predictions to be unchanged but cannot be checked in the file; None if nothing."""


@dataclass(frozen=True)
class WithoutTop:
    """What ``remove_top`` wrote."""

    path: Path
    """The copy."""
    norm_of_mean: float
    """‖μ‖ of the row μ that was subtracted."""
    components: int
    """How many principal components were removed."""
    share: float
    """Their share of the variance, in [0, 1]."""


def center(embeddings: Embeddings, out: Path) -> Centered:
    """Write a copy of a model whose output embedding is centered: W − μ, with μ the mean of its rows.

    All logits of a position change by the same amount h·μ, which the softmax ignores. The mean is computed in float64
    and the result rounded to the stored dtype. So predictions are unchanged in exact arithmetic; in bfloat16 they
    change as much as by rounding the weights once more. Everything else is copied byte for byte, except that weights in
    other formats than the one that was read are left out.

    Of word vectors, which predict nothing, it is all that a comparison by cosine needs.

    Args:
        embeddings: of the model, from ``coupled_adam.audit.embedding_files.read_embeddings``.
        out: the copy, which must not exist: a directory if the model is one, else a file of the same format
            (.safetensors, .npy, word2vec or GloVe). It is written completely or not at all.

    Returns:
        What was written, and how far rounding can change the predictions.

    Raises:
        InputError: the predictions would change, or might (tied, no output embedding, capped logits, an unknown
            architecture, a head of several parts); the format cannot be written; ``out`` exists; or a link in the
            directory points outside of the model.

    Source: μ-centering of "Output Embedding Centering", arXiv 2601.02031.
    """
    origin = embeddings.origin
    source = origin.path
    if reason := reason_against(embeddings):
        raise InputError(f"{embeddings.name}: not centered: {reason}")
    out = _place_of_copy(out, source)
    if origin.kind == "numpy":
        return _center_array(source, out)
    if is_word_format(origin.kind):
        return _center_words(source, origin.kind, out)
    assert origin.head is not None
    if missing := sorted({path.name for path in origin.files.values() if not path.exists()}):
        raise InputError(
            f"{source}: lacks {', '.join(missing[:3])}; download the whole model (hf download NAME --local-dir DIR)"
        )
    held = {path.name for path in origin.files.values()}
    copied = files_to_copy(source, held) if source.is_dir() else []
    file = origin.files[origin.head]
    weights = tensor_files.safetensors_in({origin.head: file}).stored(origin.head)
    mean = _mean(weights, embeddings.name)
    with written_whole(out) as aside:
        if source.is_dir():
            _copy(copied, aside)
        else:
            shutil.copyfile(source, aside)
        rounding = _overwrite(aside / file.name if source.is_dir() else aside, origin.head, weights, mean)
    condition = None
    if origin.config is None:
        condition = "no config.json next to the file: the model must not cap its logits (soft-capping)"
    return Centered(out, origin.head, mean.norm().item(), rounding, condition)


def remove_top(embeddings: Embeddings, out: Path) -> WithoutTop:
    """Write a copy of word vectors, or of an array, without their mean and first ⌈H/100⌉ principal components.

    It changes what a model predicts, so it is for vectors that are compared, not for the embeddings inside of a model.

    Args:
        embeddings: from ``coupled_adam.audit.embedding_files.read_embeddings``, of word2vec, GloVe or .npy.
        out: the copy, which must not exist, with the suffix of the original; written completely or not at all.

    Returns:
        What was written and removed.

    Raises:
        InputError: the embeddings are those of a model, or in a format that cannot be written; they are not finite; or
            ``out`` exists.

    Source: Mu & Viswanath 2018, "All-but-the-Top", algorithm 1.

    Examples:
        ```python
        print(remove_top(read_embeddings("glove.6B.300d.txt"), Path("glove-300d-post-processed.txt")).components)
        ```
    """
    origin, source = embeddings.origin, embeddings.origin.path
    if not (is_word_format(origin.kind) or origin.kind == "numpy"):
        raise InputError(
            f"{embeddings.name}: All-but-the-Top is for word vectors and arrays; in a model it would change predictions"
        )
    if reason := reason_against(embeddings):
        raise InputError(f"{embeddings.name}: not written: {reason}")
    out = _place_of_copy(out, source)
    mean, shared = _mean(embeddings.input, embeddings.name), Statistics(embeddings.input)
    top = principal_components(shared, isotropy_components(shared.shape[1]))
    without = all_but_the_top(shared, top)
    before = after = 0.0

    def made(rows: NDArray[Any]) -> NDArray[np.float64]:
        nonlocal before, after
        new: NDArray[np.float64] = without(rows.astype(np.float64))
        before += float(((rows - mean.numpy()) ** 2).sum())
        after += float((new**2).sum())
        return new

    if origin.kind == "numpy":
        stored = np.load(source, allow_pickle=False, mmap_mode="r")
        result = np.empty_like(stored)
        for start in range(0, len(stored), ROWS):
            result[start : start + ROWS] = made(stored[start : start + ROWS])
        with written_whole(out) as aside:
            write_array(aside, result)
    else:
        _rewrite_words(word_vectors.read_vectors(source, origin.kind)[0], origin.kind, out, made)
    return WithoutTop(out, mean.norm().item(), top.shape[1], 1 - after / before if before > 0 else 0.0)


def _place_of_copy(out: Path, source: Path) -> Path:
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: already exists; choose another place for the copy")
    if source.is_file() and out.suffix != source.suffix:
        raise InputError(f"{out}: a copy of a {source.suffix} file needs the suffix {source.suffix}")
    return output_path(out, source)


#: Why a model of this kind is not written, and what to do.
UNWRITABLE = {
    "fastText": "the vectors of n-grams in a model of fastText cannot be changed with those of words; save the latter "
    "as word2vec text with gensim (load_facebook_vectors(FILE).save_word2vec_format('words.vec')), and center that",
    "gguf": "a GGUF file cannot be written without loss; center the model it was made from, then convert that",
    "run": "a run must be exported first (coupled-adam export)",
    "pickle": "pickle files cannot be written; convert the model to safetensors",
}


def reason_against(embeddings: Embeddings) -> str | None:
    """Return why predictions would change, or cannot be told not to; None if they stay."""
    origin = embeddings.origin
    if origin.kind in UNWRITABLE:
        return UNWRITABLE[origin.kind]
    if is_word_format(origin.kind):
        return None
    if origin.kind == "numpy":
        return ".npz files cannot be written; save the output embedding as .npy" if is_zipfile(origin.path) else None
    if embeddings.tied:
        return "its input and output embeddings are one matrix, so its inputs would change too"
    if embeddings.lacks_output:
        return " ".join(embeddings.notes)
    if origin.path.is_file() and len(set(origin.files.values())) > 1:
        return "the file is one part of the model; pass the directory"
    if embeddings.output is None or origin.head is None:
        return "it has no output embedding"
    prefix = origin.head.removesuffix("weight")
    if parts := [n for n in origin.files if n.startswith(prefix) and n not in (origin.head, prefix + "bias")]:
        return f"its head is more than one matrix ({parts[0]}), so not all scores would shift by the same amount"
    return None if origin.config is None else _reason_in_config(origin, origin.config)


def _reason_in_config(origin: Origin, stated: dict[str, Any]) -> str | None:
    config = model_directories.full_config(origin.path if origin.path.is_dir() else origin.path.parent)
    if config is None:
        kind = stated.get("model_type")
        return f"transformers does not know the model type {kind!r}, so it is unknown how its logits are computed"
    for key, value in _caps(config):
        return f"it caps its logits ({key} = {value}), so a shift would change predictions"
    return None


def _caps(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _caps(value)
        elif value and CAPS.search(str(key)) and not OTHER_CAPS.search(str(key)):
            yield key, value


def _center_array(source: Path, out: Path) -> Centered:
    stored = np.load(source, allow_pickle=False, mmap_mode="r")
    weights = tensor_files.arrays_in(source).stored("embedding")
    mean = _mean(weights, source.name)
    result, rounding = np.empty_like(stored), 0.0
    for start, rows, error in _centered(weights, mean):
        result[start : start + len(rows)] = rows.numpy()
        rounding = max(rounding, error)
    with written_whole(out) as aside:
        write_array(aside, result)
    condition = "it must be the output embedding of an untied model that does not cap its logits"
    return Centered(out, "embedding", mean.norm().item(), rounding, condition)


def _center_words(source: Path, kind: WordFormat, out: Path) -> Centered:
    vectors, _ = word_vectors.read_vectors(source, kind)
    mean, rounding = _mean(torch.from_numpy(vectors.vectors), source.name), 0.0

    def made(rows: NDArray[Any]) -> NDArray[np.float64]:
        nonlocal rounding
        exact: NDArray[np.float64] = rows.astype(np.float64) - mean.numpy()
        rounding = max(rounding, float(np.linalg.norm(exact.astype(np.float32) - exact, axis=1).max()))
        return exact

    _rewrite_words(vectors, kind, out, made)
    return Centered(out, "vectors", mean.norm().item(), rounding, None)


def _rewrite_words(
    vectors: "KeyedVectors", kind: WordFormat, out: Path, made: Callable[[NDArray[Any]], NDArray[np.float64]]
) -> None:
    """Write words with other vectors, which replace the given ones some rows at a time."""
    for start in range(0, len(vectors), ROWS):
        vectors.vectors[start : start + ROWS] = made(vectors.vectors[start : start + ROWS])
    with written_whole(out) as aside:
        word_vectors.write_vectors(vectors, aside, kind)


def _mean(weights: Tensor, name: str) -> Tensor:
    """Compute the mean row, float64 (H,)."""
    mean = torch.zeros(weights.shape[1], dtype=torch.float64)
    for start in range(0, len(weights), ROWS):
        mean += weights[start : start + ROWS].double().sum(0)
    mean /= len(weights)
    if not mean.isfinite().all():
        raise InputError(f"{name}: not centered: its output embedding contains non-finite values")
    return mean


def _centered(weights: Tensor, mean: Tensor) -> Iterator[tuple[int, Tensor, float]]:
    """Yield W − μ in the type of W, some rows at a time: index of the first, the rows, largest rounding error."""
    for start in range(0, len(weights), ROWS):
        exact = weights[start : start + ROWS].double() - mean
        rows = exact.to(weights.dtype)
        yield start, rows, (rows.double() - exact).norm(dim=1).max().item()


def _copy(files: Sequence[tuple[Path, Path]], target: Path) -> None:
    """Copy contents without their permissions: what the cache of the hub holds is not to be written to."""
    for name, content in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(content, target / name, follow_symlinks=False)


def _overwrite(path: Path, name: str, weights: Tensor, mean: Tensor) -> float:
    """Put W − μ in the place of a tensor of a safetensors file. Returns the largest error of rounding of a row.

    In place, so that the order, the metadata and all other tensors stay as they are, and none of them is read.
    """
    rounding = 0.0
    with path.open("r+b") as file:
        begin = _place(file, name)
        file.seek(begin)
        for _, rows, error in _centered(weights, mean):
            file.write(rows.contiguous().view(torch.uint8).numpy().tobytes())
            rounding = max(rounding, error)
    return rounding


def _place(file: IO[bytes], name: str) -> int:
    """Find where the bytes of a tensor begin: after the header's length (8 bytes), the header, and its offset there."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    return 8 + length + int(header[name]["data_offsets"][0])
