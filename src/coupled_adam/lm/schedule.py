"""The learning rate over the steps of a run."""

import math

from coupled_adam.lm.config import Schedule


def learning_rate(step: int, schedule: Schedule, steps: int) -> float:
    """Return the rate of step 0, 1, …: linear warm-up, then half a cosine that would reach min_lr at ``steps``."""
    if step < schedule.warmup_steps:
        return schedule.lr * step / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(steps - schedule.warmup_steps, 1)
    return schedule.min_lr + (schedule.lr - schedule.min_lr) * (1 + math.cos(math.pi * progress)) / 2
