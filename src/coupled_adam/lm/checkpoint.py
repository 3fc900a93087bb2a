"""Save and resume, on torch.distributed.checkpoint.

A directory ``step-00001000/`` holds ``dcp/``, written by the ranks together, and ``state.json``, with the checksums of
what is in it and a digest of itself. Nothing else in the directory of the checkpoints is read or removed.

A checkpoint may be somebody else's: reading it runs no code that it carries.
"""

import io
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import TypedDict

from coupled_adam.errors import InputError, one_line
from coupled_adam.files import checksums, read_sealed, remove_leftovers, swap, verify, write_sealed
from coupled_adam.lm.metrics_jsonl import Number
from coupled_adam.lm.parallel import World
from coupled_adam.progress import warn

#: What torch says where a file cannot be written, with or without the operating system's word on it.
WRITE_FAILED = ("inline_container", "No space left", "File too large", "Disk quota exceeded")

#: What to do about a damaged checkpoint.
REMEDY = "rerun the same command: it resumes from the previous checkpoint, if there is one"

#: Of state.json. Before it had a format, it had no digest of itself either.
FORMAT = 2

#: The names of checkpoints: the step in eight digits, or in as many as it has.
NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")


class Sum(TypedDict):
    """Size and checksum of a file."""

    bytes: int
    xxh3_128: str


class State(TypedDict):
    """What state.json holds."""

    step: int
    checksums: dict[str, Sum]
    format: NotRequired[int]
    corpus: NotRequired[str]
    drift: NotRequired[dict[str, list[Number]]]


def save_checkpoint(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    state: dict[str, Any],
    world: World,
    *,
    keep_last: int = 2,
    keep_every: int | None = None,
    kept: Collection[int] = (),
) -> Path:
    """Write a checkpoint, whole or not at all, then delete older ones.

    All ranks call this together and write their own shards.

    Args:
        directory: of all checkpoints of the run.
        step: number of steps done.
        model, optimizers: what to save.
        state: plain values for state.json: the fingerprint of the ``corpus``, and what ``State`` has else.
        world: the ranks of the run.
        keep_last: how many of the newest checkpoints stay, this one included.
        keep_every: checkpoints at multiples of this many steps stay too.
        kept: steps whose checkpoints stay too.

    Raises:
        OSError: the disk is full, or cannot be written to. What was there before is intact.
    """
    path = directory / f"step-{step:08d}"
    name = world.broadcast_from_main(lambda: os.getpid())
    aside = directory / f".{path.name}.{name}.tmp"
    try:
        if world.is_main_process:
            aside.mkdir(parents=True)
        world.wait()
        with quiet():
            model_state, optimizer_state = get_state_dict(model, optimizers)
            content = {"model": model_state, "optimizer": optimizer_state}
            size = sum(world.gather(_bytes(content)))
            with _full_disk_named(aside, size):
                save(content, checkpoint_id=aside / "dcp", no_dist=world.size == 1)
        # Each rank reads back what it has just written; the description is rank 0's.
        own = sorted((aside / "dcp").glob(f"__{world.rank}_*"))
        own += [aside / "dcp" / ".metadata"] if world.is_main_process else []
        files = {k: v for part in world.gather(checksums(aside, own)) for k, v in part.items()}
        if world.is_main_process:
            with _full_disk_named(aside, size):
                write_sealed(aside / "state.json", {"format": FORMAT, "step": step, **state, "checksums": files})
                if path.is_symlink():
                    path.unlink()  # what it points at is left alone
                swap(aside, path)
            _delete_older(directory, path, keep_last, keep_every, kept)
        world.wait()
    finally:
        if world.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
    return path


def _delete_older(directory: Path, newest: Path, keep_last: int, keep_every: int | None, kept: Collection[int]) -> None:
    """Delete checkpoints before ``newest``. Links, and directories of other names, are somebody else's."""
    older = [path for path in _named_as_ours(directory) if step_of(path) < step_of(newest)]
    for path in older[max(keep_last - 1, 0) :]:
        milestone = step_of(path) in kept or (keep_every is not None and step_of(path) % keep_every == 0)
        if not (path.is_symlink() or milestone):
            shutil.rmtree(path)


def remove_unfinished(directory: Path) -> None:
    """Remove what processes that were killed while they wrote a checkpoint left in ``directory``.

    Under the lock of the run: nobody else may be writing there.
    """
    remove_leftovers(directory, lambda name: NAME.fullmatch(name) is not None)


def _bytes(content: Any) -> int:
    """Size of the tensors that this rank holds."""
    if isinstance(content, dict):
        return sum(map(_bytes, content.values()))
    if isinstance(content, DTensor):
        content = content.to_local()
    return content.numel() * content.element_size() if isinstance(content, Tensor) else 0


@contextmanager
def _full_disk_named(aside: Path, size: int) -> Iterator[None]:
    """Raise one OSError that names the directory and the space needed, for whatever a full disk makes torch raise."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:  # the last is no Exception
        if not isinstance(error, OSError) and not any(sign in str(error) for sign in WRITE_FAILED):
            raise
        free = shutil.disk_usage(aside.parent).free / 2**20
        reason = f"{size / 2**20:,.1f} MiB needed, {free:,.1f} MiB free"
        reason = f"{error.strerror}: {reason}" if isinstance(error, OSError) and error.strerror else reason
        raise OSError(
            f"{aside.parent}: a checkpoint could not be written ({reason}). Earlier checkpoints are intact: free "
            "some space, then rerun the same command to resume"
        ) from None


def step_of(checkpoint: Path) -> int:
    """Return the number of steps after which a checkpoint was saved."""
    found = NAME.fullmatch(checkpoint.name)
    if found is None:
        raise InputError(f"{checkpoint}: not a checkpoint; checkpoints are named step-, followed by eight digits")
    return int(found[1])


def _named_as_ours(directory: Path) -> list[Path]:
    """List the directories that have the name of a checkpoint, newest first."""
    found: Iterable[Path] = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in found if NAME.fullmatch(path.name) and path.is_dir()), key=step_of, reverse=True)


def complete_checkpoints(directory: Path) -> list[Path]:
    """List the complete checkpoints in ``directory``, newest first; what was being written at a crash is skipped.

    Copies and whatever else has another name than ``step-`` and eight digits do not count.
    """
    return [path for path in _named_as_ours(directory) if (path / "state.json").exists()]


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint in ``directory``."""
    return next(iter(complete_checkpoints(directory)), None)


def intact_checkpoint(directory: Path, world: World, corpus: str | None = None) -> Path | None:
    """Return the newest checkpoint whose files are as they were written; log those that are passed over.

    All ranks call this together. ``corpus`` is the fingerprint of the run's corpus, if that is known.

    Raises:
        InputError: there are checkpoints, and all of them are damaged; the message names a file.
    """
    damage: list[InputError] = []
    for path in world.broadcast_from_main(lambda: complete_checkpoints(directory)):
        try:
            verify_checkpoint(path, world, corpus)
        except InputError as error:
            damage.append(error)
            continue
        if damage and world.is_main_process:
            warn(f"{damage[0]}. Resuming from {path}")
        return path
    if damage:
        raise InputError(f"{str(damage[0]).partition(';')[0]}; no checkpoint is left to resume from: start a new run")
    return None


def verify_checkpoint(path: Path, world: World | None = None, corpus: str | None = None) -> State:
    """Check the files of a checkpoint against their checksums; the ranks share the work. Returns state.json.

    Raises:
        InputError: a file is missing or damaged, or it is the state of another step or corpus than it should be; the
            message names the file. On all ranks alike.
    """
    world = world or World()
    state = world.broadcast_from_main(lambda: _read_state(path, corpus))
    recorded, problem = state["checksums"], None
    try:
        verify(path, {name: recorded[name] for name in sorted(recorded)[world.rank :: world.size]}, REMEDY)
    except InputError as error:
        problem = str(error)
    for found in world.gather(problem):
        if found is not None:
            raise InputError(found)
    return state


def _read_state(path: Path, corpus: str | None) -> State:
    file = path / "state.json"
    state = read_sealed(file, State, REMEDY, older=True)
    if state.get("format", FORMAT) != FORMAT:
        raise InputError(f"{file}: format {state.get('format')}, but this version reads format {FORMAT}; {REMEDY}")
    if state["step"] != step_of(path):
        raise InputError(f"{file}: damaged (step {state['step']}, in a directory of step {step_of(path)}); {REMEDY}")
    if corpus is not None and state.get("corpus", corpus) != corpus:
        raise InputError(f"{file}: damaged (corpus {state.get('corpus')}, the run's is {corpus}); {REMEDY}")
    return state


def load_checkpoint(
    path: Path, model: nn.Module, optimizers: Sequence[Optimizer] = (), world: World | None = None
) -> State:
    """Load the weights, and the state of the optimizers given, in place. Returns what state.json holds.

    The number of ranks, and how they share the model, may differ from those that saved it.

    Raises:
        InputError: the checkpoint is damaged; the message names the file.
    """
    state = verify_checkpoint(path, world)
    alone = not (dist.is_available() and dist.is_initialized())
    with _damage_named(path), quiet():
        reader = _Reader(path / "dcp")
        if not optimizers:
            model_state = get_model_state_dict(model)
            load({"model": model_state}, storage_reader=reader, planner=_Planner(), no_dist=alone)
            set_model_state_dict(model, model_state)
        else:
            model_state, optimizer_state = get_state_dict(model, optimizers)
            groups = cast(list[dict[str, Any]], optimizer_state["param_groups"])
            known = reader.read_metadata().state_dict_metadata
            newer = [_not_stored(group, f"optimizer.param_groups.{i}", known) for i, group in enumerate(groups)]
            content = {"model": model_state, "optimizer": optimizer_state}
            load(content, storage_reader=reader, planner=_Planner(), no_dist=alone)
            for group, settings in zip(groups, newer, strict=True):
                group |= settings
            set_state_dict(model, optimizers, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return state


def _not_stored(group: dict[str, Any], name: str, known: Collection[str]) -> dict[str, Any]:
    """Take out of a group the settings that there were not yet when the checkpoint was saved: the run's own stay."""
    return {key: group.pop(key) for key in list(group) if key != "params" and f"{name}.{key}" not in known}


def tensor_names(path: Path) -> set[str]:
    """List the tensors of a checkpoint: ``model.NAME``, ``optimizer.state.NAME.exp_avg`` and the like.

    Raises:
        InputError: the checkpoint is damaged.
    """
    with _damage_named(path):
        stored = _Reader(path / "dcp").read_metadata().state_dict_metadata
    return {name for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def load_tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Load some tensors of a checkpoint by name, whole and as they were saved.

    Raises:
        InputError: the checkpoint is damaged, or lacks one of them.
    """
    verify_checkpoint(path)
    content: dict[str, Tensor] = {}
    with _damage_named(path), quiet():
        reader = _Reader(path / "dcp")
        known = reader.read_metadata().state_dict_metadata
        for name in names:
            stored = known.get(name)
            if not isinstance(stored, TensorStorageMetadata):
                raise InputError(f"{path}: this checkpoint contains no {name}")
            content[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
        load(dict(content), storage_reader=reader, planner=_Planner(), no_dist=True)
    return content


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Raise an InputError for whatever reading a damaged checkpoint raises."""
    try:
        yield
    except InputError:
        raise
    except (Exception, CheckpointException) as error:  # of every kind; torch's own is no Exception
        reason = one_line(next((line for line in reversed(str(error).splitlines()) if line.strip()), error), 160)
        raise InputError(f"{path}: damaged ({reason})") from None


class _Planner(DefaultLoadPlanner):
    """Unpickles the values that are no tensors, such as learning rates, without running what they may ask for."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain, name = io.BytesIO(), read_item.dest_index.fqn
        try:
            torch.save(torch.load(value, weights_only=True), plain)
        except Exception:
            raise pickle.UnpicklingError(f"{name} contains more than plain values and was not loaded") from None
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _Reader(FileSystemReader):
    """Reads the description of a checkpoint, which torch unpickles without any check."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"{info.relative_path} is not a file of this checkpoint")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        return metadata


class _Unpickler(pickle.Unpickler):
    """Loads only the classes that such a description consists of."""

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
        raise pickle.UnpicklingError(f"unexpected class {module}.{name} in checkpoint metadata")


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the remarks that torch makes about a checkpoint of one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        yield
