"""Training speed: our loop against transformers' GPT-2 and against a textbook loop, alternately in one process.

    python benchmarks/train_throughput.py [--rounds 10] [--threads 2] [--only mini|small] [--no-memory]
        [--json FILE]

All three train the same shape on the same tokens with clipping at 1.0. Ours is the model, loss and optimizers of
`coupled-adam train` with Coupled Adam on the embedding; the others take AdamW(fused=True) and clip_grad_norm_.
transformers: GPT2LMHeadModel, without dropout. Textbook: our model, eager, the logits of all positions at once. Figures
are medians of the ratios of neighboring steps, in both orders. Memory is the peak of a process of its own that makes
three steps, less what it held before the first with all libraries loaded, the 70 MiB of numba among them; median of
five, as the allocator's gaps differ from run to run.
"""

import argparse
import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from harness import Step
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import GPT2Config, GPT2LMHeadModel

from coupled_adam.lm.config import Experiment
from coupled_adam.lm.model import build_model
from coupled_adam.lm.optimizers import build_optimizers
from coupled_adam.lm.parallel import World
from coupled_adam.lm.train import backward

LR = 1e-4


@dataclass(frozen=True)
class Shape:
    layers: int
    heads: int
    width: int
    vocabulary: int
    length: int
    batch: int

    def __str__(self) -> str:
        size = f"{self.layers} × {self.width}, V = {self.vocabulary:,}"
        return f"{size}, T = {self.length}, batch {self.batch}"

    @property
    def experiment(self) -> Experiment:
        return Experiment.from_dict(
            {
                "run": {"name": "throughput"},
                "model": {"n_layers": self.layers, "n_heads": self.heads, "hidden_size": self.width},
                "data": {"vocab_size": self.vocabulary, "sequence_length": self.length},
                "optimizer": {"embedding": {"name": "coupled_adam"}},
                "train": {"batch_tokens": self.batch * self.length},
            }
        )

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(
            self.vocabulary, (self.batch, self.length + 1), generator=torch.Generator().manual_seed(0)
        )
        return tokens[:, :-1], tokens[:, 1:]


SHAPES = {"mini": Shape(4, 4, 128, 8_192, 128, 16), "small": Shape(12, 12, 768, 50_304, 256, 2)}
#: Against transformers and against the textbook; at least.
TARGETS = {
    ("mini", "transformers"): 1.25,
    ("mini", "textbook"): 1.1,
    ("small", "transformers"): 1.15,
    ("small", "textbook"): 1.05,
}


def ours(shape: Shape) -> Step:
    experiment, batch = shape.experiment, shape.tokens()
    model = build_model(experiment.model, shape.vocabulary, shape.length, seed=0)
    optimizers = build_optimizers(model, experiment)

    def step() -> None:
        optimizers.zero_grad()
        backward(model, batch, shape.batch, "float32", World())
        optimizers.step(LR)

    return step


def adamw_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        value.item()  # as a loop that shows its loss; ours does

    return step


def textbook(shape: Shape) -> Step:
    tokens, targets = shape.tokens()
    model = build_model(shape.experiment.model, shape.vocabulary, shape.length, seed=0)
    return adamw_step(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()))


def transformers_gpt2(shape: Shape) -> Step:
    tokens, targets = shape.tokens()
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.length,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).train()
    labels = torch.cat([tokens[:, :1], targets[:, :-1]], dim=1)  # the model shifts them itself
    return adamw_step(model, lambda: model(tokens, labels=labels).loss)


SIDES: dict[str, Callable[[Shape], Step]] = {"ours": ours, "transformers": transformers_gpt2, "textbook": textbook}


def speed(name: str, shape: Shape, rounds: int, results: harness.Results) -> None:
    steps = {side: make(shape) for side, make in SIDES.items()}
    for peer in ("transformers", "textbook"):
        size, target = shape.batch * shape.length, TARGETS[name, peer]
        times = harness.in_pairs(steps["ours"], steps[peer], rounds).pairs
        found = harness.Pairs([(size / mine, size / theirs) for mine, theirs in times])
        work = f"{shape}: tokens/s ÷ {peer}"
        results.add(work, found.figures("tokens/s", target=target, at_least=True))
        print(
            f"| {work} | {found.ours:,.0f} | {found.theirs:,.0f} | {found.ratio:.2f} | ≥ {target} |",
            flush=True,
        )


def resident_peak() -> int:
    """Bytes that this process has held at most (Linux)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak(side: str, name: str) -> float:
    """Bytes that three steps take at their peak, in a process of its own."""
    command = [sys.executable, __file__, "--peak", side, "--only", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = harness.parser(__doc__, rounds=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=SHAPES)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.peak:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the parent process
        importlib.import_module("coupled_adam.optim.backends.cpu_kernels")
        before = resident_peak()
        step = SIDES[args.peak](SHAPES[args.only])
        for _ in range(3):
            step()
        print(resident_peak() - before)
        return
    with harness.results(args) as results:
        about = harness.machine("transformers")
        print(
            f"{about['processor']}, {about['cpus']} CPUs, {args.threads} threads; Python {about['python']}, "
            f"torch {about['torch']}, transformers {about['transformers']}\n"
        )
        print("| work | ours | theirs | ratio | target |\n| --- | ---: | ---: | ---: | ---: |", flush=True)
        for name, shape in SHAPES.items():
            if args.only in (None, name):
                speed(name, shape, args.rounds, results)
        if not args.no_memory and args.only in (None, "small"):
            found = harness.Pairs([(peak("ours", "small"), peak("textbook", "small")) for _ in range(5)])
            name = f"{SHAPES['small']}: peak memory ÷ textbook"
            results.add(name, found.figures("bytes", target=0.85))
            sizes = f"{found.ours / 2**20:,.0f} MiB | {found.theirs / 2**20:,.0f} MiB"
            print(f"| {name} | {sizes} | {found.ratio:.2f} | ≤ 0.85 |")


if __name__ == "__main__":
    main()
