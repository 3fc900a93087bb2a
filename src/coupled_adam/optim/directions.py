"""Which way a parameter moves, by the name that a param group carries. A new direction is one entry here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from numpy import float32  # constants of this type keep a compiled kernel in single precision
except ImportError:  # without NumPy there are no kernels
    float32 = float  # type: ignore[assignment, misc]


class Direction(NamedTuple):
    """A function of m̂, √ν̂ and ε, with m̂ of the shape of a parameter and √ν̂ of that shape or (1, H)."""

    tensors: Callable[[Tensor, Tensor, Any], Tensor]
    numbers: Callable[[Any, Any, Any], Any] | None = None
    """The same for a single number, in Python that numba compiles; Triton too, if it is made of operators, conditional
    expressions, ``abs``, ``min`` and ``max``. None: the plain functions take this direction."""
    linear: bool = False
    """Whether it is proportional to m̂: the mean of rows that share √ν̂ then moves as if it were one of them."""


def ratio(m_hat: Any, root: Any, eps: Any) -> Any:
    """m̂ / (√ν̂ + ε), Adam's direction."""
    return m_hat / (root + eps)


def atan2(m_hat: Tensor, root: Tensor, eps: Any) -> Tensor:
    """atan2(m̂, √ν̂), bounded by π/2; ignores ε."""
    return torch.atan2(m_hat, root.expand_as(m_hat))


ZERO, ONE, HALF_PI = float32(0), float32(1), float32(1.5707963267948966)

#: atan(z)/z on [0, 1] as a polynomial in z² with the least relative error, 1e-7; from a weighted least-squares fit.
A0, A1, A2, A3 = float32(0.99999990), float32(-0.33331991), float32(0.19969724), float32(-0.14019481)
A4, A5, A6, A7 = float32(0.09914292), float32(-0.05948638), float32(0.02425239), float32(-0.00469327)


def atan2_of_numbers(m_hat: Any, root: Any, eps: Any) -> Any:
    """atan2(m̂, √ν̂) for √ν̂ ≥ 0, to 3e-7 relative; atan2(0, 0) = 0."""
    size = abs(m_hat)
    steep = size > root
    numerator = root if steep else size
    denominator = size if steep else root
    z = numerator / (ONE if denominator == ZERO else denominator)  # NaN goes on as NaN
    s = z * z
    angle = z * (A0 + s * (A1 + s * (A2 + s * (A3 + s * (A4 + s * (A5 + s * (A6 + s * A7)))))))
    angle = HALF_PI - angle if steep else angle
    return -angle if m_hat < ZERO else angle


DIRECTION: dict[str, Direction] = {
    "ratio": Direction(tensors=ratio, numbers=ratio, linear=True),
    "atan2": Direction(tensors=atan2, numbers=atan2_of_numbers),
}
