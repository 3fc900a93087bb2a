"""Loss on held-out text."""

import torch

from coupled_adam.lm.batches import Batches
from coupled_adam.lm.model import LanguageModel


@torch.no_grad()
def validation_loss(model: LanguageModel, batches: Batches, count: int) -> float:
    """Mean cross entropy per token, in nats, over ``count`` batches, or one pass over the data if that is less."""
    total, tokens = 0.0, 0
    for step in range(min(count, max(len(batches) // batches.batch_size, 1))):
        inputs, targets = batches.batch(step)
        total += model(inputs, targets).item()
        tokens += targets.numel()
    return total / tokens
