"""What a param group may hold. Every message names the value and the remedy."""

import difflib
import math
import numbers
from typing import Any, Literal

import torch
from torch import Tensor

from coupled_adam.optim.directions import DIRECTION

#: Whether each element has a second moment of its own, or the rows of a matrix share one.
SECOND_MOMENT = ("elementwise", "vocabulary")

#: What the decay takes off: θ itself, or the leading singular triple of a matrix.
DECAY = ("decoupled", "spectral")

#: What first moments are kept in; None: float32. Those of parameters that are not coupled are float32 with "8bit" too.
StateDtype = torch.dtype | Literal["8bit"] | None
STATE_DTYPE: tuple[StateDtype, ...] = (None, torch.bfloat16, "8bit")

#: Where the step and its count may lie together, for a graph of kernels to be captured.
CAPTURE_DEVICES = ("cuda", "xpu")

#: The keys of a state whose first moment is in eight bits: codes and scales. They are not called "exp_avg", so that
#: nobody takes the codes for a moment.
EIGHT_BIT = ("exp_avg_codes", "exp_avg_scales")

#: The keys of torch's own optimizers and schedulers that a group may carry beside ours, without effect here.
FOREIGN_KEYS = frozenset({"params", "param_names", "initial_lr", "swa_lr", "name"})


def check_group(group: dict[str, Any], defaults: dict[str, Any], optimizer: str) -> None:
    """Raise ValueError or TypeError for hyperparameters or parameters that a group of ``optimizer`` cannot have."""
    _check_keys(group, defaults)
    _check_number("learning rate (lr)", group["lr"])
    _check_number("eps", group["eps"])
    _check_number("weight_decay", group["weight_decay"])
    _check_number("coupling_factor", group["coupling_factor"], maximum=1.0)
    _check_number("coupling_scale", group["coupling_scale"])
    if group["coupling_scale"] == 0:
        raise ValueError("Invalid coupling_scale: 0; it multiplies the second moment and must be positive")
    _check_betas(group["betas"])
    if "scalar_vector_weight_decay" in group:
        _check_number("scalar_vector_weight_decay", group["scalar_vector_weight_decay"])
    if group["max_grad_norm"] is not None:
        _check_number("max_grad_norm", group["max_grad_norm"])
        if group["max_grad_norm"] == 0:
            raise ValueError("Invalid max_grad_norm: 0; it must be positive, or None not to bound the norm")
    for key in ("center", "maximize", "capturable"):
        if not isinstance(group[key], bool):
            raise TypeError(f"Invalid {key}: {group[key]!r}; it must be True or False")
    if group["state_dtype"] not in STATE_DTYPE:
        raise ValueError(
            f"Invalid state_dtype: {group['state_dtype']!r}; choose torch.bfloat16, '8bit', or None for float32"
        )
    for key, known in (("second_moment", SECOND_MOMENT), ("direction", DIRECTION), ("decay", DECAY)):
        if group[key] not in known:
            raise ValueError(f"Invalid {key}: {group[key]!r}; choose from {sorted(known)}")
    for i, param in enumerate(group["params"]):
        check_param(param, parameter_name(group, i), optimizer, coupled=group["second_moment"] == "vocabulary")
        check_rows(param, parameter_name(group, i), center=group["center"])


def parameter_name(group: dict[str, Any], i: int) -> str:
    """Name of the group's i-th parameter if the optimizer was given names, else its index and shape."""
    names = group.get("param_names")
    return f"parameter {names[i]!r}" if names else f"parameter {i} of shape {tuple(group['params'][i].shape)}"


def check_param(param: Tensor, name: str, optimizer: str, *, coupled: bool) -> None:
    """Raise TypeError or ValueError for a tensor that cannot be updated, or not with a coupled second moment."""
    if not param.is_floating_point():
        remedy = "give torch.view_as_real of it" if param.is_complex() else "give floating-point parameters only"
        raise TypeError(f"{name} has dtype {param.dtype}, which {optimizer} does not update; {remedy}")
    if coupled and param.ndim != 2:
        raise ValueError(
            f"{name} has {param.ndim} dimension(s), but second_moment='vocabulary' couples the rows of a "
            "(vocabulary, hidden) matrix; put it into a group with second_moment='elementwise'"
        )


def check_rows(param: Tensor, name: str, *, center: bool) -> None:
    """Raise ValueError for a parameter that has no rows to center."""
    if center and param.ndim != 2:
        raise ValueError(
            f"{name} has {param.ndim} dimension(s), but center=True subtracts the mean row of a (vocabulary, hidden) "
            "matrix; put it into a group without center"
        )


def check_state(group: dict[str, Any], i: int, state: dict[str, Any]) -> None:
    """Raise RuntimeError if the group's i-th parameter is not what group and state were made for."""
    param: Tensor = group["params"][i]
    # While it compiles a step, torch sets the flag by itself.
    if group["capturable"] and param.device.type not in CAPTURE_DEVICES and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"capturable=True keeps the step count on the device, but {parameter_name(group, i)} is on {param.device}: "
            f"move the model to one of {CAPTURE_DEVICES}, or leave capturable False"
        )
    shape = param.shape
    coupled = group["second_moment"] == "vocabulary"
    if coupled and len(shape) != 2:
        raise RuntimeError(_flattened(group, i, "no rows to couple"))
    if group["center"] and len(shape) != 2:
        raise RuntimeError(_flattened(group, i, "no rows to center"))
    if not state:
        return
    made_for: torch.Size = state[EIGHT_BIT[0] if EIGHT_BIT[0] in state else "exp_avg"].shape
    row = torch.Size((1, *made_for[1:])) if coupled else made_for
    master: torch.Size = state["master"].shape if "master" in state else made_for
    fits = shape == master == made_for and state["exp_avg_sq"].shape == row
    if not fits or ("u" in state and state["u"].shape != made_for[:-1]):
        raise RuntimeError(
            f"{parameter_name(group, i)} has shape {tuple(shape)}, but its optimizer state is for {tuple(made_for)}: "
            "it was resized after the first step. Build a new optimizer after resizing, as by resize_token_embeddings"
        )


def check_still_matrices(group: dict[str, Any], matrices: int) -> None:
    """Raise RuntimeError if some of the ``matrices`` that a group had for spectral decay are flat by now."""
    flat = [i for i, param in enumerate(group["params"]) if param.ndim < 2]
    if flat and len(group["params"]) - len(flat) < matrices:
        raise RuntimeError(_flattened(group, flat[0], "no singular value to decay"))


def _flattened(group: dict[str, Any], i: int, consequence: str) -> str:
    return (
        f"{parameter_name(group, i)} was flattened after the optimizer was built, as by DeepSpeed ZeRO, FSDP1 or "
        f"Megatron's distributed optimizer: it has {consequence}. Use FSDP2 (fully_shard), which keeps matrices"
    )


def check_grad(group: dict[str, Any], i: int) -> None:
    """Raise RuntimeError for a gradient of the group's i-th parameter that the update cannot use."""
    param = group["params"][i]
    if param.grad.shape != param.shape:
        raise RuntimeError(
            f"the gradient of {parameter_name(group, i)} has shape {tuple(param.grad.shape)}, the parameter "
            f"{tuple(param.shape)}: it was resized since its backward pass. Build a new optimizer after resizing"
        )
    if param.grad.is_sparse and group["second_moment"] != "vocabulary":
        raise RuntimeError(
            f"the gradient of {parameter_name(group, i)} is sparse, which only a matrix with "
            "second_moment='vocabulary' may have: couple it, or build the nn.Embedding with sparse=False"
        )


def _check_keys(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    for key in group.keys() - defaults.keys() - FOREIGN_KEYS:
        # A mistyped key would silently leave the default in force; a key of somebody else's is none of our business.
        if near := difflib.get_close_matches(key, defaults, n=1, cutoff=0.8):
            raise ValueError(f"Unknown key {key!r} in a param group; did you mean {near[0]!r}?")


def _check_number(name: str, value: object, maximum: float = math.inf) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Invalid {name}: a tensor of shape {tuple(value.shape)}; it must have one element")
        # Reading a tensor on an accelerator would wait for it, and one that a compiler traces has no value.
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Invalid {name}: {value!r}; it must be a number")
    number = float(value)
    if not (math.isfinite(number) and 0 <= number <= maximum):
        bound = "non-negative" if maximum == math.inf else f"between 0 and {maximum:g}"
        raise ValueError(f"Invalid {name}: {number}; it must be finite and {bound}")


def _check_betas(betas: Any) -> None:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r}; give two numbers, (β1, β2)")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            raise TypeError(f"Invalid betas[{i}]: a tensor; give a number")
        _check_number(f"betas[{i}]", beta)
        if float(beta) >= 1:
            raise ValueError(f"Invalid betas[{i}]: {float(beta)}; it must be at least 0 and less than 1")
