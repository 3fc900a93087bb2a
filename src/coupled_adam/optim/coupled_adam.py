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
    r"""Adam whose second moment is averaged over the vocabulary, for embedding matrices; AdamW for all the rest.

    A param group with ``second_moment="vocabulary"`` holds embedding matrices E of shape (V, H). All rows of one share
    the second moment, a vector of shape (1, H):

    $$m \leftarrow \beta_1 m + (1-\beta_1)\, g$$

    $$\bar v \leftarrow \beta_2 \bar v + (1-\beta_2)\, \frac1V \sum_i (g_i^2 + \kappa\, m_i^2)$$

    $$E \leftarrow (1-\eta\lambda) E - \eta\, \frac{m/(1-\beta_1^t)}{\sqrt{s\,\bar v/(1-\beta_2^t)} + \epsilon}$$

    so that the gradients' zero sum over the vocabulary survives the step and the mean embedding stays where it is.
    A group with ``second_moment="elementwise"``, the default, takes AdamW (with κ in its second moment, if not 0).
    ``coupled_adam.param_groups`` sorts the parameters of a model into such groups.

    The zero sum $\sum_i g_i = 0$ is a property of the softmax head's gradient. The gradients through a tied input
    embedding break it (strongly), and so do a z-loss, logit soft-capping (slightly) and weight decay on the embedding.

    A group of matrices with ``center=True`` keeps the mean of their rows at 0: the step is followed by E ← E − mean(E).
    For a coupled matrix that costs no pass of its own and nothing more to send: the mean row moves as if it were one of
    the rows, so it is known before they move, from column sums that the passes over gradient, parameter and first
    moment take along. These are sums of what was written, so the rounding of a step is taken off in the next one and
    nothing adds up: the mean of a column stays within 2^-22 of its largest element. Weights changed between steps are
    centered by the next step, those changed through ``param.data`` by the one after it.

    Args:
        params: parameters, (name, parameter) pairs, or param groups; floating point, not complex.
        lr: learning rate η ≥ 0, a float or a tensor of one element; 1e-3 by default. For another one of the output
            embedding see ``coupled_adam.param_groups``.
        betas: decay rates (β1, β2) of the moments, each in [0, 1).
        eps: ε ≥ 0, added to the root of the second moment.
        weight_decay: decoupled weight decay λ ≥ 0.
        coupling_scale: s > 0, multiplies a coupled second moment; 2^(−n) makes the effective learning rate 2^(n/2)
            times as large (section 6.1 of the paper). Without effect on groups that are not coupled.
        coupling_factor: κ in [0, 1], the share of the squared first moment in the second one; 0 is the paper's Adam.
        max_grad_norm: bounds the norm of all gradients together, as ``clip_grad_norm_`` before the step would, but in
            fewer passes. ``optimizer.grad_norm`` holds the norm of the last step, before it was bounded; ``p.grad``
            keeps the gradients as they were. ``math.inf``: the norm is computed and nothing bounded. None: neither.
        error_if_nonfinite: compute that norm, and raise RuntimeError before anything moves where it is infinite or NaN,
            as ``clip_grad_norm_`` does; the message names the parameters. Without it one infinite gradient leaves the
            column of a coupled matrix where it is for good, as its second moment stays infinite, and with
            ``max_grad_norm`` or ``center`` makes it NaN. On an accelerator every step then waits for the norm.
            A step that ``GradScaler`` skips raises nothing.
        maximize: maximize the objective.
        exp_avg_dtype: ``torch.bfloat16`` keeps the first moment in two bytes a number, stochastically rounded;
            ``"8bit"`` that of coupled matrices in about one, with a scale for every 256 numbers of a row (eight_bit.py
            has the code), and those of other parameters in float32; None: in float32 (float64 for float64 parameters).
        capturable: keep the step count on the GPU, so that a step can be captured in a CUDA graph, as in torch. A
            learning rate that is to change between replays must be a tensor there.
        fused: None takes the fastest implementation that there is for each parameter (torch's fused AdamW, kernels
            for CPU or GPU, or plain operations of torch); False plain operations alone; True raises RuntimeError in a
            step that needs them for some parameter, and says why.
        foreach: accepted where a call was written for ``torch.optim.AdamW``, without effect.
        amsgrad: likewise; only False is supported.
        differentiable: likewise; only False is supported.

    All from ``lr`` to ``fused`` but ``max_grad_norm`` and ``error_if_nonfinite`` may differ per param group. The
    second moment is float32 (float64) always. Gradients are never modified. Those of a coupled matrix may be sparse
    (``nn.Embedding(sparse=True)``); the step is that of the dense gradient.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key in a group, coupling of anything but a 2-D parameter.
        TypeError: a hyperparameter that is no number, a parameter that is complex or not floating point.

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
                "nothing is coupled, so this is AdamW: give CoupledAdam the groups of param_groups(model), "
                'or put the embedding matrix into a group with second_moment="vocabulary"',
                UserWarning,
                stacklevel=2,
            )
