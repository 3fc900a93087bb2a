"""Centering: the mean of a matrix's rows, its mean embedding, is subtracted from all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coupled_adam.optim import reductions
from coupled_adam.optim.exchange import Work
from coupled_adam.optim.reductions import Reduction, local, run_one, vocabulary_mean
from coupled_adam.optim.state import state_dtype


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
        TypeError: ``weight`` is not floating point.

    Source: μ-centering of "Output Embedding Centering", arXiv 2601.02031.

    Examples:
        >>> head = torch.nn.Linear(2, 3, bias=False)
        >>> optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        >>> optimizer.step()
        >>> center_(head.weight).mean(0).abs().max().item() < 1e-7
        True
    """
    if weight.ndim != 2:
        raise ValueError(
            f"center_ takes a (vocabulary, hidden) matrix, not a tensor of shape {tuple(weight.shape)}: pass the "
            "weight of the output embedding, not flattened"
        )
    if not weight.is_floating_point():
        raise TypeError(f"center_ takes a floating-point matrix, not one of {weight.dtype}")
    local(weight).sub_(run_one(_mean_row(weight)))
    return weight


def center_moved_(work: Sequence[Work]) -> None:
    """Center what a step has moved, of groups with ``center``: a pass that reads, one that writes, one all-reduce."""
    centered = [item for item in work if item.group["center"]]
    (means,) = reductions.run([_mean_row(item.param) for item in centered])
    for item, mean in zip(centered, means, strict=True):
        local(item.param).sub_(mean if item.halt is None else torch.where(item.halt > 0, 0, mean))


def _mean_row(matrix: Tensor) -> Reduction[Tensor]:
    """Average the rows of (V, H) over all processes: (1, H)."""
    return vocabulary_mean(local(matrix).sum(0, keepdim=True, dtype=state_dtype(matrix)), matrix)
