"""Measure how far a first moment in eight bits is from one in float64, by β1, into a CSV file.

    python tools/eight_bit_error.py --out docs/results/eight-bit-error.csv

The gradients of a 64 × 256 matrix are drawn from a normal distribution; after 20/(1 − β1) steps the error no longer
grows. One line per β1 and seed: the root mean square of the error over that of the moment. Takes seconds.
"""

import argparse
from pathlib import Path

import torch
from tables import write_table

from coupled_adam import CoupledAdam

BETAS, SEEDS = (0.9, 0.95, 0.99), (1, 2, 3)


def error(beta1: float, seed: int) -> float:
    """Relative error of the first moment after its last step."""
    torch.manual_seed(seed)
    weight = torch.nn.Parameter(torch.zeros(64, 256))
    group = {"params": [weight], "second_moment": "vocabulary"}
    optimizer = CoupledAdam([group], lr=1e-3, betas=(beta1, 0.95), exp_avg_dtype="8bit")
    exact = torch.zeros(weight.shape, dtype=torch.float64)
    for _ in range(round(20 / (1 - beta1))):
        weight.grad = torch.randn(weight.shape)
        exact = beta1 * exact + (1 - beta1) * weight.grad.double()
        optimizer.step()
    return float((optimizer.first_moment(weight).double() - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    out = parser.parse_args().out
    lines = [{"beta1": beta1, "seed": seed, "error": error(beta1, seed)} for beta1 in BETAS for seed in SEEDS]
    write_table(out, lines)


if __name__ == "__main__":
    main()
