"""The second half of a step: parameters move, each by what takes it fastest."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coupled_adam.optim import dispatch, triton_launch, update
from coupled_adam.optim.center import keep_column_sums, move_centered_, unless
from coupled_adam.optim.equations import Number
from coupled_adam.optim.exchange import Known, Work, advance
from coupled_adam.optim.reductions import local


def move(known: Known, clip: Number) -> None:
    """Move all parameters: group by group those that torch's AdamW takes, in one call, and then the others."""
    for _, items in itertools.groupby(known.work, key=lambda item: item.index[0]):
        _move_group(list(items), known, clip)


def _move_group(items: Sequence[Work], known: Known, clip: Number) -> None:
    group, halt = items[0].group, items[0].halt
    torchs: list[Work] = []
    together: dict[Any, list[Work]] = {}
    alone: list[Work] = []
    for item in items:
        if item.coupled or item.spectral:
            alone.append(item)
        elif dispatch.takes_torchs_adamw(*item.tensors, group, clip, item.halt):
            torchs.append(item)
        elif dispatch.moves_together(*item.tensors, group["direction"]):
            together.setdefault(_likeness(item), []).append(item)
        else:
            alone.append(item)
    if torchs:
        steps = [item.state["step"] for item in torchs]
        params, grads, exp_avgs, exp_avg_sqs = _columns(torchs)
        dispatch.adamw_(params, grads, exp_avgs, exp_avg_sqs, steps, group, clip, halt)
    for alike in together.values():
        _move_together(alike, clip)
    for item in alone:
        _move_one(item, known, clip)


def _columns(items: Sequence[Work]) -> list[list[Tensor]]:
    """List parameters, gradients, first and second moments of this process."""
    return [list(column) for column in zip(*(item.tensors for item in items), strict=True)]


def _likeness(item: Work) -> tuple[Any, ...]:
    """Return what parameters of a group must have in common to be moved by one launch, and should to be moved fast."""
    step: Tensor = item.state["step"]
    even = item.tensors[0].numel() % triton_launch.EVEN == 0
    return (*((x.dtype, x.device) for x in item.tensors), step.item() if step.device.type == "cpu" else None, even)


def _move_together(items: Sequence[Work], clip: Number) -> None:
    step = items[0].steps + 1
    if isinstance(step, Tensor):
        step = torch.stack([item.state["step"] for item in items]).to(step.dtype) + 1
    params, grads, exp_avgs, exp_avg_sqs = _columns(items)
    c, direction = items[0].coefficients(step, clip), items[0].group["direction"]
    triton_launch.move_many_(params, exp_avgs, exp_avg_sqs, grads, c, direction, step, items[0].halt)
    advance(items)


def _move_one(item: Work, known: Known, clip: Number) -> None:
    mean = known.mean(item, clip) if item.coupled else None
    spectral = known.triple(item) if item.spectral else None
    step, direction = item.steps + 1, item.group["direction"]
    c = item.coefficients(step, clip)
    if mean is None:
        param, grad, exp_avg, exp_avg_sq = item.tensors
        dispatch.move_elements_(param, exp_avg, exp_avg_sq, grad, c, direction, step, spectral, item.halt)
    else:
        param, grad = local(item.param), local(item.grad)
        root = dispatch.root_of_rows_(local(item.state["exp_avg_sq"]), mean[:1], c, item.halt)
        if not item.foreseen:
            dispatch.move_rows_(param, item.moment, grad, root, c, direction, step, spectral, item.halt)
        else:
            exp_avg = local(item.state["exp_avg"])
            after = unless(item.rests, update.mean_moved(mean[1:], root, c, direction))
            sums = move_centered_(param, exp_avg, grad, root, c, direction, step, after, item.halt)
            keep_column_sums(item.param, item.state["exp_avg"], sums)
    advance([item])
