"""Files of ``torch.save``, of which no more than tensors and plain values are made."""

import functools
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coupled_adam.audit.tensor_files import Tensors, readable
from coupled_adam.errors import InputError

#: Where training scripts keep the weights in a dictionary of more.
NESTED = ("state_dict", "model_state_dict", "model", "module")

#: What torch says of a class or function that it does not call.
NAMED = re.compile(r"(?:GLOBAL|class|got) <?(?:class )?'?([\w.]+\.\w+)")
BUILTIN = re.compile(r"GLOBAL (\w+) was")


#: What it says of the pickles of others.
NOT_OF_TORCH = ("Unsupported operand", "Invalid magic number")


class _Ignored:
    """Stands for the scalars and arrays of NumPy among the tensors, such as losses and states of random generators."""

    def __new__(cls, *_: object, **__: object) -> "_Ignored":
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...

    def __setitem__(self, _: object, value: object) -> None: ...


class _IgnoredDict:
    """The same for dictionaries that are more than that: torch sets items of none but these."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return OrderedDict()


class _IgnoredList:
    """The same for lists."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return []


_FUNCTIONS = [f"{module}.multiarray.{f}" for module in ("core", "_core") for f in ("scalar", "_reconstruct")]
HARMLESS = [f"numpy.{name}" for name in ("dtype", "ndarray", *_FUNCTIONS)]
IGNORED: dict[str, type] = dict.fromkeys(HARMLESS, _Ignored)

#: What torch says of an instance that is no list or dictionary, but is filled as one.
FILLED = {"Can only SETITEM": _IgnoredDict, "Can only append": _IgnoredList, "Can only extend": _IgnoredList}

#: A key of Lightning's checkpoints, one of the first; and how far into the file it is looked for.
LIGHTNING, HEAD = b"pytorch-lightning_version", 1 << 16

#: Classes that are skipped in one checkpoint at most.
MOST_CLASSES = 200


def pickles_in(files: Mapping[str, Path]) -> Tensors:
    """Open files of ``torch.save`` by the names of their tensors; mapped into memory, not read, where they can be."""

    @functools.cache
    def content(path: Path) -> dict[str, Tensor]:
        return read_pickle(path)

    def held(name: str) -> Tensor:
        found = content(files[name]).get(name)
        if found is None:
            raise InputError(f"{files[name]}: {name!r} is missing, although the model's index lists it in this file")
        return found

    return _tensors(files, held)


def pickle_in(*paths: Path) -> Tensors:
    """Open a file of ``torch.save``, or several of one model."""
    read = {path: read_pickle(path) for path in paths}
    files = {name: path for path, tensors in read.items() for name in tensors}
    return _tensors(files, lambda name: read[files[name]][name])


def _tensors(files: Mapping[str, Path], held: Callable[[str], Tensor]) -> Tensors:
    def stored(name: str) -> Tensor:
        tensor = held(name)
        if reason := _reason_against(tensor):
            raise InputError(f"{files[name]}: {name!r} {reason}")
        return tensor

    return Tensors(files, lambda name: tuple(held(name).shape), stored)


def _reason_against(tensor: Tensor) -> str | None:
    """Return why a tensor cannot be read; None if it can."""
    if tensor.layout != torch.strided:
        return "is a sparse tensor; save what its to_dense() returns"
    if tensor.is_meta:
        return "is a meta tensor: its values were never saved"
    claimed, holds = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > holds:  # strides of zero repeat what there is
        return f"declares {claimed:,} bytes but stores {holds:,}; save its .contiguous() form"
    return None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of one pickle, which may be a state dict, one within a dictionary, or a single tensor.

    Raises:
        InputError: it is missing, damaged, holds no tensors, or more than tensors and plain values.
    """
    with readable(path, "file of torch.save"):
        content = _content(path)
    if isinstance(content, Tensor):
        return {"weight": content.detach()}
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    named = content if isinstance(content, dict) else {}
    tensors = {str(name): value.detach() for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path}: contains no tensors")
    return tensors


def _content(path: Path) -> Any:
    """Load a pickle without the classes of others: those of NumPy are skipped, and in a checkpoint of Lightning all.

    Lightning keeps the weights apart from hyperparameters and states of callbacks, which may be anything. Stand-ins
    take the place of what is skipped: none of it is imported or called.
    """
    mapped, ignored = _check_archive(path), dict(IGNORED)
    while True:
        try:
            with (
                warnings.catch_warnings(),
                torch.serialization.safe_globals([(stand_in, name) for name, stand_in in ignored.items()]),
            ):
                warnings.simplefilter("ignore")  # torch's remarks on pickles that others made
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except (pickle.UnpicklingError, RuntimeError) as error:
            if (more := _stand_in(error, ignored)) is not None and _is_of_lightning(path):
                ignored |= more
                continue
            if reason := _reason_of(error, path):
                raise InputError(f"{path}: {reason}") from None
            raise


def _stand_in(error: Exception, ignored: Mapping[str, type]) -> dict[str, type] | None:
    """Return what should stand for the class that torch has stopped at, by its name; None if nothing can."""
    named = _named(error)
    if named is None or len(ignored) >= MOST_CLASSES:
        return None
    module, _, name = named.rpartition(".")
    if named not in ignored:  # of the same name, which torch says if it stops there again
        return {named: type(name, (_Ignored,), {"__module__": module})}
    filled = next((kind for sign, kind in FILLED.items() if sign in str(error)), None)
    return None if filled is None or ignored[named] is filled else {named: filled}


def _named(error: Exception) -> str | None:
    """Return the class or function that torch has stopped at."""
    if builtin := BUILTIN.search(str(error)):
        return f"builtins.{builtin[1]}"
    named = NAMED.search(str(error))
    return named[1] if named else None


def _is_of_lightning(path: Path) -> bool:
    with path.open("rb") as file:
        return LIGHTNING in file.read(HEAD)


def _check_archive(path: Path) -> bool:
    """Return whether a file can be mapped: those from before torch 1.6 are no archives. Refuses archives of others."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise InputError(
            f"{path}: a TorchScript archive, a program with its weights; save only the weights: "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(
            f"{path}: a compressed archive, which torch.save does not write; unpack it and zip it again with -0"
        )
    return True


def _reason_of(error: Exception, path: Path) -> str | None:
    """Return why torch does not load a pickle that is whole; None if it is damaged."""
    foreign = _named(error)
    if foreign is None and not any(sign in str(error) for sign in NOT_OF_TORCH):
        return None
    try:
        foreign = foreign or _first_class(path)
    except Exception:  # pickletools raises many on what is no pickle
        return None
    if foreign is None:
        return "a pickle that torch.save did not write; save its matrix with numpy.save"
    return (
        f"contains more than tensors, and could run arbitrary code when loaded ({foreign}); save only its matrices "
        "(model.state_dict(), numpy.save), or convert it to safetensors"
    )


def _first_class(path: Path) -> str | None:
    """Return the first class or function that a pickle names, from its instructions, of which none is carried out."""
    memo: list[str] = []
    strings: list[str] = []
    with path.open("rb") as file:
        for instruction, argument, _ in pickletools.genops(file):
            named = None
            if instruction.name in ("GLOBAL", "INST"):
                named = str(argument).replace(" ", ".")
            elif instruction.name == "STACK_GLOBAL":
                named = ".".join(strings[-2:])
            if named and named not in HARMLESS:
                return named
            if instruction.name == "MEMOIZE":
                memo.append(strings[-1] if strings else "")
            elif instruction.name in ("BINGET", "LONG_BINGET"):
                strings = [*strings[-1:], memo[int(str(argument))]]
            elif isinstance(argument, str):
                strings = [*strings[-1:], argument]
    return None
