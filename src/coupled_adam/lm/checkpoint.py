"""Save and resume, on torch.distributed.checkpoint: a folder ``step-00001000/`` holds ``dcp/`` and ``state.json``."""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from coupled_adam.files import write_json, written_whole


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> Path:
    """Write a checkpoint, whole or not at all, then delete the older ones. ``state`` is plain values for state.json."""
    path = folder / f"step-{step:08d}"
    with written_whole(path) as aside, _single_process():
        model_state, optimizer_state = get_state_dict(model, optimizer)
        save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=aside / "dcp", no_dist=True)
        write_json(aside / "state.json", {"step": step, **state})
    for older in folder.glob("step-*"):
        if older != path:
            shutil.rmtree(older)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``; what was being written when a process died is passed over."""
    return max((p.parent for p in folder.glob("step-*/state.json")), default=None)


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Load the weights, and the optimizer's state if one is given, in place. Returns what state.json holds."""
    with _single_process():
        if optimizer is None:
            load({"model": model.state_dict()}, checkpoint_id=path / "dcp", no_dist=True)
        else:
            model_state, optimizer_state = get_state_dict(model, optimizer)
            load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path / "dcp", no_dist=True)
            set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return state


@contextmanager
def _single_process() -> Iterator[None]:
    """Without the remarks that torch makes about a checkpoint of one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        yield
