"""Adams.

The equations, as they are computed, are in equations.py and directions.py; the step is in optimizer.py; the power
iteration behind spectral decay in reductions.py.
"""

from torch import Tensor
from torch.optim.optimizer import ParamsT

from coupled_adam.optim.checks import DEFAULT_LR
from coupled_adam.optim.optimizer import AdamFamily
from coupled_adam.optim.typed import MomentDtype


class Adams(AdamFamily):
    r"""Adam with the bounded step atan2, and with weight decay on the leading singular value of a matrix.

    For a matrix W of shape (…, M, N), where leading dimensions are a batch, and a persistent u of shape (…, M):

    $$v = W^T u / \|W^T u\|, \quad u \leftarrow W v / \|W v\|, \quad \sigma = u^T W v$$

    $$W \leftarrow W - \eta\lambda \sqrt{M}\, \sigma\, u v^T - \eta\, \mathrm{atan2}(\hat m, \sqrt{\hat n})$$

    with Adam's bias-corrected moments. Scalars, vectors, matrices with a dimension of 1, and parameters marked with
    ``param.use_spectral_decay = False`` before the first step (embeddings, output heads) take decoupled decay by
    ``scalar_vector_weight_decay`` instead; a group with ``decay="decoupled"``, as ``coupled_adam.param_groups``
    makes for embeddings and vectors, takes its ``weight_decay`` as decoupled decay. Apart from the decay, no element
    moves by more than η·π/2 per step.

    A group with ``second_moment="vocabulary"`` shares the second moment over the rows, as in
    ``coupled_adam.CoupledAdam``; one with ``center=True`` keeps the mean of the rows at 0, by a pass after the step.

    Args:
        params: parameters, (name, parameter) pairs, or param groups; floating point, not complex.
        lr: learning rate η ≥ 0, a float or a tensor with one element; 1e-3 by default. To give the output embedding a
            different one, see ``coupled_adam.param_groups``.
        betas: decay rates (β1, β2) of the moments, each in [0, 1).
        weight_decay: spectral decay λ ≥ 0. There is a warning when η·λ·√M exceeds 1, where it overshoots; above 2 it
            diverges.
        scalar_vector_weight_decay: decoupled decay of the parameters that take no spectral decay.
        coupling_scale: as in ``coupled_adam.CoupledAdam``, like all that follow.
        coupling_factor: κ in [0, 1], the share of the squared first moment in the second one.
        row_exponent: α in [0, 1], as of ``CoupledAdam``.
        max_grad_norm: bound on the global norm of the gradients; None for none.
        error_if_nonfinite: raise RuntimeError before anything moves if that norm is infinite or NaN.
        maximize: maximize the objective.
        exp_avg_dtype: how the first moment is stored: None for float32, ``torch.bfloat16``, or ``"8bit"``.
        capturable: keep the step count on the GPU, for CUDA graphs.
        fused: None for the fastest implementation available, False for plain operations, True to insist on a fast one.
        foreach: accepted for compatibility with ``torch.optim.AdamW``; no effect.
        amsgrad: likewise; only False is supported.
        differentiable: likewise; only False is supported.

    Raises:
        ValueError, TypeError: as for ``coupled_adam.CoupledAdam``.

    Source: Algorithm 1 of Adams (github.com/imoneoi/Adams, the package ``adams-torch``). Where that implementation
    departs from its own Algorithm 1 this class follows the algorithm: atan2 is taken of the corrected moments, so the
    first steps are bounded too; ``weight_decay=0`` leaves ``scalar_vector_weight_decay`` in force; u recovers from a
    matrix that maps it to 0.

    Examples:
        >>> import torch
        >>> from coupled_adam import Adams
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 8), torch.nn.Linear(8, 100))
        >>> model[0].weight.use_spectral_decay = False
        >>> optimizer = Adams(model.parameters(), lr=1e-3)
        >>> model(torch.tensor([1, 2])).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = DEFAULT_LR,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        scalar_vector_weight_decay: float = 0.1,
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
            "eps": 1e-8,  # of a group that takes direction="ratio"; atan2 has none
            "weight_decay": weight_decay,
            "scalar_vector_weight_decay": scalar_vector_weight_decay,
            "second_moment": "elementwise",
            "direction": "atan2",
            "decay": "spectral",
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
        super().__init__(
            params,
            defaults,
            error_if_nonfinite=error_if_nonfinite,
            foreach=foreach,
            amsgrad=amsgrad,
            differentiable=differentiable,
        )
