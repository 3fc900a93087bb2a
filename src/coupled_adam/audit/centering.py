"""A copy of a model whose output embedding has its mean at the origin, where that changes no prediction."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from coupled_adam.audit import gensim_files, model_directories, spacy_vectors, static_embeddings
from coupled_adam.audit.embedding_files import Embeddings, Origin
from coupled_adam.audit.rewriting import ROWS, write_copy
from coupled_adam.audit.tensor_files import safetensors_in
from coupled_adam.audit.word_vectors import is_word_format
from coupled_adam.errors import InputError
from coupled_adam.files import output_path
from coupled_adam.geometry import Statistics
from coupled_adam.geometry.post_processing import all_but_the_top, isotropy_components, principal_components

__all__ = ["Centered", "WithoutTop", "center", "remove_top"]

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

    Word vectors, and static embeddings (model2vec, sentence-transformers), predict nothing: subtracting their mean is
    what a comparison by cosine needs. The mean of static embeddings is subtracted from the vector of every text too.

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
    matrix = embeddings.input if embeddings.output is None else embeddings.output
    mean = _mean(matrix, embeddings.name)
    rounding = write_copy(origin, out, lambda rows: rows - mean)
    name = origin.head or origin.static or ("embedding" if origin.kind == "numpy" else "vectors")
    return Centered(out, name, mean.norm().item(), rounding, _condition(origin))


def _condition(origin: Origin) -> str | None:
    if origin.kind == "numpy":
        return "it must be the output embedding of an untied model that does not cap its logits"
    if origin.head is not None and origin.config is None:
        return "no config.json next to the file: the model must not cap its logits (soft-capping)"
    return None


def remove_top(embeddings: Embeddings, out: Path) -> WithoutTop:
    """Write a copy of word vectors, static embeddings or an array without mean and first ⌈H/100⌉ principal components.

    It changes what a model predicts, so it is for vectors that are compared, not for the embeddings inside of a model.

    Args:
        embeddings: from ``coupled_adam.audit.embedding_files.read_embeddings``, of word2vec, GloVe, model2vec, static
            modules of sentence-transformers, or .npy.
        out: the copy, which must not exist: a directory if the model is one, else a file with the suffix of the
            original. It is written completely or not at all.

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
    if not (is_word_format(origin.kind) or origin.kind in ("numpy", "spaCy") or origin.static):
        raise InputError(
            f"{embeddings.name}: All-but-the-Top is for word vectors, static embeddings and arrays; in a model it "
            "would change predictions"
        )
    if reason := reason_against(embeddings):
        raise InputError(f"{embeddings.name}: not written: {reason}")
    out = _place_of_copy(out, source)
    mean, shared = _mean(embeddings.input, embeddings.name), Statistics(embeddings.input)
    top = principal_components(shared, isotropy_components(shared.shape[1]))
    without = all_but_the_top(shared, top)
    before = after = 0.0

    def made(rows: Tensor) -> Tensor:
        nonlocal before, after
        new = torch.from_numpy(without(rows.numpy()))
        before += float(((rows - mean) ** 2).sum())
        after += float((new**2).sum())
        return new

    write_copy(origin, out, made)
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
    "onnx": "an ONNX file cannot be written; center the model it was exported from, then export that",
    "run": "a run must be exported first (coupled-adam export)",
    "pickle": "pickle files cannot be written; convert the model to safetensors",
}


def reason_against(embeddings: Embeddings) -> str | None:
    """Return why predictions would change, or cannot be told not to; None if they stay."""
    origin = embeddings.origin
    if origin.kind in UNWRITABLE:
        return UNWRITABLE[origin.kind]
    if origin.kind == "gensim":
        return gensim_files.reason_against_writing(origin.path)
    if origin.kind == "spaCy":
        return spacy_vectors.reason_against_writing(origin.path)
    if is_word_format(origin.kind):
        return None
    if origin.kind == "numpy":
        return ".npz files cannot be written; save the output embedding as .npy" if is_zipfile(origin.path) else None
    if origin.static is not None:
        return _reason_in_static(origin, origin.static)
    if embeddings.tied:
        return "its input and output embeddings are one matrix, so its inputs would change too"
    if embeddings.lacks_output:
        return " ".join(embeddings.notes)
    if origin.path.is_file() and len(set(origin.files.values())) > 1:
        return "the file is one part of the model; pass the directory"
    if origin.head in origin.merged:
        return "its output embedding is a base and an adapter; merge them first (merge_and_unload)"
    if embeddings.output is None or origin.head is None:
        return "it has no output embedding"
    prefix = origin.head.removesuffix("weight")
    if parts := [n for n in origin.files if n.startswith(prefix) and n not in (origin.head, prefix + "bias")]:
        return f"its head is more than one matrix ({parts[0]}), so not all scores would shift by the same amount"
    return None if origin.config is None else _reason_in_config(origin, origin.config)


def _reason_in_static(origin: Origin, name: str) -> str | None:
    file = origin.files[name]
    tensors = safetensors_in({n: path for n, path in origin.files.items() if path == file})
    return static_embeddings.reason_against_writing(tensors, name)


def _reason_in_config(origin: Origin, stated: dict[str, Any]) -> str | None:
    config = model_directories.full_config(next(iter(origin.files.values())).parent)
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


def _mean(weights: Tensor, name: str) -> Tensor:
    """Compute the mean row, float64 (H,)."""
    mean = torch.zeros(weights.shape[1], dtype=torch.float64)
    for start in range(0, len(weights), ROWS):
        mean += weights[start : start + ROWS].double().sum(0)
    mean /= len(weights)
    if not mean.isfinite().all():
        raise InputError(f"{name}: not centered: its embedding contains non-finite values")
    return mean
