"""Which implementation takes a step: torch's AdamW, a kernel of ours, or the plain functions of update.py.

Results are those of the plain functions within rounding. No shape reaches a kernel unchecked: it writes to raw memory.
The kernels are numba's, for the CPU, and Triton's, for GPUs, which triton_launch.py prepares.

Functions here that take ``halt`` change nothing where this number on the device is 1; see Coefficients.halted.
"""

import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling
from torch.optim.adamw import adamw

from coupled_adam.optim import triton_launch, update
from coupled_adam.optim.checks import CAPTURE_DEVICES
from coupled_adam.optim.directions import DIRECTION
from coupled_adam.optim.eight_bit import EightBit, Moment, blocks_of
from coupled_adam.optim.equations import Coefficients, Number, has_numbers
from coupled_adam.optim.rounding import seed_of
from coupled_adam.optim.state import is_plain_adamw
from coupled_adam.optim.update import RankOne

HAS_NUMBA = find_spec("numba") is not None

#: Where torch has a fused AdamW; elsewhere it chooses for itself.
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
#: Row length in which a kernel takes a tensor that has no rows of its own to respect.
FLAT_ROW = 4096
#: Where the plain functions take a matrix in blocks of rows: elsewhere every call costs more than it saves.
BLOCK_DEVICES = ("cpu",)
#: Elements of a block: few beside the matrix, many to a call.
BLOCK_ELEMENTS = 2**18
#: What a first moment that a kernel takes is made of.
KERNEL_MOMENTS = ((torch.float32,), (torch.bfloat16,), (torch.int8, torch.float32))
#: Below this many elements a second thread costs more than it brings.
ELEMENTS_PER_THREAD = 65536


# ------------------------------------------------------------------------------------------------ torch's own AdamW


def takes_torchs_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    group: dict[str, Any],
    clip: Number,
    halt: Tensor | None = None,
) -> bool:
    """Return whether torch's AdamW takes this step: where it computes the same, and as fast.

    It takes clipped gradients as copies; a kernel of ours scales them as it reads them.
    """
    if not is_plain_adamw(param, group) or grad.dtype != param.dtype:
        return False
    if halt is not None and not _fuses(param, grad, exp_avg, exp_avg_sq):
        return False
    if is_one(clip) and halt is None:
        return True
    if triton_launch.apply(param, grad, moment=exp_avg, direction=group["direction"], many=True):
        return False
    return param.numel() < ELEMENTS_PER_THREAD or not kernels_apply(param, grad)


def _fuses(*tensors: Tensor) -> bool:
    """Return whether the fused kernel takes them; it walks memory, and mixes up elements where the layouts differ."""
    return tensors[0].device.type in FUSED_DEVICES and len({x.stride() for x in tensors}) == 1


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    group: dict[str, Any],
    clip: Number,
    halt: Tensor | None = None,
) -> None:
    """Step local tensors of one group by torch's AdamW, with gradients times ``clip``."""
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        check_shapes(*tensors)
    if not is_one(clip):
        if is_compiling() or len({grad.device for grad in grads}) > 1:
            grads = [grad * beside(clip, grad) for grad in grads]
        else:
            grads = torch._foreach_mul(list(grads), beside(clip, grads[0]))
    beta1, beta2 = group["betas"]
    fused = not is_compiling() and all(map(_fuses, params, grads, exp_avgs, exp_avg_sqs))
    fused = fused and (has_numbers(params[0]) or not isinstance(group["lr"], Tensor))  # of which there is no fake form
    adamw(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        list(steps),
        foreach=is_compiling() or None,
        capturable=is_compiling() or steps[0].device.type in CAPTURE_DEVICES,  # or it reads the step, and waits
        fused=fused,
        found_inf=halt,  # the scale is in clip already: given it, the kernel would write the gradient back
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=cast(float, group["lr"]),
        weight_decay=float(group["weight_decay"]),
        eps=float(group["eps"]),
        maximize=group["maximize"],
    )


def is_one(clip: Number) -> bool:
    """Return whether nothing is clipped; of a tensor that is not known."""
    return isinstance(clip, float) and clip == 1.0


def beside(number: Number, x: Tensor) -> Number:
    """Move a number to the device of ``x``."""
    return number.to(x.device) if isinstance(number, Tensor) else number


# ---------------------------------------------------------------------------------------------------------- our steps


def sum_of_squares(grad: Tensor, exp_avg: Moment, c: Coefficients) -> Tensor:
    """As ``coupled_adam.optim.update.sum_of_squares``, without a temporary tensor of that size."""
    check_shapes(grad, exp_avg)
    if c.coupling_factor == 0 and grad.numel() > 0 and kernels_apply(grad):
        threads = threads_for(grad)
        total = scratch(threads, grad.shape[1])
        launch(compiled().sum_of_squares_kernel, grad.detach().numpy(), total.numpy(), None, threads=threads)
        return (total.sum(0, keepdim=True) * float(c.grad_factor) ** 2).to(torch.float32)
    unread = c.coupling_factor == 0 and isinstance(exp_avg, EightBit)
    if triton_launch.apply(grad, moment=None if unread else exp_avg):
        return triton_launch.sum_of_squares(grad, exp_avg, c)
    if not _in_blocks(grad):
        return update.sum_of_squares(grad, exp_avg, c)
    blocks = zip(*(x.split(_block(grad)) for x in (grad, exp_avg)), strict=True)
    return torch.cat([update.sum_of_squares(g, m, c) for g, m in blocks]).sum(0, keepdim=True)


def root_of_rows_(exp_avg_sq: Tensor, square: Tensor, c: Coefficients, halt: Tensor | None = None) -> Tensor:
    """As ``coupled_adam.optim.update.root_of_rows_``."""
    check_shapes(exp_avg_sq, square)
    if exp_avg_sq.dtype == torch.float32 and triton_launch.apply(exp_avg_sq, square):
        return triton_launch.root_of_rows_(exp_avg_sq, square, c, halt)
    return update.root_of_rows_(exp_avg_sq, *_halted(square, c, halt))


def move_rows_(
    param: Tensor,
    exp_avg: Moment,
    grad: Tensor,
    root: Tensor,
    c: Coefficients,
    direction: str,
    step: Number,
    spectral: RankOne | None = None,
    halt: Tensor | None = None,
    mean: Tensor | None = None,
) -> None:
    """As ``coupled_adam.optim.update.move_rows_``, in one pass and without temporary tensors of that size.

    Given ``mean``, ``coupled_adam.optim.center.move_centered_`` has a kernel where this has none.
    """
    check_shapes(param, exp_avg, grad, rows=root, spectral=spectral, mean=mean)
    numbers = mean is None and param.numel() > 0 and has_kernel(direction)
    if numbers and kernels_apply(param, grad, root, moment=exp_avg):
        moment, scales, seed = moment_arrays(exp_avg, step)
        made = compiled().rows_kernel if scales is None else compiled().eight_bit_rows_kernel
        moments = [moment] if scales is None else [moment, scales]
        arrays = (param.detach().numpy(), *moments, grad.detach().numpy(), root.detach().numpy()[0])
        kernel, (column, row) = made(DIRECTION[direction].numbers), _arrays(spectral)
        launch(
            kernel, *arrays, as_float32(c), seed, column, None if row is None else row[0], threads=threads_for(param)
        )
        # The kernels write past autograd, which must know, to refuse a backward pass through what has changed.
        increment_version([param, *_parts(exp_avg)])
    elif root.dtype == torch.float32 and triton_launch.apply(param, grad, moment=exp_avg, direction=direction):
        triton_launch.move_rows_(param, exp_avg, grad, root, c, direction, step, spectral, halt, mean)
    elif spectral is not None or not _in_blocks(param):
        grad, c = _halted(grad, c, halt)
        before = [x.clone() for x in exp_avg] if halt is not None and isinstance(exp_avg, EightBit) else []
        update.move_rows_(param, exp_avg, grad, root, c, direction, step, spectral, mean=mean)
        for kept, old in zip(_parts(exp_avg) if before else (), before, strict=True):  # codes were rounded again
            kept.copy_(torch.where(cast(Tensor, halt) > 0, old, kept))
    else:
        first = 0
        blocks = (x.split(_block(param)) for x in (param, exp_avg, grad))
        for theta, m, g in zip(*blocks, strict=True):
            update.move_rows_(theta, m, g, root, c, direction, step, first=first, mean=mean)
            first += len(theta)


def move_elements_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    c: Coefficients,
    direction: str,
    step: Number,
    spectral: RankOne | None = None,
    halt: Tensor | None = None,
) -> None:
    """As ``coupled_adam.optim.update.move_elements_``, in one pass and without temporary tensors of that size."""
    check_shapes(param, exp_avg, exp_avg_sq, grad, spectral=spectral)
    if param.numel() > 0 and has_kernel(direction) and kernels_apply(param, grad, exp_avg_sq, moment=exp_avg):
        kernel = compiled().elements_kernel(DIRECTION[direction].numbers)
        moment, _, seed = moment_arrays(exp_avg.view(-1), step)
        theta, second, g = (x.detach().view(-1).numpy() for x in (param, exp_avg_sq, grad))
        column, row = _arrays(spectral)
        if row is None:  # only its length counts
            row = scratch(1, min(FLAT_ROW, param.numel()), dtype=torch.float32).numpy()
        period = param.shape[-2] if spectral is not None else 1
        launch(kernel, theta, moment, second, g, as_float32(c), seed, column, row, period, threads=threads_for(param))
        increment_version([param, exp_avg, exp_avg_sq])
    elif exp_avg_sq.dtype == torch.float32 and triton_launch.apply(param, grad, moment=exp_avg, direction=direction):
        triton_launch.move_elements_(param, exp_avg, exp_avg_sq, grad, c, direction, step, spectral, halt)
    else:
        grad, c = _halted(grad, c, halt)
        update.move_elements_(param, exp_avg, exp_avg_sq, grad, c, direction, step, spectral)


def moves_together(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, direction: str) -> bool:
    """Return whether ``triton_launch.move_many_`` takes this parameter with others, if its decay is decoupled."""
    return (
        triton_launch.apply(param, grad, moment=exp_avg, direction=direction, many=True)
        and triton_launch.apply(exp_avg_sq, many=True)
        and exp_avg_sq.dtype == torch.float32
    )


def _halted(grad: Tensor, c: Coefficients, halt: Tensor | None) -> tuple[Tensor, Coefficients]:
    """Return gradient and coefficients with which the plain functions change nothing where ``halt`` is 1."""
    return (grad, c) if halt is None else (torch.where(halt > 0, 0, grad), c.halted(halt))


def check_shapes(
    first: Tensor,
    *others: Moment,
    rows: Tensor | None = None,
    spectral: RankOne | None = None,
    mean: Tensor | None = None,
) -> None:
    """Raise RuntimeError unless all have one shape, ``rows`` and ``mean`` are (1, H) beside a matrix, and ``spectral``
    fits it."""
    fit = all(x.shape == first.shape for x in others)
    for x in others:
        if isinstance(x, EightBit):
            fit = fit and first.ndim == 2 and x.scales.shape == (len(first), blocks_of(first.shape[1]))
    if mean is not None:
        fit = fit and rows is not None and mean.shape == rows.shape
    if rows is not None:
        fit = fit and first.ndim == 2 and rows.shape == (1, first.shape[1])
    if spectral is not None:
        fit = fit and spectral.column.shape == first.shape[:-1]
        fit = fit and spectral.row.shape == (*first.shape[:-2], first.shape[-1])
    if not fit:
        tensors = (first, *others, *(x for x in (rows, mean) if x is not None), *(spectral or ()))
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise RuntimeError(f"parameter, gradient and state do not fit together: they have the shapes {shapes}")


def _in_blocks(matrix: Tensor) -> bool:
    """Return whether the plain functions take the matrix in blocks of rows."""
    plain = type(matrix) in (Tensor, torch.nn.Parameter) and matrix.device.type in BLOCK_DEVICES
    return plain and len(matrix) > _block(matrix) and not is_compiling()


def _block(matrix: Tensor) -> int:
    """Return the rows of a block."""
    return max(BLOCK_ELEMENTS // max(matrix.shape[1], 1), 1)


# --------------------------------------------------------------------------------------------------- numba, on the CPU

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
def compiled() -> Any:
    """Import the kernels; None if they cannot be used. At their first use, as numba takes a second to load."""
    try:
        from coupled_adam.optim import kernels
    except Exception as error:  # an installed numba may refuse the numpy beside it, in its own ways
        warnings.warn(f"numba cannot be used ({error}); the optimizer's step takes longer", UserWarning, stacklevel=2)
        return None
    return kernels


@functools.cache
def _warn_of_fork() -> None:
    warnings.warn(
        "this process was forked from one that had stepped an optimizer, and lacks its threads: steps take one thread "
        'and no kernels here. Start processes with multiprocessing.get_context("spawn"), or before the first step',
        UserWarning,
        stacklevel=2,
    )


def has_kernel(direction: str) -> bool:
    """Return whether the CPU kernels know this direction."""
    return DIRECTION[direction].numbers is not None


def kernels_apply(*tensors: Tensor, moment: Moment | None = None) -> bool:
    """Return whether all are plain, contiguous float32 tensors on the CPU; the first ``moment`` may be narrower."""
    if not HAS_NUMBA or is_compiling():
        return False
    fit = all(map(_is_plain, tensors)) and all(x.dtype == torch.float32 for x in tensors)
    if moment is not None:
        fit = fit and all(map(_is_plain, _parts(moment))) and tuple(x.dtype for x in _parts(moment)) in KERNEL_MOMENTS
    if fit and _forked:
        _warn_of_fork()
    return fit and not _forked and compiled() is not None


def _parts(moment: Moment) -> tuple[Tensor, ...]:
    """Return the tensors that a first moment is made of."""
    return tuple(moment) if isinstance(moment, EightBit) else (moment,)


def _is_plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.is_contiguous() and type(x) in (Tensor, torch.nn.Parameter)


def moment_arrays(exp_avg: Moment, step: Number) -> tuple[Any, Any, int | None]:
    """Return a first moment as an array, that of its scales if it is in eight bits, and the seed of the dice if any."""
    if isinstance(exp_avg, EightBit):
        codes, scales = (x.detach().numpy() for x in exp_avg)
        return codes, scales, int(seed_of(float(step)))
    if exp_avg.dtype == torch.bfloat16:
        return exp_avg.detach().view(torch.uint16).numpy(), None, int(seed_of(float(step)))
    return exp_avg.detach().numpy(), None, None


def scratch(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Make a tensor for a kernel to fill, whatever torch's default dtype and device are."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def as_float32(c: Coefficients) -> Coefficients:
    import numpy as np

    return Coefficients(*(np.float32(float(x)) for x in c))  # type: ignore[arg-type]


def _arrays(spectral: RankOne | None) -> tuple[Any, Any]:
    """Return the two vectors of spectral decay, (R,) and (B, C); None without it."""
    if spectral is None:
        return None, None
    return spectral.column.reshape(-1).numpy(), spectral.row.reshape(-1, spectral.row.shape[-1]).numpy()


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
