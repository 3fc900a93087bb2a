"""Named tensors in files of several formats, of which only those that are asked for are read.

Nothing here runs code that a file carries: pickles are read with ``weights_only=True``, arrays without pickles.
"""

import functools
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coupled_adam.errors import InputError, require

Shape = tuple[int, ...]

#: Where training scripts keep the weights in a dictionary of more.
NESTED = ("state_dict", "model_state_dict", "model", "module")

#: What is read as an embedding. Narrower types stand for other numbers, by scales that are kept elsewhere.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Tensors:
    """What a file, or a set of files, holds."""

    files: Mapping[str, Path]
    """The file of each tensor, by the tensor's name."""
    shape: Callable[[str], Shape]
    """The shape of a tensor; does not read it."""
    stored: Callable[[str], Tensor]
    """A tensor as it is stored."""

    def matrix(self, name: str) -> Tensor:
        """A tensor as a float32 matrix. Raises InputError if it is not 2-D, or not of floating-point numbers."""
        if len(shape := self.shape(name)) != 2:
            raise InputError(f"{self.files[name]}: {name!r} has shape {shape}, an embedding is (vocabulary, hidden)")
        tensor = self.stored(name)
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"{self.files[name]}: {name!r} holds {str(tensor.dtype).removeprefix('torch.')}, not the numbers of an "
                "embedding: a packed or quantized form that is not read; give the model as it was before"
            )
        return tensor.to(torch.float32)


def safetensors_in(files: Mapping[str, Path]) -> Tensors:
    """The tensors of safetensors files, by name. A file is opened when one of its tensors is asked for."""
    require("audit", "safetensors")
    from safetensors import SafetensorError, safe_open

    @functools.cache
    def shapes(path: Path) -> dict[str, Shape]:
        with _readable(path, "safetensors file", SafetensorError), safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def shape(name: str) -> Shape:
        found = shapes(files[name]).get(name)
        if found is None:
            raise InputError(f"{files[name]}: holds no {name!r}, which the index of the model says it does")
        return found

    def stored(name: str) -> Tensor:
        with _readable(files[name], "safetensors file", SafetensorError):
            with safe_open(files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
            return tensor

    return Tensors(files, shape, stored)


def safetensors_names(path: Path) -> list[str]:
    """The names in one safetensors file, from its header alone."""
    require("audit", "safetensors")
    from safetensors import SafetensorError, safe_open

    with _readable(path, "safetensors file", SafetensorError), safe_open(path, framework="pt") as file:
        return list(file.keys())


def pickles_in(files: Mapping[str, Path]) -> Tensors:
    """The tensors of files that ``torch.save`` wrote, by name; mapped into memory, not read, where they can be."""

    @functools.cache
    def content(path: Path) -> dict[str, Tensor]:
        return read_pickle(path)

    def stored(name: str) -> Tensor:
        found = content(files[name]).get(name)
        if found is None:
            raise InputError(f"{files[name]}: holds no {name!r}, which the index of the model says it does")
        return found

    return Tensors(files, lambda name: tuple(stored(name).shape), stored)


def pickle_in(path: Path) -> Tensors:
    """The tensors of one file that ``torch.save`` wrote."""
    tensors = read_pickle(path)
    return Tensors(dict.fromkeys(tensors, path), lambda name: tuple(tensors[name].shape), tensors.__getitem__)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of one pickle, which may be a state dict, one within a dictionary, or a single tensor.

    Raises:
        InputError: it is missing, damaged, holds no tensors, or more than tensors and plain values.
    """
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    with _readable(path, "file of torch.save", pickle.UnpicklingError, RuntimeError, KeyError, AttributeError):
        try:
            # Files of the format before torch 1.6 are no archives, and cannot be mapped.
            content = torch.load(path, mmap=zipfile.is_zipfile(path), **options)
        except pickle.UnpicklingError as error:
            if "GLOBAL" not in str(error) and "class" not in str(error):
                raise
            raise InputError(
                f"{path}: holds more than tensors, and could run code of its own if it were loaded; "
                "convert it to safetensors"
            ) from None
    if isinstance(content, Tensor):
        return {"weight": content.detach()}
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    named = content if isinstance(content, dict) else {}
    tensors = {str(name): value.detach() for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no tensors")
    return tensors


def arrays_in(path: Path) -> Tensors:
    """The array of an .npy file, named ``embedding``, or the arrays of an .npz file."""
    with _readable(path, "NumPy file", zipfile.BadZipFile, zlib.error, SyntaxError):
        loaded = np.load(path, allow_pickle=False, mmap_mode="r")
        if isinstance(loaded, np.ndarray):
            arrays = {"embedding": loaded}
        else:
            with loaded as archive:
                arrays = {name: archive[name] for name in archive.files}

    def stored(name: str) -> Tensor:
        # In the machine's own order of bytes, without which torch takes no array.
        array = np.array(arrays[name], dtype=arrays[name].dtype.newbyteorder("="))
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise InputError(f"{path}: {name!r} holds {array.dtype}, not floating-point numbers")
        return torch.from_numpy(array)

    return Tensors(dict.fromkeys(arrays, path), lambda name: arrays[name].shape, stored)


def gguf_in(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a GGUF file, dequantized as they are asked for, and its metadata by key."""
    require("audit", "gguf")
    import gguf

    class Reader(gguf.GGUFReader):
        # It takes a slice for each token of the vocabulary. Of a plain view of the file that is three times as fast.
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    with _readable(path, "GGUF file", IndexError, KeyError, TypeError, MemoryError):
        reader = Reader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        metadata = {name: field.contents() for name, field in reader.fields.items()}

    def shape(name: str) -> Shape:
        return tuple(int(n) for n in reversed(tensors[name].shape))

    def stored(name: str) -> Tensor:
        tensor = tensors[name]
        try:
            return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        except NotImplementedError:
            raise InputError(
                f"{path}: {name!r} is quantized as {tensor.tensor_type.name}, which the package gguf does not read; "
                "give the model in another quantization"
            ) from None

    return Tensors(dict.fromkeys(tensors, path), shape, stored), metadata


@contextmanager
def _readable(path: Path, kind: str, *damages: type[Exception]) -> Iterator[None]:
    """Turn what the readers of files raise into one line."""
    caught: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, *damages)
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: not found") from None
    except caught as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(f"{path}: truncated, or no {kind} ({reason})") from None
