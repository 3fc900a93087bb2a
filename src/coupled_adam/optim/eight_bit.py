"""First moments in one byte a number: a code of eight bits, and a scale for every 256 numbers of a row.

A block is up to 256 neighboring numbers of one row; the last of a row may be shorter, and none crosses into the next,
so that a shard of rows has whole blocks. Its scale is the largest magnitude in it. A number x of the block becomes
the code ±n of one of the magnitudes, numbered n = 0…127 from small to large,

    0  and  10^(i−6) · (0.1 + 0.9·k/2^i),   i = 0…6,  k = 1…2^i,

times the scale: half of them between 0.1 and 1, a quarter in the decade below, and so on down to a millionth. This is
the dynamic map of Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, but with the ends
of its intervals for values, not their middles: −1 has a code as 1 has, and the number that gives the scale is kept.

Between neighboring magnitudes the dice of rounding.py decide: up or down with the probabilities that make it right on
average. Rounded to the nearest, a moving average sticks where its steps are smaller than half the distance.

The number of y = |x| / scale is piecewise linear and concave, hence the least of several lines, and the magnitude of n
the greatest of their inverses. Arithmetic is in float32, each operation rounded by itself, so that codes and scales are
the same to the bit wherever they are computed from the same moments. A block whose scale would be below the smallest
normal number has scale and codes 0, as processors may take such numbers for 0 or not. One with a number that is not
finite has the scale NaN and codes 0, and reads as NaN.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from coupled_adam.optim.rounding import dice_for

try:
    from numpy import float32  # constants of this type keep a compiled kernel in single precision
except ImportError:  # without NumPy there are no kernels
    float32 = float  # type: ignore[assignment, misc]

#: Numbers of a row that share a scale.
BLOCK = 256

#: The lines n = A·y + B. B6 is what makes n = 127 of y = 1 exactly.
A0, A1, A2, A3 = float32(1e6), float32(2e6 / 9), float32(4e5 / 9), float32(8e4 / 9)
A4, A5, A6 = float32(16e3 / 9), float32(32e2 / 9), float32(640 / 9)
B1, B2, B3, B4, B5, B6 = (float32(x) for x in (7 / 9, 23 / 9, 55 / 9, 119 / 9, 247 / 9, 127 - float(A6)))

#: Their inverses y = C·n + D. D6 is what makes y = 1 of n = 127 exactly.
C0, C1, C2, C3 = float32(1e-6), float32(4.5e-6), float32(2.25e-5), float32(1.125e-4)
C4, C5, C6 = float32(5.625e-4), float32(2.8125e-3), float32(1.40625e-2)
D1, D2, D3, D4, D5 = (float32(x) for x in (-3.5e-6, -5.75e-5, -6.875e-4, -7.4375e-3, -7.71875e-2))
D6 = float32(1 - float(float32(127 * C6)))


#: The lines of the functions below, as Python's numbers: slope and intercept.
LINES = [(float(a), float(b)) for a, b in ((A0, 0), (A1, B1), (A2, B2), (A3, B3), (A4, B4), (A5, B5), (A6, B6))]
INVERSES = [(float(c), float(d)) for c, d in ((C0, 0), (C1, D1), (C2, D2), (C3, D3), (C4, D4), (C5, D5), (C6, D6))]

#: The smallest normal number of float32.
SMALLEST = float32(2.0**-126)
#: Dice fall on numbers below 2^16.
PER_FACE = float32(2.0**-16)


def number_of(y: Any) -> Any:
    """Return n of y = |x| / scale: 0…127, not rounded."""
    low = min(min(A0 * y, A1 * y + B1), min(A2 * y + B2, A3 * y + B3))
    return min(min(low, A4 * y + B4), min(A5 * y + B5, A6 * y + B6))


def magnitude_of(n: Any) -> Any:
    """Return |x| / scale of a number n."""
    low = max(max(C0 * n, C1 * n + D1), max(C2 * n + D2, C3 * n + D3))
    return max(max(low, C4 * n + D4), max(C5 * n + D5, C6 * n + D6))


class EightBit(NamedTuple):
    """A first moment of shape (R, H)."""

    codes: Tensor
    """±n, (R, H), int8."""
    scales: Tensor
    """(R, ⌈H / BLOCK⌉), float32: those of the blocks of every row."""

    @property
    def shape(self) -> torch.Size:
        """That of the moment."""
        return self.codes.shape


#: A first moment, in whatever form.
Moment = Tensor | EightBit


def blocks_of(columns: int) -> int:
    """Return the number of blocks of a row."""
    return -(-columns // BLOCK)


def widened(moment: EightBit) -> Tensor:
    """Return the numbers that codes and scales stand for, (R, H), float32."""
    codes = moment.codes.to(torch.float32)
    return codes.sign() * _chosen(torch.maximum, codes.abs(), INVERSES) * _spread(moment.scales, codes.shape[1])


def quantized(x: Tensor, step: float | Tensor, first: int = 0) -> EightBit:
    """Round a matrix to eight bits.

    Args:
        x: (R, H), of any floating dtype.
        step: throws the dice.
        first: the index of the first element of ``x`` in the matrix that it is a part of.
    """
    x = x.to(torch.float32)
    columns, blocks = x.shape[1], blocks_of(x.shape[1])
    padded = torch.nn.functional.pad(x.abs(), (0, blocks * BLOCK - columns))
    scales = padded.view(len(x), blocks, BLOCK).amax(-1)
    scales = scales.masked_fill(scales < float(SMALLEST), 0).masked_fill(scales == torch.inf, torch.nan)
    scale = _spread(scales, columns)
    dead = (scale > 0).logical_not()
    x = x.masked_fill(dead, 0)
    n = _chosen(torch.minimum, x.abs() / scale.masked_fill(dead, 1), LINES)
    n = (n + dice_for(x, step, first).to(torch.float32) * float(PER_FACE)).floor()
    return EightBit((x.sign() * n).to(torch.int8), scales)


def _chosen(choose: Any, x: Tensor, lines: list[tuple[float, float]]) -> Tensor:
    """Return the least or the greatest of lines at ``x``: ``number_of`` and ``magnitude_of`` for tensors."""
    found = lines[0][0] * x
    for slope, intercept in lines[1:]:
        found = choose(found, slope * x + intercept)
    return found


def _spread(scales: Tensor, columns: int) -> Tensor:
    """Give every number of a row its scale."""
    return scales.repeat_interleave(BLOCK, 1)[:, :columns]
