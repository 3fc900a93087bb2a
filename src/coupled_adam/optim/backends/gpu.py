"""GPU kernels of gpu_kernels.py: what reaches them is checked here, and launched by Triton.

Nothing here reads a number from a GPU: those that lie there are handed on as they are.
"""

import functools
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from coupled_adam.optim.backends import plain
from coupled_adam.optim.directions import DIRECTION
from coupled_adam.optim.eight_bit import BLOCK, EightBit
from coupled_adam.optim.equations import Coefficients, Number, readable, times_square
from coupled_adam.optim.job import Job, advance, check_factors, check_shapes, check_vectors
from coupled_adam.optim.rounding import seed_of

INSTALLED = find_spec("triton") is not None

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
#: The longest stretch of a row that is taken at once: a block of a moment in 8 bits.
WIDTH = BLOCK
#: What must divide a size for the widest accesses to memory.
EVEN = 8
#: What the second dimension of a grid may have.
GRID = 65535


def refuses(job: Job) -> str:
    """Return why this backend does not take a job; empty if it does."""
    param = job.param
    if param.device.type not in DEVICES:
        return f"GPU kernels do not run on {param.device}"
    if not INSTALLED:
        return "GPU kernels need Triton, the extra 'triton'"
    if is_compiling() or param.numel() == 0:
        return "GPU kernels do not support empty tensors or traced steps"
    if fault := _fault(job):
        return fault
    if not moves_together(job) and (param.ndim < 2 or param.shape[-1] > GRID * WIDTH):
        return "GPU kernels need vectors aligned to 16 bytes, and rows that are not too long"
    if kernels() is None:
        return "Triton cannot be used"
    numbers = DIRECTION[job.group["direction"]].numbers
    if numbers is None or form(numbers) is None:
        return f"the direction {job.group['direction']!r} has no kernel"
    return ""


def _fault(job: Job) -> str:
    """Say what keeps tensors from being read and written as memory."""
    param, moment = job.param, job.exp_avg
    first = [moment.codes, moment.scales] if isinstance(moment, EightBit) else [moment]
    for x in (param, job.grad, *first, job.exp_avg_sq):
        if not (x.is_contiguous() and type(x) in PLAIN and x.device == param.device):
            return f"GPU kernels need contiguous tensors on one device, not strides {x.stride()} on {x.device}"
    if param.dtype not in FLOATS or job.grad.dtype not in FLOATS:
        return f"GPU kernels need 16-bit or 32-bit floats, not {param.dtype} with gradients in {job.grad.dtype}"
    if job.exp_avg_sq.dtype != torch.float32:
        return f"GPU kernels need a second moment in float32, not {job.exp_avg_sq.dtype}"
    known = [torch.int8, torch.float32] if len(first) == 2 else [first[0].dtype]
    if [x.dtype for x in first] != known or (len(first) == 1 and known[0] not in MOMENTS):
        return f"GPU kernels do not support a first moment in {first[0].dtype}"
    return ""


def check(job: Job, *rows: Tensor | None) -> None:
    """Raise RuntimeError unless a kernel can take the tensors of a job as memory, and ``rows`` beside it, (1, H)."""
    check_shapes(job)
    if job.param.numel() == 0:
        raise RuntimeError("a GPU kernel does not support empty tensors")
    check_vectors(job, *rows)
    if fault := _fault(job):
        raise RuntimeError(fault)


def sums(job: Job) -> Tensor:
    """As ``plain.sums``: in two stages of a fixed order, the same every time."""
    check(job)
    c = job.coefficients(1)
    simple = c.coupling_factor == 0
    if not simple and isinstance(job.exp_avg, EightBit):
        return plain.sums(job)  # for which no kernel is made
    rows, columns = job.param.shape
    width, tile = tile_of(columns, SUMMED if simple else MOVED)
    blocks = -(-rows // max(ROWS, tile))
    total = torch.empty(blocks, columns, dtype=torch.float32, device=job.grad.device)
    f, rate, factor = _numbers((c.grad_factor, c.first_rate, c.coupling_factor), job.grad)
    arguments = (job.grad, None if simple else job.exp_avg, total, rows, columns, f, rate, factor)
    launch("sum_rows", (blocks, -(-columns // width)), *arguments, ROWS=max(ROWS, tile), TILE=tile, WIDTH=width)
    whole = total.sum(0, keepdim=True, dtype=torch.float64)
    squares = (times_square(whole, f) if simple else whole).to(torch.float32)
    if not job.foreseen:
        return squares
    gradient = job.grad.sum(0, keepdim=True, dtype=torch.float32)
    return torch.cat([squares, gradient, plain.column_sums(job, plain.measure).to(torch.float32)])


def move(jobs: Sequence[Job]) -> None:
    """As ``plain.move``; of jobs of one group many small ones take one launch."""
    together: dict[Any, list[Job]] = {}
    for job in jobs:
        if moves_together(job):
            together.setdefault(_likeness(job), []).append(job)
            continue
        c = job.coefficients(job.step)
        root = mean = factors = None
        if job.coupled:
            root = root_of_rows_(job, c)
            mean = plain.mean_row(job, root, c)
            factors = plain.row_factors_(*plain.live(job, c))
        _move_matrix_(job, c, root, mean, factors)
        advance([job])
    for alike in together.values():
        move_many_(alike)
        advance(alike)


def moves_together(job: Job) -> bool:
    """Return whether a job may share a launch: of any shape, but neither at every address nor of every size."""
    if job.coupled or job.spectral or job.triple is not None or job.param.numel() >= 2**31 - 1:
        return False
    return all(_address(x) % 16 == 0 for x in (job.param, job.grad, cast(Tensor, job.exp_avg), job.exp_avg_sq))


def _likeness(job: Job) -> tuple[Any, ...]:
    """Return what jobs of a group must have in common to be moved by one launch, and should to be moved fast."""
    tensors = (job.param, job.grad, cast(Tensor, job.exp_avg), job.exp_avg_sq)
    step = job.step if readable(job.state["step"]) else None
    return (*((x.dtype, x.device) for x in tensors), step, job.param.numel() % EVEN == 0)


def root_of_rows_(job: Job, c: Coefficients) -> Tensor:
    """As ``plain.root_of_rows_``."""
    square = cast(Tensor, job.means)[:1].contiguous()
    check(job, square)
    root, columns = torch.empty_like(job.exp_avg_sq), job.exp_avg_sq.numel()
    rate, scale = _numbers((c.second_rate, c.root_scale), root)
    arguments = (job.exp_avg_sq, square, root, job.found_inf, columns, rate, scale)
    launch("root_of_rows", (-(-columns // WIDTH),), *arguments, WIDTH=WIDTH)
    increment_version([job.exp_avg_sq])
    return root


def _move_matrix_(
    job: Job, c: Coefficients, root: Tensor | None, mean: Tensor | None, factors: Tensor | None = None
) -> None:
    """Move a matrix, or a batch of them."""
    check(job, root, mean)
    check_factors(job, factors)
    param = job.param
    columns, period = param.shape[-1], param.shape[-2]
    rows = param.numel() // columns
    width, tile = tile_of(columns, MOVED)
    column, row = (None, None) if job.triple is None else (x.contiguous() for x in job.triple)
    moment, scales = job.exp_avg if isinstance(job.exp_avg, EightBit) else (job.exp_avg, None)
    exp_avg_sq = None if job.coupled else job.exp_avg_sq
    middle = None if mean is None else mean.contiguous()
    of_rows = None if factors is None else factors.contiguous()
    tensors = (param, job.grad, moment, scales, exp_avg_sq, root, of_rows, column, row, middle, job.found_inf)
    numbers = (*_numbers(c, param), _seed(job, job.step))
    grid, toward = (-(-rows // tile), -(-columns // width)), form(DIRECTION[job.group["direction"]].numbers)
    launch("move_matrix", grid, *tensors, rows, columns, period, *numbers, toward=toward, TILE=tile, WIDTH=width)
    increment_version([x for x in (param, moment, scales, exp_avg_sq) if x is not None])


def move_many_(jobs: Sequence[Job]) -> None:
    """Move jobs of one group, alike in dtypes and device and at multiples of 16 bytes, many to a launch."""
    first, likeness = jobs[0], _likeness(jobs[0])
    for job in jobs:
        check(job)
        if not moves_together(job) or _likeness(job) != likeness:
            raise RuntimeError("tensors updated together need one dtype, one device, and alignment to 16 bytes")
    step = first.step
    if isinstance(step, Tensor):  # each its own
        step = torch.stack([job.state["step"] for job in jobs]).to(step.dtype) + 1
    c, scales, seed = first.coefficients(step), isinstance(step, Tensor), _seed(first, step)
    many, toward = kernels().MANY, form(DIRECTION[first.group["direction"]].numbers)
    for start in range(0, len(jobs), many):
        here, part, seeds = jobs[start : start + many], c, seed
        if scales:
            chosen = slice(start, start + len(here))
            part = c._replace(first_scale=c.first_scale[chosen], root_scale=c.root_scale[chosen])  # type: ignore[index]
            seeds = seed[chosen] if isinstance(seed, Tensor) else seed
        # Fill up to the number of tensors that the kernel is made for; of size 0 these are not looked at.
        filled = [*here, *[here[0]] * (many - len(here))]
        columns = zip(*((job.param, job.grad, job.exp_avg, job.exp_avg_sq) for job in filled), strict=True)
        sizes = [job.param.numel() for job in here]
        halves = tuple((size + 1) << 32 for size in (*sizes, *[0] * (many - len(here))))
        grid = (sum(-(-size // MOVED) for size in sizes),)
        numbers = (*_numbers(part, first.param), seeds)
        constants = {"MANY": many, "SCALES": scales, "EVEN": not any(size % EVEN for size in sizes), "BLOCK": MOVED}
        launch("move_many", grid, *columns, halves, first.found_inf, *numbers, toward=toward, **constants)
    increment_version([x for job in jobs for x in (job.param, cast(Tensor, job.exp_avg), job.exp_avg_sq)])


def launch(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of its first tensor."""
    tensors = [y for x in arguments for y in (x if isinstance(x, tuple) else (x,)) if isinstance(y, Tensor)]
    device = tensors[0].device
    if any(x.device != device for x in tensors):
        raise RuntimeError(
            f"a GPU kernel needs all tensors on one device, not on {sorted({str(x.device) for x in tensors})}"
        )
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Products and sums are rounded one by one, as on tensors: a moment in bfloat16 must fall alike everywhere.
        getattr(kernels(), name)[grid](*arguments, **constants, num_warps=4, enable_fp_fusion=False)


def tile_of(columns: int, elements: int) -> tuple[int, int]:
    """Return width and height of a tile for rows of this length: powers of 2."""
    width = min(1 << (columns - 1).bit_length(), WIDTH)
    return width, elements // width


@functools.cache
def kernels() -> Any:
    """Import the kernels; None if they cannot be used."""
    try:
        from coupled_adam.optim.backends import gpu_kernels
    except Exception as error:  # an installed Triton may refuse the Python or the driver beside it, in its own ways
        warnings.warn(f"Triton cannot be used ({error}); optimizer steps will be slower", UserWarning, stacklevel=2)
        return None
    return gpu_kernels


@functools.cache
def form(numbers: Any) -> Any:
    """Return a direction as Triton takes it; None if it has no such form."""
    from coupled_adam.optim.backends import gpu_forms

    try:
        return gpu_forms.triton_form(numbers)
    except gpu_forms.NoForm:
        return None


def _numbers(numbers: Sequence[Number], beside: Tensor) -> tuple[Number, ...]:
    """Give numbers of the host as floats, and others as tensors on the device of ``beside``."""
    return tuple(
        x.to(beside.device) if isinstance(x, Tensor) and x.device.type in DEVICES else float(x) for x in numbers
    )


def _seed(job: Job, step: Number) -> int | Tensor | None:
    """Return the seed of the dice for a moment that is rounded: 32 bits of a signed number, or the tensor."""
    if isinstance(job.exp_avg, Tensor) and job.exp_avg.dtype != torch.bfloat16:
        return None
    seed = seed_of(step)
    return seed if isinstance(seed, Tensor) else (seed ^ 0x80000000) - 0x80000000


def _address(x: Tensor) -> int:
    return x.data_ptr()
