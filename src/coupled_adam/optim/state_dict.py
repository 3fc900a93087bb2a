"""Checkpoints of the optimizers: what fits, folding of AdamW's second moment, and moments that keep their precision."""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from coupled_adam.optim.checks import check_group
from coupled_adam.optim.equations import working_dtype
from coupled_adam.optim.moments import ROWS, has_rows, in_form_of, keys_of, shapes_of
from coupled_adam.optim.reductions import (
    local,
    placed_like,
    reduced_like,
    rows_like,
    run_one,
    vocabulary_group,
    vocabulary_mean,
    whole,
)
from coupled_adam.optim.spectral import first_u, takes_spectral_decay
from coupled_adam.optim.state import step_device
from coupled_adam.optim.typed import parameter_name

#: What a group of torch.optim.AdamW holds beside the hyperparameters that we share.
ADAMW_FLAGS = frozenset({"amsgrad", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"})

#: What earlier versions called a key of OWN: theirs are left out.
FORMER = frozenset({"state_dtype"})

#: The keys of a group that say what is computed and kept, not with which numbers, and for which parameters.
OWN = ("second_moment", "direction", "decay", "center", "exp_avg_dtype", "row_exponent", "param_names")

#: What torch's wrappers add to the names of parameters, anywhere in them.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def prepare(state_dict: dict[str, Any], groups: list[dict[str, Any]], *, resize: bool = False) -> dict[str, Any]:
    """Copy ``state_dict`` so that it fits ``groups``: checked, second moments folded, hyperparameters filled in.

    Args:
        resize: whether the vocabulary may have another size than in the checkpoint.

    Raises:
        ValueError: the number of groups or parameters differs, a moment has another shape than its parameter needs, or
            the checkpoint was made with ``amsgrad``.
    """
    saved_groups = _matched(state_dict["param_groups"], groups)
    state, fitted_groups = dict(state_dict["state"]), []
    sizes: dict[tuple[int, int], str] = {}
    for group, saved in zip(groups, saved_groups, strict=True):
        if saved.get("amsgrad"):
            raise ValueError("The checkpoint was made with amsgrad=True, which has no counterpart here")
        if saved.get("decoupled_weight_decay") is False and saved.get("weight_decay", 0) != 0:
            raise ValueError(
                "The checkpoint is from an Adam with L2 regularization (decoupled_weight_decay=False), such as "
                "torch's Adam, NAdam and RAdam; here weight decay is decoupled"
            )
        for i, key in enumerate(saved["params"]):
            if state.get(key):
                kept = _resized(state[key], group, i, sizes) if resize else state[key]
                state[key] = _fit(kept, group, i)
        fitted = {k: v for k, v in saved.items() if k not in ADAMW_FLAGS | FORMER}
        # As everywhere in torch the checkpoint's hyperparameters win. The algorithm is the optimizer's own.
        fitted_groups.append({**group, **fitted, **{key: group[key] for key in OWN if key in group}})
        check_group({**fitted_groups[-1], "params": group["params"]}, "this optimizer")
    if len(sizes) > 1:
        changes = ", ".join(f"from {old} to {new} rows ({name})" for (old, new), name in sizes.items())
        raise ValueError(f"resize_vocabulary=True resizes one vocabulary, but parameters changed {changes}")
    return {**state_dict, "state": state, "param_groups": fitted_groups}


def _matched(saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the saved groups into the order and sizes of ``groups``: by name where both have names, else by position.

    Where the groups differ, the hyperparameters are those of ``groups``.
    """
    names, saved_names = names_in(groups), names_in(saved_groups)
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


def names_in(groups: list[dict[str, Any]]) -> list[str]:
    """List the names of the parameters of all groups; empty where they have none."""
    return [bare(name) for group in groups for name in group.get("param_names", ())]


def _unnamed(sizes: list[int], saved_sizes: list[int], *, saved_has_names: bool) -> str:
    """Why positions do not tell which moments belong to which parameter, and what does."""
    reason = (
        f"The checkpoint has param groups of {saved_sizes} parameters, this optimizer of {sizes}, and without names "
        "a parameter could get the moments of another. "
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
    first = keys_of(saved)
    if missing := [key for key in ("step", *first, "exp_avg_sq") if key not in saved]:
        raise ValueError(f"The checkpoint's state of {name} has no {missing[0]!r}; it is not from an Adam optimizer")
    fitted = {key: saved[key] for key in ("step", *first, "exp_avg_sq")}
    if "master" in saved:
        fitted["master"] = saved["master"]
    if group["decay"] == "spectral" and takes_spectral_decay(param):
        fitted["u"] = saved["u"] if "u" in saved else first_u(param)
        if fitted["u"].shape != param.shape[:-1]:
            raise ValueError(_misfit(name, "u", fitted["u"], tuple(param.shape[:-1])))
    fitted["step"] = _count(saved["step"], name)
    for key, shape in zip(first, shapes_of(saved, param.shape), strict=True):
        if tuple(saved[key].shape) != shape:
            raise ValueError(_misfit(name, key, saved[key], shape))
    square = saved["exp_avg_sq"]
    if has_rows(group):
        fitted[ROWS] = _of_rows(saved, param)
        if tuple(fitted[ROWS].shape) != (len(param), 1):
            raise ValueError(_misfit(name, ROWS, fitted[ROWS], (len(param), 1)))
    if group["second_moment"] == "vocabulary":
        expected = (1, *param.shape[1:])
        if square.shape == param.shape:
            square = fitted["exp_avg_sq"] = _folded(square, param)
    else:
        expected = tuple(param.shape)
        if param.ndim == 2 and tuple(square.shape) == (1, param.shape[1]):  # was coupled
            square = fitted["exp_avg_sq"] = of_elements(saved, param)
    if tuple(square.shape) != expected:
        raise ValueError(_misfit(name, "exp_avg_sq", square, expected))
    return fitted


def _of_rows(saved: dict[str, Any], param: Tensor) -> Tensor:
    """Return the second moments of the rows in a saved state, (V, 1); all alike where it had none."""
    square = saved["exp_avg_sq"]
    if ROWS in saved:
        return saved[ROWS]  # type: ignore[no-any-return]
    if square.shape == param.shape:
        return rows_like(square, local(square).to(working_dtype(param)).mean(1, keepdim=True))
    return whole(square).mean().expand(len(param), 1)


def of_elements(state: Mapping[str, Any], param: Tensor) -> Tensor:
    """Return a second moment of each element of a coupled matrix, (V, H): v_j, or v_j·r_i/r̄ where the rows have r.

    The latter is the estimate of Adafactor (arXiv 1804.04235, equation 4).
    """
    square = whole(state["exp_avg_sq"])
    if ROWS not in state:
        return square.expand(param.shape)
    r = whole(state[ROWS])
    return square * (r / square.mean().clamp(min=torch.finfo(square.dtype).tiny))


def _folded(square: Tensor, param: Tensor) -> Tensor:
    """Average a full second moment over the vocabulary."""
    part = local(square).to(working_dtype(param)).sum(0, keepdim=True)
    if vocabulary_group(param) is not None:  # then the checkpoint has the same rows as this rank's shard
        return reduced_like(param, run_one(vocabulary_mean(part, param)), 0)
    return reduced_like(square, run_one(vocabulary_mean(part, square)), 0)


def _count(step: Any, name: str) -> Tensor:
    """Return a saved step count, as tensor or number, as a copy: torch's loading would share it with its owner."""
    if isinstance(step, Tensor) and step.numel() == 1:
        return step.detach().to(torch.float32).reshape(()).clone()
    if isinstance(step, Real) and math.isfinite(step):
        return torch.tensor(float(step), dtype=torch.float32, device="cpu")
    raise ValueError(f"The checkpoint's step of {name} is {step!r}; it must be a number, or a tensor of one element")


def _resized(saved: dict[str, Any], group: dict[str, Any], i: int, sizes: dict[tuple[int, int], str]) -> dict[str, Any]:
    """Return a saved state with as many rows as the group's i-th parameter has now; note the numbers in ``sizes``.

    New rows have a first moment of 0, and the mean of the others for a second one that they do not share.
    """
    param, name = group["params"][i], parameter_name(group, i)
    first = saved.get(keys_of(saved)[0])
    if first is None or param.ndim == 0 or len(first) == len(param) or first.shape[1:] != param.shape[1:]:
        return saved
    if vocabulary_group(param) is not None:
        raise ValueError(f"{name} is a vocabulary shard (vocabulary_group), which resize_vocabulary=True cannot resize")
    sizes.setdefault((len(first), len(param)), name)
    moments = {key: whole(saved[key]) for key in (*keys_of(saved), "exp_avg_sq", ROWS, "master") if key in saved}
    squares = {key: moments.pop(key) for key in ("exp_avg_sq", ROWS) if key in moments}
    for key, square in squares.items():
        if len(square) == len(first):
            squares[key] = _with_rows(square, square.mean(0, keepdim=True), len(param))
    if "master" in moments:
        moments["master"] = torch.cat([moments["master"].to(param.device), param.detach()[len(first) :]])[: len(param)]
    moments = {key: _with_rows(x, torch.zeros_like(x[:1]), len(param)) for key, x in moments.items()}
    # The singular vector is that of another matrix, and grows anew.
    return {"step": saved.get("step"), **moments, **squares}


def _with_rows(x: Tensor, new: Tensor, rows: int) -> Tensor:
    """Cut off rows, or append them."""
    return torch.cat([x[:rows], new.expand(max(rows - len(x), 0), *x.shape[1:])])


def _misfit(name: str, key: str, found: Tensor, expected: tuple[int, ...]) -> str:
    shape = tuple(found.shape)
    text = f"The checkpoint's {key} of {name} has shape {shape}, not {expected}; "
    if len(shape) == len(expected) > 0 and shape[1:] == expected[1:]:
        return text + (
            "if tokens were added or removed, load_state_dict(state_dict, resize_vocabulary=True) loads it; "
            "otherwise it belongs to another model or to other param groups"
        )
    return text + "it belongs to another model or to other param groups"


def restore(optimizer: Optimizer, prepared: dict[str, Any], new_state: Callable[[Tensor, Any], dict[str, Any]]) -> None:
    """Put the state as ``prepared`` has it, in the dtypes and placements of a new one.

    torch's loading has cast the moments to the parameters' dtype.
    """
    for group, saved_group in zip(optimizer.param_groups, prepared["param_groups"], strict=True):
        for param, key in zip(group["params"], saved_group["params"], strict=True):
            if saved := prepared["state"].get(key):
                state = new_state(param, group)
                saved = in_form_of(state, saved)
                tensors = {name: x for name, x in state.items() if name != "step"}
                for name in tensors.keys() & saved.keys():
                    fresh = tensors[name]
                    state[name] = placed_like(fresh, saved[name].to(fresh.device, fresh.dtype)).clone()
                state["step"] = saved["step"].to(step_device(param, group))
                optimizer.state[param] = state
