"""Stochastic rounding to bfloat16, for moments that are kept in two bytes.

A random number below 2^16 is added to the 16 bits that bfloat16 lacks, which are then cut off: up or down with the
probabilities that make it right on average. The dice are a hash of the step and of the element's index: there is no
state to save, and they fall alike on every replica, in every implementation, and after a resume.

The hash is in arithmetic of 32 bits, which processors have vector instructions for. Step and upper half of an index,
which few elements differ in, make a key; key and lower half make the dice.
"""

from typing import Any

import torch
from torch import Tensor


def stochastically_rounded(x: Tensor, step: float | Tensor, first: int = 0) -> Tensor:
    """Round to bfloat16. ``first`` is the index of the first element of ``x`` in the tensor that it is a part of."""
    bits = x.to(torch.float32).contiguous().view(torch.int32) + dice_for(x, step, first).to(torch.int32)
    rounded = (bits & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def dice_for(x: Tensor, step: float | Tensor, first: int = 0) -> Tensor:
    """Throw dice for all elements of a tensor, the first of which has the index ``first``: int64, of the same shape."""
    stop = first + x.numel()
    index = torch.arange(first, stop, device=x.device).view(x.shape)
    high = first >> 32 if first >> 32 == (stop - 1) >> 32 else index >> 32  # one for all, as nearly always
    return dice_of(index & 0xFFFFFFFF, key_of(high, seed_of(step)))  # type: ignore[no-any-return]


def seed_of(step: float | Tensor) -> int | Tensor:
    """Return the step's contribution to the hash, below 2^32."""
    return (step.to(torch.int64) if isinstance(step, Tensor) else int(step)) * 0x85EBCA77 & 0xFFFFFFFF


def key_of(high: Any, seed: Any) -> Any:
    """32 bits from the upper half of an index and from a seed: MurmurHash3's finalizer (Appleby, public domain)."""
    x = high * 0x9E3779B1 & 0xFFFFFFFF  # 64-bit integers do as those of 32 bits
    x ^= seed
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def dice_of(low: Any, key: Any) -> Any:
    """Numbers below 2^16 from the lower half of an index and a key: lowbias32 (Wellons, public domain), cut off."""
    x = low ^ key
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x >> 16
