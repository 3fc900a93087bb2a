"""What an optimizer does with which parameter, in words."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from coupled_adam.optim.equations import working_dtype
from coupled_adam.optim.moments import has_rows
from coupled_adam.optim.optimizer import AdamFamily, inner_optimizer
from coupled_adam.optim.reductions import local, vocabulary_group
from coupled_adam.optim.spectral import takes_spectral_decay
from coupled_adam.optim.state import new_state

#: As many matrices without decay as a line names.
SHOWN = 3

#: A param group and the index of one of its parameters.
Member = tuple[dict[str, Any], int]


def describe(optimizer: Optimizer) -> str:
    """Describe what is coupled, what is decayed and how, how large the state is, and whether the optimizer clips.

    Args:
        optimizer: one of this package, or the wrapper of a trainer that holds it as ``.optimizer``, as in Accelerate
            and Lightning.

    Returns:
        A few lines of text. The size is that of this process's state from the first step on. A coupled parameter that
        has had no gradient while others have is pointed out: the model may no longer use it.

    Raises:
        TypeError: the optimizer is not one of this package.

    Examples:
        >>> from torch import nn
        >>> from coupled_adam import CoupledAdam, describe, param_groups
        >>> model = nn.Sequential(nn.Embedding(100, 8), nn.LayerNorm(8), nn.Linear(8, 100, bias=False))
        >>> print(describe(CoupledAdam(param_groups(model, coupled=[model[2]]), max_grad_norm=1.0)))
        CoupledAdam
          coupled over the vocabulary: 2.weight (100, 8), weight decay 0
          weight decay 0.1: 1 matrix, 800 elements
          weight decay 0: 2 vectors and scalars, 16 elements
          state: 9.8 kB; uncoupled it would be 12.9 kB
          clipping by this optimizer: to a global norm of 1; do not clip elsewhere
    """
    ours = inner_optimizer(optimizer)
    if not isinstance(ours, AdamFamily):
        raise TypeError(f"{type(optimizer).__name__} is neither an optimizer of coupled_adam nor a wrapper around one")
    members = [(group, i) for group in ours.param_groups for i in range(len(group["params"]))]
    lines = [*_coupled(ours, members), *_others(members), *_centered(members), _state(ours, members), _clipping(ours)]
    return "\n  ".join([type(ours).__name__, *lines])


def _coupled(optimizer: AdamFamily, members: list[Member]) -> Iterator[str]:
    coupled = [member for member in members if _is_coupled(member)]
    for member in coupled:
        shard = ", a shard" if vocabulary_group(_param(member)) is not None else ""
        text = f"coupled over the vocabulary: {_name(member)} {tuple(_param(member).shape)}{shard}, {_decay(member)}"
        text += _scales(member)
        yield text + _untrained(optimizer, member)
    if not coupled:
        yield "coupled over the vocabulary: nothing"


def _scales(member: Member) -> str:
    """Name what makes the steps of a parameter longer or shorter than those of others."""
    names = {"lr_factor": "learning rate factor", "coupling_scale": "coupling_scale"}
    found = {text: member[0].get(key, 1.0) for key, text in names.items()}
    scales = "".join(f", {text} {value:g}" for text, value in found.items() if value != 1)
    exponent = member[0]["row_exponent"]
    return scales + (f", row_exponent {exponent:g}" if exponent else "")


def _untrained(optimizer: AdamFamily, member: Member) -> str:
    """Say that a parameter has not moved, where others have."""
    steps = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    own = optimizer.state.get(_param(member), {}).get("step", 0)
    if int(own) or not any(steps):
        return ""
    return (
        f"; no gradient in {max(steps)} steps: frozen, unused, or replaced since, for example by "
        "resize_token_embeddings"
    )


def _others(members: list[Member]) -> Iterator[str]:
    """Sum up the parameters that are not coupled, by their decay."""
    kinds: dict[str, list[Member]] = {}
    for member in members:
        if not _is_coupled(member):
            kinds.setdefault(_decay(member), []).append(member)
    for decay, alike in kinds.items():
        matrices = [member for member in alike if _param(member).ndim >= 2]
        vectors = len(alike) - len(matrices)
        counts = [f"{len(matrices)} {'matrix' if len(matrices) == 1 else 'matrices'}"] if matrices else []
        if matrices and decay.endswith("decay 0"):  # as a rule matrices are decayed
            counts[0] += f" ({', '.join(map(_name, matrices[:SHOWN]))}{', …' if len(matrices) > SHOWN else ''})"
        counts += [f"{vectors} vectors and scalars"] if vectors else []
        yield f"{decay}: {' and '.join(counts)}, {sum(_param(m).numel() for m in alike):,} elements"


def _centered(members: list[Member]) -> Iterator[str]:
    for member in members:
        if member[0]["center"]:
            yield f"centered in every step: {_name(member)}"


def _state(optimizer: AdamFamily, members: list[Member]) -> str:
    trained = [member for member in members if _param(member).requires_grad]
    states = [optimizer.state.get(_param(member)) for member in trained]
    if not all(states) and optimizer.spread:
        return "state: sharded across the processes in the first step"
    size = sum(_bytes(state or _to_be(member)) for state, member in zip(states, trained, strict=True))
    text = f"state: {_size(size)}"
    if not any(map(_is_coupled, trained)):
        return text
    saved = sum(_saved_bytes(member) for member in trained if _is_coupled(member))
    return f"{text}; uncoupled it would be {_size(size + saved)}"


def _clipping(optimizer: AdamFamily) -> str:
    bound = optimizer.param_groups[0]["max_grad_norm"]
    if bound is None:
        return "clipping by this optimizer: none"
    if bound == math.inf:
        return "clipping by this optimizer: none; it computes the norm"
    return f"clipping by this optimizer: to a global norm of {bound:g}; do not clip elsewhere"


def _param(member: Member) -> Tensor:
    group, i = member
    param: Tensor = group["params"][i]
    return param


def _name(member: Member) -> str:
    group, i = member
    return str(group["param_names"][i]) if group.get("param_names") else f"parameter {i}"


def _is_coupled(member: Member) -> bool:
    return bool(member[0]["second_moment"] == "vocabulary")


def _decay(member: Member) -> str:
    group = member[0]
    if group["decay"] == "spectral" and not takes_spectral_decay(_param(member)):
        return f"weight decay {group['scalar_vector_weight_decay']:g}"
    return f"{'spectral' if group['decay'] == 'spectral' else 'weight'} decay {group['weight_decay']:g}"


def _to_be(member: Member) -> dict[str, Any]:
    """Return the state that the first step will make, without memory for it."""
    part = torch.empty_like(local(_param(member)), device="meta")
    part.use_spectral_decay = takes_spectral_decay(_param(member))  # type: ignore[attr-defined]
    return new_state(part, member[0])


def _bytes(state: dict[str, Any]) -> int:
    return sum(local(x).nbytes for x in state.values())


def _saved_bytes(member: Member) -> int:
    """Return by how many bytes a coupled second moment, with those of the rows if any, is smaller than a full one."""
    param = _param(member)
    rows, columns = local(param).shape
    kept = columns + (rows if has_rows(member[0]) else 0)
    return int((rows * columns - kept) * working_dtype(param).itemsize)


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} bytes"
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
