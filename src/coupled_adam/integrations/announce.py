"""What every integration tells at the start of a run: what is coupled, and who clips."""

import torch
from torch.optim.optimizer import Optimizer

from coupled_adam import progress
from coupled_adam.optim import describe


def announce(optimizer: Optimizer, trainer: str, bound: float | None) -> None:
    """Log ``describe(optimizer)`` and what the trainer clips to, in the first process.

    Args:
        bound: of the global norm; None or 0 if the trainer does not clip.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()):
        clipping = f"to a global norm of {bound:g}" if bound else "none"
        progress.say(f"{describe(optimizer)}\n  clipping by {trainer}: {clipping}")
