"""The learning rate over the steps of a run."""

import math
from collections.abc import Sequence

from coupled_adam.lm.config import Schedule


def learning_rate(step: int, schedule: Schedule, steps: int) -> float:
    """Return the rate of step 0, 1, …: linear warm-up, then half a cosine that would reach min_lr at ``steps``."""
    if step < schedule.warmup_steps:
        return schedule.lr * step / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(steps - schedule.warmup_steps, 1)
    return schedule.min_lr + (schedule.lr - schedule.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate_in_parts(step: int, schedule: Schedule, planned: Sequence[int]) -> float:
    """Return the rate of step 0, 1, … of a run that was trained longer.

    Args:
        step: below the last of ``planned``.
        schedule: of every part.
        planned: the numbers of steps that the run was to have, one after the other, ascending. Each step has the rate
            of a run of the first of these numbers that holds it.

    Examples:
        >>> schedule = Schedule(lr=1.0, min_lr=0.0, warmup_steps=0)
        >>> [round(learning_rate_in_parts(step, schedule, [2, 4]), 2) for step in range(4)]
        [1.0, 0.5, 0.5, 0.15]
    """
    return learning_rate(step, schedule, next(steps for steps in planned if step < steps))
