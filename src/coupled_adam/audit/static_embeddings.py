"""Static embeddings, which models only average: those of model2vec and of two modules of sentence-transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coupled_adam.audit import model_directories
from coupled_adam.audit.tensor_files import Tensors
from coupled_adam.errors import InputError

#: What model2vec calls its vectors, the index of the vector of each token, and the weight of each token.
VECTORS, MAPPING, WEIGHTS = "embeddings", "mapping", "weights"


def is_static(directory: Path, config: dict[str, Any] | None) -> bool:
    """Return whether the vector of a text is the mean of rows, by what lies in a model's directory."""
    return of_model2vec(config) or model_directories.only_averages(directory)


def of_model2vec(config: dict[str, Any] | None) -> bool:
    # Models that were put together without its distillation have no type, but what it writes about the vectors.
    return config is not None and (config.get("model_type") == "model2vec" or "embedding_dtype" in config)


def stored_rows(tensors: Tensors, name: str, config: dict[str, Any] | None) -> Tensor:
    """Read the vectors as they count: float64 as they are, else float32.

    The int8 of model2vec are no codes for other numbers: it averages them as they are.

    Raises:
        InputError: as ``Tensors.matrix``.
    """
    if name == VECTORS and of_model2vec(config) and len(tensors.shape(name)) == 2:
        stored = tensors.stored(name)
        if stored.dtype == torch.int8:
            return stored.to(torch.float32)
    return tensors.matrix(name)


def rows_per_token(tensors: Tensors, name: str, vectors: Tensor, path: Path) -> tuple[Tensor, list[str]]:
    """Return the row that model2vec takes for each token, w_t·v_m(t), and what was done to the vectors in sentences.

    Args:
        tensors: of the model.
        name: of ``vectors`` among them; those of other models are returned as they are.
        vectors: (N, H).
        path: for messages.

    Raises:
        InputError: tokens have vectors that do not exist, or not each of them has a weight.
    """
    if name != VECTORS:
        return vectors, []
    notes, rows = [], vectors
    if _is_list(tensors, MAPPING):
        places = tensors.stored(MAPPING)
        if places.is_floating_point() or not len(places) or places.min() < 0 or places.max() >= len(vectors):
            raise InputError(f"{path}: damaged: {MAPPING!r} names rows that {VECTORS!r} does not have")
        rows = vectors[places.long()]
        notes = [f"Its {len(rows):,} tokens share {len(vectors):,} vectors (model2vec); there is one row per token."]
    if (weights := weights_of_tokens(tensors, name)) is not None:
        if len(weights) != len(rows):
            raise InputError(f"{path}: damaged: {len(weights):,} {WEIGHTS!r} for {len(rows):,} tokens")
        rows = rows * weights.to(rows.dtype)[:, None]
        notes.append("Each row is the vector of a token times its weight, as model2vec takes it.")
    return rows, notes


def weights_of_tokens(tensors: Tensors, name: str) -> Tensor | None:
    """Return what model2vec multiplies the vectors of its tokens by, (V,); None if it does not."""
    return tensors.stored(WEIGHTS) if name == VECTORS and _is_list(tensors, WEIGHTS) else None


def reason_against_writing(tensors: Tensors, name: str) -> str | None:
    """Return why the rows of a static model cannot be replaced in its files; None if they can."""
    stored = tensors.stored(name).dtype
    if not stored.is_floating_point:
        kind = str(stored).removeprefix("torch.")
        return f"its vectors are {kind}, too coarse to subtract from; write a copy of the model before quantization"
    if name == VECTORS and _is_list(tensors, MAPPING) and _is_list(tensors, WEIGHTS):
        return "its tokens share vectors and have weights of their own, so nothing can be subtracted from their rows"
    return None


def _is_list(tensors: Tensors, name: str) -> bool:
    return name in tensors.files and len(tensors.shape(name)) == 1
