"""The embeddings of a model, from whatever file or directory it comes in. The rest of the model is not read."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coupled_adam.audit import (
    adapters,
    gensim_files,
    gguf,
    model_directories,
    onnx_files,
    spacy_vectors,
    static_embeddings,
    tensor_files,
    word_vectors,
)
from coupled_adam.audit.embedding_names import (
    find_input,
    find_output,
    find_packed_output,
    has_adapter,
    largest_matrices,
    none_found,
    only_matrix,
)
from coupled_adam.audit.first_bytes import READ, Format, format_of
from coupled_adam.audit.tensor_files import PackedError, Tensors
from coupled_adam.audit.word_vectors import WordFormat, is_word_format
from coupled_adam.errors import InputError, one_line, printable
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.words import Words

__all__ = ["Embeddings", "Origin", "read_embeddings"]

Kind = Literal["safetensors", "pickle", "gguf", "onnx", "numpy", "run", "spaCy"] | WordFormat
"""The format that embeddings were read from; ``"run"`` for a run of this package. Word vectors have one of the formats
``"word2vec text"``, ``"word2vec binary"``, ``"GloVe"``, ``"fastText"`` and ``"gensim"``."""

#: What a file should be by its name, where its first bytes do not tell.
SUFFIXES: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".gguf": "gguf",
    ".onnx": "onnx",
    **dict.fromkeys((".npy", ".npz"), "numpy"),
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl"), "pickle"),
}

#: Characters of a message; names out of files may be longer.
LONGEST = 1000

#: The name of a model on the Hugging Face hub.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

#: Names of files and directories that say nothing about the model.
BARE_NAMES = ("model", "pytorch_model", "embedding", "embeddings", "weights", "checkpoint", "hf")


@dataclass(frozen=True)
class Origin:
    """Where embeddings were read from: what ``coupled_adam.audit.centering.center`` needs."""

    kind: Kind
    """The format."""
    path: Path
    """The file, or the directory of the model or run."""
    head: str | None = None
    """The name of the tensor of an output embedding that is not tied."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """The file of each tensor of the model, by the tensor's name."""
    config: dict[str, Any] | None = None
    """The content of config.json; None without one."""
    static: str | None = None
    """The name of the tensor with the vectors of a model that only averages them; None for other models."""
    merged: tuple[str, ...] = ()
    """The names of embeddings that are in no file as they are, but as a base and an adapter."""


@dataclass(frozen=True, eq=False)
class Embeddings:
    """The embeddings of a model, and what its tokens are."""

    name: str
    """Name for display."""
    origin: Origin
    """Where they were read from."""
    input: Tensor
    """The token embedding (V, H), on the CPU; float64 if stored so, else float32. Values that are not finite are
    kept."""
    output: Tensor | None = None
    """The output embedding (V', H), likewise; None if it is tied or missing. V' may differ from V by padding."""
    tied: bool | None = None
    """Whether the output embedding is the input embedding. None: unknown, as for a single array. False without
    ``output``: the model has no output embedding (a sentence encoder), or ``lacks_output``."""
    lacks_output: bool = False
    """Whether the model has, or may have, an output embedding that was not read; the notes say why."""
    notes: tuple[str, ...] = ()
    """What was not read, in sentences."""
    words: Words | None = None
    """The words and tokens of its tokenizer; None without one."""
    unigram_counts: NDArray[np.int64] | None = None
    """How often each token occurs in the training text, (V,); only for runs of this package."""


def read_embeddings(model: str, *, tensor: str | None = None, data: Path | None = None) -> Embeddings:
    """Read the embeddings of a model, without reading its other tensors and files.

    Args:
        model: a Hugging Face model directory; the name of a model on the Hub; a .safetensors, .gguf, .npy or .npz file;
            a file of torch.save; word vectors of word2vec, GloVe, fastText or gensim; or the directory of a run of
            this package, of which the last checkpoint is read. The format of a file is recognized by its first bytes,
            else by its name.
        tensor: the name of the tensor to read instead of the embeddings. It is returned as ``input``.
        data: the corpus, for a run of this package; None for where it was during training.

    Returns:
        The embeddings, as stored, and the words of the tokenizer.

    Raises:
        InputError: there is no such model; it is damaged, of another format, or holds no embedding; the file could run
            code; or ``data`` is not the text of the run.
        ImportError: a package for its format is not installed; the message names the extra.
    """
    try:
        return _read(model, tensor, data)
    except InputError as error:
        raise InputError(one_line(error, LONGEST)) from None  # it may hold names out of files
    except MemoryError:
        raise InputError(f"{printable(model)}: not enough memory to open it") from None


def _read(model: str, tensor: str | None, data: Path | None) -> Embeddings:
    path = Path(model)
    with contextlib.suppress(RuntimeError):  # a tilde before the name of nobody
        path = path.expanduser()
    if path.is_dir():
        if (path / "experiment.toml").exists():
            return _read_run(path, tensor, data)
        return _read_directory(path, _short_name(path), tensor)
    if path.exists():
        return _read_file(path, tensor)
    if path.suffix in SUFFIXES or not HUB_NAME.fullmatch(model):
        raise InputError(f"{model}: no such file or directory")
    return _read_directory(model_directories.from_hub(model), model, tensor)


def _read_directory(directory: Path, name: str, tensor: str | None) -> Embeddings:
    if (vocabulary := spacy_vectors.vocabulary_in(directory)) is not None:
        return _read_vocabulary(directory, vocabulary, name, tensor)
    folder = model_directories.folder_of_weights(directory)
    tensors, missing = model_directories.weights_in(folder)
    return _embeddings(tensors, name, _kind(tensors), directory, folder, tensor, missing)


def _read_file(path: Path, tensor: str | None) -> Embeddings:
    name, kind = _short_name(path), format_of(path) or SUFFIXES.get(path.suffix.lower())
    if kind == "gguf":
        return _read_gguf(path, name, tensor)
    if kind == "onnx":
        return _read_onnx(path, name, tensor)
    if kind in ("safetensors", "pickle"):
        tensors, missing = model_directories.weights_of_part(path, kind == "pickle")
        return _embeddings(tensors, name, kind, path, path.parent, tensor, missing)
    if kind == "numpy":
        tensors = tensor_files.arrays_in(path)
        # The error of a lone array is about its shape, not about its name.
        lone = next(iter(tensors.files)) if len(tensors.files) == 1 else None
        matrix = _matrix(tensors, tensor or find_input(tensors) or only_matrix(tensors) or lone, path)
        return Embeddings(name, Origin("numpy", path, None, tensors.files), matrix)
    if is_word_format(kind):
        return _read_word_vectors(path, name, kind, tensor)
    raise InputError(f"{path}: not a supported type of file; {READ}")


def _read_word_vectors(path: Path, name: str, kind: WordFormat, tensor: str | None) -> Embeddings:
    if tensor is not None:
        raise InputError(f"{path}: has no tensors, only the vectors of its words; leave out --tensor {tensor}")
    vectors, said = word_vectors.read_vectors(path, kind)
    notes = []
    if repeated := said - len(vectors):
        notes.append(f"{repeated:,} of its {said:,} words occur a second time and were left out.")
    if kind == "fastText":
        notes.append("The vectors of the words in its vocabulary, each with those of its character n-grams.")
    if kind == "gensim" and (holder := gensim_files.class_of(path)) not in gensim_files.VECTORS_ALONE:
        notes.append(f"Of this {holder} of gensim, the vectors of its words.")
    matrix = torch.from_numpy(vectors.vectors)
    matrix = matrix if matrix.dtype == torch.float64 else matrix.to(torch.float32)
    return Embeddings(
        name, Origin(kind, path), matrix, words=word_vectors.words_of_vectors(vectors), notes=tuple(notes)
    )


def _read_vocabulary(directory: Path, folder: Path, name: str, tensor: str | None) -> Embeddings:
    if tensor is not None:
        raise InputError(f"{directory}: has no tensors, only the vectors of its words; leave out --tensor {tensor}")
    found = spacy_vectors.read_vocabulary(folder)
    (only,) = found.tensors.files
    matrix = found.tensors.matrix(only)[found.rows]
    origin = Origin("spaCy", directory, None, found.tensors.files)
    return Embeddings(name, origin, matrix, words=found.words, notes=tuple(found.notes))


def _embeddings(
    tensors: Tensors,
    name: str,
    kind: Kind,
    path: Path,
    directory: Path,
    tensor: str | None,
    missing: str | None = None,
) -> Embeddings:
    """Read those of the model at ``path`` whose configuration and tokenizer, if any, lie in ``directory``."""
    config, base = model_directories.read_config(directory), model_directories.base_of_adapter(directory)
    merged = adapters.merged(tensors, directory) if tensor is None else adapters.Merged(tensors)
    tensors = merged.tensors
    words, no_words = model_directories.words_in(directory)
    if words is None and no_words is None and merged.base is not None:
        words, no_words = model_directories.words_in(merged.base)
    notes = [note for note in (missing, no_words) if note]
    if base is not None:
        notes.append(f"An adapter: the rest of the model is in its base model {base} and was not measured.")
    if tensor is not None:
        matrix = _matrix(tensors, tensor, path)
        notes += _adapted(tensor)
        return Embeddings(
            name, Origin(kind, path, None, tensors.files, config), matrix, words=words, notes=tuple(notes)
        )
    said = None if config is None else model_directories.says_tied(directory, config)
    found = find_input(tensors) or (find_output(tensors) if said else None)
    if found is None and base is not None:
        raise InputError(
            f"{path}: an adapter; its input embeddings are in its base model {base}: audit that, or name one of the "
            f"adapter's matrices ({largest_matrices(tensors)})"
        )
    matrix, found, expanded = _input(tensors, found or _lone(tensors), path, missing, config)
    head, output, note = _output(tensors, found, matrix)
    tied = _tied(said, head, matrix, output, config)
    if tied:
        head = output = None
    if note is None and output is None and not tied and base is None:
        note = _absent(said, config)
    notes += [*expanded, *(note for note in (note,) if note), *_adapted(found), *_adapted(head or "")]
    notes += [f"{name} was measured with its adapter merged into it." for name in (found, head) if name in merged.names]
    lacks = output is None and not tied and (note is not None or bool(missing))
    averages = head is None and static_embeddings.is_static(path if path.is_dir() else directory, config)
    origin = Origin(kind, path, head, tensors.files, config, found if averages else None, merged.names)
    return Embeddings(name, origin, matrix, output, False if note else tied, lacks, tuple(notes), words)


def _input(
    tensors: Tensors, found: str | None, path: Path, missing: str | None, config: dict[str, Any] | None = None
) -> tuple[Tensor, str, list[str]]:
    """Read the token embedding. Returns it, its name, and what was done to it in sentences."""
    if found is None:
        if missing:
            raise InputError(f"{path}: {missing} The token embedding is in a missing part; {_named(tensors)}")
        raise none_found(str(path), tensors)
    stored = static_embeddings.stored_rows(tensors, found, config)
    matrix, notes = static_embeddings.rows_per_token(tensors, found, stored, path)
    return matrix, found, notes


def _named(tensors: Tensors) -> str:
    return f"put all parts into one directory, or name a tensor (--tensor): {largest_matrices(tensors)}"


def _output(tensors: Tensors, found: str, matrix: Tensor) -> tuple[str | None, Tensor | None, str | None]:
    """Read the output embedding. Returns its name, the matrix, or a sentence about why it could not be read."""
    head, packed = find_output(tensors, *matrix.shape), None
    if head == found:
        return head, None, None
    if head is not None:
        try:
            return head, tensors.matrix(head), None
        except PackedError:
            packed = head
    packed = packed or find_packed_output(tensors, found)
    if packed is None:
        return None, None, None
    note = f"Its output embedding {packed} is packed or quantized and was not measured; use the unquantized model."
    return None, None, note


def _absent(said: bool | None, config: dict[str, Any] | None) -> str | None:
    """Return a sentence about an output embedding that there should be, but is in none of the files."""
    if config is None or said or model_directories.predicts(config) is False:
        return None
    if said is None and not model_directories.predicts(config):
        return None
    says = "says that it is not tied" if said is False else "does not say whether it is tied"
    return f"Its config.json {says}, but its files have no output embedding under a known name: it was not measured."


def _adapted(name: str) -> list[str]:
    return [f"{name} was measured without its adapter; merge it first (merge_and_unload)."] * has_adapter(name)


def _tied(
    said: bool | None, head: str | None, matrix: Tensor, output: Tensor | None, config: dict[str, Any] | None
) -> bool | None:
    """Decide whether a model is tied, from what its configuration says and what its files hold."""
    if output is not None:
        # Files of tied models may hold the matrix twice. Where two differ transformers does not tie them either,
        # whatever the configuration says.
        return said is not False and output.shape == matrix.shape and bool((output == matrix).all())
    if config is None:
        return None
    return False if head is None and model_directories.predicts(config) is False else said


def _read_gguf(path: Path, name: str, tensor: str | None) -> Embeddings:
    tensors, metadata, missing = gguf.tensors_in(path)
    words = gguf.words_in(metadata)
    notes = [missing] if missing else []
    origin = Origin("gguf", path, None, tensors.files)
    if tensor is not None:
        return Embeddings(name, origin, _matrix(tensors, tensor, path), words=words, notes=tuple(notes))
    matrix, _, _ = _input(tensors, find_input(tensors), path, missing)
    output = None
    if has_output := "output.weight" in tensors.files:
        try:
            output = tensors.matrix("output.weight")
        except PackedError as error:
            notes.append(f"Its output embedding was not measured: {error}.")
    lacks = output is None and (has_output or missing is not None)
    # Without a matrix of its own llama.cpp takes the token embedding, but encoders, which pool, predict nothing.
    tied = None if lacks else output is None and not gguf.is_encoder(metadata)
    return Embeddings(name, origin, matrix, output, tied, lacks, tuple(notes), words)


def _read_onnx(path: Path, name: str, tensor: str | None) -> Embeddings:
    model = onnx_files.Model(path)
    # Exporters put the graph into a folder of the model.
    described = (directory for directory in (path.parent, path.parent.parent) if _describes(directory))
    directory = next(described, path.parent)
    config = model_directories.read_config(directory)
    words, no_words = model_directories.words_in(directory)
    notes, origin = [no_words] if no_words else [], Origin("onnx", path, None, model.tensors.files, config)
    if tensor is not None:
        return Embeddings(name, origin, _matrix(model.tensors, tensor, path), words=words, notes=tuple(notes))
    table, output, lacks = model.find_input(), None, False
    if table is None:
        lone = only_matrix(model.tensors)
        if lone is None:
            raise none_found(str(path), model.tensors)
        table = onnx_files.Table(lone)
    matrix = model.matrix(table)
    try:
        head = model.find_output(*matrix.shape)
        if head is not None and head.name != table.name:
            output = model.matrix(head)
    except PackedError as error:
        lacks, head = True, None
        notes.append(f"Its output embedding was not measured: {error}.")
    notes += [
        f"{found.name} is quantized, and was measured as the model dequantizes it."
        for found in dict.fromkeys((table, head))
        if found is not None and found.scale is not None
    ]
    tied: bool | None = False
    if head is not None:
        tied = output is None or (output.shape == matrix.shape and bool((output == matrix).all()))
    elif not lacks and (config is None or model_directories.predicts(config) is not False):
        tied = None
    return Embeddings(name, origin, matrix, None if tied else output, tied, lacks, tuple(notes), words)


def _describes(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("config.json", "tokenizer.json"))


def _read_run(directory: Path, tensor: str | None, data: Path | None) -> Embeddings:
    # Other models need nothing of torch.distributed, which takes as long to import as torch.
    from coupled_adam.lm.checkpoint import load_tensors
    from coupled_adam.lm.run import open_checkpoint, open_run

    corpus: Corpus | None
    notes: tuple[str, ...] = ()
    try:
        run = open_run(directory, data)
        experiment, checkpoint, corpus = run.experiment, run.checkpoint, run.corpus
    except InputError as error:
        if data is not None:
            raise
        experiment, checkpoint = open_checkpoint(directory)  # raises the same error, if this is what is wrong
        notes = (f"Without its corpus, words and frequencies are left out ({error}).",)
        corpus = None
    tied = experiment.model.tied
    names = [tensor or "token_embedding.weight"] + (["head.weight"] if tensor is None and not tied else [])
    read = load_tensors(checkpoint, [f"model.{name}" for name in names])
    matrices = [matrix.to(torch.float32) for matrix in read.values()]
    if matrices[0].ndim != 2:
        raise InputError(f"{checkpoint}: {names[0]!r} is not a matrix (shape {tuple(matrices[0].shape)})")
    output = matrices[1] if len(matrices) > 1 else None
    return Embeddings(
        _short_name(directory),
        Origin("run", directory, None if output is None else "head.weight"),
        matrices[0],
        output,
        None if tensor else tied,
        notes=notes,
        words=corpus.words if corpus else None,
        unigram_counts=corpus.unigram_counts if corpus else None,
    )


def _matrix(tensors: Tensors, name: str | None, source: Path) -> Tensor:
    """Read the matrix of that name; the error lists what there is, if there is none."""
    if name is None:
        raise none_found(str(source), tensors)
    if name not in tensors.files:
        raise InputError(f"{source}: contains no tensor {name!r}; {largest_matrices(tensors)}")
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
