"""Coupled Adam.

The equations, as they are computed, are in equations.py; the step that applies them is in optimizer.py.
"""

import warnings

from torch import Tensor
from torch.optim.optimizer import ParamsT

from coupled_adam.optim.checks import DEFAULT_LR
from coupled_adam.optim.optimizer import AdamFamily
from coupled_adam.optim.typed import MomentDtype


class CoupledAdam(AdamFamily):
    r"""Adam with a second moment averaged over the vocabulary for embedding matrices; AdamW for everything else.

    A param group with ``second_moment="vocabulary"`` holds embedding matrices E of shape (V, H). All rows of a matrix
    share one second moment, of shape (1, H):

    $$m \leftarrow \beta_1 m + (1-\beta_1)\, g$$

    $$\bar v \leftarrow \beta_2 \bar v + (1-\beta_2)\, \frac1V \sum_i (g_i^2 + \kappa\, m_i^2)$$

    $$E \leftarrow (1-\eta\lambda) E - \eta\, \frac{m/(1-\beta_1^t)}{\sqrt{s\,\bar v/(1-\beta_2^t)} + \epsilon}$$

    Gradients that sum to zero over the vocabulary then give steps that sum to zero, and the mean embedding does not
    move. A group with ``second_moment="elementwise"``, the default, is updated by AdamW (with κ in its second moment
    if κ is not 0). ``coupled_adam.param_groups`` sorts the parameters of a model into such groups.

    The zero sum $\sum_i g_i = 0$ is a property of the gradient of a softmax head. Gradients through a tied input
    embedding break it strongly; a z-loss, logit soft-capping and weight decay on the embedding break it slightly.

    A group of matrices with ``center=True`` keeps the mean of their rows at 0: the step is followed by E ← E − mean(E).
    For a coupled matrix that costs no extra pass over memory and no extra communication: the mean row moves as if it
    were one of the rows, so it is known before they move, from column sums that are computed along with the passes over
    gradient, parameter and first moment. As these are sums of the rounded values, each step corrects the rounding of
    the previous one and errors do not accumulate: the mean of a column stays within 2^-22 of its largest element.
    Weights changed between steps are centered by the next step, those changed through ``param.data`` by the one after.

    Args:
        params: parameters, (name, parameter) pairs, or param groups; floating point, not complex.
        lr: learning rate η ≥ 0, a float or a tensor with one element; 1e-3 by default. To give the output embedding a
            different one, see ``coupled_adam.param_groups``.
        betas: decay rates (β1, β2) of the moments, each in [0, 1).
        eps: ε ≥ 0, added to the root of the second moment.
        weight_decay: decoupled weight decay λ ≥ 0.
        coupling_scale: s > 0, multiplies a coupled second moment; 2^(−n) makes the effective learning rate 2^(n/2)
            times as large (section 6.1 of the paper). No effect on groups that are not coupled.
        coupling_factor: κ in [0, 1], the share of the squared first moment in the second one; 0 is the paper's Adam.
        row_exponent: α in [0, 1] of a tempered second moment, between Coupled Adam's and Adam's: that of row i is
            $\bar v\,(r_i/\bar r)^\alpha$, where $r_i$ is the second moment of the row, averaged over its columns, and
            $\bar r$ the mean of all $r_i$. 0 is Coupled Adam, 1 the factored second moment of Adafactor (arXiv
            1804.04235). It costs V more numbers of state; gradients that sum to zero then move the mean a little. No
            effect on groups that are not coupled.
        max_grad_norm: bound on the global norm of the gradients, as with ``clip_grad_norm_`` before the step, but in
            fewer passes. ``optimizer.grad_norm`` holds the norm of the last step before clipping; ``p.grad`` is not
            modified. ``math.inf``: the norm is computed and nothing is clipped. None: neither.
        error_if_nonfinite: compute that norm, and raise RuntimeError before anything moves if it is infinite or NaN, as
            ``clip_grad_norm_`` does; the message names the parameters. Without it, one infinite gradient makes a second
            moment of a coupled matrix infinite for good, so that its column never moves again; with ``max_grad_norm``
            or ``center`` it becomes NaN. On an accelerator, every step then waits for the norm. A step that
            ``GradScaler`` skips raises nothing.
        maximize: maximize the objective.
        exp_avg_dtype: how the first moment is stored. ``torch.bfloat16``: two bytes per element, stochastically
            rounded. ``"8bit"``: about one byte per element for coupled matrices, with one scale per 256 elements of a
            row, and float32 for other parameters. None: float32 (float64 for float64 parameters).
        capturable: keep the step count on the GPU, so that a step can be captured in a CUDA graph, as in torch. A
            learning rate that changes between replays must then be a tensor on the GPU.
        fused: None uses the fastest implementation available for each parameter (torch's fused AdamW, kernels for CPU
            or GPU, or plain torch operations); False only plain operations; True raises RuntimeError in a step that
            would need them for some parameter, and says why.
        foreach: accepted for compatibility with ``torch.optim.AdamW``; no effect.
        amsgrad: likewise; only False is supported.
        differentiable: likewise; only False is supported.

    All arguments from ``lr`` to ``fused`` may differ between param groups, except for ``max_grad_norm`` and
    ``error_if_nonfinite``. The second moment is always float32 (float64 for float64 parameters). Gradients are never
    modified. Those of a coupled matrix may be sparse (``nn.Embedding(sparse=True)``); the step is that of the dense
    gradient.

    Raises:
        ValueError: a hyperparameter is out of range, a group has an unknown key, or a coupled parameter is not 2-D.
        TypeError: a hyperparameter is not a number, or a parameter is complex or not floating point.

    Source: Stollenwerk & Stollenwerk, "Better Embeddings with Coupled Adam", ACL 2025, arXiv 2502.08441, algorithm 1.

    Examples:
        >>> import torch
        >>> from coupled_adam import CoupledAdam
        >>> embedding, matrix = torch.nn.Embedding(100, 8), torch.nn.Linear(8, 8)
        >>> optimizer = CoupledAdam([
        ...     {"params": embedding.parameters(), "second_moment": "vocabulary"},
        ...     {"params": matrix.parameters(), "weight_decay": 0.1},
        ... ], lr=6e-4, betas=(0.9, 0.95))
        >>> matrix(embedding(torch.tensor([1, 2]))).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[embedding.weight]["exp_avg_sq"].shape
        torch.Size([1, 8])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = DEFAULT_LR,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        coupling_scale: float = 1.0,
        coupling_factor: float = 0.0,
        row_exponent: float = 0.0,
        max_grad_norm: float | None = None,
        error_if_nonfinite: bool = False,
        maximize: bool = False,
        exp_avg_dtype: MomentDtype = None,
        capturable: bool = False,
        fused: bool | None = None,
        foreach: bool | None = None,
        amsgrad: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "second_moment": "elementwise",
            "direction": "ratio",
            "decay": "decoupled",
            "center": False,
            "coupling_scale": coupling_scale,
            "coupling_factor": coupling_factor,
            "row_exponent": row_exponent,
            "max_grad_norm": max_grad_norm,
            "maximize": maximize,
            "exp_avg_dtype": exp_avg_dtype,
            "capturable": capturable,
            "fused": fused,
        }
        given = params if isinstance(params, list | tuple) else ()
        chosen = any(isinstance(group, dict) and "second_moment" in group for group in given)
        super().__init__(
            params,
            defaults,
            error_if_nonfinite=error_if_nonfinite,
            foreach=foreach,
            amsgrad=amsgrad,
            differentiable=differentiable,
        )
        if not chosen and not any(
            g["second_moment"] == "vocabulary" or g["coupling_factor"] for g in self.param_groups
        ):
            warnings.warn(
                "nothing is coupled, so CoupledAdam behaves exactly like AdamW: pass it param_groups(model), or put "
                'the embedding matrix into a group with second_moment="vocabulary"',
                UserWarning,
                stacklevel=2,
            )
