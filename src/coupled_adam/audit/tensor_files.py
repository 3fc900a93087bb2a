"""Named tensors in files of several formats, of which only those that are asked for are read."""

import functools
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from coupled_adam.audit.first_bytes import check_downloaded, format_of
from coupled_adam.errors import InputError, one_line, require
from coupled_adam.geometry.arrays import enough_memory, out_of_memory

Shape = tuple[int, ...]

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
        """Read a tensor as a matrix: float64 as it is, else float32.

        Raises:
                InputError: it is not 2-D, or does not fit into memory.
            PackedError: an InputError too: its numbers are not floating-point numbers.
        """
        if len(shape := self.shape(name)) != 2:
            raise InputError(
                f"{self.files[name]}: {name!r} has shape {shape}, but an embedding is (vocabulary, hidden)"
            )
        with enough_memory(f"{self.files[name]}: {name!r}", *shape):
            tensor = self.stored(name)
            if tensor.dtype not in FLOATS:
                raise PackedError(
                    f"{self.files[name]}: {name!r} holds {str(tensor.dtype).removeprefix('torch.')}: packed or "
                    "quantized embeddings are not supported; use the unquantized model"
                )
            return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def safetensors_in(files: Mapping[str, Path]) -> Tensors:
    """Open safetensors files by the names of their tensors; a file is opened when one of its tensors is asked for."""
    require("audit", "safetensors")
    from safetensors import safe_open

    @functools.cache
    def shapes(path: Path) -> dict[str, Shape]:
        with readable(path, "safetensors file"), safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def shape(name: str) -> Shape:
        found = shapes(files[name]).get(name)
        if found is None:
            raise InputError(f"{files[name]}: {name!r} is missing, although the model's index lists it in this file")
        return found

    def stored(name: str) -> Tensor:
        with readable(files[name], "safetensors file"):
            with safe_open(files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
            return tensor

    return Tensors(files, shape, stored)


def safetensors_names(path: Path) -> list[str]:
    """List the names in one safetensors file, from its header alone."""
    require("audit", "safetensors")
    from safetensors import safe_open

    with readable(path, "safetensors file"), safe_open(path, framework="pt") as file:
        return list(file.keys())


def arrays_in(path: Path) -> Tensors:
    """Open the array of an .npy file, named ``embedding``, or the arrays of an .npz file.

    Raises:
        InputError: it is damaged, claims more than it holds, or holds Python objects, which could run code.
    """
    lone = "embedding"
    with readable(path, "NumPy file"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                headers: dict[str, tuple[Shape, np.dtype[Any], int]] = {
                    info.filename.removesuffix(".npy"): _header_in(archive, info)
                    for info in archive.infolist()
                    if info.filename.endswith(".npy")  # people put a README beside their arrays
                }
        else:
            with path.open("rb") as file:
                headers = {lone: (*_header(file), path.stat().st_size)}
    if not headers:
        raise InputError(f"{path}: contains no arrays")
    for name, (shape, dtype, holds) in headers.items():
        if dtype.hasobject:
            raise InputError(
                f"{path}: {name!r} contains Python objects, and loading them could run code; save only the numbers"
            )
        if any(length < 0 or isinstance(length, bool) for length in shape):
            raise InputError(f"{path}: damaged: {name!r} declares the shape {shape}")
        if (claimed := math.prod(shape) * dtype.itemsize) > holds:
            raise InputError(f"{path}: truncated: {name!r} should have {claimed:,} bytes, more than the file contains")

    def stored(name: str) -> Tensor:
        with readable(path, "NumPy file"):
            loaded = np.load(path, allow_pickle=False, mmap_mode="r")
            array = loaded if isinstance(loaded, np.ndarray) else loaded[name]
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise InputError(
                f"{path}: {name!r} holds {array.dtype}, not floating-point numbers; save it with .astype('float32')"
            )
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


class PackedError(InputError):
    """A tensor is in a form that stands for other numbers, which are not known here."""


@contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a reader of a file with tensors raises into one line.

    Raises:
        InputError: as ``parsed``; or the file is of a format that is not read.
        MemoryError: there is too little memory.
    """
    format_of(path)
    with parsed(path, f"truncated, or not a {kind}"):
        yield


@contextmanager
def parsed(path: Path, damage: str) -> Iterator[None]:
    """Turn whatever a parser raises into one line that names the file.

    Of every kind: parsers meet bytes that nobody thought of, and none of them lists all that it may raise.

    Args:
        path: of the file.
        damage: what an exception means.

    Raises:
        InputError: the file is missing or damaged, or something else stands in its place.
        MemoryError: there is too little memory.
    """
    check_downloaded(path)
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if (
            not isinstance(error, Exception) and type(error).__name__ != "PanicException"
        ):  # Rust's, which is no Exception
            raise
        if out_of_memory(error):
            raise MemoryError from None
        reason = one_line(error, 160)
        if not isinstance(error, OSError | ValueError) and reason != type(error).__name__:
            reason = f"{type(error).__name__}: {reason}"
        raise InputError(f"{path}: {damage} ({reason})") from None


#: The name of a file that holds one part of a model.
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def parts_beside(path: Path) -> tuple[list[Path], str | None]:
    """Return the parts of the model of which a file is one, in order, and a sentence about those that are missing.

    A file whose name is not that of a part is the only one.
    """
    match = PART.fullmatch(path.name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [path], None
    beginning, count, suffix = match[1], int(match[3]), match[4]
    names = [f"{beginning}-{number:05}-of-{match[3]}{suffix}" for number in range(1, count + 1)]
    there = {other.name for other in path.parent.iterdir()} & set(names)
    missing = [name for name in names if name not in there]
    listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    said = (
        f"The model has {count} parts, and {listed} {'is' if len(missing) == 1 else 'are'} missing."
        if missing
        else None
    )
    return [path.parent / name for name in names if name in there], said
