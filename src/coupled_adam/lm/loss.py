"""The loss of a large vocabulary: no logits of all positions, and one gradient for a tied embedding."""

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: Positions whose logits exist at a time.
CHUNK = 512

#: What the products of a head can be rounded to.
Rounding = Literal["float32", "bfloat16"]


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


class Losses(NamedTuple):
    """What ``linear_cross_entropy`` returns: sums over the positions, float32 (float64 for float64)."""

    total: Tensor
    """Cross entropy and penalties together: what is to be minimized. The only one with a gradient."""
    cross_entropy: Tensor
    """−log p(target), in nats."""
    statistics: Tensor | None
    """``STATISTICS``, (4,); only where gradients are off."""


#: Of the logits as the model makes them: the mean over the vocabulary, the standard deviation over it (with the divisor
#: V), the largest absolute value, and the square of log Z = log Σ exp(logit).
STATISTICS = ("logit_mean", "logit_std", "logit_max", "log_z_squared")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tied: TiedGradient | None = None,
    *,
    bias: Tensor | None = None,
    z_loss: float = 0.0,
    mu_loss: float = 0.0,
    softcap: float | None = None,
    logits: Rounding | None = None,
) -> Losses:
    """Sum −log softmax(c)[target] over all positions, of the logits c = cap·tanh(s/cap), s = W h + b, and penalties.

    ``F.linear_cross_entropy`` of torch does the plain case; this one is faster on the CPU, rounds products to
    autocast's type as the layers of torch do, and hands on the gradient of W so that the tied embedding's can be added
    to it in place. The gradients are computed before a loss scale is applied: autocast to bfloat16, not to float16.

    Args:
        hidden: what the head reads, (positions, width).
        weight: W, (vocabulary, width), whole. Its gradient is summed in its own type.
        targets: ids from 0 up to the vocabulary, int64 (positions,).
        tied: what the embedding of the same weight got, of which ``hidden`` is made.
        bias: b, (vocabulary,); None for 0.
        z_loss: λ of λ·(log Z)² at every position, Z = Σ exp(c) (Chowdhery et al., PaLM, arXiv 2204.02311, section 5).
        mu_loss: λ of λ·‖μ‖² at every position, μ the mean row of W (arXiv 2601.02031): once in the mean over positions.
        softcap: cap; None for c = s (Gemma 2, arXiv 2408.00118, section 2).
        logits: the type that the products of the head are rounded to; None for autocast's, or that of the weight.

    Returns:
        The sums. A second backward pass through ``total`` raises RuntimeError.
    """
    wanted = torch.is_grad_enabled()  # within forward it never is
    settings = _Settings(z_loss, mu_loss, softcap, logits)
    total, entropy, statistics = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, tied, settings, wanted
    )
    return Losses(total, entropy, None if wanted else statistics)


def head_logits(
    hidden: Tensor, weight: Tensor, softcap: float | None, logits: Rounding | None, bias: Tensor | None = None
) -> Tensor:
    """Return the logits that the loss sees, (…, vocabulary) of (…, width): rounded, then capped; float32 at least."""
    dtype = _head_dtype(weight, logits)
    with torch.autocast(hidden.device.type, enabled=False):
        s = _product(_rounded(hidden, dtype), _rounded(weight, dtype).T, dtype)
        s = s.to(torch.promote_types(dtype, torch.float32))
        s = s if bias is None else s + bias
        return s if softcap is None else softcap * torch.tanh(s / softcap)


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
            raise RuntimeError("no gradient came from the head: pass the TiedGradient of tied_embedding to the loss")
        rows = rows.to(gradient.dtype)
        if gradient.is_cuda:  # which of the two adds in the same order at every call depends on the device
            return None, gradient.index_put_((tokens,), rows, accumulate=True), None
        return None, gradient.index_add_(0, tokens.flatten(), rows.flatten(0, -2)), None


class _Settings(NamedTuple):
    z_loss: float
    mu_loss: float
    softcap: float | None
    logits: Rounding | None


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed with the loss, chunk after chunk, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        tied: TiedGradient | None,
        settings: _Settings,
        wanted: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_dh, wants_dw, wants_db = (wanted and needed for needed in ctx.needs_input_grad[:3])
        z_loss, mu_loss, cap, _ = settings
        dtype = _head_dtype(weight, settings.logits)
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = _rounded(hidden, dtype), _rounded(weight, dtype)
            precise = torch.promote_types(dtype, torch.float32)
            entropy, squares = torch.zeros(2, dtype=precise, device=hidden.device)
            statistics = torch.zeros(len(STATISTICS), dtype=precise, device=hidden.device)
            dh, dw = torch.empty_like(hidden) if wants_dh else None, None
            db = torch.zeros_like(bias, dtype=precise) if bias is not None and wants_db else None
            for at in range(0, len(h), CHUNK):
                x, y = h[at : at + CHUNK], targets[at : at + CHUNK, None]
                c = _product(x, w.T, dtype).to(precise)  # s = W h + b
                if bias is not None:
                    c += bias
                slope = None
                if cap is not None:
                    torch.tanh(c.div_(cap), out=c)
                    slope = 1 - c.square() if wanted else None  # ∂c/∂s = 1 − (c/cap)²
                    c.mul_(cap)  # c = cap·tanh(s/cap)
                if not wanted:
                    statistics[:3] += _statistics(c)
                c_y = c.gather(1, y)
                log_p = torch.log_softmax(c, dim=1, out=c)
                losses = -log_p.gather(1, y)
                log_z = c_y + losses  # log Z = c_y − log p_y
                entropy += losses.sum()
                squares += log_z.square().sum()
                if not (wants_dh or wants_dw or wants_db):
                    continue
                # ∂total/∂c = p·(1 + 2λ·log Z) − onehot(target)
                ds = log_p.exp_()
                if z_loss:
                    ds.mul_(1 + 2 * z_loss * log_z)
                ds.scatter_add_(1, y, torch.full_like(y, -1, dtype=precise))
                if slope is not None:
                    ds.mul_(slope)
                if db is not None:
                    db += ds.sum(0)
                ds = _rounded(ds, dtype)
                if dh is not None:
                    dh[at : at + CHUNK] = _product(ds, w, dtype)
                if not wants_dw:
                    continue
                if dw is None:
                    dw = _product(ds.T, x, dtype).to(weight.dtype)
                elif dw.dtype == dtype == ds.dtype:
                    dw.addmm_(ds.T, x)
                else:
                    dw += _product(ds.T, x, dtype)
            total = entropy + z_loss * squares if z_loss else entropy.clone()
            if mu_loss:
                mu = weight.mean(0, dtype=torch.promote_types(weight.dtype, torch.float32))
                total = total + mu_loss * len(h) * mu.square().sum()
                if dw is not None:
                    dw += (2 * mu_loss * len(h) / len(weight)) * mu  # ∂‖μ‖²/∂e_i = 2μ/V, for every row alike
        statistics[3] = squares
        if db is not None and bias is not None:
            db = db.to(bias.dtype)
        ctx.gradients, ctx.tied = (dh, dw, db), tied
        ctx.mark_non_differentiable(entropy, statistics)
        return total, entropy, statistics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, scale: Tensor, *unused: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy can be differentiated only once: compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        dh, dw, db = (None if x is None else x.mul_(scale) for x in gradients)
        if ctx.tied is not None and dh is not None:  # else there is no embedding below to take it
            ctx.tied.of_head, dw = dw, None
        return dh, dw, db, None, None, None, None


def _statistics(c: Tensor) -> Tensor:
    """Sum mean, standard deviation and largest absolute value over the positions, (positions, vocabulary) -> (3,)."""
    variance, mean = torch.var_mean(c, dim=1, correction=0)
    low, high = c.aminmax(dim=1)
    return torch.stack([mean.sum(), variance.sqrt().sum(), torch.maximum(-low, high).sum()])


def _head_dtype(weight: Tensor, logits: Rounding | None) -> torch.dtype:
    """Which type the products of the head are rounded to."""
    if logits is not None:
        return torch.bfloat16 if logits == "bfloat16" else torch.promote_types(weight.dtype, torch.float32)
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to ``dtype``. CPUs that do not multiply bfloat16 get its numbers in float32, where products are exact."""
    rounded = x.to(dtype)
    held = dtype == torch.bfloat16 and x.device.type == "cpu" and not _cpu_multiplies_bfloat16()
    return rounded.float() if held else rounded


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply two ``_rounded`` matrices, summed in float32 or better, and round as they are."""
    return _rounded(a @ b, dtype)


@cache
def _cpu_multiplies_bfloat16() -> bool:
    """Return whether the CPU has instructions for it; without them it takes several times as long as in float32."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # old torch does not tell
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
