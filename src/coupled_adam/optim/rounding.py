"""Stochastic rounding to bfloat16, for moments that are kept in two bytes.

A random number below 2^16 is added to the 16 bits that bfloat16 lacks, which are then cut off: up or down with the
probabilities that make it right on average. The dice are a hash of the step and of the element's index: there is no
state to save, and they fall alike on every replica, in every implementation, and after a resume.
"""

from typing import Any

import torch
from torch import Tensor


def stochastically_rounded(x: Tensor, step: float | Tensor, first: int = 0) -> Tensor:
    """Round to bfloat16. ``first`` is the index of the first element of ``x`` in the tensor that it is a part of."""
    index = torch.arange(first, first + x.numel(), device=x.device).view(x.shape)
    dice = dice_of(index, seed_of(step))
    bits = x.to(torch.float32).contiguous().view(torch.int32) + dice.to(torch.int32)
    rounded = (bits & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def seed_of(step: float | Tensor) -> int | Tensor:
    """Return the step's contribution to the hash, below 2^32."""
    return (step.to(torch.int64) if isinstance(step, Tensor) else int(step)) * 0x85EBCA77 & 0xFFFFFFFF


def dice_of(index: Any, seed: Any) -> Any:
    """Numbers below 2^16 from integers: the finalizer of MurmurHash3 (Appleby, public domain). Uses ``index`` up."""
    x = index
    x *= 0x9E3779B1
    x += seed
    x &= 0xFFFFFFFF  # 64-bit integers do as those of 32 bits
    x ^= x >> 16
    x *= 0x85EBCA6B
    x &= 0xFFFFFFFF
    x ^= x >> 13
    x *= 0xC2B2AE35
    x &= 0xFFFFFFFF
    x ^= x >> 16
    x &= 0xFFFF
    return x
