"""What a step of ours and of AdamW sends, and how long both take, for models sharded by FSDP2 over processes.

    python benchmarks/distributed_step.py [--ranks 1 2 4] [--rounds 15] [--vocabulary 16384] [--width 256] [--layers 4]
        [--json FILE]

Starts the processes itself (gloo, one thread each) and measures the optimizers' steps alone: AdamW (fused) after
clip_grad_norm_, CoupledAdam and Adams with max_grad_norm; and, on the shards and gradients that a backward pass leaves
under CPUOffloadPolicy, without clipping too. Bytes are those of the tensors that one process hands to collectives in a
step. Times are medians over rounds of ours, theirs, theirs, ours. Processes beyond the number of cores take turns on
them.
"""

import argparse
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import Step
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coupled_adam import Adams, CoupledAdam, param_groups

MAX_NORM = 1.0
COLLECTIVES = ("c10d", "_c10d_functional")


class Sent(TorchDispatchMode):
    """Counts what this process gives to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # taken apart first; its collectives then pass here
        name = function.__name__
        if function.namespace in COLLECTIVES and not any(word in name for word in ("wait", "wrap", "barrier")):
            self.calls[name.split(".")[0].strip("_").replace("all_", "all")] += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tree_leaves(args) if isinstance(x, Tensor))
        return function(*args, **(kwargs or {}))


class Model(nn.Module):
    """Parameters as those of a language model."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocabulary, bias=False)
        blocks = [nn.Linear(width, 4 * width) for _ in range(layers)] + [
            nn.Linear(4 * width, width) for _ in range(layers)
        ]
        self.blocks = nn.ModuleList(blocks)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        half = len(self.blocks) // 2
        for up, down in zip(self.blocks[:half], self.blocks[half:], strict=True):
            x = x + down(up(x))
        return self.head(x)


def prepared(make: Callable[[Any, float | None], Any], setting: "Setting", args: argparse.Namespace) -> Step:
    """A step of an optimizer on a sharded model with gradients."""
    torch.manual_seed(0)
    model = Model(args.vocabulary, args.width, args.layers)
    if setting.ranks > 1:
        policy = CPUOffloadPolicy(pin_memory=False) if setting.offload else OffloadPolicy()
        fully_shard(model, mesh=init_device_mesh("cpu", (setting.ranks,)), offload_policy=policy)
    if setting.offload:
        model(torch.randn(8, args.width)).square().mean().backward()
    else:
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
    bound = MAX_NORM if setting.clip else None
    optimizer = make(param_groups(model), bound)
    clips_itself = any(group.get("max_grad_norm") for group in optimizer.param_groups)

    def step() -> None:
        if bound is not None and not clips_itself:
            clip_grad_norm_(model.parameters(), bound)
        optimizer.step()

    return step


OPTIMIZERS: dict[str, Callable[[Any, float | None], Any]] = {
    "AdamW": lambda groups, _: torch.optim.AdamW(groups, lr=1e-6, fused=True),
    "CoupledAdam": lambda groups, bound: CoupledAdam(groups, lr=1e-6, max_grad_norm=bound),
    "Adams": lambda groups, bound: Adams(groups, lr=1e-6, max_grad_norm=bound),
}


@dataclass(frozen=True)
class Setting:
    """How the model is spread, and what the step does."""

    ranks: int
    offload: bool = False
    clip: bool = True

    def __str__(self) -> str:
        processes = f"{self.ranks} process{'es' if self.ranks > 1 else ''}"
        return processes + (", CPU offload" if self.offload else "") + ("" if self.clip else ", without clipping")


def timed(step: Step) -> float:
    if dist.is_initialized():
        dist.barrier()
    return harness.seconds(step)


def worker(rank: int, setting: Setting, directory: str, args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if setting.ranks > 1:
        store = f"file://{directory}/{setting}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=setting.ranks)
    steps = {name: prepared(make, setting, args) for name, make in OPTIMIZERS.items()}
    sent = {}
    for name, step in steps.items():
        step()  # creates the state
        with Sent() as sent[name]:
            step()
    times = {
        name: harness.in_pairs(step, steps["AdamW"], args.rounds, timed)
        for name, step in steps.items()
        if name != "AdamW"
    }
    if rank == 0:
        peer = sent["AdamW"]
        figures = {
            f"{setting}: {name} ÷ AdamW": pairs.figures()
            | {"collectives": [calls(sent[name]), calls(peer)], "sent": [sent[name].bytes, peer.bytes]}
            for name, pairs in times.items()
        }
        Path(f"{directory}/figures.json").write_text(json.dumps(figures))
        for name, pairs in times.items():
            both = (f"{1e3 * each:.1f} ms" for each in (pairs.ours, pairs.theirs))
            collectives, moved = f"{calls(sent[name])} / {calls(peer)}", f"{sent[name].bytes:,} / {peer.bytes:,}"
            print(
                f"| {setting}: {name} ÷ AdamW | {' | '.join(both)} | {pairs.ratio:.2f} | {collectives} | {moved} |",
                flush=True,
            )
    if setting.ranks > 1:
        dist.destroy_process_group()


def calls(sent: Sent) -> str:
    return ", ".join(f"{n} {name}" for name, n in sent.calls.items()) or "nothing"


def main() -> None:
    parser = harness.parser(__doc__, rounds=15)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    settings = [Setting(ranks) for ranks in args.ranks]
    settings += [Setting(max(2, min(args.ranks)), offload=True, clip=clip) for clip in (False, True)]
    print("| work | ours | AdamW | ratio | collectives per step | bytes sent per process |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as directory, harness.results(args) as results:
        for setting in settings:
            mp.spawn(worker, (setting, directory, args), nprocs=setting.ranks)
            for name, figures in json.loads(Path(f"{directory}/figures.json").read_text()).items():
                results.add(name, figures)


if __name__ == "__main__":
    main()
