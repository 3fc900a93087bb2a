"""What a param group may hold. Every message names the value and the remedy."""

import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from coupled_adam.optim.directions import DIRECTION
from coupled_adam.optim.equations import readable
from coupled_adam.optim.moments import EIGHT_BIT, MOMENT_DTYPES, ROWS, has_rows, keys_of, shapes_of
from coupled_adam.optim.reductions import is_dtensor, local
from coupled_adam.optim.typed import parameter_name

#: What a group may name.
CHOICES: dict[str, Collection[str]] = {
    "second_moment": ("elementwise", "vocabulary"),
    "direction": DIRECTION,
    "decay": ("decoupled", "spectral"),
}
#: Where the step and its count may lie together, for a graph of kernels to be captured.
CAPTURE_DEVICES = ("cuda", "xpu")

#: The keys of torch's own optimizers and schedulers that a group may carry beside ours, without effect here.
FOREIGN_KEYS = frozenset({"params", "param_names", "initial_lr", "swa_lr", "name"})

#: What an optimizer that is given no learning rate has. By its identity it is told from the same number given.
DEFAULT_LR = float("1e-3")

#: Dtype and device of what must be in a state, by its key.
Form = dict[str, tuple[torch.dtype, torch.device]]

#: What to do about a state that does not fit its parameter.
CHANGED = "Load a checkpoint into this optimizer, or build a new one"
CONVERTS = "optimizer.load_state_dict(optimizer.state_dict()) makes the state fit the parameters as they are now"

#: Dtypes between which the moments of a parameter follow it when it is converted. Narrower ones have lost too much.
WORKING = (torch.float32, torch.float64)


def check_group(group: Mapping[str, Any], optimizer: str) -> None:
    """Raise ValueError or TypeError for hyperparameters or parameters that a group of ``optimizer`` cannot have."""
    check_number("learning rate (lr)", group["lr"], tensor=True)
    check_settings(group)
    for i, param in enumerate(group["params"]):
        check_param(param, parameter_name(group, i), optimizer, coupled=group["second_moment"] == "vocabulary")
        check_rows(param, parameter_name(group, i), center=group["center"])


def check_rate(lr: object) -> None:
    """Raise ValueError or TypeError for a learning rate that no step can take.

    That of a schedule may end a rounding error below 0.
    """
    if isinstance(lr, Tensor):
        check_number("learning rate (lr)", lr, tensor=True, minimum=-math.inf)
    elif type(lr) is not float or not math.isfinite(lr):
        check_number("learning rate (lr)", lr, minimum=-math.inf)


def check_factor(name: str, value: object) -> None:
    """Raise ValueError or TypeError for a factor of the learning rate that is not positive and finite."""
    check_number(name, value)
    if value == 0:
        raise ValueError(f"Invalid {name}: 0; it multiplies the learning rate and must be positive")


def check_one_base(groups: list[dict[str, Any]], lr: float | Tensor) -> None:
    """Raise ValueError if groups whose rates are multiples of one learning rate were given with another one."""
    for group in groups:
        own = group["lr"]
        if "lr_factor" not in group or not all(not isinstance(x, Tensor) or readable(x) for x in (lr, own)):
            continue
        base = float(own) / group["lr_factor"]
        if not math.isclose(base, float(lr), rel_tol=1e-5):
            raise ValueError(
                f"the optimizer was given lr={float(lr):g}, and its param groups lr={base:g} (param_groups(model, "
                "lr=…)): set only one of them, or both to the same value"
            )


def check_settings(group: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError for hyperparameters, other than the learning rate, that a group cannot have."""
    check_number("eps", group["eps"])
    check_number("weight_decay", group["weight_decay"])
    check_number("coupling_factor", group["coupling_factor"], maximum=1.0)
    check_number("coupling_scale", group["coupling_scale"])
    check_number("row_exponent", group["row_exponent"], maximum=1.0)
    if group["coupling_scale"] == 0:
        raise ValueError("Invalid coupling_scale: 0; it multiplies the second moment and must be positive")
    _check_betas(group["betas"])
    if "lr_factor" in group:
        check_factor("lr_factor", group["lr_factor"])
    if "scalar_vector_weight_decay" in group:
        check_number("scalar_vector_weight_decay", group["scalar_vector_weight_decay"])
    if group["max_grad_norm"] not in (None, math.inf):
        check_number("max_grad_norm", group["max_grad_norm"])
        if group["max_grad_norm"] == 0:
            raise ValueError("Invalid max_grad_norm: 0; it must be positive, or None to leave the norm unbounded")
    for key in ("center", "maximize", "capturable"):
        if not isinstance(group[key], bool):
            raise TypeError(f"Invalid {key}: {group[key]!r}; it must be True or False")
    if group["exp_avg_dtype"] not in MOMENT_DTYPES:
        choices = ", ".join(repr(choice) for choice in MOMENT_DTYPES if choice is not None)
        raise ValueError(f"Invalid exp_avg_dtype: {group['exp_avg_dtype']!r}; choose {choices}, or None for float32")
    check_flags(group)
    for key, known in CHOICES.items():
        if group[key] not in known:
            raise ValueError(f"Invalid {key}: {group[key]!r}; choose from {sorted(known)}")


def check_flags(flags: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError for what torch's AdamW can be told to do and these optimizers cannot."""
    for key, consequence in (
        ("amsgrad", "no maximum of the second moment is kept"),
        ("differentiable", "no gradient flows through a step"),
    ):
        if flags.get(key, False) is not False:
            raise ValueError(f"Invalid {key}: {flags[key]!r}; it is not supported: {consequence}. Leave it out")
    for key in ("fused", "foreach"):
        if not isinstance(flags.get(key), bool | None):
            raise TypeError(f"Invalid {key}: {flags[key]!r}; it must be True, False or None")


def check_param(param: Tensor, name: str, optimizer: str, *, coupled: bool) -> None:
    """Raise TypeError or ValueError for a tensor that cannot be updated, or not with a coupled second moment."""
    if not param.is_floating_point():
        remedy = "pass torch.view_as_real(param)" if param.is_complex() else "pass only floating-point parameters"
        raise TypeError(f"{name} has dtype {param.dtype}, which {optimizer} does not support; {remedy}")
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


def check_state(group: Mapping[str, Any], i: int, state: Mapping[str, Any], form: Form) -> list[str]:
    """Raise RuntimeError if the group's i-th parameter is not what group and state were made for.

    Returns:
        The keys of tensors that must yet take their ``form``: a parameter was converted between float32 and float64.
    """
    param: Tensor = group["params"][i]
    _check_memory(param, group, i)
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
        return []
    for key in form:
        if not isinstance(state.get(key), Tensor):
            what = f"a {type(state[key]).__name__} for {key!r}, not a tensor" if key in state else f"no {key!r}"
            raise RuntimeError(f"the optimizer state of {parameter_name(group, i)} has {what}. {CHANGED}")
        if state[key].is_nested:
            _check_memory(state[key], group, i, f"{key!r} in the optimizer state of ")
    first = keys_of(state)
    made_for: torch.Size = state[first[0]].shape
    row = torch.Size((1, *made_for[1:])) if coupled else made_for
    master: torch.Size = state["master"].shape if "master" in state else made_for
    fits = shape == master == made_for and state["exp_avg_sq"].shape == row
    fits = fits and [tuple(state[key].shape) for key in first] == shapes_of(state, shape)
    fits = fits and (ROWS not in form or state[ROWS].shape == (made_for[0], 1))
    if not fits or ("u" in state and state["u"].shape != made_for[:-1]):
        raise RuntimeError(
            f"{parameter_name(group, i)} has shape {tuple(shape)}, but its optimizer state is for {tuple(made_for)}: "
            "it was resized after the first step. Build a new optimizer after resizing (resize_token_embeddings), "
            "and keep the moments with new.load_state_dict(old.state_dict(), resize_vocabulary=True)"
        )
    _check_shards(group, i, state)
    return [key for key, wanted in form.items() if _must_change(group, i, key, (state[key], *wanted))]


def _check_shards(group: Mapping[str, Any], i: int, state: Mapping[str, Any]) -> None:
    """Raise RuntimeError if this process holds other parts of the moments than of the parameter."""
    first, square = state[keys_of(state)[0]], state["exp_avg_sq"]
    like = state.get("master", group["params"][i])
    if not any(is_dtensor(x) for x in (like, first, square)):
        return
    shape = local(like).shape
    row = (1, *shape[1:]) if group["second_moment"] == "vocabulary" else shape
    rows = state.get(ROWS) if has_rows(group) else None
    fits = local(first).shape == shape and local(square).shape == row
    if not fits or (rows is not None and len(local(rows)) != len(local(like))):
        raise RuntimeError(
            f"{parameter_name(group, i)} has the local shape {tuple(shape)} in this process, but its moments have "
            f"{tuple(local(first).shape)} and {tuple(local(square).shape)}: they are sharded differently. {CONVERTS}"
        )


def _must_change(group: Mapping[str, Any], i: int, key: str, found: tuple[Tensor, torch.dtype, torch.device]) -> bool:
    """Return whether a tensor of a state must first take a dtype and device; RuntimeError if it cannot be used."""
    x, dtype, device = found
    if x.dtype is dtype and x.device == device and _sound(x) and key != "step":
        return False
    what = f"{key!r} in the optimizer state of "
    _check_memory(x, group, i, what)
    count, param = key == "step", group["params"][i]
    if count and x.numel() != 1:
        raise RuntimeError(f"{what}{parameter_name(group, i)} has {x.numel()} elements, not one. {CHANGED}")
    if x.device != param.device and not (count and x.device.type == "cpu"):
        remedy = CHANGED if "meta" in (x.device.type, param.device.type) else CONVERTS
        raise RuntimeError(
            f"{parameter_name(group, i)} is on {param.device}, but {key!r} in its optimizer state is on {x.device}: "
            f"one of them was moved after the first step. {remedy}"
        )
    if x.dtype == dtype:
        return count and x.device != device and x.device.type == "cpu"
    if x.dtype in WORKING and dtype in WORKING and key in ("exp_avg", "exp_avg_sq", "u"):
        return True
    remedy = CHANGED if key in EIGHT_BIT else CONVERTS
    raise RuntimeError(
        f"{what}{parameter_name(group, i)} is {x.dtype}, not {dtype}: it was cast outside the optimizer. {remedy}"
    )


def _sound(x: Tensor) -> bool:
    """Return whether a tensor can be written in place."""
    if x.layout is not torch.strided or x.is_nested or 0 in x.stride():
        return False
    return torch.compiler.is_compiling() or not (x.is_inference() or x.is_neg())  # the compiler traces neither


def _check_memory(x: Tensor, group: Mapping[str, Any], i: int, what: str = "") -> None:
    """Raise RuntimeError for a tensor that cannot be written in place: the group's i-th parameter, or of its state."""
    if _sound(x):
        return
    if x.layout is not torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else x.layout
        raise RuntimeError(
            f"{what}{parameter_name(group, i)} has the layout {layout}; only dense tensors are supported"
        )
    if not torch.compiler.is_compiling() and x.is_neg():
        raise RuntimeError(
            f"{what}{parameter_name(group, i)} is a negated view, as .conj().imag returns it; replace it with its "
            ".resolve_neg() form"
        )
    if any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
        raise RuntimeError(
            f"{what}{parameter_name(group, i)} overlaps with itself in memory, as after expand(); replace it with "
            "its .contiguous() form"
        )
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what}{parameter_name(group, i)} was created under torch.inference_mode() and cannot be updated "
            "outside it; create it under torch.no_grad()"
        )


def check_still_matrices(group: Mapping[str, Any], matrices: int) -> None:
    """Raise RuntimeError if some of the ``matrices`` that a group had for spectral decay are flat by now."""
    flat = [i for i, param in enumerate(group["params"]) if param.ndim < 2]
    if flat and len(group["params"]) - len(flat) < matrices:
        raise RuntimeError(_flattened(group, flat[0], "no singular value to decay"))


def _flattened(group: Mapping[str, Any], i: int, consequence: str) -> str:
    return (
        f"{parameter_name(group, i)} was flattened after the optimizer was built, as DeepSpeed ZeRO, FSDP1 and "
        f"Megatron's distributed optimizer do: it has {consequence}. Use FSDP2 (fully_shard), which keeps matrices"
    )


def memory_stamp(param: Tensor, state: Mapping[str, Any]) -> object:
    """Return what is another as soon as a parameter or its state is resized, converted, moved or replaced.

    None where that cannot be told cheaply: of tensors that are more than memory, or traced.
    """
    if torch.compiler.is_compiling():
        return None
    stamp: list[object] = [*state]
    for x in (param, *state.values()):
        if type(x) not in (Tensor, torch.nn.Parameter) or x.layout is not torch.strided or x.is_nested or x.is_neg():
            return None
        stamp += (x.data_ptr(), x.shape, x.stride(), x.dtype)
    return stamp


def check_grad(group: Mapping[str, Any], i: int) -> None:
    """Raise RuntimeError for a gradient of the group's i-th parameter that the update cannot use."""
    param = group["params"][i]
    grad = param.grad
    if grad is None:
        return
    if grad.shape != param.shape:
        raise RuntimeError(
            f"the gradient of {parameter_name(group, i)} has shape {tuple(grad.shape)}, the parameter "
            f"{tuple(param.shape)}: it was resized since its backward pass. Build a new optimizer after resizing"
        )
    if grad.device != param.device:
        raise RuntimeError(
            f"the gradient of {parameter_name(group, i)} is on {grad.device}, the parameter on {param.device}: "
            "it was moved since its backward pass. Call zero_grad() after moving a model"
        )
    if not grad.is_floating_point() or not param.is_floating_point():
        raise RuntimeError(
            f"the gradient of {parameter_name(group, i)} is {grad.dtype}, the parameter {param.dtype}; only "
            "floating-point tensors are supported"
        )
    if grad.layout not in (torch.strided, torch.sparse_coo):
        raise RuntimeError(
            f"the gradient of {parameter_name(group, i)} has the layout {grad.layout}, which is not supported; "
            "make it dense with .to_dense()"
        )
    if grad.is_sparse and group["second_moment"] != "vocabulary":
        raise RuntimeError(
            f"the gradient of {parameter_name(group, i)} is sparse, which is supported only for a matrix with "
            "second_moment='vocabulary': couple it, or build the nn.Embedding with sparse=False"
        )


def check_keys(group: Mapping[str, Any], defaults: dict[str, Any]) -> None:
    """Raise ValueError for a key that is probably one of ours, mistyped: the default would silently be in force.

    Other keys are none of our business.
    """
    known = (*defaults, "lr_factor")
    for key in group.keys() - FOREIGN_KEYS - set(known):
        limit = 2 if len(key) > 5 else 1
        if near := [ours for ours in known if len(key) > 2 and _distance(key, ours) <= limit]:
            raise ValueError(f"Unknown key {key!r} in a param group; did you mean {near[0]!r}?")


def _distance(a: str, b: str) -> int:
    """Count the letters that must be inserted, deleted, replaced, or swapped with their neighbor, to make b of a."""
    before, rows = list(range(len(b) + 1)), [list(range(len(b) + 1))]
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            least = min(row[j - 1] + 1, before[j] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and (x, a[i - 2]) == (b[j - 2], y):
                least = min(least, rows[i - 2][j - 2] + 1)
            row.append(least)
        rows.append(row)
        before = row
    return before[-1]


def check_number(
    name: str, value: object, minimum: float = 0, maximum: float = math.inf, *, tensor: bool = False
) -> None:
    if isinstance(value, Tensor):
        if not tensor:
            raise TypeError(f"Invalid {name}: a tensor; pass a number")
        if value.numel() != 1:
            raise ValueError(f"Invalid {name}: a tensor of shape {tuple(value.shape)}; it must have one element")
        # Reading a tensor on an accelerator would wait for it, and one that a compiler traces has no value.
        if not readable(value):
            return
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Invalid {name}: {value!r}; it must be a number")
    number = float(value)
    if not (math.isfinite(number) and minimum <= number <= maximum):
        bounds = [f"between 0 and {maximum:g}" if maximum < math.inf else "non-negative"] if minimum == 0 else []
        raise ValueError(f"Invalid {name}: {number}; it must be {' and '.join(['finite', *bounds])}")


def _check_betas(betas: Any) -> None:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r}; pass two numbers, (β1, β2)")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            raise TypeError(f"Invalid betas[{i}]: a tensor; pass a number")
        check_number(f"betas[{i}]", beta)
        if float(beta) >= 1:
            raise ValueError(f"Invalid betas[{i}]: {float(beta)}; it must be at least 0 and less than 1")
