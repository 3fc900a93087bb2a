"""What a param group and the state of a parameter hold, by key."""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

__all__ = ["MomentDtype", "ParamGroup", "State"]

#: What first moments are kept in; None: float32 (float64 for float64 parameters).
MomentDtype = torch.dtype | Literal["8bit"] | None


class ParamGroup(TypedDict, total=False):
    """A param group of these optimizers. ``coupled_adam.CoupledAdam`` says what each hyperparameter does."""

    params: list[Tensor]
    param_names: list[str]
    lr: float | Tensor
    lr_factor: float
    """What multiple of the optimizer's learning rate ``lr`` is, for loops that set it; else 1."""
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    scalar_vector_weight_decay: float
    """Of Adams: decay of what takes no spectral decay."""
    second_moment: Literal["elementwise", "vocabulary"]
    """Whether each element has a second moment, or the rows of a matrix share one."""
    direction: str
    """A key of ``directions.DIRECTION``."""
    decay: Literal["decoupled", "spectral"]
    """What the decay takes off: θ itself, or the leading singular triple of a matrix."""
    center: bool
    coupling_scale: float
    coupling_factor: float
    max_grad_norm: float | None
    maximize: bool
    exp_avg_dtype: MomentDtype
    capturable: bool
    fused: bool | None


class State(TypedDict, total=False):
    """The state of a parameter. Tensors are placed as the parameter is; shapes are those of a (V, H) parameter."""

    step: Tensor
    """Steps taken: float32, of one element, on the CPU or beside the parameter."""
    exp_avg: Tensor
    """First moment, (V, H)."""
    exp_avg_codes: Tensor
    """The first moment in 8 bits instead: codes, (V, H), int8. Not "exp_avg", so that nobody takes them for it."""
    exp_avg_scales: Tensor
    """Their scales, (V, ⌈H / 256⌉), float32."""
    exp_avg_sq: Tensor
    """Second moment, (V, H), or (1, H) where the rows share it."""
    u: Tensor
    """Left singular vector of spectral decay, (V,)."""
    master: Tensor
    """Master weights of Adams_ZeRO, (V, H)."""


def parameter_name(group: Mapping[str, Any], i: int) -> str:
    """Name of the group's i-th parameter if the optimizer was given names, else its index and shape."""
    names = group.get("param_names")
    return f"parameter {names[i]!r}" if names else f"parameter {i} of shape {tuple(group['params'][i].shape)}"
