"""Real processes: a sharded vocabulary gives the result of one process."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from coupled_adam import CoupledAdam, param_groups

V, H, STEPS, RANKS = 7, 4, 20, 3


def model_and_optimizer(shard: bool) -> tuple[nn.Module, CoupledAdam]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V, bias=False))
    if shard:
        fully_shard(model)
    optimizer = CoupledAdam(param_groups(model, coupled=[model[2]]), lr=1e-2, coupling_factor=0.1)
    return model, optimizer


def train(model: nn.Module, optimizer: CoupledAdam) -> list[torch.Tensor]:
    """Every process sees the same batch, so that the mean gradient is that of one process."""
    for step in range(STEPS):
        tokens = torch.randint(V, (16,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens.roll(1)).backward()
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    model, optimizer = model_and_optimizer(shard=True)
    parameters = train(model, optimizer)
    second_moment = optimizer.state[model[2].weight]["exp_avg_sq"]
    assert second_moment.shape == (1, H)
    torch.save([p.detach() for p in parameters], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_a_vocabulary_sharded_unevenly_gives_the_result_of_one_process(tmp_path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=RANKS)
    expected = train(*model_and_optimizer(shard=False))
    for rank in range(RANKS):
        for found, parameter in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, parameter, rtol=0, atol=1e-6)
