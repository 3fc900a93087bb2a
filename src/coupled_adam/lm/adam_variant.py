"""Adam with other second moments, to find out what lowers the loss: each is one line of the step below.

For experiments on one process, to be read side by side. The optimizers for users are in ``coupled_adam.optim``.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Shape = Literal["element", "token", "hidden", "scalar", "frequency", "factored"]

#: Dimensions of a (V, H) matrix over which each second moment averages g².
AVERAGED: dict[Shape, tuple[int, ...]] = {
    "element": (),  # (V, H): Adam
    "token": (1,),  # (V, 1): one per token, as Adam-mini has it (arXiv 2406.16793)
    "hidden": (0,),  # (1, H): one per hidden unit: Coupled Adam (arXiv 2502.08441)
    "scalar": (0, 1),  # (1, 1): one for the matrix
    "frequency": (0,),  # (1, H), times (q_i / q̄)^α for token i
    "factored": (0,),  # (1, H), times (r_i / r̄)^α, r (V, 1) being the second moment per token
}


class AdamVariant(Optimizer):
    """Adam on one (V, H) embedding matrix, with a second moment of another shape.

    Args:
        params: the matrix.
        second_moment: what g² is averaged over, see ``AVERAGED``.
        betas, eps: as of Adam.
        frequency: q, (V,): the share of each token in the training text, none of them 0. For ``"frequency"`` only.
        exponent: α of ``"frequency"`` and ``"factored"``. 0 is ``"hidden"``; 1 gives each token a second moment in
            proportion to its frequency, as Adam's is on average, or is Adafactor's (arXiv 1804.04235).
        zero_sum: subtract from every update its mean over the vocabulary.
        amsgrad: divide by the largest second moment so far (arXiv 1904.09237, with Adam's bias correction as in torch).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        second_moment: Shape,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        frequency: Tensor | None = None,
        exponent: float = 0.0,
        zero_sum: bool = False,
        amsgrad: bool = False,
    ) -> None:
        if (second_moment == "frequency") != (frequency is not None):
            raise ValueError("second_moment='frequency' and frequency go together")
        super().__init__(params, {"lr": 1e-3, "betas": betas, "eps": eps})
        self.averaged, self.zero_sum, self.amsgrad = AVERAGED[second_moment], zero_sum, amsgrad
        self.exponent = exponent if second_moment == "factored" else None
        # (q_i / q̄)^α, (V, 1); q̄ is the mean over the vocabulary
        self.tempered = None if frequency is None else (frequency / frequency.mean()).pow(exponent).unsqueeze(1)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the matrix."""
        for group in self.param_groups:
            (beta1, beta2), eps, lr = group["betas"], group["eps"], group["lr"]
            for param in group["params"]:
                g, state = param.grad, self._state_of(param)
                m, v, state["step"] = state["exp_avg"], state["exp_avg_sq"], state["step"] + 1
                t = state["step"].item()
                m.lerp_(g, 1 - beta1)  # m = β1·m + (1 − β1)·g
                square = g.square().mean(self.averaged, keepdim=True) if self.averaged else g.square()
                v.lerp_(square, 1 - beta2)  # v = β2·v + (1 − β2)·mean(g²)
                n = v
                if self.amsgrad:
                    n = torch.maximum(state["max_exp_avg_sq"], v, out=state["max_exp_avg_sq"])
                if self.tempered is not None:
                    n = n * self.tempered.to(n)  # v_i = v̄·(q_i / q̄)^α
                if self.exponent is not None:
                    r = state["rows"].lerp_(g.square().mean(1, keepdim=True), 1 - beta2)
                    n = n * (r / r.mean()).pow(self.exponent)  # v_i = v̄·(r_i / r̄)^α
                u = m / (1 - beta1**t) / ((n / (1 - beta2**t)).sqrt() + eps)  # m̂ / (√v̂ + ε)
                if self.zero_sum:
                    u -= u.mean(0)
                param.sub_(u, alpha=lr)  # θ = θ − η·u

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state:
            shape = [1 if d in self.averaged else size for d, size in enumerate(param.shape)]
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = param.new_zeros(shape)
            if self.amsgrad:
                state["max_exp_avg_sq"] = param.new_zeros(shape)
            if self.exponent is not None:
                state["rows"] = param.new_zeros(len(param), 1)
        return state
