"""The step on plain tensors: it takes everything, it is what ``torch.compile`` traces, and what others must compute.

A second moment that rows share, (1, H), is updated once, first; the rows move second, block by block on a CPU.
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.weak import WeakTensorKeyDictionary

from coupled_adam.optim.directions import DIRECTION
from coupled_adam.optim.eight_bit import EightBit
from coupled_adam.optim.equations import (
    Coefficients,
    centered,
    first_moment,
    moved,
    second_moment,
    squared,
    times_square,
)
from coupled_adam.optim.job import Job, advance, check_shapes
from coupled_adam.optim.moments import keep_, numbers_of, split_rows
from coupled_adam.optim.reductions import local
from coupled_adam.optim.spectral import RankOne

#: Where a matrix is taken in blocks of rows: elsewhere every call costs more than it saves.
BLOCK_DEVICES = ("cpu",)
#: Elements of a block: few beside the matrix, many to a call.
BLOCK_ELEMENTS = 2**18


#: By first moment, which is another tensor in every optimizer and after every resume: the stamp and the column sums.
_kept: MutableMapping[Tensor, tuple[tuple[int, ...], Tensor]] = WeakTensorKeyDictionary()


def refuses(job: Job) -> str:
    """Return why this backend does not take a job: it takes all."""
    return ""


def sums(job: Job) -> Tensor:
    """Sum over the rows of a coupled matrix that this process holds what ``Job.means`` are the means of."""
    check_shapes(job)
    rows = sums_of_gradient(job)
    return torch.cat([rows, column_sums(job, measure).to(rows.dtype)]) if job.foreseen else rows


def sums_of_gradient(job: Job) -> Tensor:
    """Sum (f·g)² + κ·m², m after this step's update, and g too if the mean row is to be foreseen: (1, H) or (2, H)."""
    c = job.coefficients(1)  # the step does not count here
    parts = [_sum_of_squares(part, c) for part in _blocks(job)]
    squares = parts[0] if len(parts) == 1 else torch.cat(parts).sum(0, keepdim=True)
    if not job.foreseen:
        return squares
    return torch.cat([squares, job.grad.sum(0, keepdim=True, dtype=squares.dtype)])


def column_sums(job: Job, measure: Callable[[Job], Tensor]) -> Tensor:
    """Sum the rows that this process holds, of a matrix and of its first moment: (2, H).

    What the last step has summed as it wrote them is taken if nobody has changed either since. So rounding is in the
    sums, the next step takes it off, and errors do not accumulate. A change past the version counter (``param.data``)
    is not seen: the mean is off by it for one step, whose own sums then hold it.
    """
    if not is_compiling():
        found = _kept.get(job.state["exp_avg"])
        if found is not None and found[0] == _stamp(job.whole, job.state["exp_avg"]):
            return found[1]
    return measure(job)


def keep_column_sums(job: Job) -> None:
    """Keep what a step has summed as it wrote the tensors, if it has."""
    if job.column_sums is not None:
        _kept[job.state["exp_avg"]] = _stamp(job.whole, job.state["exp_avg"]), job.column_sums.sum(0)


def _stamp(*tensors: Tensor) -> tuple[int, ...]:
    """Return numbers that are others once one of the tensors is changed in place or lies elsewhere."""
    return tuple(number for x in map(local, tensors) for number in (x._version, x.data_ptr()))


def measure(job: Job) -> Tensor:
    """Sum parameter and first moment over the rows: (2, H)."""
    dtype = torch.promote_types(job.param.dtype, torch.float32)
    return torch.cat([x.sum(0, keepdim=True, dtype=dtype) for x in (job.param, cast(Tensor, job.exp_avg))])


def move(jobs: Sequence[Job]) -> None:
    """Move parameters and moments in place, and count the step."""
    for job in jobs:
        check_shapes(job)
        c = job.coefficients(job.step)
        if job.coupled:
            root = root_of_rows_(job, c)
            mean = mean_row(job, root, c)
            job, c = live(job, c)
            factors = row_factors_(job, c)
            kept = [x.clone() for x in job.exp_avg] if job.found_inf is not None and _packed(job) else []
            for part in _blocks(job):
                here = None if factors is None else factors[part.first_row : part.first_row + len(part.param)]
                _move_rows_(part, c, root if here is None else root * here, mean)
            for now, before in zip(job.exp_avg if kept else (), kept, strict=True):  # codes were rounded again
                now.copy_(torch.where(cast(Tensor, job.found_inf) > 0, before, now))
        else:
            _move_elements_(*live(job, c))
        advance([job])


def root_of_rows_(job: Job, c: Coefficients) -> Tensor:
    """Update a shared second moment with this step's mean square. Returns √ν̂, (1, H)."""
    square = cast(Tensor, job.means)[:1]
    if job.found_inf is not None:
        square, c = torch.where(job.found_inf > 0, 0, square), c.halted(job.found_inf)
    v = second_moment(job.exp_avg_sq, square, c.second_rate)
    return c.root_scale * v.sqrt()  # type: ignore[no-any-return]


def row_factors_(job: Job, c: Coefficients) -> Tensor | None:
    """Update the second moments r of the rows. Returns (r_i / r̄)^(α/2), (V, 1), by which each row's √ν̂ is multiplied.

    r̄ is the mean over all rows, and the mean over the columns of the shared second moment is the same number.
    """
    r = job.exp_avg_sq_rows
    if r is None:
        return None
    if c.coupling_factor == 0:  # one pass, and nothing of the size of the matrix
        norms = torch.linalg.vector_norm(job.grad, dim=1, keepdim=True, dtype=r.dtype)
        squares = times_square(norms.square(), c.grad_factor)
    else:
        squares = torch.cat([_sum_of_squares(part, c, dim=1) for part in _blocks(job)]).to(r.dtype)
    r = second_moment(r, squares / max(job.param.shape[1], 1), c.second_rate)
    mean = job.exp_avg_sq.mean().clamp(min=torch.finfo(r.dtype).tiny)  # 0 before there was any gradient
    return (r / mean).pow(job.group["row_exponent"] / 2)  # type: ignore[no-any-return]


def mean_row(job: Job, root: Tensor, c: Coefficients) -> Tensor | None:
    """Return the mean of a matrix's rows after the step, (1, H), to be subtracted from all; None if it is not foreseen.

    The direction is linear, and the rows share √ν̂: their mean moves as if it were one of them.
    """
    if not job.foreseen:
        return None
    grad, param, exp_avg = (x.clone() for x in torch.split(cast(Tensor, job.means)[1:], 1))
    m = first_moment(exp_avg.to(root.dtype), grad.to(root.dtype), c.grad_factor, c.first_rate)
    _move_(param, DIRECTION[job.group["direction"]].tensors(c.first_scale * m, root, c.eps), c)
    return job.unless_it_rests(param)


def live(job: Job, c: Coefficients) -> tuple[Job, Coefficients]:
    """Return a job and coefficients that change nothing where GradScaler has found an infinity."""
    if job.found_inf is None:
        return job, c
    return replace(job, grad=torch.where(job.found_inf > 0, 0, job.grad)), c.halted(job.found_inf)


def _packed(job: Job) -> bool:
    return isinstance(job.exp_avg, EightBit)


def _blocks(job: Job) -> Iterator[Job]:
    """Cut a matrix into blocks of rows, where that is faster."""
    param = job.param
    rows = max(BLOCK_ELEMENTS // max(param.shape[1], 1), 1)
    plain = type(param) in (Tensor, torch.nn.Parameter) and param.device.type in BLOCK_DEVICES
    if not plain or len(param) <= rows or is_compiling():
        yield job
        return
    pieces = zip(torch.split(param, rows), torch.split(job.grad, rows), split_rows(job.exp_avg, rows), strict=True)
    for i, (theta, g, m) in enumerate(pieces):
        triple = job.triple and job.triple._replace(column=job.triple.column[i * rows : (i + 1) * rows])
        yield replace(job, param=theta, grad=g, exp_avg=m, triple=triple, first=i * rows * param.shape[1])


def _sum_of_squares(job: Job, c: Coefficients, dim: int = 0) -> Tensor:
    """Sum over the rows, (1, H), or with ``dim`` = 1 over the columns, (V, 1); in float32 or float64."""
    dtype = torch.promote_types(job.grad.dtype, torch.float32)
    g = job.grad.to(dtype)
    if c.coupling_factor == 0:
        return times_square(g.square().sum(dim, keepdim=True), c.grad_factor)
    m = first_moment(numbers_of(job.exp_avg).to(dtype, copy=True), g, c.grad_factor, c.first_rate)
    return squared(g, m, c.grad_factor, c.coupling_factor).sum(dim, keepdim=True)  # type: ignore[no-any-return]


def _move_rows_(job: Job, c: Coefficients, root: Tensor, mean: Tensor | None) -> None:
    """Move rows with √ν̂, (1, H) or (V, H), in whose dtype all is computed; then subtract ``mean``, (1, H), if any."""
    m = numbers_of(job.exp_avg).to(root.dtype)
    m = first_moment(m, job.grad.to(root.dtype), c.grad_factor, c.first_rate)
    keep_(job.exp_avg, m, job.step, job.first)
    way = DIRECTION[job.group["direction"]].tensors(c.first_scale * m, root, c.eps)
    _move_(job.param, way, c, job.triple, mean)


def _move_elements_(job: Job, c: Coefficients) -> None:
    """Move a parameter each of whose elements has a second moment, in whose dtype all is computed."""
    v = job.exp_avg_sq
    g = job.grad.to(v.dtype)
    m = first_moment(cast(Tensor, job.exp_avg).to(v.dtype), g, c.grad_factor, c.first_rate)
    keep_(job.exp_avg, m, job.step, job.first)
    v = second_moment(v, squared(g, m, c.grad_factor, c.coupling_factor), c.second_rate)
    way = DIRECTION[job.group["direction"]].tensors(c.first_scale * m, c.root_scale * v.sqrt(), c.eps)
    _move_(job.param, way, c, job.triple)


def _move_(
    param: Tensor, way: Tensor, c: Coefficients, triple: RankOne | None = None, mean: Tensor | None = None
) -> None:
    theta = param.to(way.dtype)
    shrink: Tensor | float = theta
    if triple is not None:
        shrink = triple.column.unsqueeze(-1) * triple.row.unsqueeze(-2)
    elif isinstance(c.decay, float) and c.decay == 0:
        shrink = 0.0  # as embeddings have it; saves a pass over them
    theta = moved(theta, shrink, c.decay, c.lr, way)
    if mean is not None:
        theta = centered(theta, mean)
    if theta is not param:  # moved in place
        param.copy_(theta)
