"""Centering: the mean of a matrix's rows, its mean embedding, is subtracted from all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coupled_adam.optim import reductions
from coupled_adam.optim.equations import working_dtype
from coupled_adam.optim.job import Job
from coupled_adam.optim.reductions import Reduction, local, run_one, vocabulary_mean


@torch.no_grad()
def center_(weight: Tensor) -> Tensor:
    """Subtract the mean of its rows from every row of an embedding matrix, in place and outside of autograd.

    For any optimizer: call it after ``optimizer.step()``, on every process. The optimizers of this package do it
    themselves in groups with ``center=True``, in fewer passes.

    Args:
        weight: (V, H) of any floating dtype: a plain tensor, a DTensor, or a shard with ``vocabulary_group``. With
            shards, the mean is that of all V rows, and the processes exchange H numbers (H + 1 with
            ``vocabulary_group``). Sums are taken in float32 (float64 for a float64 matrix).

    Returns:
        ``weight``. The mean of its rows is 0 within the rounding of its dtype.

    Raises:
        ValueError: ``weight`` is not a matrix.
        TypeError: ``weight`` is not a tensor, or not floating point.

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


def center_all_(jobs: Sequence[Job]) -> None:
    """Center matrices after their step: a pass that reads, one that writes, one all-reduce for all."""
    moving = [job for job in jobs if job.rests is not True]
    (means,) = reductions.run([_mean_row(job.whole) for job in moving])
    for job, mean in zip(moving, means, strict=True):
        job.param.sub_(job.unless_it_rests(mean))


def _mean_row(matrix: Tensor) -> Reduction[Tensor]:
    """Average the rows of (V, H) over all processes: (1, H)."""
    return vocabulary_mean(local(matrix).sum(0, keepdim=True, dtype=working_dtype(matrix)), matrix)
