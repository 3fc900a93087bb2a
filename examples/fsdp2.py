"""Train a small language model on any number of devices, its parameters sharded by FSDP2.

    python examples/fsdp2.py                                    # one process
    torchrun --nproc-per-node 4 examples/fsdp2.py               # four processes, on GPUs where there are any
    torchrun --nproc-per-node 4 examples/fsdp2.py --cpu-offload # shards and optimizer step on the CPU
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/fsdp2.py

Whatever the number of processes, the global batch, and so the loss, is the same. With --checkpoint a run goes on where
the last one ended, on another number of processes if need be. Needs torch alone; reads this file, or --text.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from coupled_adam import CoupledAdam, param_groups

VOCABULARY = 256  # bytes


class Transformer(nn.Module):
    """A causal transformer with tied embeddings."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(x))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def batch(data: Tensor, step: int, args: argparse.Namespace, rank: int, processes: int) -> Tensor:
    """This process's sequences of a step, one token longer than the model reads."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(len(data) - args.length - 1, (args.batch,), generator=generator)
    return torch.stack([data[s : s + args.length + 1] for s in starts[rank::processes]])


def mean_shift_ratio(matrix: Tensor) -> float:
    """Length of the mean embedding over the mean length of the embeddings."""
    whole = matrix.full_tensor() if isinstance(matrix, DTensor) else matrix
    return (whole.mean(0).norm() / whole.norm(dim=1).mean()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(__file__), help="a file to train on (default: this one)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=24, help="sequences of a step, over all processes (default: 24)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence (default: 64)")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="directory of the checkpoints, one a subfolder")
    parser.add_argument("--cpu-offload", action="store_true", help="keep shards and optimizer state on the CPU")
    args = parser.parse_args()

    if args.cpu_offload and "RANK" not in os.environ:
        parser.error("--cpu-offload needs processes that FSDP2 shards over: start with torchrun")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % processes:
        parser.error(f"--batch {args.batch} is not a multiple of the {processes} processes")
    data = torch.tensor(list(args.text.read_bytes()))
    if len(data) < args.length + 2:
        parser.error(f"--text {args.text} has {len(data)} bytes; give one of more than --length {args.length} + 1")

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    rank = 0
    if "RANK" in os.environ:
        if device.type != "cpu":
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()  # gloo for the CPU and NCCL for GPUs: offloaded shards need both
        rank = dist.get_rank()

    torch.manual_seed(args.seed)
    model = Transformer(args.width, args.layers, args.length).to(device)
    if processes > 1 or args.cpu_offload:
        mesh = init_device_mesh(device.type, (processes,))
        # Without an accelerator there is no memory to pin.
        policy = CPUOffloadPolicy(pin_memory=device.type != "cpu") if args.cpu_offload else OffloadPolicy()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, offload_policy=policy)
        fully_shard(model, mesh=mesh, offload_policy=policy)
    # The only lines of the optimizer: after the wrapping, and the same with and without it.
    optimizer = CoupledAdam(param_groups(model), lr=args.lr, betas=(0.9, 0.95), max_grad_norm=1.0)
    if args.cpu_offload and rank == 0:
        print(f"shards and their optimizer state are on the {model.head.weight.device.type}", flush=True)

    first = 0
    # The last file of a checkpoint is .metadata: a directory without it was not finished.
    finished = [int(path.parent.name) for path in args.checkpoint.glob("*/.metadata")] if args.checkpoint else []
    if finished:
        first = max(finished)
        content = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        checkpoint.load(content, checkpoint_id=args.checkpoint / str(first))
        set_model_state_dict(model, content["model"])
        set_optimizer_state_dict(model, optimizer, content["optimizer"])

    for step in range(first, args.steps):
        tokens = batch(data, step, args, rank, processes).to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        if (step + 1) % 10 == 0 or step + 1 == args.steps:
            mean = loss.detach() / processes
            if processes > 1:
                dist.all_reduce(mean)
            shift = mean_shift_ratio(model.head.weight.detach())
            if rank == 0:
                print(f"step {step + 1:4d}  loss {mean.item():.5f}  mean shift ratio {shift:.5f}", flush=True)

    if args.checkpoint and args.steps > first:
        content = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        checkpoint.save(content, checkpoint_id=args.checkpoint / str(args.steps))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
