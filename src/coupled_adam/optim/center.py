"""Centering: the mean of a matrix's rows, its mean embedding, is subtracted from all of them."""

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling
from torch.utils.weak import WeakTensorKeyDictionary

from coupled_adam.optim import dispatch, reductions
from coupled_adam.optim.directions import DIRECTION
from coupled_adam.optim.equations import Coefficients, Number
from coupled_adam.optim.reductions import Reduction, local, run_one, vocabulary_mean
from coupled_adam.optim.state import state_dtype

#: By first moment, which is another tensor in every optimizer and after every resume: the stamp and the column sums.
_kept: MutableMapping[Tensor, tuple[tuple[int, ...], Tensor]] = WeakTensorKeyDictionary()


@torch.no_grad()
def center_(weight: Tensor) -> Tensor:
    """Subtract the mean of its rows from every row of an embedding matrix, in place and unseen by autograd.

    For optimizers of other people: call it after ``optimizer.step()``, on every process. Our own do it by themselves in
    groups with ``center=True``, in fewer passes.

    Args:
        weight: (V, H) of any floating dtype: a plain tensor, a DTensor, or a shard with ``vocabulary_group``; then the
            mean is that of all V rows, and the processes exchange H numbers (H + 1 for ``vocabulary_group``). It is
            summed in float32, of a float64 matrix in float64.

    Returns:
        ``weight``. The mean of its rows is 0 to the rounding of its dtype.

    Raises:
        ValueError: ``weight`` is no matrix.
        TypeError: ``weight`` is no tensor, or not floating point.

    Source: μ-centering of "Output Embedding Centering", arXiv 2601.02031.

    Examples:
        >>> head = torch.nn.Linear(2, 3, bias=False)
        >>> optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        >>> optimizer.step()
        >>> center_(head.weight).mean(0).abs().max().item() < 1e-7
        True
    """
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"center_ takes a (vocabulary, hidden) matrix, not a {type(weight).__name__}: "
            "center_(model.get_output_embeddings().weight)"
        )
    if weight.ndim != 2:
        raise ValueError(
            f"center_ takes a (vocabulary, hidden) matrix, not a tensor of shape {tuple(weight.shape)}: pass the "
            "weight of the output embedding, not flattened"
        )
    if not weight.is_floating_point():
        raise TypeError(f"center_ takes a floating-point matrix, not one of {weight.dtype}")
    local(weight).sub_(run_one(_mean_row(weight)))
    return weight


def center_all_(matrices: Sequence[tuple[Tensor, Tensor | bool]]) -> None:
    """Center matrices: a pass that reads, one that writes, one all-reduce for all. Beside each stands its ``rests``."""
    moving = [(matrix, rests) for matrix, rests in matrices if rests is not True]
    (means,) = reductions.run([_mean_row(matrix) for matrix, _ in moving])
    for (matrix, rests), mean in zip(moving, means, strict=True):
        local(matrix).sub_(unless(rests, mean))


def unless(rests: Tensor | bool, mean: Tensor) -> Tensor:
    """Return the mean to subtract: 0 of a parameter that rests."""
    if isinstance(rests, Tensor):
        return torch.where(rests, 0, mean)
    return torch.zeros_like(mean) if rests else mean


def column_sums(param: Tensor, exp_avg: Tensor) -> Tensor:
    """Sum the rows that this process holds, of a matrix and of its first moment: (2, H).

    What the last step has summed as it wrote them is taken if nobody has changed either since. So rounding is in the
    sums, the next step takes it off, and nothing adds up. A change past the version counter (``param.data``) is not
    seen: the mean is off by it for one step, whose own sums then hold it.
    """
    if not is_compiling():
        found = _kept.get(exp_avg)
        if found is not None and found[0] == _stamp(param, exp_avg):
            return found[1]
    return measure(local(param), local(exp_avg))


def measure(param: Tensor, exp_avg: Tensor) -> Tensor:
    """Sum a matrix and its first moment over the rows: (2, H), of float64, or of float32 where there is no kernel."""
    dispatch.check_shapes(param, exp_avg)
    if param.ndim == 2 and param.numel() > 0 and dispatch.kernels_apply(param, moment=exp_avg):
        threads = dispatch.threads_for(param)
        sums = dispatch.scratch(threads, 2, param.shape[1])
        moment, _, seed = dispatch.moment_arrays(exp_avg, 0)
        dispatch.launch(
            dispatch.compiled().column_sums_kernel, param.detach().numpy(), moment, seed, sums.numpy(), threads=threads
        )
        return sums.sum(0)
    dtype = torch.promote_types(param.dtype, torch.float32)
    return torch.cat([x.sum(0, keepdim=True, dtype=dtype) for x in (param, exp_avg)])


def sums_of_gradient(grad: Tensor, exp_avg: Tensor, c: Coefficients) -> Tensor:
    """Return what ``sum_of_squares`` does and, from the same pass where there is a kernel for it, Σ g: (2, H)."""
    if not (c.coupling_factor == 0 and grad.numel() > 0 and dispatch.kernels_apply(grad)):
        squares = dispatch.sum_of_squares(grad, exp_avg, c)
        return torch.cat([squares, grad.sum(0, keepdim=True, dtype=squares.dtype)])
    dispatch.check_shapes(grad, exp_avg)
    threads = dispatch.threads_for(grad)
    total = dispatch.scratch(2, threads, grad.shape[1])
    squares, plain = total
    dispatch.launch(
        dispatch.compiled().sum_of_squares_kernel,
        grad.detach().numpy(),
        squares.numpy(),
        plain.numpy(),
        threads=threads,
    )
    squares *= float(c.grad_factor) ** 2
    return total.sum(1).to(torch.float32)


def move_centered_(
    param: Tensor,
    exp_avg: Tensor,
    grad: Tensor,
    root: Tensor,
    c: Coefficients,
    direction: str,
    step: Number,
    mean: Tensor,
    halt: Tensor | None = None,
) -> Tensor | None:
    """As ``coupled_adam.optim.update.move_rows_`` with ``mean``.

    Returns:
        What ``measure`` gives of the tensors as they are now, if the pass has found it out.
    """
    dispatch.check_shapes(param, exp_avg, grad, rows=root, mean=mean)
    fit = param.numel() > 0 and dispatch.has_kernel(direction)
    if not (fit and dispatch.kernels_apply(param, grad, root, mean, moment=exp_avg)):
        dispatch.move_rows_(param, exp_avg, grad, root, c, direction, step, None, halt, mean)
        return None
    kernel = dispatch.compiled().centered_rows_kernel(DIRECTION[direction].numbers)
    moment, _, seed = dispatch.moment_arrays(exp_avg, step)
    threads = dispatch.threads_for(param)
    sums = dispatch.scratch(threads, 2, param.shape[1])
    arrays = (param.detach().numpy(), moment, grad.detach().numpy(), root.detach().numpy()[0])
    dispatch.launch(kernel, *arrays, dispatch.as_float32(c), seed, mean.numpy()[0], sums.numpy(), threads=threads)
    increment_version([param, exp_avg])
    return sums.sum(0)


def keep_column_sums(param: Tensor, exp_avg: Tensor, sums: Tensor | None) -> None:
    """Keep what a step has summed as it wrote them; None if it has not."""
    if sums is not None:
        _kept[exp_avg] = _stamp(param, exp_avg), sums


def _stamp(*tensors: Tensor) -> tuple[int, ...]:
    """Return numbers that are others once one of the tensors is changed in place or lies elsewhere."""
    return tuple(number for x in map(local, tensors) for number in (x._version, x.data_ptr()))


def _mean_row(matrix: Tensor) -> Reduction[Tensor]:
    """Average the rows of (V, H) over all processes: (1, H)."""
    return vocabulary_mean(local(matrix).sum(0, keepdim=True, dtype=state_dtype(matrix)), matrix)
