"""The movement of the mean by cause: the parts add up to it, and each vanishes where its cause does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from coupled_adam import Adams, CoupledAdam, param_groups
from coupled_adam.monitor import Drift, DriftMonitor, drift

VOCABULARY, WIDTH = 61, 6


class Model(nn.Module):
    """The last token predicts the next: the smallest model with both embeddings."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def loss(self, z_loss: float = 0.0) -> Tensor:
        # Frequent tokens and rare ones, as in text.
        tokens = (VOCABULARY ** torch.rand(2, 32)).long().clamp(max=VOCABULARY - 1)
        logits = self.head(self.embedding(tokens[0]) + self.inner(self.embedding(tokens[0])).tanh())
        return nn.functional.cross_entropy(logits, tokens[1]) + z_loss * logits.logsumexp(-1).square().mean()


def adamw(**options: Any) -> Callable[[Model], Optimizer]:
    return lambda model: AdamW(model.parameters(), lr=0.02, betas=(0.8, 0.9), weight_decay=0.3, **options)


def coupled(**options: Any) -> Callable[[Model], Optimizer]:
    def make(model: Model) -> Optimizer:
        groups = param_groups(model)
        groups[0]["weight_decay"] = 0.3
        return CoupledAdam(groups, lr=0.02, betas=(0.8, 0.9), **options)

    return make


OPTIMIZERS = {
    "single": adamw(foreach=False),
    "foreach": adamw(foreach=True),
    "fused": adamw(fused=True),
    "amsgrad": adamw(amsgrad=True),
    "maximize": adamw(maximize=True),
    "tensor lr": lambda model: AdamW(model.parameters(), lr=torch.tensor(0.02, dtype=torch.float64), fused=True),
    "with our groups": lambda model: AdamW(param_groups(model), lr=0.02),
    "adam": lambda model: Adam(model.parameters(), lr=0.02),
    "coupled": coupled(),
    "coupled, clipped, scaled, κ": coupled(max_grad_norm=0.1, coupling_scale=0.25, coupling_factor=0.5),
    "coupled, maximize": coupled(maximize=True),
    "tempered, scaled": coupled(row_exponent=0.5, coupling_scale=0.25),
    "not coupled": coupled(coupling_factor=0.2),
}


def mean(matrix: Tensor) -> Tensor:
    return matrix.detach().double().mean(0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_causes_add_up_to_the_movement(name: str, tied: bool) -> None:
    model = Model(tied).double()
    optimizer, weight = OPTIMIZERS[name](model), model.head.weight
    monitor, start, steps = DriftMonitor(optimizer, weight), mean(weight), []
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if name != "tensor lr" else None
    for _ in range(8):
        before = mean(weight)
        optimizer.zero_grad()
        model.loss(z_loss=0.01).backward()
        optimizer.step()
        steps.append(drift(optimizer, weight))
        torch.testing.assert_close(steps[-1].total, mean(weight) - before, atol=1e-15, rtol=1e-12)
        torch.testing.assert_close(steps[-1].mean, mean(weight), atol=1e-15, rtol=0)
        if scheduler:
            scheduler.step()
    decay = optimizer.param_groups[0]["weight_decay"]
    if decay and scheduler:  # η·λ·μ by hand; the learning rate has moved on since
        lr = optimizer.param_groups[0]["lr"] / 0.9
        torch.testing.assert_close(steps[-1].decay, -lr * decay * before, atol=1e-15, rtol=1e-9)
    summed = monitor.total
    torch.testing.assert_close(summed.total, mean(weight) - start, atol=1e-14, rtol=1e-12)
    by_hand = sum(steps[1:], steps[0])
    assert all(torch.equal(getattr(summed, cause), getattr(by_hand, cause)) for cause in summed.norms())


def trained(optimizer: Callable[[Model], Optimizer], tied: bool, z_loss: float = 0.0) -> Drift:
    model = Model(tied).double()
    made = optimizer(model)
    monitor = DriftMonitor(made, model.head.weight)
    for _ in range(30):
        made.zero_grad()
        model.loss(z_loss).backward()
        made.step()
    return monitor.total


def test_each_cause_vanishes_where_it_should() -> None:
    plain, ours = (lambda m: AdamW(m.parameters(), lr=0.02, weight_decay=0), lambda m: CoupledAdam(param_groups(m, 0)))
    untied = trained(plain, tied=False).norms()
    assert untied["gradients"] < 1e-14 and untied["second_moments"] > 0.01 and untied["decay"] == 0
    assert trained(plain, tied=True).norms()["gradients"] > 0.01, "the input embedding's gradients have no zero sum"
    assert trained(plain, tied=False, z_loss=0.1).norms()["gradients"] > 0.01, "nor have a z-loss's"
    assert trained(adamw(), tied=False).norms()["decay"] > 1e-3
    centered = trained(ours, tied=False)
    assert centered.norms()["second_moments"] == 0 and centered.total.norm() < 1e-14, "so the mean stays where it is"
    tied = trained(ours, tied=True).norms()
    assert tied["second_moments"] == 0 and tied["gradients"] > 1e-4


def test_shares_and_lengths_by_hand() -> None:
    vectors = [torch.tensor(v, dtype=torch.float64) for v in ([2.0, 0.0], [0.0, 5.0], [-0.5, 0.0], [4.0, 0.0])]
    found = Drift(*vectors)
    assert found.norms() == {"second_moments": 2, "gradients": 5, "decay": 0.5}
    assert found.along_mean() == {"second_moments": 2, "gradients": 0, "decay": -0.5}
    assert found.shares() == {"second_moments": 0.5, "gradients": 0, "decay": -0.125}
    assert torch.equal((found + found).gradients, 2 * vectors[1])
    assert all(x != x for x in Drift(*vectors[:3], 0 * vectors[3]).shares().values()), "NaN for a mean of zero"


def test_moments_are_only_read() -> None:
    model = Model(True)
    optimizer = AdamW(model.parameters())
    model.loss().backward()
    optimizer.step()
    kept = {key: x.clone() for key, x in optimizer.state[model.head.weight].items()}
    drift(optimizer, model.head.weight)
    assert all(torch.equal(x, kept[key]) for key, x in optimizer.state[model.head.weight].items())


def test_bfloat16_moments_add_up_to_their_rounding() -> None:
    model = Model(True)
    optimizer, before = coupled(exp_avg_dtype=torch.bfloat16)(model), mean(model.head.weight)
    model.loss().backward()
    optimizer.step()
    found = drift(optimizer, model.head.weight)
    torch.testing.assert_close(found.total, mean(model.head.weight) - before, atol=0.02 * 2**-7, rtol=0)


def test_steps_that_leave_the_parameter_alone_add_nothing() -> None:
    model = Model(False)
    optimizer, weight = AdamW(model.parameters(), weight_decay=0.1), model.head.weight
    monitor, start = DriftMonitor(optimizer, weight), mean(weight)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        weight.grad = None
        optimizer.step()
    torch.testing.assert_close(monitor.total.total, mean(weight) - start, atol=1e-7, rtol=0)
    monitor.remove()
    kept = monitor.total
    model.loss().backward()
    optimizer.step()
    assert monitor.total is kept


def test_sums_go_on_where_they_were_saved() -> None:
    model = Model(True).double()
    optimizer = AdamW(model.parameters())

    def steps(count: int) -> None:
        for seed in range(count):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            model.loss().backward()
            optimizer.step()

    first = DriftMonitor(optimizer, model.head.weight)
    steps(3)
    second = DriftMonitor(optimizer, model.head.weight)
    second.load_state_dict(first.state_dict())
    steps(2)
    assert first.state_dict() == second.state_dict()
    with pytest.raises(ValueError, match="not from a matrix of shape"):
        second.load_state_dict({"gradients": [0.0]})


def test_what_does_not_split_is_refused() -> None:
    model = Model(False)
    weight, parameters = model.head.weight, list(model.parameters())
    for optimizer, error, message in (
        (SGD(parameters), TypeError, "does not support SGD"),
        (NAdam(parameters), TypeError, "does not support NAdam"),
        (Adam(parameters, weight_decay=0.1), ValueError, "AdamW, or weight_decay=0"),
        (Adams(param_groups(model)), ValueError, "atan2"),
        (AdamW([model.inner.weight]), ValueError, "in no group"),
    ):
        with pytest.raises(error, match=message):
            DriftMonitor(optimizer, weight)
    with pytest.raises(ValueError, match="FSDP1 and DeepSpeed"):
        DriftMonitor(AdamW(parameters), model.inner.bias)
    with pytest.raises(ValueError, match=r"call optimizer\.step"):
        drift(AdamW(parameters), weight)


PLACEMENTS = {"rows": [Shard(0)], "columns": [Shard(1)], "whole": [Replicate()], "plain": None}
ROWS = [4, 0, 3]  # of the vocabulary shards that are plain tensors


def sharded(layout: str, ours: bool) -> list[Tensor]:
    """What every process finds of a 7 × 5 matrix, cut over three of them, after three steps."""
    torch.manual_seed(0)
    start, grads = torch.randn(7, 5, dtype=torch.float64), torch.randn(3, 7, 5, dtype=torch.float64)

    def spread(x: Tensor) -> Tensor:
        if not dist.is_initialized():
            return x.clone()
        if PLACEMENTS[layout] is None:
            return x.split(ROWS)[dist.get_rank()].clone()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return distribute_tensor(x, mesh, PLACEMENTS[layout], src_data_rank=None)

    weight = nn.Parameter(spread(start))
    if layout == "plain" and dist.is_initialized():
        weight.vocabulary_group = dist.group.WORLD
    group = {"params": [weight], "second_moment": "vocabulary", "weight_decay": 0.1}
    optimizer = CoupledAdam([group], lr=0.1) if ours else AdamW([weight], lr=0.1, weight_decay=0.1)
    monitor = DriftMonitor(optimizer, weight)
    torch.testing.assert_close(monitor.total.mean, start.mean(0))
    for grad in grads:
        weight.grad = spread(grad)
        optimizer.step()
    vectors = [monitor.total.second_moments, monitor.total.gradients, monitor.total.decay, monitor.total.mean]
    assert not any(isinstance(v, DTensor) for v in vectors)
    return vectors


@pytest.mark.long
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("layout", PLACEMENTS)
def test_three_processes_find_what_one_does(layout: str, ours: bool, processes: Any) -> None:
    alone = sharded(layout, ours)
    for found in processes(3).run(sharded, layout, ours):
        torch.testing.assert_close(found, alone, atol=1e-15, rtol=1e-12)
