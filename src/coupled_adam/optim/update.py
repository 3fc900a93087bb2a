"""The maths of one step. Pure and local: sees the shard that this process holds and never communicates."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class RankOne(NamedTuple):
    """σ·√M·u·vᵀ of a (…, M, N) matrix, what spectral decay shrinks it by."""

    column: Tensor
    """σ·√M·u, (…, M)."""
    row: Tensor
    """v, (…, N)."""


def ratio(m_hat: Tensor, v_hat: Tensor, eps: float) -> Tensor:
    """m̂ / (√ν̂ + ε), Adam's direction."""
    return m_hat / (v_hat.sqrt() + eps)


def atan2(m_hat: Tensor, v_hat: Tensor, eps: float) -> Tensor:
    """atan2(m̂, √ν̂), bounded by π/2; takes no notice of ε."""
    return torch.atan2(m_hat, v_hat.sqrt().expand_as(m_hat))


#: Which way a parameter moves, by the name that a param group carries.
DIRECTION: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"ratio": ratio, "atan2": atan2}


def update_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    square: Tensor | None,
    step: float | Tensor,
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
    """One step of Adam and its relatives. Modifies ``param``, ``exp_avg`` and ``exp_avg_sq`` in place.

    Args:
        param: any shape and floating dtype, as are ``grad`` and ``exp_avg``.
        exp_avg_sq: of the shape of ``param``, or (1, H) where the rows of a (V, H) parameter share their second moment.
            float32, or float64 for float64 parameters; all arithmetic is done in this dtype.
        square: this step's contribution to a shared second moment, (1, H), from reductions.py; None where every element
            has its own.
        step: counts from 1.
        grad_scale: multiplies the gradient: less than 1 to clip, negative to maximize.
        spectral: what one unit of decay η·λ takes off; None for θ itself.

    Source: Coupled Adam, arXiv 2502.08441, section 3 (the mean over the vocabulary of a linear recursion is that
    recursion of the mean, so the vector is all the state there is); Adams, Algorithm 1.
    """
    dtype = exp_avg_sq.dtype
    g = grad.to(dtype) * grad_scale
    m = exp_avg.to(dtype).lerp(g, 1 - beta1)  # m ← β1·m + (1 − β1)·g
    exp_avg.copy_(m if exp_avg.dtype == dtype else stochastically_rounded(m, step))
    if square is None:
        square = g.square() if coupling_factor == 0 else g.square() + coupling_factor * m.square()  # g² + κ·m²
    exp_avg_sq.lerp_(square, 1 - beta2)  # v ← β2·v + (1 − β2)·square
    m_hat = m / (1 - beta1**step)  # m̂ = m / (1 − β1^t)
    v_hat = exp_avg_sq * (coupling_scale / (1 - beta2**step))  # ν̂ = s·v / (1 − β2^t)
    theta = param.to(dtype)
    shrink = theta if spectral is None else spectral.column.unsqueeze(-1) * spectral.row.unsqueeze(-2)  # θ or √M·σ·uvᵀ
    decayed = theta - (lr * weight_decay) * shrink
    param.copy_(decayed - lr * DIRECTION[direction](m_hat, v_hat, eps))  # θ ← θ − η·λ·shrink − η·direction


def sum_squares(
    grad: Tensor, exp_avg: Tensor, *, beta1: float, coupling_factor: float, grad_scale: float | Tensor = 1.0
) -> Tensor:
    """Sum of g² + κ·m² over the rows: (V, H) -> (1, H), float32 or float64.

    g is ``grad_scale·grad``, and m the first moment after this step's update of ``exp_avg``.
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)
    g = grad.to(dtype) * grad_scale
    square = g.square()
    if coupling_factor != 0:
        m = exp_avg.to(dtype).lerp(g, 1 - beta1)  # m = β1·m + (1 − β1)·g
        square.add_(m.square(), alpha=coupling_factor)
    return square.sum(0, keepdim=True)


def stochastically_rounded(x: Tensor, step: float | Tensor) -> Tensor:
    """float32 as bfloat16, up or down with the probabilities that make it right on average.

    The dice are a hash of the step and the element's index: nothing to save, the same on every replica and after a
    resume. A random number below 2^16 is added to the 16 bits that bfloat16 lacks, which are then cut off.
    """
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    dice = _hash(index * 0x9E3779B1 + hash_seed(step)) & 0xFFFF
    bits = x.to(torch.float32).contiguous().view(torch.int32) + dice.to(torch.int32)
    rounded = (bits & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def hash_seed(step: float | Tensor) -> int | Tensor:
    """What the step contributes to the hash."""
    return (step.to(torch.int64) if isinstance(step, Tensor) else int(step)) * 0x85EBCA77


def _hash(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (Appleby, public domain) on the low 32 bits of int64 numbers."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
