"""The ranks of a run: which one this process is, how they share the model, and what they tell each other."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from coupled_adam.errors import InputError
from coupled_adam.lm.config import Parallel
from coupled_adam.lm.model import LanguageModel

T = TypeVar("T")

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """The processes that torchrun started, or a single one."""

    rank: int = 0
    """Rank of this process, 0 to ``size`` − 1."""
    size: int = 1
    """Number of ranks."""
    local_size: int = 1
    """Ranks on this machine."""
    device: torch.device = CPU
    """Where this process computes."""

    @property
    def is_main_process(self) -> bool:
        """Whether this process, rank 0, writes files and logs for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """Collect a picklable value from every rank, by rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def broadcast_from_main(self, function: Callable[[], T]) -> T:
        """Call ``function`` on rank 0 only; broadcast its result, or its InputError, to all ranks."""
        if self.size == 1:
            return function()
        outcome: list[T | InputError | None] = [None]
        if self.is_main_process:
            try:
                outcome = [function()]
            except InputError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], InputError):
            raise outcome[0]
        return outcome[0]  # type: ignore[return-value]


@contextmanager
def init_distributed() -> Iterator[World]:
    """Yield the world of this process; set up communication, and take it down, where torchrun started it."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator or CPU
    if "RANK" not in os.environ:
        yield World(device=device)
        return
    if accelerator is not None:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    try:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        yield World(dist.get_rank(), dist.get_world_size(), local_size, device)
    finally:
        dist.destroy_process_group()


def parallelize(model: LanguageModel, config: Parallel, world: World) -> nn.Module:
    """Replicate or shard ``model`` over the ranks. Returns the module to call instead of it.

    FSDP2 shards the parameters of ``model`` in place; build the optimizer afterwards.

    Raises:
        InputError: ``parallel.shard_size`` does not divide the number of ranks.
    """
    if world.size == 1:
        return model
    if config.strategy == "ddp":
        return DistributedDataParallel(model)
    shape, names = (world.size,), ("shard",)
    if config.strategy == "hsdp":
        size = config.shard_size or world.local_size
        if world.size % size:
            raise InputError(f"parallel.shard_size {size} does not divide the {world.size} ranks")
        shape, names = (world.size // size, size), ("replicate", "shard")  # type: ignore[assignment]
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def no_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Skip gradient synchronization in backward passes inside the block if ``enabled`` (for accumulation)."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not enabled)
        yield
    elif isinstance(model, DistributedDataParallel) and enabled:
        with model.no_sync():
            yield
    else:
        yield
