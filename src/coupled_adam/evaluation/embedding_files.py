"""The embeddings of a model, from whatever file or folder it comes in. The rest of the model is not read."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coupled_adam.errors import InputError
from coupled_adam.evaluation import model_folders, tensor_files, words
from coupled_adam.evaluation.embedding_names import find_input, find_output, none_found, only_matrix
from coupled_adam.evaluation.tensor_files import Tensors
from coupled_adam.lm.checkpoint import latest_checkpoint, load_tensors
from coupled_adam.lm.config import load_experiment
from coupled_adam.lm.corpus import Corpus

Kind = Literal["safetensors", "pickle", "gguf", "numpy", "run"]

PICKLES, ARRAYS = (".pt", ".pth", ".bin"), (".npy", ".npz")

#: The name of a model on the Hugging Face hub.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

#: Names of files and folders that say nothing about the model.
BARE_NAMES = ("model", "pytorch_model", "embedding", "embeddings", "weights", "checkpoint", "hf")


@dataclass(frozen=True)
class Origin:
    """Where embeddings were read from; what :func:`coupled_adam.evaluation.centering.center` needs to know."""

    kind: Kind
    path: Path
    """The file, or the folder of the model or run."""
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
    """What the user gave, short enough for a table."""
    input: Tensor
    """The token embedding, float32 (V, H), on the CPU. Values are as stored, also where they are not finite."""
    output: Tensor | None
    """The output embedding, float32 (V', H), where it is a matrix of its own. V' may differ from V by padding."""
    tied: bool | None
    """Whether the output embedding is the input embedding. None: it cannot be told, as for a lone array. False and no
    ``output``: the model has no output embedding (a sentence encoder), or its file does not hold it."""
    token_of: Callable[[str], int | None] | None
    """The row of a word that is a single token within a text, else None; absent where no tokenizer is at hand."""
    labels: Callable[[int], str] | None
    """The text of the token of a row; absent where no tokenizer is at hand."""
    unigram_counts: NDArray[np.int64] | None
    """How often each token occurs in the training text, (V,); known of our own runs."""
    origin: Origin


def read_embeddings(model: str, *, tensor: str | None = None, corpus: Corpus | None = None) -> Embeddings:
    """Read the embeddings of a model; of a large one no other tensors, and no other files.

    Args:
        model: a Hugging Face model folder, the name of a model on the hub, a .safetensors, .gguf, .npy, .npz, .pt,
            .pth or .bin file, or one of our run folders, of which the last checkpoint counts.
        tensor: the name of the tensor to read instead of what is found by name. It comes as ``input``, whichever it is.
        corpus: the text of a run; it has the run's tokenizer and counts. Of no use to other models.

    Raises:
        InputError: there is no such model, it is truncated or of another kind, holds no embedding, is a pickle that
            could run code, or ``corpus`` is not the text of the run.
        ImportError: a package that its format needs is not installed; the message names the extra.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "experiment.toml").exists():
            return _read_run(path, tensor, corpus)
        return _read_folder(path, _short_name(path), tensor)
    if path.is_file():
        return _read_file(path, tensor)
    suffixes = (".safetensors", ".gguf", *ARRAYS, *PICKLES)
    if path.suffix in suffixes or not HUB_NAME.fullmatch(model):
        raise InputError(f"{model}: no such file or folder")
    return _read_folder(model_folders.from_hub(model), model, tensor)


def _read_folder(folder: Path, name: str, tensor: str | None) -> Embeddings:
    tensors = model_folders.weights_in(folder)
    return _embeddings(tensors, name, _kind(tensors), folder, folder, tensor)


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
        return Embeddings(name, matrix, None, None, None, None, None, Origin("numpy", path, None, tensors.files))
    raise InputError(f"{path}: not a kind of file that is read; those are .safetensors, .gguf, .npy, .npz, .pt, .bin")


def _embeddings(tensors: Tensors, name: str, kind: Kind, path: Path, folder: Path, tensor: str | None) -> Embeddings:
    """Of a model whose configuration and tokenizer, if any, lie in ``folder``."""
    config, vocabulary = model_folders.read_config(folder), words.words_in(folder)
    head, output, tied = None, None, None
    if tensor is not None:
        matrix = _matrix(tensors, tensor, path)
    else:
        said = None if config is None else model_folders.says_tied(folder, config)
        found = find_input(tensors) or (find_output(tensors) if said else None) or _lone(tensors)
        matrix = _matrix(tensors, found, path)
        head = find_output(tensors, *matrix.shape)
        if head is not None and head != found:
            output = tensors.matrix(head)
            # Files of tied models may hold the matrix twice. Where two differ transformers does not tie them either,
            # whatever the configuration says.
            tied = said is not False and torch.equal(output, matrix)
        elif config is not None:
            tied = False if head is None and model_folders.has_no_head(config) else said
    if tied:
        head, output = None, None
    token_of = vocabulary.token_of if vocabulary else None
    labels = vocabulary.label if vocabulary else None
    return Embeddings(
        name, matrix, output, tied, token_of, labels, None, Origin(kind, path, head, tensors.files, config)
    )


def _read_gguf(path: Path, name: str, tensor: str | None) -> Embeddings:
    tensors, metadata = tensor_files.gguf_in(path)
    vocabulary = words.words_of_gguf(metadata)
    matrix = _matrix(tensors, tensor or find_input(tensors), path)
    output, tied = None, None
    if tensor is None:
        head = "output.weight" if "output.weight" in tensors.files else None
        output = tensors.matrix(head) if head else None
        # Without a matrix of its own llama.cpp takes the token embedding, but encoders, which pool, predict nothing.
        architecture = str(metadata.get("general.architecture", ""))
        encoder = "bert" in architecture or "encoder" in architecture or metadata.get(f"{architecture}.pooling_type")
        tied = head is None and not encoder
    return Embeddings(
        name,
        matrix,
        output,
        tied,
        vocabulary.token_of if vocabulary else None,
        vocabulary.label if vocabulary else None,
        None,
        Origin("gguf", path, None, tensors.files),
    )


def _read_run(folder: Path, tensor: str | None, corpus: Corpus | None) -> Embeddings:
    experiment = load_experiment(folder / "experiment.toml")
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{folder}: no complete checkpoint in it; train the run first")
    if corpus is not None:
        _check_corpus(folder, corpus)
    tied = experiment.model.tied
    names = [tensor or "token_embedding.weight"] + (["head.weight"] if tensor is None and not tied else [])
    matrices = [
        read.to(torch.float32) for read in load_tensors(checkpoint, [f"model.{name}" for name in names]).values()
    ]
    if matrices[0].ndim != 2:
        raise InputError(f"{checkpoint}: {names[0]!r} has shape {tuple(matrices[0].shape)}, no matrix")
    return Embeddings(
        _short_name(folder),
        matrices[0],
        matrices[1] if len(matrices) > 1 else None,
        None if tensor else tied,
        corpus.token_of if corpus else None,
        words.words_of(corpus.tokenizer).label if corpus else None,
        corpus.unigram_counts if corpus else None,
        Origin("run", folder, "head.weight" if len(matrices) > 1 else None),
    )


def _check_corpus(folder: Path, corpus: Corpus) -> None:
    environment = folder / "environment.json"
    try:
        used = json.loads(environment.read_text(encoding="utf-8"))["corpus"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{environment}: cannot be read: {error}") from None
    if used != corpus.fingerprint:
        raise InputError(f"{corpus.folder}: not the text that {folder} was trained on")


def _matrix(tensors: Tensors, name: str | None, source: Path) -> Tensor:
    """The matrix of that name; the error lists what there is, if there is none."""
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
    """The last part of a path, and those before it while they say nothing."""
    name = path = path.resolve()
    while name.stem in BARE_NAMES and name.name:
        name = name.parent
    return str(path.relative_to(name.parent)) if name.name else path.name
