"""Train a small model for some steps, and keep a table of results that an interrupted program goes on with."""

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from tables import write_table
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from coupled_adam import CoupledAdam, param_groups
from coupled_adam.lm.batches import Batches
from coupled_adam.lm.config import Schedule
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.model import LanguageModel
from coupled_adam.lm.schedule import learning_rate
from coupled_adam.optim.typed import MomentDtype

Line = dict[str, str | float]


class Table:
    """A CSV file with one line per result."""

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path, self.keys = path, keys
        self.lines: list[Line] = []
        if path.exists():
            with path.open(newline="") as file:
                self.lines = [{**line} for line in csv.DictReader(file)]

    def line(self, *values: str | float, measure: Callable[[], Line]) -> Line:
        """Return the line whose keys have these values; measure, write and print it if it is not there."""
        wanted = list(map(str, values))
        for line in self.lines:
            if [str(line[key]) for key in self.keys] == wanted:
                return line
        line = {**dict(zip(self.keys, values, strict=True)), **measure()}
        self.lines.append(line)
        write_table(self.path, self.lines)
        print(*line.values(), file=sys.stderr, flush=True)
        return line


def batches_of(corpus: Corpus, split: Literal["train", "validation"], length: int, size: int, seed: int) -> Batches:
    """Batches of ``size`` sequences of a corpus."""
    return Batches(corpus.shards(split), length, size, seed, corpus.vocab_size)


def loss_of(model: LanguageModel, batches: Batches, steps: Sequence[int]) -> float:
    """Mean cross entropy per token on some batches, in nats."""
    with torch.no_grad():
        total = sum(float(model(*batches.batch(i)).cross_entropy) for i in steps)
    return total / (len(steps) * batches.batch_size * batches.sequence_length)


def optimizer_of(
    name: str,
    model: LanguageModel,
    lr: float,
    factor: float,
    weight_decay: float,
    dtype: MomentDtype = None,
) -> Optimizer:
    """``adamw`` or ``coupled_adam``, with the embedding at ``factor`` times the rate; betas (0.9, 0.95).

    ``dtype`` is the form of the first moment of the coupled matrix.
    """
    groups = param_groups(model, weight_decay=weight_decay, lr=lr, embedding_lr_factor=factor)
    if name == "coupled_adam":
        return CoupledAdam(groups, lr=lr, betas=(0.9, 0.95), exp_avg_dtype=dtype)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def train(model: LanguageModel, batches: Batches, optimizer: Optimizer, steps: int, warmup: int) -> None:
    """Train in place, with gradients clipped to a norm of 1; the rate decays to a tenth by half a cosine."""
    shape = Schedule(lr=1.0, min_lr=0.1, warmup_steps=warmup)
    schedule = LambdaLR(optimizer, lambda step: learning_rate(step + 1, shape, steps + 1))
    model.train()
    for step in range(steps):
        inputs, targets = batches.batch(step)
        (model(inputs, targets).total / targets.numel()).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
