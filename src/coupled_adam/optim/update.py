"""The step of one parameter on plain tensors: what every fast path computes.

It sees the shard that this process holds, and never communicates. A second moment that rows share, (1, H), is updated
once, first; the rows move second, and may do so block by block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from coupled_adam.optim.directions import DIRECTION
from coupled_adam.optim.eight_bit import EightBit, Moment, quantized, widened
from coupled_adam.optim.equations import Coefficients, Number, centered, first_moment, moved, second_moment, squared
from coupled_adam.optim.rounding import stochastically_rounded


class RankOne(NamedTuple):
    """√M·σ·u·vᵀ of a (…, M, N) matrix, what spectral decay shrinks it by."""

    column: Tensor
    """√M·σ·u, (…, M)."""
    row: Tensor
    """v, (…, N)."""


def sum_of_squares(grad: Tensor, exp_avg: Moment, c: Coefficients) -> Tensor:
    """Sum (f·g)² + κ·m² over the rows, m after this step's update: (V, H) -> (1, H), float32 or float64."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    g = grad.to(dtype)
    if c.coupling_factor == 0:
        return times_square(g.square().sum(0, keepdim=True), c.grad_factor)
    m = first_moment(numbers_of(exp_avg).to(dtype, copy=True), g, c.grad_factor, c.first_rate)
    return squared(g, m, c.grad_factor, c.coupling_factor).sum(0, keepdim=True)  # type: ignore[no-any-return]


def times_square(total: Tensor, factor: Number) -> Tensor:
    """Return f²·total; where f is known to be ±1, without an operation."""
    return total if isinstance(factor, float) and abs(factor) == 1 else total * (factor * factor)


def root_of_rows_(exp_avg_sq: Tensor, square: Tensor, c: Coefficients) -> Tensor:
    """Update a shared second moment, (1, H), with this step's mean square. Returns √ν̂, (1, H)."""
    v = second_moment(exp_avg_sq, square, c.second_rate)
    return c.root_scale * v.sqrt()  # type: ignore[no-any-return]


def move_rows_(
    param: Tensor,
    exp_avg: Moment,
    grad: Tensor,
    root: Tensor,
    c: Coefficients,
    direction: str,
    step: float | Tensor,
    spectral: RankOne | None = None,
    first: int = 0,
    mean: Tensor | None = None,
) -> None:
    """Move the rows of a matrix that share √ν̂. Modifies ``param`` and ``exp_avg`` in place.

    Args:
        param: (R, H) of any floating dtype, as are ``grad`` and ``exp_avg``; the latter may be in eight bits.
        root: √ν̂, (1, H), float32 or float64; all arithmetic is done in this dtype.
        step: counts from 1; throws the dice of rounding.
        spectral: what one unit of decay η·λ takes off; None for the parameter itself.
        first: the index of the first row in the matrix that these rows are a part of.
        mean: (1, H), what is subtracted from every row in the end; None for nothing.
    """
    m = first_moment(numbers_of(exp_avg).to(root.dtype), grad.to(root.dtype), c.grad_factor, c.first_rate)
    _keep_moment_(exp_avg, m, step, first * param.shape[1])
    _move_(param, DIRECTION[direction].tensors(c.first_scale * m, root, c.eps), c, spectral, mean)


def mean_moved(means: Tensor, root: Tensor, c: Coefficients, direction: str) -> Tensor:
    """Return the mean of a matrix's rows after the step, (1, H), from those of gradient, parameter and first moment
    before it, (3, H).

    The direction is linear, and the rows share √ν̂: their mean moves as if it were one of them.
    """
    grad, param, exp_avg = torch.split(means.clone(), 1)
    move_rows_(param, exp_avg, grad, root, c, direction, step=0.0)
    return param


def move_elements_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    c: Coefficients,
    direction: str,
    step: float | Tensor,
    spectral: RankOne | None = None,
) -> None:
    """Move a parameter each of whose elements has a second moment. Modifies parameter and both moments in place.

    Args as for ``move_rows_``; ``exp_avg_sq`` is float32 or float64, and all arithmetic is done in this dtype.
    """
    dtype = exp_avg_sq.dtype
    g = grad.to(dtype)
    m = first_moment(exp_avg.to(dtype), g, c.grad_factor, c.first_rate)
    _keep_moment_(exp_avg, m, step)
    v = second_moment(exp_avg_sq, squared(g, m, c.grad_factor, c.coupling_factor), c.second_rate)
    _move_(param, DIRECTION[direction].tensors(c.first_scale * m, c.root_scale * v.sqrt(), c.eps), c, spectral)


def numbers_of(exp_avg: Moment) -> Tensor:
    """Return a first moment as a floating-point tensor."""
    return widened(exp_avg) if isinstance(exp_avg, EightBit) else exp_avg


def _keep_moment_(exp_avg: Moment, m: Tensor, step: float | Tensor, first: int = 0) -> None:
    if isinstance(exp_avg, EightBit):
        for kept, new in zip(exp_avg, quantized(m, step, first), strict=True):
            kept.copy_(new)
    elif exp_avg.dtype == torch.bfloat16:
        exp_avg.copy_(stochastically_rounded(m, step, first))
    elif m is not exp_avg:  # updated in place
        exp_avg.copy_(m)


def _move_(
    param: Tensor, direction: Tensor, c: Coefficients, spectral: RankOne | None, mean: Tensor | None = None
) -> None:
    theta = param.to(direction.dtype)
    shrink: Tensor | float = theta
    if spectral is not None:
        shrink = spectral.column.unsqueeze(-1) * spectral.row.unsqueeze(-2)
    elif isinstance(c.decay, float) and c.decay == 0:
        shrink = 0.0  # as embeddings have it; saves a pass over them
    theta = moved(theta, shrink, c.decay, c.lr, direction)
    if mean is not None:
        theta = centered(theta, mean)
    if theta is not param:  # moved in place
        param.copy_(theta)
