"""Clipping by the global norm, as ``torch.nn.utils.clip_grad_norm_`` does it, but within the step."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from coupled_adam.optim.equations import Number, readable
from coupled_adam.optim.reductions import ProcessGroups, holders, local


def partial_norms(
    held: Sequence[Tensor], grads: Mapping[Tensor, Tensor], sums: Mapping[Tensor, Tensor]
) -> dict[ProcessGroups, Tensor]:
    """Compute, for every set of ranks that share parameters, the norm of this rank's part of their gradients.

    Args:
        held: all parameters, with a gradient or not, so that every process has the same keys.
        grads: the gradients there are, by parameter.
        sums: sums of squares of gradients that are known already, by parameter.
    """
    sets: dict[ProcessGroups, list[Tensor]] = {}
    for param in held:
        sets.setdefault(holders(param), []).append(param)
    return {
        over: _norm(
            [local(grads[p]) for p in params if p in grads and p not in sums],
            [sums[p].sum() for p in params if p in sums],
            device=local(params[0]).device,
        )
        for over, params in sets.items()
    }


def global_norm(norm: Tensor | None, square_sums: Sequence[Tensor]) -> Tensor:
    """Combine the norm of gradients that no other rank shares with the complete sums of squares of the others."""
    if not square_sums:
        return torch.zeros((), dtype=torch.float32, device="cpu") if norm is None else norm
    return _norm([] if norm is None else [norm], square_sums, device=square_sums[0].device)


def coefficient(norm: Tensor, bound: float) -> Number:
    """Return the factor, at most 1, that clips this norm to ``bound``; a float where reading it is free."""
    if bound == math.inf:
        return 1.0  # infinity over infinity is no number
    clip = (bound / (norm + 1e-6)).clamp(max=1.0)  # the 1e-6 is torch's
    return float(clip) if readable(clip) else clip


def _norm(tensors: Sequence[Tensor], square_sums: Sequence[Tensor], device: torch.device) -> Tensor:
    """Norm of all tensors together, a scalar, at least float32; of some of them only the sums of squares are given."""
    if not square_sums:
        return _norm_of(tensors).to(device)
    rest = [_norm_of(tensors)] if tensors else []
    squares = [r.to(device).square() for r in rest]
    terms = [*(s.to(device) for s in square_sums), *squares]
    return (torch.stack(terms).sum() if len(terms) > 1 else terms[0]).sqrt()


def _norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """As torch's ``get_total_norm``, which computes the norm of 16-bit tensors in 16 bits: it overflows at 65,504."""
    wide = [x for x in tensors if x.dtype.itemsize > 2]
    narrow = [x for x in tensors if x.dtype.itemsize <= 2]
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    norms = [get_total_norm(wide)] if wide else []
    for device in dict.fromkeys(x.device for x in narrow):
        here = [x for x in narrow if x.device == device]
        norms += [_vector_norm(torch.stack(_norms(here)))]
    first = norms[0]
    return first if len(norms) == 1 else _vector_norm(torch.stack([x.to(first.device) for x in norms]))


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    if torch.compiler.is_compiling():
        return [_vector_norm(x) for x in tensors]
    return list(torch._foreach_norm(tensors, 2, dtype=torch.float32))


def _vector_norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm
