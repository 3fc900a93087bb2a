"""GPU kernels of triton_kernels.py: what reaches them is checked here, and launched.

Nothing here reads a number from a GPU: those that lie there are handed on as they are.
"""

import functools
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from coupled_adam.optim.directions import DIRECTION
from coupled_adam.optim.eight_bit import BLOCK, EightBit, Moment, blocks_of
from coupled_adam.optim.equations import Coefficients, Number
from coupled_adam.optim.rounding import seed_of
from coupled_adam.optim.update import RankOne, times_square

HAS_TRITON = find_spec("triton") is not None

#: Devices whose memory the kernels can reach: those of CUDA and ROCm.
DEVICES = ["cuda"]
#: Tensors that are no more than memory; a subclass may hold it otherwise.
PLAIN = [Tensor, torch.nn.Parameter]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOMENTS = (torch.float32, torch.bfloat16)

#: Elements of the tile that a program moves, or sums with κ, and of the one that it sums without.
MOVED, SUMMED = 1024, 2048
#: Rows that one program sums.
ROWS = 256
#: The longest stretch of a row that is taken at once: a block of a moment in eight bits.
WIDTH = BLOCK
#: What must divide a size for the widest accesses to memory.
EVEN = 8
#: What the second dimension of a grid may have.
GRID = 65535


@functools.cache
def kernels() -> Any:
    """Import the kernels; None if they cannot be used."""
    try:
        from coupled_adam.optim import triton_kernels
    except Exception as error:  # an installed Triton may refuse the Python or the driver beside it, in its own ways
        warnings.warn(f"Triton cannot be used ({error}); the optimizer's step takes longer", UserWarning, stacklevel=2)
        return None
    return triton_kernels


@functools.cache
def form(numbers: Any) -> Any:
    """Return a direction as Triton takes it; None if it has no such form."""
    from coupled_adam.optim import triton_forms

    try:
        return triton_forms.triton_form(numbers)
    except triton_forms.NoForm:
        return None


def apply(*tensors: Tensor, moment: Moment | None = None, direction: str | None = None, many: bool = False) -> bool:
    """Return whether the kernels take these tensors, all on one device, with this first moment and this direction.

    Args:
        tensors: the parameter and the gradient, in any order.
        many: whether for ``move_many_``, which takes any shape, but neither every address nor every size.
    """
    if not HAS_TRITON or is_compiling() or tensors[0].device.type not in DEVICES or tensors[0].numel() == 0:
        return False
    packed = isinstance(moment, EightBit)
    alike = (*tensors, *([] if moment is None else moment if isinstance(moment, EightBit) else [moment]))
    fit = (
        all(type(x) in PLAIN and x.is_contiguous() and x.device == tensors[0].device for x in alike)
        and all(x.dtype in FLOATS for x in tensors)
        and (moment is None or isinstance(moment, EightBit) or moment.dtype in MOMENTS)
        and not (packed and direction is None)  # sums with κ are not made for it
        and (_fit_together(alike) if many else tensors[0].ndim >= 2 and tensors[0].shape[-1] <= GRID * WIDTH)
    )
    if not fit or kernels() is None:
        return False
    if direction is None:
        return True
    numbers = DIRECTION[direction].numbers
    return numbers is not None and form(numbers) is not None


def _fit_together(tensors: Sequence[Tensor]) -> bool:
    return all(_address(x) % 16 == 0 for x in tensors) and tensors[0].numel() < 2**31 - 1


def sum_of_squares(grad: Tensor, exp_avg: Moment, c: Coefficients) -> Tensor:
    """As ``coupled_adam.optim.update.sum_of_squares``: in two stages of a fixed order, the same every time."""
    simple = c.coupling_factor == 0
    if isinstance(exp_avg, EightBit) and not simple:
        raise RuntimeError("a GPU kernel does not sum κ·m² of moments in eight bits")
    _check(grad, *([exp_avg] if isinstance(exp_avg, Tensor) else []), matrices=True)
    rows, columns = grad.shape
    width, tile = tile_of(columns, SUMMED if simple else MOVED)
    blocks = -(-rows // max(ROWS, tile))
    total = torch.empty(blocks, columns, dtype=torch.float32, device=grad.device)
    f, rate, factor = _numbers((c.grad_factor, c.first_rate, c.coupling_factor), grad)
    arguments = (grad, None if simple else exp_avg, total, rows, columns, f, rate, factor)
    launch("sum_rows", (blocks, -(-columns // width)), *arguments, ROWS=max(ROWS, tile), TILE=tile, WIDTH=width)
    whole = total.sum(0, keepdim=True, dtype=torch.float64)
    return (times_square(whole, f) if simple else whole).to(torch.float32)


def root_of_rows_(exp_avg_sq: Tensor, square: Tensor, c: Coefficients, halt: Tensor | None) -> Tensor:
    """As ``coupled_adam.optim.update.root_of_rows_``."""
    _check(exp_avg_sq, square)
    root, columns = torch.empty_like(exp_avg_sq), exp_avg_sq.numel()
    rate, scale = _numbers((c.second_rate, c.root_scale), exp_avg_sq)
    arguments = (exp_avg_sq, square.contiguous(), root, halt, columns, rate, scale)
    launch("root_of_rows", (-(-columns // WIDTH),), *arguments, WIDTH=WIDTH)
    increment_version([exp_avg_sq])
    return root


def move_rows_(
    param: Tensor,
    exp_avg: Moment,
    grad: Tensor,
    root: Tensor,
    c: Coefficients,
    direction: str,
    step: Number,
    spectral: RankOne | None,
    halt: Tensor | None,
    mean: Tensor | None,
) -> None:
    """As ``coupled_adam.optim.update.move_rows_``."""
    codes, scales = exp_avg if isinstance(exp_avg, EightBit) else (None, None)
    _check(param, grad, *([exp_avg] if isinstance(exp_avg, Tensor) else []), matrices=True)
    if codes is not None and scales is not None:
        _check_packed(param, codes, scales)
    if root.shape != (1, param.shape[1]):
        raise RuntimeError(f"√ν̂ has the shape {tuple(root.shape)}, not (1, {param.shape[1]})")
    if mean is not None and (mean.shape != root.shape or mean.dtype != torch.float32 or mean.device != param.device):
        raise RuntimeError(f"the mean row is {mean.dtype} {tuple(mean.shape)}, not float32 {tuple(root.shape)}, or far")
    _move_matrix_(param, exp_avg, None, grad, root, c, direction, step, spectral, halt, mean)


def move_elements_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    c: Coefficients,
    direction: str,
    step: Number,
    spectral: RankOne | None,
    halt: Tensor | None,
) -> None:
    """As ``coupled_adam.optim.update.move_elements_``, for a matrix or a batch of them."""
    _check(param, exp_avg, grad, exp_avg_sq)
    if param.ndim < 2:
        raise RuntimeError(f"a parameter of shape {tuple(param.shape)} has no rows; move_many_ takes it")
    _move_matrix_(param, exp_avg, exp_avg_sq, grad, None, c, direction, step, spectral, halt)


def _move_matrix_(
    param: Tensor,
    exp_avg: Moment,
    exp_avg_sq: Tensor | None,
    grad: Tensor,
    root: Tensor | None,
    c: Coefficients,
    direction: str,
    step: Number,
    spectral: RankOne | None,
    halt: Tensor | None,
    mean: Tensor | None = None,
) -> None:
    columns, period = param.shape[-1], param.shape[-2]
    rows = param.numel() // columns
    width, tile = tile_of(columns, MOVED)
    column, row = (None, None) if spectral is None else (x.contiguous() for x in spectral)
    for x, shape in ((column, param.shape[:-1]), (row, (*param.shape[:-2], columns))):
        if x is not None and (x.shape != shape or x.dtype != torch.float32 or x.device != param.device):
            raise RuntimeError(f"spectral decay needs float32 vectors of {shape} beside the parameter, not {x.shape}")
    moment, scales = exp_avg if isinstance(exp_avg, EightBit) else (exp_avg, None)
    middle = None if mean is None else mean.contiguous()
    tensors = (param, moment, scales, exp_avg_sq, grad, root, column, row, middle, halt)
    numbers = (*_numbers(c, param), _seed(exp_avg, step))
    grid = (-(-rows // tile), -(-columns // width))
    toward = form(DIRECTION[direction].numbers)
    launch("move_matrix", grid, *tensors, rows, columns, period, *numbers, toward=toward, TILE=tile, WIDTH=width)
    increment_version([x for x in (param, moment, scales, exp_avg_sq) if x is not None])


def move_many_(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    c: Coefficients,
    direction: str,
    step: Number,
    halt: Tensor | None,
) -> None:
    """As ``coupled_adam.optim.update.move_elements_`` for each, many to a launch.

    Args:
        params, exp_avgs, exp_avg_sqs, grads: lists of tensors of one dtype each, all on one device.
        c: its ``first_scale`` and ``root_scale`` may have an element for every tensor.
        step: so may this.
    """
    for param, exp_avg, exp_avg_sq, grad in zip(params, exp_avgs, exp_avg_sqs, grads, strict=True):
        _check(param, exp_avg, grad, exp_avg_sq)
    for tensors in (params, exp_avgs, exp_avg_sqs, grads):
        alike = all(x.dtype == tensors[0].dtype and x.device == params[0].device for x in tensors)
        if not alike or not all(_fit_together([x]) for x in tensors):
            raise RuntimeError("tensors that move together need one dtype, one device, and multiples of 16 bytes")
    many, toward = kernels().MANY, form(DIRECTION[direction].numbers)
    scales = isinstance(step, Tensor) and step.ndim == 1
    seed = _seed(exp_avgs[0], step)
    for first in range(0, len(params), many):
        here = slice(first, min(first + many, len(params)))
        sizes = [x.numel() for x in params[here]]
        # Fill up to the number of tensors that the kernel is made for; of size 0 these are not looked at.
        filled = [(*x[here], *[x[first]] * (many - len(sizes))) for x in (params, exp_avgs, exp_avg_sqs, grads)]
        halves = tuple((size + 1) << 32 for size in (*sizes, *[0] * (many - len(sizes))))
        part = c
        if scales:
            part = c._replace(first_scale=c.first_scale[here], root_scale=c.root_scale[here])  # type: ignore[index]
        seeds = seed[here] if scales and isinstance(seed, Tensor) else seed
        grid = (sum(-(-size // MOVED) for size in sizes),)
        numbers = (*_numbers(part, params[0]), seeds)
        constants = {"MANY": many, "SCALES": scales, "EVEN": not any(size % EVEN for size in sizes), "BLOCK": MOVED}
        launch("move_many", grid, *filled, halves, halt, *numbers, toward=toward, **constants)
    increment_version([*params, *exp_avgs, *exp_avg_sqs])


def launch(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of its first tensor."""
    tensors = [y for x in arguments for y in (x if isinstance(x, tuple) else (x,)) if isinstance(y, Tensor)]
    device = tensors[0].device
    if any(x.device != device for x in tensors):
        raise RuntimeError(
            f"a GPU kernel takes tensors on one device, not on {sorted({str(x.device) for x in tensors})}"
        )
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Products and sums are rounded one by one, as on tensors: a moment in bfloat16 must fall alike everywhere.
        getattr(kernels(), name)[grid](*arguments, **constants, num_warps=4, enable_fp_fusion=False)


def tile_of(columns: int, elements: int) -> tuple[int, int]:
    """Return width and height of a tile for rows of this length: powers of 2."""
    width = min(1 << (columns - 1).bit_length(), WIDTH)
    return width, elements // width


def _numbers(numbers: Sequence[Number], beside: Tensor) -> tuple[Number, ...]:
    """Give numbers of the host as floats, and others as tensors on the device of ``beside``."""
    return tuple(
        x.to(beside.device) if isinstance(x, Tensor) and x.device.type in DEVICES else float(x) for x in numbers
    )


def _seed(exp_avg: Moment, step: Number) -> int | Tensor | None:
    """Return the seed of the dice for a moment that is rounded: 32 bits of a signed number, or the tensor."""
    if isinstance(exp_avg, Tensor) and exp_avg.dtype != torch.bfloat16:
        return None
    seed = seed_of(step)
    return seed if isinstance(seed, Tensor) else (seed ^ 0x80000000) - 0x80000000


def _address(x: Tensor) -> int:
    return x.data_ptr()


def _check(param: Tensor, *others: Tensor, matrices: bool = False) -> None:
    """Raise RuntimeError unless the tensors have one shape and device, are contiguous, and of dtypes for kernels."""
    tensors = (param, *others)
    if any(x.shape != param.shape for x in tensors) or (matrices and param.ndim != 2) or param.numel() == 0:
        raise RuntimeError(f"parameter, gradient and state do not fit together: {[tuple(x.shape) for x in tensors]}")
    if not all(x.is_contiguous() and x.device == param.device and x.dtype in FLOATS for x in tensors):
        layouts = [f"{x.dtype}, {x.device}, strides {x.stride()}" for x in tensors]
        raise RuntimeError(f"a GPU kernel takes contiguous tensors of 16 or 32 bits on one device, not {layouts}")


def _check_packed(param: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Raise RuntimeError unless codes and scales in eight bits are those of the parameter, beside it and contiguous."""
    rows, columns = param.shape
    fit = codes.shape == param.shape and scales.shape == (rows, blocks_of(columns))
    fit = fit and codes.dtype == torch.int8 and scales.dtype == torch.float32
    if not fit or not all(x.is_contiguous() and x.device == param.device for x in (codes, scales)):
        raise RuntimeError(
            f"parameter and moment in eight bits do not fit together: {tuple(param.shape)} on {param.device}, "
            f"{codes.dtype} {tuple(codes.shape)} and {scales.dtype} {tuple(scales.shape)} on {scales.device}"
        )
