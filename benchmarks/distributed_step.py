"""What a step of ours and of AdamW sends, and how long both take, for models sharded by FSDP2 over processes.

    python benchmarks/distributed_step.py [--ranks 1 2 4] [--rounds 15] [--vocabulary 16384] [--width 256] [--layers 4]
        [--json FILE]

Starts the processes itself (gloo, one thread each) and measures the optimizers' steps alone, clipping included: AdamW
with clip_grad_norm_, CoupledAdam and Adams with max_grad_norm. Bytes are those of the tensors that one process hands to
collectives in a step. Times are medians over rounds of ours, theirs, theirs, ours. Processes beyond the number of cores
take turns on them.
"""

import argparse
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
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
    """The parameters of a language model: they need no forward pass here."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocabulary, bias=False)
        blocks = [nn.Linear(width, 4 * width) for _ in range(layers)] + [
            nn.Linear(4 * width, width) for _ in range(layers)
        ]
        self.blocks = nn.ModuleList(blocks)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def prepared(make: Callable[[Any], Any], ranks: int, args: argparse.Namespace) -> Callable[[], None]:
    """A step of an optimizer on a sharded model with gradients."""
    torch.manual_seed(0)
    model = Model(args.vocabulary, args.width, args.layers)
    if ranks > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    optimizer = make(param_groups(model))
    bound = any(group.get("max_grad_norm") for group in optimizer.param_groups)

    def step() -> None:
        if not bound:
            clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    return step


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-6, fused=True),
    "CoupledAdam": lambda groups: CoupledAdam(groups, lr=1e-6, max_grad_norm=MAX_NORM),
    "Adams": lambda groups: Adams(groups, lr=1e-6, max_grad_norm=MAX_NORM),
}


def timed(step: Callable[[], None]) -> float:
    if dist.is_initialized():
        dist.barrier()
    return harness.seconds(step)


def worker(rank: int, ranks: int, directory: str, args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/{ranks}", rank=rank, world_size=ranks)
    steps = {name: prepared(make, ranks, args) for name, make in OPTIMIZERS.items()}
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
        figures = {name: pairs.figures() | {"bytes": sent[name].bytes} for name, pairs in times.items()}
        Path(f"{directory}/{ranks}.json").write_text(json.dumps(figures))
        peer = sent["AdamW"]
        print(f"| {ranks} | AdamW | {calls(peer)} | {peer.bytes:,} | {adamw_time(times):.1f} ms | |", flush=True)
        for name, pairs in times.items():
            ratio, ours = pairs.ratio, 1e3 * pairs.ours
            print(
                f"| {ranks} | {name} | {calls(sent[name])} | {sent[name].bytes:,} | {ours:.1f} ms | {ratio:.2f} |",
                flush=True,
            )
    if ranks > 1:
        dist.destroy_process_group()


def calls(sent: Sent) -> str:
    return ", ".join(f"{n} {name}" for name, n in sent.calls.items()) or "nothing"


def adamw_time(times: dict[str, harness.Pairs]) -> float:
    return 1e3 * harness.Pairs([pair for pairs in times.values() for pair in pairs.pairs]).theirs


def main() -> None:
    parser = harness.parser(__doc__, rounds=15)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    print("| processes | optimizer | collectives per step | bytes sent per process | step | ÷ AdamW |")
    print("| ---: | --- | --- | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as directory, harness.results(args) as results:
        for ranks in args.ranks:
            mp.spawn(worker, (ranks, directory, args), nprocs=ranks)
            results.add(f"{ranks} processes", json.loads(Path(f"{directory}/{ranks}.json").read_text()))


if __name__ == "__main__":
    main()
