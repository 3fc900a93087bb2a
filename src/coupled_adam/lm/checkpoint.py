"""Save and resume, on torch.distributed.checkpoint: a folder ``step-00001000/`` holds ``dcp/`` and ``state.json``."""

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from coupled_adam.errors import InputError
from coupled_adam.files import move_into_place, write_json
from coupled_adam.lm.parallel import World


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    state: dict[str, Any],
    world: World,
    keep_every: int | None = None,
) -> Path:
    """Write a checkpoint, whole or not at all, then delete the older ones but the multiples of ``keep_every`` steps.

    ``state`` is plain values for state.json. All processes call this together and write their own shards.
    """
    path = folder / f"step-{step:08d}"
    name = world.from_main(lambda: os.getpid())
    aside = folder / f".{path.name}.{name}.tmp"
    try:
        if world.main:
            aside.mkdir(parents=True)
        world.wait()
        with quiet():
            model_state, optimizer_state = get_state_dict(model, optimizers)
            content = {"model": model_state, "optimizer": optimizer_state}
            save(content, checkpoint_id=aside / "dcp", no_dist=world.size == 1)
        if world.main:
            write_json(aside / "state.json", {"step": step, **state})
            move_into_place(aside, path)
            for older in folder.glob("step-*"):
                kept = keep_every is not None and step_of(older) % keep_every == 0
                if older != path and not kept:
                    shutil.rmtree(older)
        world.wait()
    finally:
        if world.main:
            shutil.rmtree(aside, ignore_errors=True)
    return path


def step_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``; what was being written when a process died is passed over."""
    return max((p.parent for p in folder.glob("step-*/state.json")), default=None)


def load_checkpoint(path: Path, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> dict[str, Any]:
    """Load the weights, and the state of the optimizers given, in place. Returns what state.json holds.

    The number of processes, and how they share the model, may differ from those that saved it. Raises InputError if the
    checkpoint is damaged.
    """
    alone = not (dist.is_available() and dist.is_initialized())
    with _damage_named(path), quiet():
        reader = _Reader(path / "dcp")
        if not optimizers:
            model_state = get_model_state_dict(model)
            load({"model": model_state}, storage_reader=reader, no_dist=alone)
            set_model_state_dict(model, model_state)
        else:
            model_state, optimizer_state = get_state_dict(model, optimizers)
            load({"model": model_state, "optimizer": optimizer_state}, storage_reader=reader, no_dist=alone)
            set_state_dict(model, optimizers, model_state_dict=model_state, optim_state_dict=optimizer_state)
    state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return state


def tensor_names(path: Path) -> set[str]:
    """What the tensors of a checkpoint are called: ``model.NAME``, ``optimizer.state.NAME.exp_avg`` and the like.

    Raises:
        InputError: the checkpoint is damaged.
    """
    with _damage_named(path):
        stored = _Reader(path / "dcp").read_metadata().state_dict_metadata
    return {name for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def load_tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint, by name, whole and as they were saved; the others are not read.

    Raises:
        InputError: the checkpoint is damaged, or lacks one of them.
    """
    content: dict[str, Tensor] = {}
    with _damage_named(path), quiet():
        reader = _Reader(path / "dcp")
        known = reader.read_metadata().state_dict_metadata
        for name in names:
            stored = known.get(name)
            if not isinstance(stored, TensorStorageMetadata):
                raise InputError(f"{path}: this checkpoint holds no {name}")
            content[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
        load(dict(content), storage_reader=reader, no_dist=True)
    return content


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """An InputError for whatever reading a damaged checkpoint raises."""
    try:
        yield
    except InputError:
        raise
    except (Exception, CheckpointException) as error:  # of every kind; torch's own is no Exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:160]
        raise InputError(f"{path}: damaged ({reason})") from None


class _Reader(FileSystemReader):
    """Reads a checkpoint that may be somebody else's: torch unpickles the description of one without any check."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        return metadata


class _Unpickler(pickle.Unpickler):
    """Knows the classes of which a description consists."""

    parts = frozenset(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ) | {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib._local", "PosixPath"),
        ("pathlib._local", "WindowsPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if (module, name) in self.parts or isinstance(found, torch.dtype):
            # Python 3.13 calls its module otherwise than the versions before and after.
            return super().find_class("pathlib" if module == "pathlib._local" else module, name)
        raise pickle.UnpicklingError(f"its description names {module}.{name}, which none does")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks that torch makes about a checkpoint of one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        yield
