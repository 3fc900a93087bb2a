"""What an update needs to know of the whole tensor. The only place of the optimizers that may communicate."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils import get_total_norm

from coupled_adam.optim.update import RankOne

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Replicate


def local(x: Tensor) -> Tensor:
    """The part of ``x`` that this process holds: the shard of a DTensor, any other tensor itself."""
    if torch.distributed.is_available() and isinstance(x, DTensor):
        return x.to_local()
    return x


def replicate_partial(x: Tensor) -> Tensor:
    """Complete the sums that are pending over a device mesh. Leaves sharded dimensions as they are."""
    if not (torch.distributed.is_available() and isinstance(x, DTensor)):
        return x
    return x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])


def vocabulary_mean_square(
    grad: Tensor, exp_avg: Tensor, *, beta1: float, coupling_factor: float, grad_scale: float | Tensor = 1.0
) -> Tensor:
    """Mean of g² + κ·m² over the vocabulary: (V, H) -> (1, H), float32 or float64.

    g is ``grad_scale·grad``, and m the first moment after this step's update of ``exp_avg``.
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)
    g = grad.to(dtype) * grad_scale
    square = g.square()
    if coupling_factor != 0:
        m = exp_avg.to(dtype).lerp(g, 1 - beta1)  # m = β1·m + (1 − β1)·g
        square.add_(m.square(), alpha=coupling_factor)
    # The sum over V divided by V: DTensor.mean gathers the matrix where the shards are uneven, sum is one all-reduce.
    return replicate_partial(square.sum(0, keepdim=True)) / max(grad.shape[0], 1)


#: What a second moment averages over, by the name that a param group carries; None for nothing.
SECOND_MOMENT: dict[str, Callable[..., Tensor] | None] = {
    "elementwise": None,
    "vocabulary": vocabulary_mean_square,
}


def total_norm(grads: Sequence[Tensor], square_sums: Sequence[Tensor]) -> Tensor:
    """Norm of all gradients together, a scalar; of some of them only the sums of squares are given."""
    if not square_sums:
        return get_total_norm(grads)
    device = square_sums[0].device
    rest = [get_total_norm(grads)] if grads else []
    rest = [norm.to(device, torch.promote_types(norm.dtype, torch.float32)).square() for norm in rest]
    return torch.stack([*(s.to(device) for s in square_sums), *rest]).sum().sqrt()


def power_iteration_(u: Tensor, matrix: Tensor, step: int | Tensor) -> RankOne:
    """One step of the power method from ``u``, modified in place: nearly the matrix's leading singular triple.

    Args:
        u: (…, M), in the working precision; the estimate of the left singular vector that persists between steps.
        matrix: (…, M, N); leading dimensions are a batch.
        step: seeds the vector that takes the place of a ``u`` that the matrix maps to 0, as it maps a vector of ones
            where its columns sum to 0: the power method would never leave it.

    Returns:
        √M·σ·u, and v: what Algorithm 1 of Adams subtracts, times η·λ. Both 0 where the matrix maps ``u`` to 0.
    """
    w = matrix.to(u.dtype)
    v = normalize(torch.einsum("...mn,...m->...n", w, u), dim=-1)  # v = Wᵀu / ‖Wᵀu‖
    scaled = torch.einsum("...mn,...n->...m", w, v)  # W·v = σ·u
    sigma = scaled.norm(dim=-1, keepdim=True)
    fresh = torch.cos(torch.arange(u.shape[-1], device=u.device, dtype=u.dtype).add(step).square()).expand_as(u)
    u.copy_(torch.where(sigma > 0, scaled / sigma, fresh))  # u ← W·v / ‖W·v‖
    return RankOne(column=scaled * matrix.shape[-2] ** 0.5, row=v)  # √M·σ·u, v
