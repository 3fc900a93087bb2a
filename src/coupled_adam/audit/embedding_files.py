"""The embeddings of a model, from whatever file or directory it comes in. The rest of the model is not read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coupled_adam.audit import gguf, model_directories, tensor_files
from coupled_adam.audit.embedding_names import find_input, find_output, none_found, only_matrix
from coupled_adam.audit.tensor_files import Tensors
from coupled_adam.errors import InputError
from coupled_adam.lm.checkpoint import load_tensors
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.run import open_checkpoint, open_run
from coupled_adam.lm.words import Words
from coupled_adam.progress import warn

Kind = Literal["safetensors", "pickle", "gguf", "numpy", "run"]

PICKLES, ARRAYS = (".pt", ".pth", ".bin"), (".npy", ".npz")

#: The name of a model on the Hugging Face hub.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

#: Names of files and directories that say nothing about the model.
BARE_NAMES = ("model", "pytorch_model", "embedding", "embeddings", "weights", "checkpoint", "hf")


@dataclass(frozen=True)
class Origin:
    """Where embeddings were read from; what ``coupled_adam.audit.centering.center`` needs to know."""

    kind: Kind
    path: Path
    """The file, or the directory of the model or run."""
    head: str | None = None
    """The name of the output embedding's tensor, if there is one of its own."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """The file of each tensor of the model, by the tensor's name."""
    config: dict[str, Any] | None = None
    """config.json, where the model has one."""


@dataclass(frozen=True, eq=False)
class Embeddings:
    """The embeddings of a model, and what its tokens are."""

    name: str
    """Display name."""
    origin: Origin
    input: Tensor
    """The token embedding, float32 (V, H), on the CPU. Values are as stored, also where they are not finite."""
    output: Tensor | None = None
    """The output embedding, float32 (V', H), where it is a matrix of its own. V' may differ from V by padding."""
    tied: bool | None = None
    """Whether the output embedding is the input embedding. None: it cannot be told, as for a lone array. False and no
    ``output``: the model has no output embedding (a sentence encoder), or its file does not hold it."""
    words: Words | None = None
    """The words and tokens of its tokenizer; None where there is none at hand."""
    unigram_counts: NDArray[np.int64] | None = None
    """How often each token occurs in the training text, (V,); known of our own runs."""


def read_embeddings(model: str, *, tensor: str | None = None, data: Path | None = None) -> Embeddings:
    """Read the embeddings of a model; of a large one no other tensors, and no other files.

    Args:
        model: a Hugging Face model directory, the name of a model on the hub, a .safetensors, .gguf, .npy, .npz, .pt,
            .pth or .bin file, or the directory of one of our runs, of which the last checkpoint counts.
        tensor: the name of the tensor to read instead of what is found by name. It comes as ``input``, whichever it is.
        data: the corpus of a run, which has its tokenizer and counts; None for where it was during training.

    Raises:
        InputError: there is no such model, it is damaged or of another kind, holds no embedding, is a file that could
            run code, or ``data`` is not the text of the run.
        ImportError: a package that its format needs is not installed; the message names the extra.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "experiment.toml").exists():
            return _read_run(path, tensor, data)
        return _read_directory(path, _short_name(path), tensor)
    if path.is_file():
        return _read_file(path, tensor)
    suffixes = (".safetensors", ".gguf", *ARRAYS, *PICKLES)
    if path.suffix in suffixes or not HUB_NAME.fullmatch(model):
        raise InputError(f"{model}: no such file or directory")
    return _read_directory(model_directories.from_hub(model), model, tensor)


def _read_directory(directory: Path, name: str, tensor: str | None) -> Embeddings:
    tensors = model_directories.weights_in(directory)
    return _embeddings(tensors, name, _kind(tensors), directory, directory, tensor)


def _read_file(path: Path, tensor: str | None) -> Embeddings:
    suffix, name = path.suffix.lower(), _short_name(path)
    with path.open("rb") as file:
        beginning = file.read(4)
    if suffix == ".gguf" or beginning == b"GGUF":  # programs that manage models name the file after a digest
        return _read_gguf(path, name, tensor)
    if suffix == ".safetensors":
        tensors = tensor_files.safetensors_in(dict.fromkeys(tensor_files.safetensors_names(path), path))
        return _embeddings(tensors, name, "safetensors", path, path.parent, tensor)
    if suffix in PICKLES:
        return _embeddings(tensor_files.pickle_in(path), name, "pickle", path, path.parent, tensor)
    if suffix in ARRAYS:
        tensors = tensor_files.arrays_in(path)
        # The error of a lone array is about its shape, not about its name.
        lone = next(iter(tensors.files)) if len(tensors.files) == 1 else None
        matrix = _matrix(tensors, tensor or find_input(tensors) or only_matrix(tensors) or lone, path)
        return Embeddings(name, Origin("numpy", path, None, tensors.files), matrix)
    raise InputError(f"{path}: not a kind of file that is read; those are .safetensors, .gguf, .npy, .npz, .pt, .bin")


def _embeddings(tensors: Tensors, name: str, kind: Kind, path: Path, directory: Path, tensor: str | None) -> Embeddings:
    """Read those of a model whose configuration and tokenizer, if any, lie in ``directory``."""
    config, words = model_directories.read_config(directory), model_directories.words_in(directory)
    if tensor is not None:
        matrix = _matrix(tensors, tensor, path)
        return Embeddings(name, Origin(kind, path, None, tensors.files, config), matrix, words=words)
    said = None if config is None else model_directories.says_tied(directory, config)
    found = find_input(tensors) or (find_output(tensors) if said else None) or _lone(tensors)
    matrix = _matrix(tensors, found, path)
    head = find_output(tensors, *matrix.shape)
    output = tensors.matrix(head) if head is not None and head != found else None
    tied = _tied(said, head, matrix, output, config)
    if tied:
        head = output = None
    return Embeddings(name, Origin(kind, path, head, tensors.files, config), matrix, output, tied, words)


def _tied(
    said: bool | None, head: str | None, matrix: Tensor, output: Tensor | None, config: dict[str, Any] | None
) -> bool | None:
    """Decide whether a model is tied, from what its configuration says and what its files hold."""
    if output is not None:
        # Files of tied models may hold the matrix twice. Where two differ transformers does not tie them either,
        # whatever the configuration says.
        return said is not False and torch.equal(output, matrix)
    if config is None:
        return None
    return False if head is None and model_directories.has_no_head(config) else said


def _read_gguf(path: Path, name: str, tensor: str | None) -> Embeddings:
    tensors, metadata = gguf.tensors_in(path)
    words = gguf.words_in(metadata)
    matrix = _matrix(tensors, tensor or find_input(tensors), path)
    origin = Origin("gguf", path, None, tensors.files)
    if tensor is not None:
        return Embeddings(name, origin, matrix, words=words)
    output = tensors.matrix("output.weight") if "output.weight" in tensors.files else None
    # Without a matrix of its own llama.cpp takes the token embedding, but encoders, which pool, predict nothing.
    tied = output is None and not gguf.is_encoder(metadata)
    return Embeddings(name, origin, matrix, output, tied, words)


def _read_run(directory: Path, tensor: str | None, data: Path | None) -> Embeddings:
    corpus: Corpus | None
    try:
        run = open_run(directory, data)
        experiment, checkpoint, corpus = run.experiment, run.checkpoint, run.corpus
    except InputError as error:
        if data is not None:
            raise
        experiment, checkpoint = open_checkpoint(directory)  # raises the same error, if this is what is wrong
        warn(f"{error}. Without its corpus, words and frequencies are left out")
        corpus = None
    tied = experiment.model.tied
    names = [tensor or "token_embedding.weight"] + (["head.weight"] if tensor is None and not tied else [])
    read = load_tensors(checkpoint, [f"model.{name}" for name in names])
    matrices = [matrix.to(torch.float32) for matrix in read.values()]
    if matrices[0].ndim != 2:
        raise InputError(f"{checkpoint}: {names[0]!r} has shape {tuple(matrices[0].shape)}, no matrix")
    output = matrices[1] if len(matrices) > 1 else None
    return Embeddings(
        _short_name(directory),
        Origin("run", directory, None if output is None else "head.weight"),
        matrices[0],
        output,
        None if tensor else tied,
        corpus.words if corpus else None,
        corpus.unigram_counts if corpus else None,
    )


def _matrix(tensors: Tensors, name: str | None, source: Path) -> Tensor:
    """Read the matrix of that name; the error lists what there is, if there is none."""
    if name is None:
        raise none_found(str(source), tensors)
    if name not in tensors.files:
        raise InputError(f"{source}: holds no tensor {name!r}; {none_found('what it holds', tensors)}")
    return tensors.matrix(name)


def _lone(tensors: Tensors) -> str | None:
    # In a model of several files this would open all of them, and it has more than one matrix anyway.
    return only_matrix(tensors) if len(set(tensors.files.values())) == 1 else None


def _kind(tensors: Tensors) -> Kind:
    return "safetensors" if all(path.suffix == ".safetensors" for path in tensors.files.values()) else "pickle"


def _short_name(path: Path) -> str:
    """Return the last part of a path, and those before it while they say nothing."""
    name = path = path.resolve()
    while name.stem in BARE_NAMES and name.name:
        name = name.parent
    return str(path.relative_to(name.parent)) if name.name else path.name
