"""What every integration tells at the start of a run: what is coupled, and who clips."""

import torch
from torch.optim.optimizer import Optimizer

from coupled_adam import progress
from coupled_adam.optim import describe


def announce(optimizer: Optimizer, clipping: str) -> None:
    """Log ``describe(optimizer)``, and below it what the trainer clips, in the first process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()):
        for line in (*describe(optimizer).splitlines(), f"  clipping by {clipping}"):
            progress.say(line)
