"""A step of one parameter, given to a backend directly."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coupled_adam.optim.eight_bit import EightBit, Moment
from coupled_adam.optim.job import Job
from coupled_adam.optim.moments import EIGHT_BIT, ROWS
from coupled_adam.optim.reference import DEFAULTS
from coupled_adam.optim.spectral import RankOne
from coupled_adam.optim.state import job_of

#: What the equations need, and what a backend asks for besides.
GROUP: dict[str, Any] = DEFAULTS | {
    "lr": 0.01,
    "betas": (0.9, 0.95),
    "weight_decay": 0.1,
    "exp_avg_dtype": None,
    "capturable": False,
    "fused": None,
}


def job(
    tensors: Sequence[Tensor | EightBit],
    shared: bool | None = None,
    step: float | Tensor = 1,
    triple: RankOne | None = None,
    **group: Any,
) -> Job:
    """A job on copies of parameter, gradient, first and second moment; a second moment of another shape is shared."""
    param, grad, exp_avg, exp_avg_sq = tensors
    if shared is None:
        shared = exp_avg_sq.shape != param.shape
    state: dict[str, Any] = {"step": step - 1 if isinstance(step, Tensor) else torch.tensor(step - 1.0)}
    if isinstance(exp_avg, EightBit):
        state |= {key: x.clone() for key, x in zip(EIGHT_BIT, exp_avg, strict=True)}
    else:
        state["exp_avg"] = exp_avg.clone()
    state["exp_avg_sq"] = exp_avg_sq.clone()
    if group.get("row_exponent") and shared:
        state[ROWS] = torch.linspace(0, 2, len(param), dtype=exp_avg_sq.dtype)[:, None] * exp_avg_sq.mean()
    if triple is not None:
        state["u"], group = torch.zeros(param.shape[:-1]), {"decay": "spectral", **group}
    moment = "vocabulary" if shared else "elementwise"
    made = job_of(param.clone(), grad, state, {**GROUP, "second_moment": moment, "params": [param], **group})
    made.triple = triple
    return made


def stepped(backend: Any, made: Job) -> list[Moment]:
    """Parameter, first and second moment after the step of a job by a backend."""
    if made.coupled:
        made.means = backend.sums(made) / max(len(made.param), 1)
    backend.move([made])
    return [made.param, made.exp_avg, made.exp_avg_sq]
