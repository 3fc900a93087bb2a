"""The loss of a large vocabulary: no logits of all positions, and one gradient for a tied embedding."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: Positions whose logits exist at a time.
CHUNK = 512


class TiedGradient:
    """Hands the head's gradient of a tied matrix to the embedding, which adds its rows to it and gives it to autograd.

    Autograd alone would fill a second matrix of that size with the embedding's few rows, and add the two. The head
    comes first in the backward pass, since what the embedding is given depends on it.
    """

    def __init__(self) -> None:
        self.of_head: Tensor | None = None


def tied_embedding(tokens: Tensor, weight: Tensor, tied: TiedGradient) -> Tensor:
    """Look up rows of ``weight``, (V, H): int64 (…) -> (…, H). The head must get the same ``tied``."""
    rows: Tensor = _TiedEmbedding.apply(tokens, weight, tied)  # type: ignore[no-untyped-call]
    return rows


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, tied: TiedGradient | None = None) -> Tensor:
    """Sum −log softmax(W h)[target] over all positions, in nats.

    ``F.linear_cross_entropy`` of torch does the same; this one is faster on the CPU, rounds products to autocast's type
    as the layers of torch do, and hands on the gradient of W so that the tied embedding's can be added to it in place.
    The gradient is computed before a loss scale is applied: autocast to bfloat16 rather than to float16.

    Args:
        hidden: what the head reads, (positions, width).
        weight: W, (vocabulary, width). Its gradient is summed in its own type.
        targets: ids from 0 up to the vocabulary, int64 (positions,).
        tied: what the embedding of the same weight got, of which ``hidden`` is made.

    Returns:
        A float32 scalar (float64 for float64). A second backward pass through it raises RuntimeError.
    """
    wanted = torch.is_grad_enabled()  # within forward it never is
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, tied, wanted)  # type: ignore[no-untyped-call]
    return loss


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, tied: TiedGradient) -> Tensor:
        ctx.tied = tied
        ctx.save_for_backward(tokens)
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor) -> tuple[None, Tensor, None]:
        (tokens,) = ctx.saved_tensors
        gradient, ctx.tied.of_head = ctx.tied.of_head, None
        if gradient is None:
            raise RuntimeError("no gradient came from the head: give one loss the TiedGradient of its tied_embedding")
        rows = rows.to(gradient.dtype)
        if gradient.is_cuda:  # which of the two adds in the same order at every call depends on the device
            return None, gradient.index_put_((tokens,), rows, accumulate=True), None
        return None, gradient.index_add_(0, tokens.flatten(), rows.flatten(0, -2)), None


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed with the loss, chunk after chunk, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, tied: TiedGradient | None, wanted: bool
    ) -> Tensor:
        wants_dh, wants_dw = (wanted and needed for needed in ctx.needs_input_grad[:2])
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            h, w = hidden.to(dtype), weight.to(dtype)
            precise = torch.promote_types(dtype, torch.float32)
            loss = torch.zeros((), dtype=precise, device=hidden.device)
            dh, dw = torch.empty_like(hidden) if wants_dh else None, None
            for at in range(0, len(h), CHUNK):
                x, y = h[at : at + CHUNK], targets[at : at + CHUNK, None]
                log_p = F.linear(x, w).to(precise)
                torch.log_softmax(log_p, dim=1, out=log_p)
                loss -= log_p.gather(1, y).sum()
                if not (wants_dh or wants_dw):
                    continue
                # ∂loss/∂logits = p − onehot(target)
                ds = log_p.exp_().scatter_add_(1, y, torch.full_like(y, -1, dtype=precise)).to(dtype)
                if dh is not None:
                    dh[at : at + CHUNK] = ds @ w
                if not wants_dw:
                    continue
                if dw is None:
                    dw = (ds.T @ x).to(weight.dtype)
                elif dw.dtype == dtype:
                    dw.addmm_(ds.T, x)
                else:
                    dw += ds.T @ x
        ctx.gradients, ctx.tied = (dh, dw), tied
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy can be differentiated once: compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        dh, dw = (None if x is None else x.mul_(scale) for x in gradients)
        if ctx.tied is not None and dh is not None:  # else there is no embedding below to take it
            ctx.tied.of_head, dw = dw, None
        return dh, dw, None, None, None
