"""How much a method's loss depends on the learning rate."""

import math
from collections.abc import Sequence

__all__ = ["lr_sensitivity"]


def lr_sensitivity(losses: Sequence[float | None], initial_loss: float) -> float:
    """Compute the learning-rate sensitivity (LRS) of a method from its losses over a grid of learning rates.

    It is Σ_k [min(ℓ_k, ℓ_0) − min_k ℓ_k] / (n − 1). It says nothing about how low the loss is, and depends on the grid:
    compare methods over the same grid, and together with their best losses.

    Args:
        losses: final losses in nats per token, one per learning rate, in any order. NaN, infinity or None for a run
            that diverged, which counts as ``initial_loss``, as does a higher loss.
        initial_loss: ℓ_0, the loss before the first step, in nats per token.

    Returns:
        Nats per token, 0 or above; 0 if the loss is the same at every rate.

    Raises:
        ValueError: fewer than two losses, or an initial loss that is not finite.

    Source: the tables of "Output Embedding Centering", arXiv 2601.02031. Wortsman et al., arXiv 2309.14322, who
    introduced the metric, divide by n instead of n − 1: with seven rates, these values are 7/6 of theirs.

    Examples:
        >>> lr_sensitivity([3.0, 3.25, None], initial_loss=10.0)
        3.625
    """
    if len(losses) < 2:
        raise ValueError(f"{len(losses)} loss(es): a sensitivity needs the losses at two or more learning rates")
    if not math.isfinite(initial_loss):
        raise ValueError(f"initial_loss {initial_loss} is not finite")
    bounded = [counted(loss, initial_loss) for loss in losses]
    return math.fsum(loss - min(bounded) for loss in bounded) / (len(bounded) - 1)


def counted(loss: float | None, initial_loss: float) -> float:
    """Return the loss that a run counts with: its own, or ``initial_loss`` if that is lower or the run diverged."""
    return initial_loss if loss is None or not math.isfinite(loss) else min(loss, initial_loss)
