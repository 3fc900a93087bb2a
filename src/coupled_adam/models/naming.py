"""Whose moments an unnamed checkpoint of AdamW holds: names for its groups, from the ways in which they are made."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from coupled_adam.optim.state_dict import bare

#: The names in a param group of each group.
Layout = list[list[str]]

#: What the Trainer of transformers does not decay, by a parameter's name; nor the parameters of an ``nn.LayerNorm``.
UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def name_checkpoint(model: nn.Module, adamw: Optimizer | dict[str, Any]) -> dict[str, Any]:
    """Add the names of the parameters to a state dict of AdamW, so that an optimizer with other groups can load it.

    Without names it is unknown which moments belong to which parameter. An optimizer knows its parameters. The groups
    of a bare state dict are recognized by their sizes, and by the shapes of the moments, if they were built for this
    model in one of these ways:

    * ``AdamW(model.parameters())``
    * two groups, of parameters with and without decay: by dimensions, as nanoGPT; by names and types, as the Trainer
      of transformers; all but biases and ``LayerNorm.weight``, as its older examples

    Otherwise, build the AdamW as it was built, load the state dict into it, and pass the optimizer.

    Args:
        model: the model that AdamW was built for, with the same parameters frozen.
        adamw: the optimizer, or its ``state_dict()``; it is not modified.

    Returns:
        The state dict with ``param_names`` in its groups and without frozen parameters, for ``load_state_dict`` of an
        optimizer built with ``param_groups``.

    Raises:
        ValueError: the groups match none of these ways, or several that differ; a parameter is not in the model.

    Examples:
        >>> import torch
        >>> from coupled_adam import CoupledAdam, name_checkpoint, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 8), torch.nn.Linear(8, 100))
        >>> adamw = torch.optim.AdamW(model.parameters())
        >>> optimizer = CoupledAdam(param_groups(model, coupled="1"))
        >>> optimizer.load_state_dict(name_checkpoint(model, adamw.state_dict()))
    """
    if isinstance(adamw, Optimizer):
        return _named(adamw.state_dict(), _layout_of(adamw, model), model)
    if not isinstance(adamw, dict) or not {"state", "param_groups"} <= adamw.keys():
        found = f"a dictionary with {list(adamw)[:5]}" if isinstance(adamw, dict) else f"a {type(adamw).__name__}"
        raise ValueError(
            f"name_checkpoint takes an optimizer or its state_dict(), with 'state' and 'param_groups', not {found}"
        )
    if all("param_names" in group for group in adamw["param_groups"]):
        return dict(adamw)
    return _named(adamw, _layout_for(adamw, model), model)


def _named(state_dict: dict[str, Any], layout: Layout, model: nn.Module) -> dict[str, Any]:
    """Put the names into the groups, and leave out what is frozen, as ``param_groups`` does."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    groups = []
    for group, names in zip(state_dict["param_groups"], layout, strict=True):
        kept = [(key, name) for key, name in zip(group["params"], names, strict=True) if name in trained]
        groups.append({**group, "params": [key for key, _ in kept], "param_names": [name for _, name in kept]})
    keys = {key for group in groups for key in group["params"]}
    state = {key: moments for key, moments in state_dict["state"].items() if key in keys}
    return {**state_dict, "state": state, "param_groups": groups}


def _layout_of(optimizer: Optimizer, model: nn.Module) -> Layout:
    names = {id(p): name for name, p in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if id(p) not in names:
                raise ValueError(
                    f"parameter {i} of group {number}, of shape {tuple(p.shape)}, is not in this "
                    f"{type(model).__name__}: pass the model that the optimizer was built for"
                )
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _layout_for(state_dict: dict[str, Any], model: nn.Module) -> Layout:
    """Return the one layout that fits the sizes of the groups and the shapes of the moments."""
    params: dict[str, Tensor] = dict(model.named_parameters())
    sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    known: dict[str, Layout] = {}
    for kind, layout in _layouts(model):
        if layout not in known.values():
            known[kind] = layout
    sized = {kind: layout for kind, layout in known.items() if [len(names) for names in layout] == sizes}
    misfits = {kind: _misfit(state_dict, layout, params) for kind, layout in sized.items()}
    fitting = [kind for kind, misfit in misfits.items() if not misfit]
    if len(fitting) == 1:
        return sized[fitting[0]]
    if fitting:
        reason = f"its groups of {sizes} parameters fit more than one layout: {' or '.join(fitting)}"
    elif sized:
        reason = next(iter(misfits.values()))
    else:
        made = "; ".join(f"{kind} {[len(names) for names in layout]}" for kind, layout in known.items())
        reason = f"it has groups of {sizes} parameters, but the known layouts for this model are: {made}"
    raise ValueError(
        f"cannot match the moments in this AdamW checkpoint to the parameters of this {type(model).__name__}: "
        f"{reason}. Build the AdamW as it was built then, load the checkpoint into it, and pass that optimizer: "
        "name_checkpoint(model, adamw)"
    )


def _misfit(state_dict: dict[str, Any], layout: Layout, params: dict[str, Tensor]) -> str:
    """Say which moment has not the shape of its parameter; empty if all have."""
    for group, names in zip(state_dict["param_groups"], layout, strict=True):
        for key, name in zip(group["params"], names, strict=True):
            moment = state_dict["state"].get(key, {}).get("exp_avg")
            if moment is not None and moment.shape != params[name].shape:
                return (
                    f"{name!r} has shape {tuple(params[name].shape)}, but the moment in its place {tuple(moment.shape)}"
                )
    return ""


def _layouts(model: nn.Module) -> Iterator[tuple[str, Layout]]:
    """Yield the groups that are usual for the trainable parameters, and for all, each with a word on them."""
    norms = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for p in module.parameters(recurse=False)
    }
    decays: dict[str, Callable[[str, Tensor], bool]] = {
        "matrices and vectors": lambda _, p: p.ndim >= 2,
        "the Trainer's decayed and others": lambda name, p: not UNDECAYED.search(name.lower()) and id(p) not in norms,
        "all but biases and LayerNorm.weight, then those": lambda name, _: (
            not re.search(r"bias|(?i:layer_?norm)\.weight", name)
        ),
    }
    every = [(bare(name), name, p) for name, p in model.named_parameters()]
    trained = [item for item in every if item[2].requires_grad]
    for word, items in (("", trained), (" (frozen ones too)", every)):
        yield f"model.parameters(){word}", [[name for _, name, _ in items]]
        for kind, is_decayed in decays.items():
            both = [[name for b, name, p in items if is_decayed(b, p) is wanted] for wanted in (True, False)]
            yield kind + word, both
            yield f"{kind} in reverse{word}", both[::-1]
