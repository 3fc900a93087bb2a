"""Measure why the mean embedding of a toy model moves, and write the shares of each cause into a CSV file.

    python tools/toy_drift.py --out docs/results/toy-drift.csv

The model predicts the next token from the last one alone: a tied embedding of 97 tokens and width 16, and one layer
beside a residual connection. Tokens are drawn by Zipf's law, independently of each other; 300 steps of 64 tokens with
AdamW at 1e-2, betas (0.9, 0.95), without weight decay. One line per seed. Takes seconds.
"""

import argparse
from pathlib import Path

import torch
from tables import write_table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from coupled_adam.geometry import norm_of_mean
from coupled_adam.monitor import DriftMonitor

TOKENS, WIDTH, STEPS, BATCH, SEEDS = 97, 16, 300, 64, range(1, 11)


def shares(seed: int) -> dict[str, float]:
    """Train one model; return ‖μ‖, and each cause as a share of it."""
    torch.manual_seed(seed)
    embedding = nn.Embedding(TOKENS, WIDTH)
    nn.init.normal_(embedding.weight, std=0.02)
    inner = nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.AdamW(
        [*embedding.parameters(), *inner.parameters()], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0
    )
    monitor = DriftMonitor(optimizer, embedding.weight)
    zipf = 1 / torch.arange(1, TOKENS + 1)

    def loss() -> Tensor:
        last, following = torch.multinomial(zipf, 2 * BATCH, replacement=True).view(2, BATCH)
        read = embedding(last)
        return cross_entropy((read + inner(read).tanh()) @ embedding.weight.T, following)

    for _ in range(STEPS):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"norm_of_mean": norm_of_mean(embedding.weight.detach()), **monitor.total.shares()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    lines = [{"seed": seed, **shares(seed)} for seed in SEEDS]
    write_table(out, lines)


if __name__ == "__main__":
    main()
