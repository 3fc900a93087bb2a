"""What a param group and the state of a parameter hold, by key."""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

__all__ = ["MomentDtype", "ParamGroup", "State"]

MomentDtype = torch.dtype | Literal["8bit"] | None
"""How first moments are stored: a floating dtype, ``"8bit"``, or None for float32 (float64 for float64 parameters)."""


class ParamGroup(TypedDict, total=False):
    """A param group of these optimizers. ``coupled_adam.CoupledAdam`` explains the hyperparameters."""

    params: list[Tensor]
    """The parameters."""
    param_names: list[str]
    """Their names, if the optimizer was given names."""
    lr: float | Tensor
    """Learning rate η ≥ 0."""
    lr_factor: float
    """``lr`` as a multiple of the optimizer's learning rate, for loops that set the rate in every step; 1 if
    missing."""
    betas: tuple[float, float]
    """Decay rates of the moments, each in [0, 1)."""
    eps: float
    """ε ≥ 0."""
    weight_decay: float
    """λ ≥ 0, decoupled or spectral as ``decay`` says."""
    scalar_vector_weight_decay: float
    """Adams only: decoupled decay of what takes no spectral decay."""
    second_moment: Literal["elementwise", "vocabulary"]
    """Whether each element has a second moment, or the rows of a matrix share one."""
    direction: str
    """``"ratio"`` for m̂/(√v̂ + ε) of Adam, ``"atan2"`` for that of Adams."""
    decay: Literal["decoupled", "spectral"]
    """Whether the decay shrinks the parameter itself, or the leading singular value of a matrix."""
    center: bool
    """Whether every step keeps the mean of the rows of a matrix at 0."""
    coupling_scale: float
    """s > 0, multiplies a coupled second moment."""
    coupling_factor: float
    """κ in [0, 1], the share of the squared first moment in the second one."""
    row_exponent: float
    """α in [0, 1]: for row i a coupled second moment is multiplied by (r_i / r̄)^α, r_i being that of the row."""
    max_grad_norm: float | None
    """Bound on the global norm of all gradients, the same in all groups; None for none."""
    maximize: bool
    """Whether to maximize the objective."""
    exp_avg_dtype: MomentDtype
    """How the first moment is stored."""
    capturable: bool
    """Whether the step count is kept on the GPU, for CUDA graphs."""
    fused: bool | None
    """Which implementation is used: the fastest (None), plain operations (False), or a fast one or an error (True)."""


class State(TypedDict, total=False):
    """The state of one parameter. Tensors are placed like the parameter; shapes are those for a (V, H) parameter."""

    step: Tensor
    """Steps taken: float32, one element, on the CPU or on the device of the parameter."""
    exp_avg: Tensor
    """First moment, (V, H)."""
    exp_avg_codes: Tensor
    """The 8-bit first moment: codes, (V, H), int8. Stored instead of ``exp_avg``."""
    exp_avg_scales: Tensor
    """Scales of the 8-bit first moment, (V, ⌈H / 256⌉), float32."""
    exp_avg_sq: Tensor
    """Second moment, (V, H), or (1, H) where the rows share it."""
    exp_avg_sq_rows: Tensor
    """Second moment of each row, (V, 1); with a ``row_exponent`` only."""
    u: Tensor
    """Left singular vector of spectral decay, (V,)."""
    master: Tensor
    """Master weights of Adams_ZeRO, (V, H)."""


def parameter_name(group: Mapping[str, Any], i: int) -> str:
    """Name of the group's i-th parameter if the optimizer was given names, else its index and shape."""
    names = group.get("param_names")
    return f"parameter {names[i]!r}" if names else f"parameter {i} of shape {tuple(group['params'][i].shape)}"
