"""What an update needs to know of the whole tensor. The only place of the optimizers that may communicate."""

from collections.abc import Callable

import torch
from torch import Tensor

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Replicate


def local(x: Tensor) -> Tensor:
    """The part of ``x`` that this process holds: a view of the shard of a DTensor, any other tensor itself."""
    if torch.distributed.is_available() and isinstance(x, DTensor):
        return x.to_local()
    return x


def replicate_partial(x: Tensor) -> Tensor:
    """Complete the sums that are pending over a device mesh. Leaves sharded dimensions as they are."""
    if not (torch.distributed.is_available() and isinstance(x, DTensor)):
        return x
    return x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])


def elementwise_square(grad: Tensor, exp_avg: Tensor, *, beta1: float, coupling_factor: float) -> Tensor:
    """g² + κ·m², shape and dtype of ``exp_avg``; m is the first moment after this step's update of ``exp_avg``."""
    grad = grad.to(exp_avg.dtype)
    if coupling_factor == 0:
        return grad.square()
    m = exp_avg.lerp(grad, 1 - beta1)  # m = β1·m + (1 − β1)·g
    return grad.square().add_(m.square(), alpha=coupling_factor)


def vocabulary_mean_square(grad: Tensor, exp_avg: Tensor, *, beta1: float, coupling_factor: float) -> Tensor:
    """Mean of g² + κ·m² over the vocabulary: (V, H) -> (1, H), dtype of ``exp_avg``."""
    square = elementwise_square(grad, exp_avg, beta1=beta1, coupling_factor=coupling_factor)
    # The sum over V divided by V: DTensor.mean gathers the matrix where the shards are uneven, sum is one all-reduce.
    return replicate_partial(square.sum(0, keepdim=True)) / grad.shape[0]


#: What Adam's second moment averages, by the name that a param group carries.
SECOND_MOMENT: dict[str, Callable[..., Tensor]] = {
    "elementwise": elementwise_square,
    "vocabulary": vocabulary_mean_square,
}
