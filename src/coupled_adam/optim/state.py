"""Checkpoints of the optimizers: what fits, folding of AdamW's second moment, and moments that keep their precision."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from coupled_adam.optim.checks import EIGHT_BIT, check_group, parameter_name
from coupled_adam.optim.eight_bit import EightBit, Moment, blocks_of, quantized
from coupled_adam.optim.reductions import (
    holders,
    local,
    placed_like,
    reduced_like,
    rows_like,
    run_one,
    vocabulary_group,
    vocabulary_mean,
)
from coupled_adam.optim.update import numbers_of

#: What a group of torch.optim.AdamW holds beside the hyperparameters that we share.
ADAMW_FLAGS = frozenset({"amsgrad", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"})

#: The keys of a group that say what is computed and kept, not with which numbers, and for which parameters.
OWN = ("second_moment", "direction", "decay", "center", "state_dtype", "param_names")

#: What torch's wrappers add to the names of parameters, anywhere in them.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def state_dtype(param: Tensor) -> torch.dtype:
    """Return float32, or float64 for a float64 parameter. A moving average in bfloat16 stalls: its steps round to 0."""
    return torch.promote_types(param.dtype, torch.float32)


def is_plain_adamw(param: Tensor, group: dict[str, Any]) -> bool:
    """Return whether the group asks for what ``torch.optim.AdamW`` does, in the precision it has."""
    return bool(
        group["second_moment"] == "elementwise"
        and group["coupling_factor"] == 0
        and group["direction"] == "ratio"
        and group["decay"] == "decoupled"
        and group["state_dtype"] != torch.bfloat16
        and param.dtype == state_dtype(param)
    )


def new_state(param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """Make the state before the first step."""
    dtype = state_dtype(param)
    part = local(param)
    coupled = group["second_moment"] == "vocabulary"
    row = reduced_like(param, part.new_zeros((1, *part.shape[1:]), dtype=dtype), 0) if coupled else None
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=step_device(param, group)),
        **_new_moment(param, group),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype) if row is None else row,
    }
    if group["decay"] == "spectral" and takes_spectral_decay(param):
        if vocabulary_group(param) is not None:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is a vocabulary shard (vocabulary_group), and spectral "
                "decay does not know its other rows; couple it, or set param.use_spectral_decay = False"
            )
        state["u"] = _first_u(param)
    return state


def _new_moment(param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Make a first moment of 0, in the form that the group keeps it in."""
    if group["state_dtype"] != "8bit" or group["second_moment"] != "vocabulary":
        dtype = torch.bfloat16 if group["state_dtype"] == torch.bfloat16 else state_dtype(param)
        return {"exp_avg": torch.zeros_like(param, dtype=dtype)}
    if holders(param, 1):
        raise ValueError(
            f"a coupled parameter of shape {tuple(param.shape)} is sharded over its columns, and state_dtype='8bit' "
            "needs whole rows: shard it over the vocabulary, or choose state_dtype=torch.bfloat16"
        )
    part = local(param)
    scales = part.new_zeros((len(part), blocks_of(part.shape[1])), dtype=torch.float32)
    return dict(zip(EIGHT_BIT, (torch.zeros_like(param, dtype=torch.int8), rows_like(param, scales)), strict=True))


def local_moment(state: dict[str, Any]) -> Moment:
    """Return this process's part of a first moment."""
    if EIGHT_BIT[0] in state:
        return EightBit(*(local(state[key]) for key in EIGHT_BIT))
    return local(state["exp_avg"])


def numbers_of_moment(state: dict[str, Any]) -> Tensor:
    """Return a first moment as floating-point numbers, a DTensor if it is one."""
    if EIGHT_BIT[0] in state:
        return rows_like(state[EIGHT_BIT[0]], numbers_of(local_moment(state)))
    moment: Tensor = state["exp_avg"]
    return moment


def _first_u(param: Tensor) -> Tensor:
    """Ones, one a row of the matrix."""
    part = local(param)
    return reduced_like(param, part.new_ones(part.shape[:-1], dtype=state_dtype(param)), -1)


def step_device(param: Tensor, group: dict[str, Any]) -> torch.device:
    """Return where the step count lies: on the CPU, where reading it is free, or beside the parameter.

    There torch's fused kernels want it, and a captured graph. Scaled gradients take it there too (``Work.advance``).
    """
    return param.device if group["capturable"] or is_plain_adamw(param, group) else torch.device("cpu")


def takes_spectral_decay(param: Tensor) -> bool:
    """Return whether spectral decay applies: to a matrix with no dimension of 1 that is not marked otherwise."""
    wanted = bool(getattr(param, "use_spectral_decay", True))
    return wanted and param.ndim >= 2 and min(param.shape[-2:]) > 1


def prepare(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Copy ``state_dict`` so that it fits ``groups``: checked, second moments folded, hyperparameters filled in.

    Raises:
        ValueError: the number of groups or parameters differs, a moment has another shape than its parameter needs, or
            the checkpoint was made with ``amsgrad``.
    """
    saved_groups = _matched(state_dict["param_groups"], groups)
    state, fitted_groups = dict(state_dict["state"]), []
    for group, saved in zip(groups, saved_groups, strict=True):
        if saved.get("amsgrad"):
            raise ValueError("The checkpoint was made with amsgrad=True, which has no counterpart here")
        if saved.get("decoupled_weight_decay") is False and saved.get("weight_decay", 0) != 0:
            raise ValueError(
                "The checkpoint is one of torch.optim.Adam with L2 regularization; here decay is decoupled"
            )
        for i, key in enumerate(saved["params"]):
            if state.get(key):
                state[key] = _fit(state[key], group, i)
        fitted = {k: v for k, v in saved.items() if k not in ADAMW_FLAGS}
        # As everywhere in torch the checkpoint's hyperparameters win. The algorithm is the optimizer's own.
        fitted_groups.append({**group, **fitted, **{key: group[key] for key in OWN if key in group}})
        check_group({**fitted_groups[-1], "params": group["params"]}, group, "this optimizer")
    return {**state_dict, "state": state, "param_groups": fitted_groups}


def _matched(saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the saved groups into the order and sizes of ``groups``: by name where both have names, else by position.

    Where the groups differ, the hyperparameters are those of ``groups``.
    """
    names, saved_names = _names(groups), _names(saved_groups)
    sizes, saved_sizes = ([len(g["params"]) for g in gs] for gs in (groups, saved_groups))
    if sizes == saved_sizes and (names == saved_names or not names or not saved_names):
        return saved_groups
    if not names or not saved_names:
        raise ValueError(_unnamed(sizes, saved_sizes, saved_has_names=bool(saved_names)))
    if missing := set(names) ^ set(saved_names):
        raise ValueError(f"Parameter {min(missing)!r} is in the checkpoint or in this optimizer, but not in both")
    by_name = dict(zip(saved_names, (key for g in saved_groups for key in g["params"]), strict=True))
    keys = (by_name[name] for name in names)
    return [{**group, "params": [next(keys) for _ in group["params"]]} for group in groups]


def _names(groups: list[dict[str, Any]]) -> list[str]:
    """List the names of the parameters of all groups; empty where they have none."""
    return [bare(name) for group in groups for name in group.get("param_names", ())]


def _unnamed(sizes: list[int], saved_sizes: list[int], *, saved_has_names: bool) -> str:
    """Why positions do not tell which moments belong to which parameter, and what does."""
    reason = (
        f"The checkpoint has param groups of {saved_sizes} parameters, this optimizer of {sizes}, and without names a "
        "parameter could be given the moments of another. "
    )
    if sum(sizes) != sum(saved_sizes):
        return reason + "Build the optimizer for the model of the run that saved the checkpoint"
    if saved_has_names:
        return reason + "Build this optimizer with names: param_groups(model), or model.named_parameters()"
    return reason + (
        "Name them: load_state_dict(coupled_adam.name_checkpoint(model, state_dict)), and build this optimizer with "
        "names too: param_groups(model), or model.named_parameters()"
    )


def bare(name: str) -> str:
    """Strip a parameter's name of the wrappers around the model and its parts."""
    parts = name.split(".")
    while parts[0] == "module" and len(parts) > 1:  # DistributedDataParallel; inside a model the name may mean anything
        parts = parts[1:]
    return ".".join(part for part in parts if part not in WRAPPERS)


def _fit(saved: dict[str, Any], group: dict[str, Any], i: int) -> dict[str, Any]:
    """Return the saved state of the group's i-th parameter, its second moment folded if it is coupled here."""
    param, name = group["params"][i], parameter_name(group, i)
    first = EIGHT_BIT if EIGHT_BIT[0] in saved else ("exp_avg",)
    if missing := [key for key in ("step", *first, "exp_avg_sq") if key not in saved]:
        raise ValueError(f"The checkpoint's state of {name} has no {missing[0]!r}; it is not one of an Adam optimizer")
    fitted = {key: saved[key] for key in ("step", *first, "exp_avg_sq")}
    if "master" in saved:
        fitted["master"] = saved["master"]
    if group["decay"] == "spectral" and takes_spectral_decay(param):
        fitted["u"] = saved["u"] if "u" in saved else _first_u(param)
        if fitted["u"].shape != param.shape[:-1]:
            raise ValueError(_misfit(name, "u", fitted["u"], tuple(param.shape[:-1])))
    # A copy: torch's loading leaves the step count to be shared with whoever saved it.
    fitted["step"] = torch.as_tensor(saved["step"], dtype=torch.float32).clone()
    shapes = [tuple(param.shape), (len(param), blocks_of(param.shape[-1]))] if len(first) > 1 else [tuple(param.shape)]
    for key, shape in zip(first, shapes, strict=True):
        if tuple(saved[key].shape) != shape:
            raise ValueError(_misfit(name, key, saved[key], shape))
    square = saved["exp_avg_sq"]
    if group["second_moment"] == "vocabulary":
        expected = (1, *param.shape[1:])
        if square.shape == param.shape:
            square = fitted["exp_avg_sq"] = _folded(square, param)
    else:
        expected = tuple(param.shape)
    if tuple(square.shape) != expected:
        raise ValueError(_misfit(name, "exp_avg_sq", square, expected))
    return fitted


def _folded(square: Tensor, param: Tensor) -> Tensor:
    """Average a full second moment over the vocabulary."""
    part = local(square).to(state_dtype(param)).sum(0, keepdim=True)
    if vocabulary_group(param) is not None:  # then the checkpoint has the same rows as this rank's shard
        return reduced_like(param, run_one(vocabulary_mean(part, param)), 0)
    return reduced_like(square, run_one(vocabulary_mean(part, square)), 0)


def _misfit(name: str, key: str, found: Tensor, expected: tuple[int, ...]) -> str:
    shape = tuple(found.shape)
    return (
        f"The checkpoint's {key} of {name} has shape {shape}, not {expected}; it belongs to another model or to other "
        "param groups"
    )


def restore(
    optimizer: Optimizer, prepared: dict[str, Any], new_state: Callable[[Tensor, dict[str, Any]], dict[str, Any]]
) -> None:
    """Put the state as ``prepared`` has it, in the dtypes and placements of a new one.

    torch's loading has cast the moments to the parameters' dtype.
    """
    for group, saved_group in zip(optimizer.param_groups, prepared["param_groups"], strict=True):
        for param, key in zip(group["params"], saved_group["params"], strict=True):
            if saved := prepared["state"].get(key):
                state = new_state(param, group)
                saved = _in_form_of(state, saved)
                tensors = {name: x for name, x in state.items() if name != "step"}
                for name in tensors.keys() & saved.keys():
                    fresh = tensors[name]
                    state[name] = placed_like(fresh, saved[name].to(fresh.device, fresh.dtype)).clone()
                state["step"] = saved["step"].to(step_device(param, group))
                optimizer.state[param] = state


def _in_form_of(fresh: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state whose first moment is in eight bits where that of ``fresh`` is, and in numbers elsewhere."""
    codes = EIGHT_BIT[0]
    if (codes in fresh) == (codes in saved):
        return saved
    if codes in saved:
        return {**saved, "exp_avg": numbers_of_moment(saved)}
    moment = placed_like(fresh[codes], saved["exp_avg"].to(fresh[codes].device))
    new = quantized(local(moment), saved["step"].item())
    return {**saved, **{key: rows_like(fresh[codes], part) for key, part in zip(EIGHT_BIT, new, strict=True)}}
