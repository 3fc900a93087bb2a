"""Named tensors in files of several formats, of which only those that are asked for are read.

Nothing here runs code that a file carries: pickles are read with ``weights_only=True``, arrays without pickles.
"""

import functools
import math
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from coupled_adam.errors import InputError, one_line, require

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
        """Read a tensor as a float32 matrix. Raises InputError if it is not 2-D, or not of floating-point numbers."""
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
    """Open safetensors files by the names of their tensors; a file is opened when one of its tensors is asked for."""
    require("audit", "safetensors")
    from safetensors import SafetensorError, safe_open

    @functools.cache
    def shapes(path: Path) -> dict[str, Shape]:
        with readable(path, "safetensors file", SafetensorError), safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def shape(name: str) -> Shape:
        found = shapes(files[name]).get(name)
        if found is None:
            raise InputError(f"{files[name]}: holds no {name!r}, which the index of the model says it does")
        return found

    def stored(name: str) -> Tensor:
        with readable(files[name], "safetensors file", SafetensorError):
            with safe_open(files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
            return tensor

    return Tensors(files, shape, stored)


def safetensors_names(path: Path) -> list[str]:
    """List the names in one safetensors file, from its header alone."""
    require("audit", "safetensors")
    from safetensors import SafetensorError, safe_open

    with readable(path, "safetensors file", SafetensorError), safe_open(path, framework="pt") as file:
        return list(file.keys())


def pickles_in(files: Mapping[str, Path]) -> Tensors:
    """Open files of ``torch.save`` by the names of their tensors; mapped into memory, not read, where they can be."""

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
    """Open one file of ``torch.save``."""
    tensors = read_pickle(path)
    return Tensors(dict.fromkeys(tensors, path), lambda name: tuple(tensors[name].shape), tensors.__getitem__)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of one pickle, which may be a state dict, one within a dictionary, or a single tensor.

    Raises:
        InputError: it is missing, damaged, holds no tensors, or more than tensors and plain values.
    """
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    with readable(path, "file of torch.save", pickle.UnpicklingError, RuntimeError, KeyError, AttributeError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's remarks on pickles that others made
                # Files of the format before torch 1.6 are no archives, and cannot be mapped.
                content = torch.load(path, mmap=zipfile.is_zipfile(path), **options)
        except pickle.UnpicklingError as error:
            if not any(word in str(error) for word in ("GLOBAL", "class", "Unsupported operand")):
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
    """Open the array of an .npy file, named ``embedding``, or the arrays of an .npz file.

    Raises:
        InputError: it is damaged, claims more than it holds, or holds Python objects, which could run code.
    """
    lone = "embedding"
    with readable(path, "NumPy file", zipfile.BadZipFile, zlib.error, SyntaxError):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                headers: dict[str, tuple[Shape, np.dtype[Any], int]] = {
                    info.filename.removesuffix(".npy"): _header_in(archive, info) for info in archive.infolist()
                }
        else:
            with path.open("rb") as file:
                headers = {lone: (*_header(file), path.stat().st_size)}
    for name, (shape, dtype, holds) in headers.items():
        if dtype.hasobject:
            raise InputError(
                f"{path}: {name!r} holds Python objects, and loading these could run code; save the numbers alone"
            )
        if any(length < 0 for length in shape):
            raise InputError(f"{path}: damaged: {name!r} claims the shape {shape}")
        if (claimed := math.prod(shape) * dtype.itemsize) > holds:
            raise InputError(f"{path}: truncated: {name!r} should be {claimed:,} bytes, which the file does not hold")

    def stored(name: str) -> Tensor:
        with readable(path, "NumPy file", zipfile.BadZipFile, zlib.error):
            loaded = np.load(path, allow_pickle=False, mmap_mode="r")
            array = loaded if isinstance(loaded, np.ndarray) else loaded[name]
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise InputError(f"{path}: {name!r} holds {array.dtype}, not floating-point numbers")
        # In the machine's own order of bytes, without which torch takes no array.
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))

    return Tensors(dict.fromkeys(headers, path), lambda name: headers[name][0], stored)


def _header(file: IO[bytes]) -> tuple[Shape, np.dtype[Any]]:
    """Read shape and type of an .npy file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _header_in(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[Shape, np.dtype[Any], int]:
    """Read the same of a file in an archive, and the most it can hold: deflate packs 1,032 to 1 at best."""
    with archive.open(info) as file:
        shape, dtype = _header(file)
    return shape, dtype, min(info.file_size, 1032 * info.compress_size)


@contextmanager
def readable(path: Path, kind: str, *damages: type[Exception]) -> Iterator[None]:
    """Turn what the readers of files raise into one line."""
    caught: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, *damages)
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: not found") from None
    except caught as error:
        raise InputError(f"{path}: truncated, or no {kind} ({one_line(error, 160)})") from None
