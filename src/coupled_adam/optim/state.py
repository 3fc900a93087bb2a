"""The state of a parameter: which tensors, their dtypes and placement."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coupled_adam.optim.backends.torch_adamw import is_plain_adamw
from coupled_adam.optim.checks import Form
from coupled_adam.optim.equations import has_numbers, working_dtype
from coupled_adam.optim.job import Job, is_spectral
from coupled_adam.optim.moments import ROWS, dtypes_of, has_rows, keys_of, local_moment, new_moment, new_rows
from coupled_adam.optim.reductions import ProcessGroups, holders, local, reduced_like, vocabulary_group
from coupled_adam.optim.spectral import first_u, takes_spectral_decay
from coupled_adam.optim.typed import ParamGroup, State


def new_state(param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Make the state before the first step."""
    dtype = working_dtype(param)
    part = local(param)
    coupled = group["second_moment"] == "vocabulary"
    row = reduced_like(param, part.new_zeros((1, *part.shape[1:]), dtype=dtype), 0) if coupled else None
    state = {
        # Not of zeros(): a fake tensor made like this remembers its number, which torch's AdamW reads.
        "step": torch.tensor(0.0, dtype=torch.float32, device=step_device(param, group)),
        **new_moment(param, group),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype) if row is None else row,
        **new_rows(param, group),
    }
    if group["decay"] == "spectral" and takes_spectral_decay(param):
        if vocabulary_group(param) is not None:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is a vocabulary shard (vocabulary_group), and spectral "
                "decay does not know its other rows; couple it, or set param.use_spectral_decay = False"
            )
        state["u"] = first_u(param)
    return state


def job_of(whole: Tensor, grad: Tensor | None, state: State, group: ParamGroup) -> Job:
    """Make the job of a parameter; without a gradient it is that of one which only other processes have."""
    param = local(whole)
    held = torch.zeros_like(param) if grad is None else local(grad)
    made = Job(whole, state, group, param, held, local_moment(state), local(state["exp_avg_sq"]))
    made.shared_over, made.present = shared_over(whole, state, group), grad is not None
    if has_rows(group):
        made.exp_avg_sq_rows = local(state["exp_avg_sq_rows"])
    return made


def shared_over(param: Tensor, state: State, group: ParamGroup) -> ProcessGroups:
    """The process groups over which the reductions of a parameter communicate."""
    if is_spectral(state, group):
        return holders(param)
    return holders(param, 0) if group["second_moment"] == "vocabulary" or group["center"] else ()


def step_device(param: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Return where the step count lies: on the CPU, where reading it is free, or beside the parameter.

    There torch's fused kernels want it, and a captured graph. Scaled gradients take it there too (``job.advance``).
    """
    beside = group["capturable"] or is_plain_adamw(param, group)
    return param.device if beside and param.device.type != "meta" else torch.device("cpu")


def form_of_state(param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Form:
    """Return dtype and device of what must be in a state, by its key. That of the step count may also be the CPU."""
    dtype, device = working_dtype(param), param.device
    form: Form = {"step": (torch.float32, step_device(param, group)), "exp_avg_sq": (dtype, device)}
    for key, kept_in in zip(keys_of(state), dtypes_of(state, param, group), strict=True):
        form[key] = (kept_in, device)
    if has_rows(group):
        form[ROWS] = (dtype, device)
    if "u" in state:
        form["u"] = (dtype, device)
    return form


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Name the moments of a state that no step can use: infinite, NaN, or a negative second one."""
    found = []
    squares = {"exp_avg_sq", ROWS} & state.keys()
    for key in (keys_of(state)[-1], *sorted(squares)):  # of codes and scales, the scales
        x = local(state[key])
        if not has_numbers(x):
            continue
        fine = ((x >= 0) & (x < math.inf)).all() if key in squares else x.isfinite().all()
        found += [] if fine else [key]
    return found
