"""What the processes of test_safety.py run."""

import copy
import math
from typing import Any

import jobs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from coupled_adam import CoupledAdam, adamw_state_dict
from coupled_adam.optim.reductions import local, whole


def peeked(optimizer: str, wrapping: str, peek: bool) -> dict[str, Tensor]:
    """Train, after the state was asked for or not."""
    model, opt, rank, ranks = jobs.trainer(optimizer, wrapping)
    if peek:
        before = [p.detach().clone() for p in model.parameters()]
        get_optimizer_state_dict(model, opt)
        assert all(torch.equal(local(a), local(b)) for a, b in zip(before, model.parameters(), strict=True))
        assert all(state["step"] == 0 for state in opt.state.values())
    for i in range(3):
        jobs.one_step(model, opt, jobs.batch(i, rank, ranks))
    return jobs.whole(model)


def tables(rows: int = 7, seed: int = 0) -> tuple[nn.Parameter, nn.Parameter]:
    """A table and a matrix, spread by rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = []
    for shape in ((rows, 5), (6, 5)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        made.append(nn.Parameter(distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)))
    return made[0], made[1]


def coupled(table: Tensor, matrix: Tensor, **options: Any) -> CoupledAdam:
    groups = [{"params": [("table", table)], "second_moment": "vocabulary"}, {"params": [("matrix", matrix)]}]
    return CoupledAdam(groups, lr=1e-2, **options)


def step(optimizer: CoupledAdam, seed: int) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            x = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            p.grad = distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
    optimizer.step()


def first_step_at_0() -> list[float]:
    """A first step at a learning rate of 0 in which only the last process has gradients other than 0: the counts."""
    table, matrix = tables()
    optimizer = coupled(table, matrix, max_grad_norm=1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    last = dist.get_rank() == dist.get_world_size() - 1
    for p in (table, matrix):
        p.grad = torch.zeros_like(p)
        local(p.grad).fill_(float(last))
    optimizer.step()
    return [optimizer.state[p]["step"].item() for p in (table, matrix)]


def one_infinity(which: str) -> str:
    """An infinite gradient in the first process: what is raised here."""
    table, matrix = tables()
    optimizer = coupled(table, matrix, error_if_nonfinite=True)
    step(optimizer, 1)
    before = [local(x).clone() for p in (table, matrix) for x in (p, *optimizer.state[p].values())]
    if dist.get_rank() == 0:
        local(table.grad if which == "table" else matrix.grad)[0, 0] = math.inf
    try:
        optimizer.step()
    except RuntimeError as error:
        after = [local(x) for p in (table, matrix) for x in (p, *optimizer.state[p].values())]
        assert all(map(torch.equal, before, after))
        return str(error)
    return ""


def back_to_adamw(exp_avg_dtype: Any) -> list[Tensor]:
    """Three steps of Coupled Adam, then three of AdamW from its state."""
    table, matrix = tables()
    optimizer = coupled(table, matrix, exp_avg_dtype=exp_avg_dtype)
    for i in range(3):
        step(optimizer, i)
    adamw = torch.optim.AdamW([matrix, table], lr=1e-2)
    adamw.load_state_dict(adamw_state_dict(optimizer, adamw))
    for i in range(3, 6):
        step(adamw, i)
    return [whole(p).detach().clone() for p in (table, matrix)]


def resized(rows: int) -> list[Tensor]:
    """The moments of a table of 7 rows, loaded for one of ``rows``."""
    table, matrix = tables()
    optimizer = coupled(table, matrix)
    for i in range(3):
        step(optimizer, i)
    other, _ = tables(rows)
    resumed = coupled(other, matrix)
    resumed.load_state_dict(optimizer.state_dict(), resize_vocabulary=True)
    step(resumed, 3)
    return [whole(resumed.state[other][key]).clone() for key in ("exp_avg", "exp_avg_sq")]


def copied_zero() -> bool:
    """Whether a copy of a spread Adams_ZeRO trains on as the original."""
    model, optimizer, rank, ranks = jobs.trainer("clipped adams", "zero")
    for i in range(2):
        jobs.one_step(model, optimizer, jobs.batch(i, rank, ranks))
    other_model, other = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other_model, other)):
        for i in range(2, 4):
            jobs.one_step(m, o, jobs.batch(i, rank, ranks))
    return all(map(torch.equal, model.parameters(), other_model.parameters()))
