"""The change that Coupled Adam is to nanoGPT: ``configure_optimizers``, before and after, on a model of its shape.

    python examples/nanogpt.py     # trains both on this file, and prints how far the mean embedding moved

In nanoGPT's model.py replace ``configure_optimizers`` by the function ``coupled`` below. train.py, which sets the
learning rate of every group, unscales, clips, and steps, stays as it is, unless the embedding is to have another rate
(``param_groups(…, lr=learning_rate, embedding_lr_factor=…)``): then multiply by the group's factor there, as ``train``
does.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coupled_adam import CoupledAdam, describe, param_groups


def before(
    model: nn.Module, weight_decay: float, learning_rate: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """As nanoGPT does it: matrices are decayed, the embedding among them, vectors are not."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


def coupled(model: nn.Module, weight_decay: float, learning_rate: float, betas: tuple[float, float]) -> CoupledAdam:
    """The same with Coupled Adam: the embedding, tied to ``lm_head``, is coupled and not decayed."""
    groups = param_groups(model, weight_decay=weight_decay, coupled=[model.lm_head])
    optimizer = CoupledAdam(groups, lr=learning_rate, betas=betas)
    print(describe(optimizer))
    return optimizer


class GPT(nn.Module):
    """A model with the names of nanoGPT's: wte and lm_head are one matrix."""

    def __init__(self, vocabulary: int = 256, width: int = 32, length: int = 32) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        modules = {"wte": nn.Embedding(vocabulary, width), "wpe": nn.Embedding(length, width), "h": block}
        self.transformer = nn.ModuleDict({**modules, "ln_f": nn.LayerNorm(width)})
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.transformer.ln_f(self.transformer.h(x, src_mask=mask, is_causal=True))
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), targets.flatten())


def train(configure_optimizers, steps: int, learning_rate: float = 1e-3) -> tuple[float, float]:
    """nanoGPT's loop. Returns the last loss and the mean shift ratio of the embedding."""
    torch.manual_seed(0)
    data, model = torch.tensor(list(Path(__file__).read_bytes())), GPT()
    optimizer = configure_optimizers(model, weight_decay=0.1, learning_rate=learning_rate, betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            lr = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = lr * group.get("lr_factor", 1.0)
        starts = torch.randint(len(data) - 33, (16,))
        rows = torch.stack([data[s : s + 33] for s in starts])
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    e = model.lm_head.weight.detach()
    return loss.item(), (e.mean(0).norm() / e.norm(dim=1).mean()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of each of the two trainings (default: 100)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: it must be 1 or more")
    for name, configure in (("AdamW", before), ("Coupled Adam", coupled)):
        loss, shift = train(configure, options.steps)
        print(f"{name}: loss {loss:.3f}, mean shift ratio {shift:.3f}")


if __name__ == "__main__":
    main()
