"""CPU kernels of cpu_kernels.py: what reaches them is checked here, and launched by numba."""

import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from coupled_adam.optim.backends import plain
from coupled_adam.optim.directions import DIRECTION
from coupled_adam.optim.eight_bit import EightBit
from coupled_adam.optim.equations import Coefficients
from coupled_adam.optim.job import Job, advance, check_factors, check_shapes, check_vectors
from coupled_adam.optim.rounding import seed_of

INSTALLED = find_spec("numba") is not None

#: What a first moment that a kernel takes is made of.
MOMENTS = (torch.float32, torch.bfloat16)
#: Row length in which a kernel takes a tensor that has no rows of its own to respect.
FLAT_ROW = 4096
#: Below this many elements a second thread costs more than it brings.
ELEMENTS_PER_THREAD = 65536


def refuses(job: Job) -> str:
    """Return why this backend does not take a job; empty if it does."""
    if job.param.device.type != "cpu":
        return f"CPU kernels do not run on {job.param.device}"
    if not INSTALLED:
        return "CPU kernels need numba, the extra 'fast'"
    if is_compiling() or job.found_inf is not None or job.param.numel() == 0:
        return "CPU kernels do not support empty tensors, traced steps, or found_inf as a tensor"
    if DIRECTION[job.group["direction"]].numbers is None:
        return f"the direction {job.group['direction']!r} has no kernel"
    if fault := _fault(job):
        return fault
    if _forked:
        _warn_of_fork()
        return "the process was forked from one that had stepped an optimizer"
    return "" if kernels() is not None else "numba cannot be used"


def _fault(job: Job) -> str:
    """Say what keeps tensors from being read and written as memory."""
    moment = job.exp_avg
    codes = moment.codes if isinstance(moment, EightBit) else moment
    for name, x in (("parameter", job.param), ("gradient", job.grad), ("second moment", job.exp_avg_sq)):
        if x.dtype != torch.float32:
            return f"CPU kernels need float32, but the {name} is {x.dtype}"
        if not _is_memory(x):
            return f"CPU kernels need contiguous tensors, but the {name} is not contiguous"
    known = codes.dtype == torch.int8 if codes is not moment else codes.dtype in MOMENTS
    if not known or not _is_memory(codes):
        return f"CPU kernels do not support a first moment in {codes.dtype} or in this memory layout"
    if isinstance(moment, EightBit) and not (moment.scales.dtype == torch.float32 and _is_memory(moment.scales)):
        return "CPU kernels need contiguous float32 scales for an 8-bit first moment"
    return ""


def _is_memory(x: Tensor) -> bool:
    return x.is_contiguous() and x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)


def check(job: Job, *rows: Tensor | None) -> None:
    """Raise RuntimeError unless a kernel can take the tensors of a job as memory, and ``rows`` beside it, (1, H)."""
    check_shapes(job)
    check_vectors(job, *rows)
    if fault := _fault(job):
        raise RuntimeError(fault)


def sums(job: Job) -> Tensor:
    """As ``plain.sums``; sums over rows are taken in float64."""
    check(job)
    c = job.coefficients(1)
    if c.coupling_factor == 0:
        threads = threads_for(job.param)
        total = _scratch(1 + job.foreseen, threads, job.param.shape[1])
        squares, plain_sums = total[0].numpy(), total[1].numpy() if job.foreseen else None
        launch(kernels().sum_of_squares_kernel, job.grad.detach().numpy(), squares, plain_sums, threads=threads)
        total[0] *= float(c.grad_factor) ** 2
        rows = total.sum(1).to(torch.float32)
    else:
        rows = plain.sums_of_gradient(job)
    return torch.cat([rows, plain.column_sums(job, measure).to(rows.dtype)]) if job.foreseen else rows


def measure(job: Job) -> Tensor:
    """Sum parameter and first moment over the rows: (2, H), float64."""
    check(job)
    threads = threads_for(job.param)
    found = _scratch(threads, 2, job.param.shape[1])
    (moment,), seed = _moment(job)
    launch(kernels().column_sums_kernel, job.param.detach().numpy(), moment, seed, found.numpy(), threads=threads)
    return found.sum(0)


def move(jobs: Sequence[Job]) -> None:
    """As ``plain.move``, each parameter in one pass and without temporary tensors of its size."""
    for job in jobs:
        check(job)
        c = job.coefficients(job.step)
        if job.coupled:
            root = plain.root_of_rows_(job, c)
            _move_rows_(job, c, root, plain.mean_row(job, root, c), plain.row_factors_(job, c))
        else:
            _move_elements_(job, c)
        # The kernels write past autograd, which must know, to refuse a backward pass through what has changed.
        increment_version([job.param, *(job.exp_avg if isinstance(job.exp_avg, EightBit) else [job.exp_avg])])
        if job.foreseen:
            plain.keep_column_sums(job)
        advance([job])


def _move_rows_(job: Job, c: Coefficients, root: Tensor, mean: Tensor | None, factors: Tensor | None) -> None:
    check(job, root, mean)
    check_factors(job, factors)
    of_row = None if factors is None else factors.contiguous().numpy()[:, 0]
    numbers, threads = DIRECTION[job.group["direction"]].numbers, threads_for(job.param)
    moments, seed = _moment(job)
    arrays = (job.param.detach().numpy(), job.grad.detach().numpy(), *moments, root.numpy()[0], _float32(c), seed)
    if mean is not None:
        job.column_sums = _scratch(threads, 2, job.param.shape[1])
        kernel = kernels().centered_rows_kernel(numbers)
        launch(kernel, *arrays, mean.contiguous().numpy()[0], job.column_sums.numpy(), threads=threads)
    else:
        made = kernels().rows_kernel if len(moments) == 1 else kernels().eight_bit_rows_kernel
        column, row = _vectors(job)
        launch(made(numbers), *arrays, column, None if row is None else row[0], of_row, threads=threads)


def _move_elements_(job: Job, c: Coefficients) -> None:
    (moment,), seed = _moment(job)
    param, grad, second = (x.detach().view(-1).numpy() for x in (job.param, job.grad, job.exp_avg_sq))
    column, row = _vectors(job)
    if row is None:  # only its length counts
        row = torch.empty(1, min(FLAT_ROW, job.param.numel()), dtype=torch.float32, device="cpu").numpy()
    period = job.param.shape[-2] if column is not None else 1
    kernel = kernels().elements_kernel(DIRECTION[job.group["direction"]].numbers)
    threads = threads_for(job.param)
    launch(kernel, param, grad, moment.reshape(-1), second, _float32(c), seed, column, row, period, threads=threads)
    increment_version([job.exp_avg_sq])


def _moment(job: Job) -> tuple[list[Any], int | None]:
    """Return a first moment as arrays, of codes and scales if it is in 8 bits, and the seed of the dice if any."""
    if isinstance(job.exp_avg, EightBit):
        return [x.detach().numpy() for x in job.exp_avg], int(seed_of(float(job.step)))
    if job.exp_avg.dtype == torch.bfloat16:
        return [job.exp_avg.detach().view(torch.uint16).numpy()], int(seed_of(float(job.step)))
    return [job.exp_avg.detach().numpy()], None


def _vectors(job: Job) -> tuple[Any, Any]:
    """Return the two vectors of spectral decay, (R,) and (B, C); None without it."""
    if job.triple is None:
        return None, None
    column, row = job.triple
    return column.reshape(-1).numpy(), row.reshape(-1, row.shape[-1]).numpy()


def _float32(c: Coefficients) -> Coefficients:
    import numpy as np

    return Coefficients(*(np.float32(float(x)) for x in c))  # type: ignore[arg-type]


def _scratch(*shape: int) -> Tensor:
    """Make a tensor for a kernel to fill, whatever torch's default dtype and device are."""
    return torch.empty(*shape, dtype=torch.float64, device="cpu")


# ----------------------------------------------------------------------------------------------------- numba's threads

#: numba's simplest pool of threads aborts the process when two threads of it start a kernel.
_one_at_a_time = threading.Lock()
_launched = _forked = False


def _after_fork() -> None:
    global _forked
    if _launched:
        _forked = True
        torch.set_num_threads(1)  # torch would wait for threads that this process does not have


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def kernels() -> Any:
    """Import the kernels; None if they cannot be used. At their first use, as numba takes a second to load."""
    try:
        from coupled_adam.optim.backends import cpu_kernels
    except Exception as error:  # an installed numba may refuse the numpy beside it, in its own ways
        warnings.warn(f"numba cannot be used ({error}); optimizer steps will be slower", UserWarning, stacklevel=2)
        return None
    return cpu_kernels


@functools.cache
def _warn_of_fork() -> None:
    warnings.warn(
        "this process was forked from one that had stepped an optimizer, and lacks its threads: steps here use one "
        'thread and no kernels. Start processes with multiprocessing.get_context("spawn"), or before the first step',
        UserWarning,
        stacklevel=2,
    )


def threads_for(x: Tensor) -> int:
    """Return how many threads share the work."""
    import numba

    return int(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, x.numel() // ELEMENTS_PER_THREAD + 1))


def launch(kernel: Callable[..., object], *arguments: Any, threads: int) -> None:
    """Call a kernel with so many threads, and leave the settings of numba and torch as the user has them."""
    global _launched
    import numba

    with _one_at_a_time:
        of_torch = torch.get_num_threads()
        first, _launched = not _launched, True
        before = numba.get_num_threads()
        if first:  # numba's threads have just been made, by the OpenMP that torch uses too: as many for both
            torch.set_num_threads(of_torch)
        numba.set_num_threads(threads)
        try:
            kernel(*arguments, threads)
        finally:
            numba.set_num_threads(before)
