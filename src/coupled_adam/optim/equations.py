"""The equations of one element, written with operators alone: stated here and nowhere else.

``backends/plain.py`` applies them to tensors; numba and Triton compile them for one number at a time. ``x += …``
changes a tensor in place and gives a number its new value, so callers use what is returned. ``Coefficients`` is the
only place where bias corrections and the coupling scale are folded in.

Notation: θ parameter, g gradient, m and v first and second moment, η learning rate, λ weight decay, t step.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

Number = float | Tensor


def readable(x: Tensor) -> bool:
    """Return whether reading a number of ``x`` is free: it lies on the CPU, and is neither traced nor fake."""
    return not is_compiling() and x.device.type == "cpu" and type(x) in (Tensor, Parameter)


def has_numbers(x: Tensor) -> bool:
    """Return whether there are numbers in ``x`` at all; neither in a fake tensor nor on the meta device."""
    return x.device.type != "meta" and type(x) in (Tensor, Parameter)


def working_dtype(param: Tensor) -> torch.dtype:
    """Return float32, or float64 for a float64 parameter. A moving average in bfloat16 stalls: its steps round to 0."""
    return torch.promote_types(param.dtype, torch.float32)


def beside(number: Number, x: Tensor) -> Number:
    """Move a number to the device of ``x``."""
    return number.to(x.device) if isinstance(number, Tensor) else number


def times_square(total: Tensor, factor: Number) -> Tensor:
    """Return f²·total; where f is known to be ±1, without an operation."""
    return total if isinstance(factor, float) and abs(factor) == 1 else total * (factor * factor)


def first_moment(m: Any, g: Any, grad_factor: Any, rate: Any) -> Any:
    """m ← β1·m + (1 − β1)·f·g, with ``rate`` = 1 − β1 and f = ``grad_factor``."""
    m += rate * (grad_factor * g - m)
    return m


def squared(g: Any, m: Any, grad_factor: Any, coupling_factor: Any) -> Any:
    """(f·g)² + κ·m², what a step adds to the second moment."""
    return grad_factor * g * (grad_factor * g) + coupling_factor * (m * m)


def second_moment(v: Any, square: Any, rate: Any) -> Any:
    """v ← β2·v + (1 − β2)·square, with ``rate`` = 1 − β2."""
    v += rate * (square - v)
    return v


def moved(theta: Any, shrink: Any, decay: Any, lr: Any, direction: Any) -> Any:
    """θ ← θ − η·λ·shrink − η·direction, with ``decay`` = η·λ; ``shrink`` is θ, or √M·σ·uvᵀ. Uses ``direction`` up."""
    direction *= lr
    direction += decay * shrink
    theta -= direction  # one rounding of θ
    return theta


def centered(theta: Any, mean: Any) -> Any:
    """θ ← θ − mean, with the ``mean`` of the moved rows."""
    theta -= mean
    return theta


class Coefficients(NamedTuple):
    """What the hyperparameters of a group come to at a step. A kernel that has one number type takes all of them in it.

    On accelerators, and while a compiler traces, any of them may be a tensor of one element.
    """

    grad_factor: Number
    """f multiplies the gradient: the clip coefficient, negative to maximize."""
    first_rate: Number
    """1 − β1."""
    second_rate: Number
    """1 − β2."""
    coupling_factor: Number
    """κ."""
    first_scale: Number
    """1/(1 − β1^t): m̂ = first_scale·m."""
    root_scale: Number
    """√(s/(1 − β2^t)): √ν̂ = root_scale·√v."""
    eps: Number
    lr: Number
    """η."""
    decay: Number
    """η·λ."""

    @classmethod
    def of(
        cls, group: Mapping[str, Any], step: Number, grad_factor: Number = 1.0, weight_decay: float | None = None
    ) -> "Coefficients":
        """Fold the hyperparameters of a group at ``step``, which counts from 1; ``weight_decay`` instead of its own."""
        lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        decay = group["weight_decay"] if weight_decay is None else weight_decay
        beta1, beta2 = group["betas"]
        scale = group["coupling_scale"] if group["second_moment"] == "vocabulary" else 1.0
        return cls(
            grad_factor=grad_factor,
            first_rate=1 - beta1,
            second_rate=1 - beta2,
            coupling_factor=group["coupling_factor"],
            first_scale=(1 - beta1**step) ** -1,  # of tensors each operator is a launch, and a quotient two
            root_scale=((1 - beta2**step) / scale) ** -0.5,
            eps=group["eps"],
            lr=lr,
            # Known to be 0 whatever device lr lies on.
            decay=0.0 if not isinstance(decay, Tensor) and decay == 0 else lr * decay,
        )

    def halted(self, found_inf: Tensor) -> "Coefficients":
        """Return coefficients with which nothing changes where ``found_inf`` is 1, and these where it is 0.

        The gradient must be finite; ε is, so that no direction is 0/0.
        """
        live = 1 - found_inf
        return self._replace(
            first_rate=self.first_rate * live,
            second_rate=self.second_rate * live,
            eps=self.eps + found_inf,
            lr=self.lr * live,
            decay=self.decay * live,
        )
