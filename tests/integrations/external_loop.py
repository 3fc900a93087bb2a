"""The loop that the tests with other people's models share."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

STEPS, ROWS = 4, 97


def train(model: nn.Module, optimizer: Any, steps: range, rank: int = 0, ranks: int = 1) -> nn.Module:
    """Train on made-up tokens, this process on its part of them, clipped as the trainers do it."""
    for step in steps:
        tokens = torch.randint(ROWS, (4, 9), generator=torch.Generator().manual_seed(step))
        tokens = tokens[rank * 4 // ranks : (rank + 1) * 4 // ranks]
        optimizer.zero_grad()
        logits = model(tokens[:, :-1]).float()
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    tensors = ((name, p.detach()) for name, p in model.named_parameters())
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in tensors}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name], x, rtol=10 * tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
