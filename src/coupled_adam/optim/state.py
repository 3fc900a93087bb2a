"""The state of a parameter: which tensors, their dtypes and placement."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coupled_adam.optim.backends.torch_adamw import is_plain_adamw
from coupled_adam.optim.checks import Form
from coupled_adam.optim.eight_bit import EIGHT_BIT, blocks_of
from coupled_adam.optim.equations import has_numbers, working_dtype
from coupled_adam.optim.reductions import holders, local, reduced_like, rows_like, vocabulary_group
from coupled_adam.optim.spectral import first_u, takes_spectral_decay


def new_state(param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Make the state before the first step."""
    dtype = working_dtype(param)
    part = local(param)
    coupled = group["second_moment"] == "vocabulary"
    row = reduced_like(param, part.new_zeros((1, *part.shape[1:]), dtype=dtype), 0) if coupled else None
    state = {
        # Not of zeros(): a fake tensor made like this remembers its number, which torch's AdamW reads.
        "step": torch.tensor(0.0, dtype=torch.float32, device=step_device(param, group)),
        **_new_moment(param, group),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype) if row is None else row,
    }
    if group["decay"] == "spectral" and takes_spectral_decay(param):
        if vocabulary_group(param) is not None:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is a vocabulary shard (vocabulary_group), and spectral "
                "decay does not know its other rows; couple it, or set param.use_spectral_decay = False"
            )
        state["u"] = first_u(param)
    return state


def _new_moment(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make a first moment of 0, in the form that the group keeps it in."""
    if group["exp_avg_dtype"] != "8bit" or group["second_moment"] != "vocabulary":
        dtype = torch.bfloat16 if group["exp_avg_dtype"] == torch.bfloat16 else working_dtype(param)
        return {"exp_avg": torch.zeros_like(param, dtype=dtype)}
    if holders(param, 1):
        raise ValueError(
            f"a coupled parameter of shape {tuple(param.shape)} is sharded over its columns, and exp_avg_dtype='8bit' "
            "needs whole rows: shard it over the vocabulary, or choose exp_avg_dtype=torch.bfloat16"
        )
    part = local(param)
    scales = part.new_zeros((len(part), blocks_of(part.shape[1])), dtype=torch.float32)
    return dict(zip(EIGHT_BIT, (torch.zeros_like(param, dtype=torch.int8), rows_like(param, scales)), strict=True))


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
    if EIGHT_BIT[0] in state:
        form |= {EIGHT_BIT[0]: (torch.int8, device), EIGHT_BIT[1]: (torch.float32, device)}
    else:
        form["exp_avg"] = (torch.bfloat16 if group["exp_avg_dtype"] == torch.bfloat16 else dtype, device)
    if "u" in state:
        form["u"] = (dtype, device)
    return form


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Name the moments of a state that no step can use: infinite, NaN, or a negative second one."""
    found = []
    for key in ("exp_avg", EIGHT_BIT[1], "exp_avg_sq"):
        x = local(state[key]) if key in state else None
        if x is None or not has_numbers(x):
            continue
        fine = ((x >= 0) & (x < math.inf)).all() if key == "exp_avg_sq" else x.isfinite().all()
        found += [] if fine else [key]
    return found
