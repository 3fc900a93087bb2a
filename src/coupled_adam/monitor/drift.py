"""Why the mean embedding moves: the steps of an Adam-like optimizer, split by cause.

With m̂ and v̂ the corrected moments of an embedding matrix (V, H), all means over its rows, a step moves the mean μ by

    −η·[mean(m̂/(√v̂ + ε)) − mean(m̂)/(√mean(v̂) + ε)]    because the rows have second moments of their own
    −η·mean(m̂)/(√mean(v̂) + ε)                          because the gradients do not sum to zero
    −η·λ·μ                                             because of weight decay

The first term is what Coupled Adam removes. The second is zero for an untied softmax head, whose gradients sum to zero
over the vocabulary; a tied input embedding, a z-loss and soft-capped logits make it something else.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from coupled_adam.monitor.shards import mean_over_rows, precision
from coupled_adam.optim.optimizer import inner_optimizer
from coupled_adam.optim.reductions import whole

#: The causes, in the order of the equation above; the names of ``Drift``'s vectors.
CAUSES = ("second_moments", "gradients", "decay")


@dataclass(frozen=True)
class Drift:
    """How far the mean of an embedding matrix moved, by cause: vectors (H,), float64, that add up to the movement.

    Two of them can be added, the earlier one first: the vectors add up, and the mean is that of the later one.
    """

    second_moments: Tensor
    """Due to one second moment per row, (H,): what coupling removes. Zero with Coupled Adam."""
    gradients: Tensor
    """Due to gradients that do not sum to zero over the vocabulary, (H,). Zero for an untied head and a plain
    softmax."""
    decay: Tensor
    """Due to weight decay, (H,)."""
    mean: Tensor
    """μ after the (last) step, (H,)."""

    @property
    def total(self) -> Tensor:
        """How far the mean moved in all, (H,)."""
        return self.second_moments + self.gradients + self.decay

    def norms(self) -> dict[str, float]:
        """Return the length of each cause's vector, in units of the embedding."""
        return {cause: getattr(self, cause).norm().item() for cause in CAUSES}

    def along_mean(self) -> dict[str, float]:
        """Return Δ·μ/‖μ‖ of each cause's vector Δ: how far it moved the mean away from the origin (> 0) or towards it.

        Lengths in units of the embedding, along μ as it is after the step; NaN for μ = 0. Over all steps of a run they
        add up to ‖μ‖ minus the component of the initial mean in that direction.
        """
        direction = self.mean / self.mean.norm()
        return {cause: (getattr(self, cause) @ direction).item() for cause in CAUSES}

    def shares(self) -> dict[str, float]:
        """Return Δ·μ/‖μ‖² of each cause's vector Δ: ``along_mean`` as a share of ‖μ‖.

        Over all steps of a run, these shares and that of the initial mean add up to 1.
        """
        length = self.mean.norm().item()
        return {cause: along / length if length else float("nan") for cause, along in self.along_mean().items()}

    def __add__(self, later: "Drift") -> "Drift":
        second_moments, gradients, decay = (getattr(self, cause) + getattr(later, cause) for cause in CAUSES)
        return Drift(second_moments, gradients, decay, later.mean)


@torch.no_grad()
def drift(optimizer: Optimizer, param: Tensor) -> Drift:
    """Split the movement of the mean of ``param`` in the optimizer's last step by cause, using only the state.

    Call it after ``optimizer.step()`` and before the learning rate changes: it reads learning rate and weight decay
    from the group. The three vectors add up to the movement within the rounding of the parameter, or of the first
    moment where that is stored in bfloat16 or 8 bits. Clipping and ``maximize`` are already part of the moments.
    ``DriftMonitor`` sums over steps, and skips steps that left the parameter unchanged.

    Args:
        optimizer: ``torch.optim.AdamW`` or ``Adam`` in any implementation, with or without ``amsgrad``, or
            ``coupled_adam.CoupledAdam``; also inside the wrapper of Accelerate.
        param: an embedding matrix (V, H) in one of its groups. If it is a DTensor or a shard with
            ``vocabulary_group``, all ranks must call this; five vectors (H,) are summed.

    Returns:
        One vector (H,) per cause, and the mean after the step.

    Raises:
        TypeError: the optimizer is of another kind.
        ValueError: ``param`` is not a matrix of the optimizer or has not been stepped; its step or decay cannot be
            split (atan2 of Adams, spectral decay, L2 regularization inside Adam's gradient); the group has
            ``center=True``.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(3, 2))
        >>> optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
        >>> weight.grad = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])  # sums to zero, as with a softmax head
        >>> optimizer.step()
        >>> {cause: round(length, 3) for cause, length in drift(optimizer, weight).norms().items()}
        {'second_moments': 0.033, 'gradients': 0.0, 'decay': 0.071}
    """
    optimizer = inner_optimizer(optimizer)
    group = _group_of(optimizer, param)
    state = optimizer.state.get(param)
    if not state or "exp_avg_sq" not in state:
        raise ValueError("the parameter has no moments yet; drift describes the last step: call optimizer.step() first")
    # Ours may keep it in another form.
    m = state["exp_avg"] if "exp_avg" in state else optimizer.first_moment(param)  # type: ignore[attr-defined]
    v = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    coupled = "direction" in group and group["second_moment"] == "vocabulary"  # AdamW may have groups of param_groups
    if m.shape != param.shape or v.shape != (torch.Size([1, param.shape[1]]) if coupled else param.shape):
        raise ValueError(
            f"moments of shapes {tuple(m.shape)} and {tuple(v.shape)} are not those of a {tuple(param.shape)} matrix; "
            "pass the parameter that the optimizer holds"
        )

    def number(x: Any) -> Any:
        return x.detach().reshape(()).to(precision(x)) if isinstance(x, Tensor) else float(x)

    lr, weight_decay, eps = number(group["lr"]), number(group["weight_decay"]), group["eps"]
    (beta1, beta2), step = map(number, group["betas"]), number(state["step"])
    first, second = 1 - beta1**step, 1 - beta2**step  # corrections of the moments' bias

    def direction(m: Tensor, v: Tensor) -> Tensor:
        """m/(√v + ε·√(1 − β2^t)): Adam's direction m̂/(√v̂ + ε) but for the factor of ``scale``."""
        return m / v.sqrt().add_(eps * second**0.5)

    scale = -lr * second**0.5 / first

    if coupled and not group["row_exponent"]:
        mean, mean_m = mean_over_rows(param, lambda e, m: [e, m], param, m)
        mean_v = group["coupling_scale"] * whole(v)[0].to(mean.dtype)
        apart = torch.zeros_like(mean)
        together = scale * direction(mean_m, mean_v)
    else:
        own = v
        if coupled:
            shared, own = whole(v), state["exp_avg_sq_rows"]
            tiny = torch.finfo(shared.dtype).tiny

        def of_elements(v: Tensor) -> Tensor:
            """Return the second moments of rows, where what is given are those of whole rows."""
            if not coupled:
                return v
            power = (v / shared.mean().clamp(min=tiny)).pow(group["row_exponent"])
            return shared.to(v.dtype) * power * group["coupling_scale"]  # type: ignore[no-any-return]

        def parts(e: Tensor, m: Tensor, v: Tensor) -> list[Tensor]:
            v = of_elements(v)
            return [e, m, v, direction(m, v)]

        mean, mean_m, mean_v, mean_direction = mean_over_rows(param, parts, param, m, own)
        together = scale * direction(mean_m, mean_v)  # as if the rows had one second moment
        apart = scale * mean_direction - together
    before = (mean - apart - together) / (1 - lr * weight_decay)  # μ before the step, which is what decayed
    return Drift(apart, together, -lr * weight_decay * before, mean)


class DriftMonitor:
    """Sums the drift of a parameter over all further steps of its optimizer, in any training loop.

    It reads the state after every ``optimizer.step()``, before a scheduler can change the learning rate. A step in
    which the parameter had no gradient, or that a ``GradScaler`` skips, adds nothing. Nothing is copied from the device
    until you ask for a sum.

    Args:
        optimizer: as for ``coupled_adam.monitor.drift``, with its state or before the first step.
        param: an embedding matrix (V, H) in one of its groups.

    Raises:
        TypeError, ValueError: as for ``coupled_adam.monitor.drift``.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0)
        >>> monitor = DriftMonitor(optimizer, weight)
        >>> for _ in range(3):
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> [round(x, 3) for x in (monitor.total.mean - monitor.total.total).tolist()]  # the mean before the first step
        [0.5, 0.5]
    """

    def __init__(self, optimizer: Optimizer, param: Tensor) -> None:
        self.optimizer, self.param = inner_optimizer(optimizer), param
        _group_of(self.optimizer, param)
        self._sum: Drift | None = None
        self._seen: Any = self._step()
        self._handle = self.optimizer.register_step_post_hook(self._after_step)

    @property
    def total(self) -> Drift:
        """The sum over the steps so far. Before the first step, all ranks that hold rows must read it."""
        if self._sum is None:
            (mean,) = mean_over_rows(self.param, lambda e: [e], self.param.detach())
            zero = torch.zeros_like(mean)
            self._sum = Drift(zero, zero, zero, mean)
        return self._sum

    def remove(self) -> None:
        """Stop watching the optimizer."""
        self._handle.remove()

    def state_dict(self) -> dict[str, list[float]]:
        """Return the sums as plain numbers, for a checkpoint."""
        return {cause: getattr(self.total, cause).tolist() for cause in CAUSES}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Continue from the sums in ``state``, once parameter and optimizer are loaded. All ranks must call it.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ValueError: the sums are those of a matrix with another number of columns.
        """
        if any(len(state.get(cause, ())) != self.param.shape[1] for cause in CAUSES):
            raise ValueError(f"the saved drift is not from a matrix of shape {tuple(self.param.shape)}")
        self._sum = None
        mean = self.total.mean
        second_moments, gradients, decay = (torch.tensor(state[c], dtype=torch.float64).to(mean) for c in CAUSES)
        self._sum = Drift(second_moments, gradients, decay, mean)
        self._seen = self._step()

    def _step(self) -> Any:
        step = self.optimizer.state.get(self.param, {}).get("step", 0)
        return step.clone() if isinstance(step, Tensor) else step

    def _after_step(self, *_: Any) -> None:
        step = self._step()
        if isinstance(step, int):
            return  # no step has reached the parameter yet
        moved = (step != self._seen).to(precision(self.param))
        self._seen = step
        last = drift(self.optimizer, self.param)
        last = Drift(moved * last.second_moments, moved * last.gradients, moved * last.decay, last.mean)
        self._sum = last if self._sum is None else self._sum + last


def _group_of(optimizer: Optimizer, param: Tensor) -> dict[str, Any]:
    """Find the group of ``param``, and check that its steps split."""
    name = type(optimizer).__name__
    group = next((g for g in optimizer.param_groups if any(p is param for p in g["params"])), None)
    if group is None:
        raise ValueError(
            f"the {tuple(param.shape)} parameter is in no group of this {name}; pass the parameter that the "
            "optimizer holds"
        )
    if param.ndim != 2:
        raise ValueError(
            f"drift needs an embedding matrix (vocabulary, hidden), not a parameter of shape {tuple(param.shape)}; "
            "FSDP1 and DeepSpeed ZeRO flatten parameters: use FSDP2"
        )
    if "direction" in group:  # one of ours
        if (group["direction"], group["decay"]) != ("ratio", "decoupled"):
            raise ValueError(f"the step of {name} (atan2, or spectral decay) cannot be split by cause, unlike Adam's")
        if group["center"]:
            raise ValueError(f"{name} centers this matrix in every step (center=True): its mean stays 0")
    elif not isinstance(optimizer, Adam):
        raise TypeError(f"drift does not support {name}; it supports torch.optim.AdamW and Adam, and CoupledAdam")
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
        raise ValueError(
            f"{name} adds weight_decay={group['weight_decay']} to the gradient, so decay is mixed into its moments; "
            "use torch.optim.AdamW, or weight_decay=0"
        )
    return group
