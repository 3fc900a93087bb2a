"""The class: defaults, validation, and the loop over parameters. The maths is in update.py and reductions.py."""

from collections.abc import Callable
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT

from coupled_adam.optim import state as checkpoints
from coupled_adam.optim.reductions import SECOND_MOMENT, local
from coupled_adam.optim.update import update_
from coupled_adam.optim.validation import check_grad, check_group, parameter_name

Group = dict[str, Any]

#: Where torch has a fused AdamW; elsewhere it chooses for itself.
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


class CoupledAdam(Optimizer):
    r"""Adam whose second moment is averaged over the vocabulary, for embedding matrices; AdamW for all the rest.

    A param group with ``second_moment="vocabulary"`` holds embedding matrices E of shape (V, H). All rows of one share
    the second moment, a vector of shape (1, H):

    .. math::
        m &\leftarrow \beta_1 m + (1-\beta_1)\, g \\
        \bar v &\leftarrow \beta_2 \bar v + (1-\beta_2)\, \tfrac1V \textstyle\sum_i (g_i^2 + \kappa\, m_i^2) \\
        E &\leftarrow (1-\eta\lambda) E - \eta\, \frac{m/(1-\beta_1^t)}{\sqrt{s\,\bar v/(1-\beta_2^t)} + \epsilon}

    so that the gradients' zero sum over the vocabulary survives the step and the mean embedding stays where it is.
    A group with ``second_moment="elementwise"``, the default, takes AdamW (with κ in its second moment, if not 0).
    :func:`coupled_adam.param_groups` sorts the parameters of a model into such groups.

    The zero sum :math:`\sum_i g_i = 0` is a property of the softmax head's gradient. The gradients through a tied input
    embedding break it (strongly), and so do a z-loss, logit soft-capping (slightly) and weight decay on the embedding.

    Args:
        params: parameters, (name, parameter) pairs, or param groups; floating point, not complex.
        lr: learning rate η ≥ 0, a float or a tensor of one element.
        betas: decay rates (β1, β2) of the moments, each in [0, 1).
        eps: ε ≥ 0, added to the root of the second moment.
        weight_decay: decoupled weight decay λ ≥ 0.
        coupling_scale: s > 0, multiplies a coupled second moment; 2^(−n) makes the effective learning rate 2^(n/2)
            times as large (section 6.1 of the paper). Without effect on groups that are not coupled.
        coupling_factor: κ in [0, 1], the share of the squared first moment in the second one; 0 is the paper's Adam.

    All of them may differ per param group. The moments are kept in float32 (float64 for float64 parameters), whatever
    the dtype of the parameter; gradients are never modified.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key in a group, coupling of anything but a 2-D parameter.
        TypeError: a hyperparameter that is no number, a parameter that is complex or not floating point.

    Source: Stollenwerk & Stollenwerk, "Better Embeddings with Coupled Adam", ACL 2025, arXiv 2502.08441, algorithm 1.

    Example:
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
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        coupling_scale: float = 1.0,
        coupling_factor: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "second_moment": "elementwise",
            "coupling_scale": coupling_scale,
            "coupling_factor": coupling_factor,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group. Its missing keys take the defaults of the constructor; it is checked like the others."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self.defaults)
        except (ValueError, TypeError):
            self.param_groups.pop()  # a caller who catches the error keeps a working optimizer
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. ``closure``, if given, recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._create_missing_state()
        for group in self.param_groups:
            with_grad = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
            for i, param in with_grad:
                check_grad(cast(Tensor, param.grad), parameter_name(group, i))
            params = [param for _, param in with_grad]
            plain = [p for p in params if self._is_plain_adamw(p, group)]
            if plain:
                self._adamw_(plain, group)
            for param in params:
                if not self._is_plain_adamw(param, group):
                    self._update_(param, group)
        return loss

    def _create_missing_state(self) -> None:
        """For every parameter, with a gradient or not: a distributed checkpoint must be complete on every rank."""
        for group in self.param_groups:
            for param in group["params"]:
                if not self.state[param]:
                    zeros = torch.zeros_like(param, dtype=checkpoints.state_dtype(param))
                    square = SECOND_MOMENT[group["second_moment"]](zeros, zeros, beta1=0.0, coupling_factor=0.0)
                    # Where torch's fused kernels want it: beside the parameter. Our own update reads it as a number.
                    device = param.device if self._is_plain_adamw(param, group) else torch.device("cpu")
                    step = torch.zeros((), dtype=torch.float32, device=device)
                    self.state[param] = {"step": step, "exp_avg": zeros, "exp_avg_sq": square}

    @staticmethod
    def _is_plain_adamw(param: Tensor, group: Group) -> bool:
        """Whether torch's own AdamW does the same: nothing coupled, and moments of the parameter's dtype."""
        uncoupled = group["second_moment"] == "elementwise" and group["coupling_factor"] == 0
        return uncoupled and param.dtype == checkpoints.state_dtype(param)

    def _adamw_(self, params: list[Tensor], group: Group) -> None:
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [cast(Tensor, p.grad) for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=params[0].device.type in FUSED_DEVICES or None,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _update_(self, param: Tensor, group: Group) -> None:
        state, grad = self.state[param], cast(Tensor, param.grad)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        square = SECOND_MOMENT[group["second_moment"]](
            grad, state["exp_avg"], beta1=beta1, coupling_factor=group["coupling_factor"]
        )
        update_(
            local(param),
            local(state["exp_avg"]),
            local(state["exp_avg_sq"]),
            local(grad),
            local(square),
            state["step"].item(),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            coupling_scale=group["coupling_scale"] if group["second_moment"] == "vocabulary" else 1.0,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, of ``torch.optim.AdamW``, or of the authors' reference implementation.

        A full (V, H) second moment of a parameter that is coupled here is folded to its mean over the vocabulary, so a
        running AdamW job can go on with Coupled Adam. The moments stay float32 whatever the parameters' dtype.

        Raises:
            ValueError: the groups or the shapes of the state do not fit; the message names the parameter.
        """
        prepared: dict[str, Any] = {}

        def prepare(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            prepared.update(checkpoints.prepare(state_dict, self.param_groups))
            return prepared

        # As the last of the hooks: it must see what those of other libraries make of the checkpoint.
        handle = self.register_load_state_dict_pre_hook(prepare)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        checkpoints.restore_precision(self, prepared)
