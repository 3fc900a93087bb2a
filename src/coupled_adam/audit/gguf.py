"""GGUF, the format of llama.cpp: tensors, dequantized as they are asked for, and the words of the vocabulary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from coupled_adam.audit.tensor_files import PackedError, Shape, Tensors, parsed, parts_beside, readable
from coupled_adam.errors import InputError, require
from coupled_adam.lm.words import BYTE_LEVEL, Words, space_marker


def tensors_in(path: Path) -> tuple[Tensors, dict[str, Any], str | None]:
    """Open the tensors of a GGUF file and of the parts beside it, if it is one of several.

    Returns:
        The tensors, the metadata by key, and a sentence about what is missing of the model, None if nothing is.

    Raises:
        InputError: a file is damaged, of another kind, or in the byte order of other machines.
    """
    require("audit", "gguf")
    import gguf

    given = _read(path)
    count = given[1].get("split.count")
    files, missing = [path], None
    if isinstance(count, int) and count > 1:
        number = given[1].get("split.no")
        part = f"part {number + 1} of {count}" if isinstance(number, int) else f"one of {count} parts"
        files, missing = parts_beside(path)
        if files == [path] and missing is None:
            missing = f"{path.name} is {part}; restore the original names of the parts (NAME-00001-of-{count:05}.gguf)."
        elif missing:
            missing = f"{path.name} is {part}. {missing}"
    opened = {file: given if file == path else _read(file) for file in files}
    found = {name: (file, tensor) for file, (tensors, _) in opened.items() for name, tensor in tensors.items()}
    metadata = {name: value for _, described in reversed(opened.values()) for name, value in described.items()}

    def shape(name: str) -> Shape:
        return tuple(int(n) for n in reversed(found[name][1].shape))

    def stored(name: str) -> Tensor:
        file, tensor = found[name]
        with parsed(file, f"{name!r} is damaged"):
            try:
                return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
            except NotImplementedError:
                raise PackedError(
                    f"{file}: {name!r} is quantized as {tensor.tensor_type.name}, which the package gguf cannot "
                    "read; use another quantization of the model"
                ) from None

    return Tensors({name: file for name, (file, _) in found.items()}, shape, stored), metadata, missing


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the descriptions of the tensors of one file by name, and its metadata by key."""
    import gguf

    class Reader(gguf.GGUFReader):
        # It takes a slice for each token of the vocabulary. Of a plain view of the file that is three times as fast.
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

        # Beyond the end it takes empty slices, as many as the file claims.
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it declares more data than it contains")
            return super()._get(offset, dtype, count, override_order)

    with readable(path, "GGUF file"):
        reader = Reader(path)
        if reader.byte_order == "S":
            raise InputError(f"{path}: big-endian, which is not supported; convert it to little-endian")
        return {tensor.name: tensor for tensor in reader.tensors}, {
            name: field.contents() for name, field in reader.fields.items()
        }


def is_encoder(metadata: Mapping[str, Any]) -> bool:
    """Return whether the model only encodes text, and so has no output embedding."""
    architecture = str(metadata.get("general.architecture", ""))
    return bool("bert" in architecture or "encoder" in architecture or metadata.get(f"{architecture}.pooling_type"))


def words_in(metadata: Mapping[str, Any]) -> Words | None:
    """Return the words of the vocabulary in a GGUF file; None if it has none.

    Words are looked up in the list of tokens instead of being encoded. For SmolLM2 the two agree on every word of the
    benchmarks, and the tokenizer takes eight seconds to be made from the file.
    """
    listed = metadata.get("tokenizer.ggml.tokens")
    if not listed:
        return None
    tokens = dict(enumerate(listed))
    ids = {token: number for number, token in tokens.items()}
    marker, lower = space_marker(tokens), metadata.get("tokenizer.ggml.model") == "bert"
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def encode(text: str) -> list[int]:
        text = text.lower() if lower else text  # as llama.cpp does for WordPiece
        if marker == BYTE_LEVEL:
            ((token, _),) = alphabet.pre_tokenize_str(text)
        else:
            token = text.replace(" ", marker)
        return [ids[token]] if token in ids else []

    return Words(tokens, encode, metadata.get("tokenizer.ggml.unknown_token_id"))
