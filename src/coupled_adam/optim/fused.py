"""Fast paths with the signatures of update.py: CPU kernels (numba), torch.compile on accelerators.

Each falls back to the plain function where it does not apply. Results are those of the plain functions within rounding.
"""

import functools
import math
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from coupled_adam.optim import update as plain
from coupled_adam.optim.update import RankOne, hash_seed

HAS_NUMBA = find_spec("numba") is not None
HAS_TRITON = find_spec("triton") is not None

#: Row length in which a kernel takes a tensor that has no rows of its own to respect.
FLAT_ROW = 4096
#: Elements of a block of rows in which a plain function takes a coupled matrix: few beside the matrix, many to a call.
BLOCK_ELEMENTS = 2**18
#: Below this many elements a second thread costs more than it brings.
ELEMENTS_PER_THREAD = 65536


def sum_squares(
    grad: Tensor, exp_avg: Tensor, *, beta1: float, coupling_factor: float, grad_scale: float | Tensor = 1.0
) -> Tensor:
    """As :func:`coupled_adam.optim.update.sum_squares`, without a temporary tensor of that size."""
    numbers: dict[str, Any] = {"beta1": beta1, "coupling_factor": coupling_factor, "grad_scale": grad_scale}
    if coupling_factor == 0 and grad.numel() > 0 and kernels_apply(grad):
        threads = _threads(grad)
        total = torch.empty(threads, grad.shape[1], dtype=torch.float64)
        _run(_kernels().sum_squares, grad.detach().numpy(), total.numpy(), threads=threads)
        return (total.sum(0, keepdim=True) * grad_scale**2).to(torch.float32)
    if not _in_blocks(grad):
        return plain.sum_squares(grad, exp_avg, **numbers)
    blocks = zip(*(torch.split(x, _block(grad)) for x in (grad, exp_avg)), strict=True)
    return torch.cat([plain.sum_squares(g, m, **numbers) for g, m in blocks]).sum(0, keepdim=True)


def update_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    square: Tensor | None,
    step: float | Tensor,
    **hyperparameters: Any,
) -> None:
    """As :func:`coupled_adam.optim.update.update_`, in one pass and without temporary tensors of the matrix's size."""
    if param.numel() > 0 and kernels_apply(param, grad, exp_avg_sq, moment=exp_avg):
        _kernel_update_(param, exp_avg, exp_avg_sq, grad, square, float(step), **hyperparameters)
        # The kernels write past autograd, which must know, to refuse a backward pass through what has changed.
        increment_version([param, exp_avg, exp_avg_sq])
    elif param.is_cuda and HAS_TRITON and not is_compiling():
        compiled_update_(param, exp_avg, exp_avg_sq, grad, square, step, **hyperparameters)
    elif (
        square is None or hyperparameters.get("spectral") or exp_avg.dtype != exp_avg_sq.dtype or not _in_blocks(param)
    ):
        plain.update_(param, exp_avg, exp_avg_sq, grad, square, step, **hyperparameters)
    else:
        before = exp_avg_sq.clone()
        for rows in zip(*(torch.split(x, _block(param)) for x in (param, exp_avg, grad)), strict=True):
            exp_avg_sq.copy_(before)  # every block makes the same update of it
            plain.update_(rows[0], rows[1], exp_avg_sq, rows[2], square, step, **hyperparameters)


def _in_blocks(matrix: Tensor) -> bool:
    """Whether the plain functions take the matrix in blocks of rows."""
    return type(matrix) in (Tensor, torch.nn.Parameter) and len(matrix) > _block(matrix) and not is_compiling()


def _block(matrix: Tensor) -> int:
    """Rows of a block."""
    return max(BLOCK_ELEMENTS // max(matrix.shape[1], 1), 1)


def compiled_update_(*args: Any, lr: float | Tensor, **hyperparameters: Any) -> None:
    """The plain update, compiled for any shape. Past torch's limit of variants it runs uncompiled."""
    # A tensor on the CPU would draw the arithmetic of scalars there, and need a compiler for it.
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = lr.item()
    _compiled()(*args, lr=lr, **hyperparameters)


@functools.cache
def _compiled() -> Callable[..., None]:
    return torch.compile(plain.update_, dynamic=True)


@functools.cache
def _kernels() -> Any:
    """The kernels' module, or None. Imported with the first tensor that they apply to: numba takes a second to load."""
    try:
        from coupled_adam.optim import kernels
    except Exception as error:  # an installed numba may refuse the numpy beside it, in its own ways
        warnings.warn(f"numba cannot be used ({error}); the optimizer's step takes longer", UserWarning, stacklevel=2)
        return None
    return kernels


def kernels_apply(*tensors: Tensor, moment: Tensor | None = None) -> bool:
    """Whether all are plain, contiguous float32 tensors on the CPU; the first ``moment`` may be bfloat16."""
    if not HAS_NUMBA or is_compiling():
        return False
    narrow = moment is not None and moment.dtype == torch.bfloat16
    exact = tensors if moment is None or narrow else (*tensors, moment)
    fit = all(x.dtype == torch.float32 for x in exact) and all(
        x.device.type == "cpu" and x.is_contiguous() and type(x) in (Tensor, torch.nn.Parameter)
        for x in (*tensors, *([] if moment is None else [moment]))
    )
    return fit and _kernels() is not None


def kernel_pays(param: Tensor, grad: Tensor) -> bool:
    """Whether a kernel applies and has enough to do to be worth a call of its own."""
    return param.numel() >= ELEMENTS_PER_THREAD and kernels_apply(param, grad)


def _threads(x: Tensor) -> int:
    """How many threads share the work."""
    import numba

    return int(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, x.numel() // ELEMENTS_PER_THREAD + 1))


def _run(kernel: Callable[..., None], *arguments: Any, threads: int) -> None:
    """Call a kernel with so many threads, and leave numba's setting as the user has it."""
    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        kernel(*arguments, threads)
    finally:
        numba.set_num_threads(before)


def _kernel_update_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    square: Tensor | None,
    step: float,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    coupling_scale: float,
    coupling_factor: float,
    direction: str,
    grad_scale: float | Tensor = 1.0,
    spectral: RankOne | None = None,
) -> None:
    import numpy as np

    lr, scale, f32 = float(lr), float(grad_scale), np.float32
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    seed = None if exp_avg.dtype == torch.float32 else np.uint64(hash_seed(step))
    moment = exp_avg.detach() if seed is None else exp_avg.detach().view(torch.uint16)
    atan = True if direction == "atan2" else None
    keep = f32(1 - lr * weight_decay if spectral is None else 1.0)
    column = row = None
    if spectral is not None:
        column = spectral.column.reshape(-1).mul(lr * weight_decay).numpy()
        row = spectral.row.reshape(-1, param.shape[-1]).numpy()
    threads = _threads(param)
    if square is not None:
        exp_avg_sq.lerp_(square, 1 - beta2)
        root = exp_avg_sq.double().mul_(coupling_scale / bias2).sqrt_()[0]  # √ν̂
        if atan:
            gain, factor = lr, root * bias1  # atan2(m/b, r) = atan2(m, b·r)
        else:
            gain, factor = lr / bias1, 1 / (root + eps)
        factor = factor.clamp_(max=torch.finfo(torch.float32).max).to(torch.float32)
        _run(
            _kernels().update_rows,
            param.detach().numpy(),
            moment.numpy(),
            grad.detach().numpy(),
            factor.numpy(),
            f32(gain),
            keep,
            f32(1 - beta1),
            f32(scale),
            atan,
            seed,
            column,
            None if row is None else row[0],
            threads=threads,
        )
        return
    if row is None:
        row = np.empty((1, min(FLAT_ROW, param.numel())), f32)  # only its length counts
    gain, correction = (lr, 1 / bias1) if atan else (lr / bias1, 1.0)
    _run(
        _kernels().update_elements,
        param.detach().view(-1).numpy(),
        moment.view(-1).numpy(),
        exp_avg_sq.view(-1).numpy(),
        grad.detach().view(-1).numpy(),
        f32(gain),
        keep,
        f32(eps),
        f32(1 - beta1),
        f32(1 - beta2),
        f32(coupling_factor),
        f32(math.sqrt(coupling_scale / bias2)),
        f32(correction),
        f32(scale),
        atan,
        seed,
        column,
        row,
        param.shape[-2] if spectral is not None else 1,
        threads=threads,
    )
