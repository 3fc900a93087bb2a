"""What must change nothing changes nothing: reading the state, a learning rate of 0, a step that is refused."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional as F

from coupled_adam import Adams, Adams_ZeRO, CoupledAdam, param_groups
from coupled_adam.optim.optimizer import AdamFamily

V, H = 37, 16
OPTIMIZERS: list[type[AdamFamily]] = [CoupledAdam, Adams, Adams_ZeRO]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"exp_avg_dtype": torch.bfloat16},
    {"exp_avg_dtype": "8bit"},
    {"max_grad_norm": 0.1},
    {"coupling_factor": 0.1},
    {"row_exponent": 0.5},
]


class Model(nn.Module):
    """An embedding, a matrix and a vector, and an output embedding."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding, self.inner, self.head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V, bias=False)
        for p in self.parameters():
            nn.init.normal_(p, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.inner(self.embedding(tokens)))


def made(cls: type, center: bool = False, model: Model | None = None, **options: Any) -> tuple[Model, AdamFamily]:
    model = model or Model()
    return model, cls(param_groups(model, coupled=[model.head], center=center), **{"lr": 1e-2, **options})


def backward(model: nn.Module, step: int) -> None:
    tokens = torch.randint(V, (32,), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    F.cross_entropy(model(tokens).float(), tokens.roll(1)).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(3)) -> None:
    for i in steps:
        backward(model, i)
        optimizer.step()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = list(model.parameters())
    return [x.detach().clone() for p in params for x in (p, *optimizer.state.get(p, {}).values())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------- reading the state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rate", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_whoever_asks_for_the_state_changes_nothing(
    cls: type, options: dict, center: bool, rate: Callable, dtype: torch.dtype
) -> None:
    outcomes = []
    for asks in (False, True):
        model, optimizer = made(cls, center, Model().to(dtype), lr=rate(1e-2), **options)
        before = [p.detach().clone() for p in model.parameters()]
        if asks:
            state = get_optimizer_state_dict(model, optimizer)
            assert len(state["state"]) == len(before)
            assert all(entry["step"] == 0 for entry in state["state"].values())
            set_optimizer_state_dict(model, optimizer, state)
        assert same(before, [p.detach() for p in model.parameters()])
        train(model, optimizer)
        outcomes.append(snapshot(model, optimizer))
    assert same(*outcomes)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_weights_that_are_loaded_after_the_state_was_asked_for_count(cls: type) -> None:
    outcomes = []
    for asks in (False, True):
        model, optimizer = made(cls, model=Model().to(torch.bfloat16))
        if asks:
            get_optimizer_state_dict(model, optimizer)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3)
        train(model, optimizer)
        outcomes.append(snapshot(model, optimizer))
    assert same(*outcomes)


def test_a_first_step_at_a_learning_rate_of_0_with_gradients_is_a_step() -> None:
    model, optimizer = made(CoupledAdam, lr=0.0)
    train(model, optimizer, range(1))
    assert all(state["step"] == 1 and state["exp_avg"].any() for state in optimizer.state.values())


# -------------------------------------------------------------------------------------------- a learning rate of 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rate", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_nothing_moves_at_a_learning_rate_of_0(
    cls: type, options: dict, rate: Callable, dtype: torch.dtype, fused: bool | None
) -> None:
    model, optimizer = made(cls, True, Model().to(dtype), lr=rate(0.0), fused=fused, **options)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer)
    assert same(before, [p.detach() for p in model.parameters()])
    for group in optimizer.param_groups:
        group["lr"] = rate(1e-2)
    train(model, optimizer, range(3, 4))
    assert not any(map(torch.equal, before, model.parameters()))
    assert model.head.weight.mean(0).abs().max() < 0.02


def test_nothing_moves_at_a_learning_rate_of_0_that_the_compiler_does_not_know() -> None:
    model, optimizer = made(CoupledAdam, True, lr=torch.tensor(0.0))
    step = torch.compile(optimizer.step, backend="eager")
    before = [p.detach().clone() for p in model.parameters()]
    for i in range(3):
        backward(model, i)
        step()
    assert same(before, [p.detach() for p in model.parameters()])
    optimizer.param_groups[0]["lr"].fill_(1e-2)
    backward(model, 3)
    step()
    assert model.head.weight.mean(0).abs().max() < 1e-6


def test_a_warmup_from_0_of_a_tied_model_begins_where_the_model_was() -> None:
    model = Model()
    model.embedding.weight = model.head.weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, optimizer = made(CoupledAdam, True, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: i / 10)
    before = model.head.weight.detach().clone()
    train(model, optimizer, range(1))
    assert torch.equal(model.head.weight, before)
    schedule.step()
    train(model, optimizer, range(1, 2))
    assert model.head.weight.mean(0).abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------- no gradient at all


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_an_optimizer_of_embeddings_that_were_replaced_says_so_once(cls: type) -> None:
    model, optimizer = made(cls)
    model.head = nn.Linear(H, V, bias=False)  # as resize_token_embeddings does it
    with pytest.warns(
        UserWarning, match=r"'head.weight' has had no gradient in the first 10 steps.*afterwards"
    ) as seen:
        train(model, optimizer, range(30))
    assert len(seen) == 1


@pytest.mark.filterwarnings("error")
def test_a_head_that_is_frozen_or_has_had_gradients_is_not_warned_of() -> None:
    model, optimizer = made(CoupledAdam)
    model.head.weight.requires_grad_(False)
    train(model, optimizer, range(20))
    model.head.weight.requires_grad_(True)
    train(model, optimizer, range(1))
    for _ in range(20):
        model.zero_grad()
        optimizer.step()
