"""The way back: the state of an optimizer of this package in the form of ``torch.optim.AdamW``."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from coupled_adam.optim.equations import working_dtype
from coupled_adam.optim.moments import numbers_of_moment
from coupled_adam.optim.optimizer import AdamFamily
from coupled_adam.optim.reductions import placed_like
from coupled_adam.optim.state_dict import names_in, of_elements
from coupled_adam.optim.typed import parameter_name

#: What schedulers of torch put into a group of any optimizer.
OF_SCHEDULERS = ("initial_lr", "swa_lr")


def adamw_state_dict(optimizer: AdamFamily, adamw: Optimizer | None = None) -> dict[str, Any]:
    """Convert the state of a Coupled Adam to that of a ``torch.optim.AdamW``, for its ``load_state_dict``.

    Every row gets a copy of a shared second moment, with ``row_exponent`` in proportion to its own. First moments in 8
    bits or bfloat16 become float32. What AdamW does not support is left out: coupling with its scale and factor,
    centering, clipping by the optimizer.

    Args:
        optimizer: ``coupled_adam.CoupledAdam``, or another optimizer of this package whose groups all have the
            direction "ratio" and decoupled decay.
        adamw: the optimizer that will load the state, if its groups differ. Parameters are then matched by identity, or
            by name if both have names, and hyperparameters are those of ``adamw``. None: the groups of ``optimizer``.

    Returns:
        A state dict of new tensors, or of DTensors with the placements of the parameters.

    Raises:
        ValueError: a parameter takes a step of Adams, which AdamW cannot continue; ``adamw`` was built with
            ``amsgrad=True``; or the parameters of the two optimizers cannot be matched.

    Examples:
        >>> from torch import nn
        >>> from coupled_adam import CoupledAdam, adamw_state_dict, param_groups
        >>> model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 100, bias=False))
        >>> optimizer = CoupledAdam(param_groups(model, coupled=[model[1]]))
        >>> model(torch.tensor([1, 2])).sum().backward()
        >>> optimizer.step()
        >>> adamw = torch.optim.AdamW(model.parameters())
        >>> adamw.load_state_dict(adamw_state_dict(optimizer, adamw))
        >>> adamw.state[model[1].weight]["exp_avg_sq"].shape
        torch.Size([100, 8])
    """
    for group in optimizer.param_groups:
        for i, param in enumerate(group["params"]):
            _check(optimizer, group, i, optimizer.state.get(param, {}))
    if adamw is None:
        groups = _groups(optimizer)
        params = [param for group in optimizer.param_groups for param in group["params"]]
    else:
        groups, params = adamw.state_dict()["param_groups"], _counterparts(optimizer, adamw)
        if any(group.get("amsgrad") for group in groups):
            raise ValueError(
                "amsgrad=True needs the maximum of the second moment, which is not kept here; build AdamW with "
                "amsgrad=False"
            )
    keys = (key for group in groups for key in group["params"])
    states = ((key, param, optimizer.state.get(param)) for key, param in zip(keys, params, strict=True))
    return {"state": {key: _state(param, state) for key, param, state in states if state}, "param_groups": groups}


def _check(optimizer: AdamFamily, group: dict[str, Any], i: int, state: dict[str, Any]) -> None:
    """Raise ValueError for a parameter whose step is not that of AdamW but for the coupling."""
    if group["direction"] != "ratio" or (group["decay"] == "spectral" and "u" in state):
        raise ValueError(
            f"{parameter_name(group, i)} is trained by {type(optimizer).__name__} with "
            f"direction={group['direction']!r} and decay={group['decay']!r}, whose steps AdamW cannot continue; "
            "start torch.optim.AdamW with fresh state"
        )


def _groups(optimizer: AdamFamily) -> list[dict[str, Any]]:
    """Return the groups as AdamW packs them, with the keys that the installed torch gives them."""
    defaults = torch.optim.AdamW([torch.zeros(1, device="cpu")]).param_groups[0]
    shared = ("lr", "betas", "eps", "weight_decay", "maximize")
    groups, first = [], 0
    for group in optimizer.param_groups:
        kept = {key: group[key] for key in (*shared, "param_names", *OF_SCHEDULERS) if key in group}
        groups.append({**defaults, **kept, "params": list(range(first, first + len(group["params"])))})
        first += len(group["params"])
    return copy.deepcopy(groups)


def _counterparts(optimizer: AdamFamily, adamw: Optimizer) -> list[Tensor]:
    """List the parameters of ``optimizer`` in the order of those of ``adamw``, matched by identity, else by name."""
    ours = [param for group in optimizer.param_groups for param in group["params"]]
    theirs = [param for group in adamw.param_groups for param in group["params"]]
    if set(map(id, theirs)) == set(map(id, ours)):
        return theirs
    names, their_names = names_in(optimizer.param_groups), names_in(adamw.param_groups)
    if not names or not their_names:
        raise ValueError(
            "the two optimizers have different parameters, and no names to match them by: build both from (name, "
            "parameter) pairs, as model.named_parameters() returns them"
        )
    if missing := set(names) ^ set(their_names):
        raise ValueError(f"Parameter {min(missing)!r} is in one of the two optimizers, but not in both")
    by_name = dict(zip(names, ours, strict=True))
    found = [by_name[name] for name in their_names]
    for name, a, b in zip(their_names, found, theirs, strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"Parameter {name!r} has shape {tuple(a.shape)}, but {tuple(b.shape)} in the other optimizer"
            )
    return found


def _state(param: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
    """Return a state with moments of the parameter's shape and placement, float32 or float64."""
    square: Tensor = state["exp_avg_sq"]
    if square.shape != param.shape:
        square = placed_like(param, of_elements(state, param))
    moments = {"exp_avg": placed_like(param, numbers_of_moment(state)), "exp_avg_sq": placed_like(param, square)}
    # Expanded rows must become rows of memory, and nothing be shared with this optimizer.
    full = {key: x.to(working_dtype(x), copy=True).contiguous() for key, x in moments.items()}
    return {"step": state["step"].detach().to("cpu", torch.float32, copy=True), **full}
