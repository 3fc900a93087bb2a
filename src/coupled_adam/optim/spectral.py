"""Spectral decay: the leading singular triple of a matrix, one step of the power method at a time."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coupled_adam.optim.equations import working_dtype
from coupled_adam.optim.reductions import Reduction, Sum, cuts, holders, is_dtensor, local, reduced_like, spread


class RankOne(NamedTuple):
    """√M·σ·u·vᵀ of a (…, M, N) matrix, what spectral decay shrinks it by."""

    column: Tensor
    """√M·σ·u, (…, M)."""
    row: Tensor
    """v, (…, N)."""


def takes_spectral_decay(param: Tensor) -> bool:
    """Return whether spectral decay applies: to a matrix with no dimension of 1 that is not marked otherwise."""
    wanted = bool(getattr(param, "use_spectral_decay", True))
    return wanted and param.ndim >= 2 and min(param.shape[-2:]) > 1


def first_u(param: Tensor) -> Tensor:
    """Ones, one a row of the matrix."""
    part = local(param)
    return reduced_like(param, part.new_ones(part.shape[:-1], dtype=working_dtype(param)), -1)


def power_iteration(u: Tensor, matrix: Tensor, step: float | Tensor) -> Reduction[tuple[RankOne, Tensor]]:
    """Take one step of the power method from ``u``, towards the matrix's leading singular triple.

    Args:
        u: (…, M), in the working precision; the direction of the left singular vector, which persists between steps.
            Its length does not count.
        matrix: (…, M, N); leading dimensions are a batch.
        step: seeds the vector that takes the place of a ``u`` that the matrix maps to 0, as it maps a vector of ones
            where its columns sum to 0: the power method would never leave it.

    Returns:
        √M·σ·u and v, which Algorithm 1 of Adams subtracts, times η·λ (both 0 where the matrix maps ``u`` to 0), and the
        next ``u``; of the rows and columns held here.
    """
    w, direction = local(matrix).to(u.dtype), local(u)
    x = yield Sum(torch.einsum("...mn,...m->...n", w, direction), holders(matrix, -2))  # x = Wᵀu
    y = torch.einsum("...mn,...n->...m", w, x)  # W·x
    both = yield Sum(torch.cat([y, x.square().sum(-1, keepdim=True)], -1), holders(matrix, -1))
    y, length = both[..., :-1], both[..., -1:].sqrt()  # W·x, ‖x‖
    inverse = torch.where(length > 0, 1 / length, 0)
    column = y * inverse  # W·v = σ·u, where v = x / ‖x‖
    fresh = torch.cos(_positions(u).to(u.dtype).add(step).square()).expand_as(column)
    direction = torch.where(length > 0, column, fresh)  # u ← W·v
    yield RankOne(column=column * matrix.shape[-2] ** 0.5, row=x * inverse), direction  # √M·σ·u, v


def _positions(u: Tensor) -> Tensor:
    """Return where in the whole vector the elements of ``u`` that this rank holds stand."""
    if not is_dtensor(u):
        return torch.arange(u.shape[-1], device=u.device)
    from torch.distributed.tensor import Replicate

    placements = tuple(p if cut == u.ndim - 1 else Replicate() for cut, p in zip(cuts(u), u.placements, strict=True))
    return _shard_positions(u.shape[-1], u.device_mesh, placements, u.ndim, u.device)


@functools.lru_cache(maxsize=256)
def _shard_positions(size: int, mesh: Any, placements: Any, ndim: int, device: torch.device) -> Tensor:
    """Return the positions of one shard, by torch's own rule. Every rank cuts for itself, so nothing is sent."""
    whole = torch.arange(size, device=device).reshape(*[1] * (ndim - 1), size)
    return spread(whole, mesh, placements).to_local().reshape(-1)
