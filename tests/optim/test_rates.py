"""The learning rate of the output embedding as a multiple of the others': set, scheduled, lost, resumed, copied."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from coupled_adam import Adams, Adams_ZeRO, CoupledAdam, adamw_state_dict, describe, name_checkpoint, param_groups

LR, FACTOR = 2e-3, 30.0
OURS = [CoupledAdam, Adams, Adams_ZeRO]
ALL = [*OURS, AdamW, SGD]


class Model(nn.Module):
    """Tied or not, with one output embedding or two."""

    def __init__(self, tied: bool = False, heads: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.middle = nn.Embedding(23, 8), nn.Linear(8, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 23, bias=False) for _ in range(heads))
        if tied:
            self.heads[0].weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.middle(self.embedding(tokens))
        return torch.stack([head(x) for head in self.heads]).sum(0)

    def get_output_embeddings(self) -> nn.Module:
        return self.heads


def groups(model: nn.Module, factor: float | None = FACTOR, lr: float | torch.Tensor = LR) -> list[dict[str, Any]]:
    return param_groups(model, lr=lr, embedding_lr_factor=factor)


def made(cls: type[Optimizer], factor: float | None = FACTOR, **model: Any) -> tuple[Model, Optimizer]:
    network = Model(**model)
    return network, cls(groups(network, factor))


def train(model: nn.Module, optimizer: Optimizer, steps: range = range(3)) -> None:
    for step in steps:
        tokens = torch.randint(23, (16,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens.flip(0)).backward()
        optimizer.step()


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("factor", [0.03, 1.0, FACTOR, 300])
@pytest.mark.parametrize(("tied", "heads"), [(False, 1), (True, 1), (False, 2)])
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.usefixtures("no_warning")
def test_the_output_embedding_and_nothing_else_has_it(
    cls: type[Optimizer], tied: bool, heads: int, factor: float
) -> None:
    model, optimizer = made(cls, factor, tied=tied, heads=heads)
    weights = {id(head.weight) for head in model.heads}
    for group in optimizer.param_groups:
        coupled = {id(p) for p in group["params"]} == weights
        assert coupled or not weights & {id(p) for p in group["params"]}
        assert group["lr"] == pytest.approx(LR * (factor if coupled else 1))
        assert group["lr_factor"] == (factor if coupled else 1)
    train(model, optimizer)


@pytest.mark.filterwarnings("ignore:nothing is coupled")
@pytest.mark.parametrize("cls", [CoupledAdam, Adams, AdamW, SGD])
def test_the_step_is_that_of_an_optimizer_for_each_rate(cls: type[Optimizer]) -> None:
    (ours, optimizer), reference = made(cls), Model()
    apart = [cls([{**group, "lr": LR * (FACTOR if i == 0 else 1)}]) for i, group in enumerate(param_groups(reference))]
    train(ours, optimizer)
    for step in range(3):
        for each in apart:
            each.zero_grad()
        tokens = torch.randint(23, (16,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(reference(tokens), tokens.flip(0)).backward()
        for each in apart:
            each.step()
    for name, p in reference.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("cls", OURS)
def test_a_rate_alone_is_that_of_all_groups(cls: type[Optimizer]) -> None:
    _, optimizer = made(cls, None)
    assert set(rates(optimizer)) == {LR}
    assert "factor" not in describe(optimizer)
    assert "learning rate factor 30" in describe(made(cls)[1])
    assert all("lr_factor" not in group and "lr" not in group for group in param_groups(Model()))


SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "lambda": lambda o: LambdaLR(o, lambda step: min((step + 1) / 3, 1) * 0.9**step),
    "from 0": lambda o: LambdaLR(o, lambda step: step / 3),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=6),
    "one cycle": lambda o: OneCycleLR(
        o, [group["lr"] for group in o.param_groups], total_steps=6, cycle_momentum=False
    ),
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "sequence": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=2), ConstantLR(o, 0.5, 2)], milestones=[2]),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning", "ignore:The epoch parameter:UserWarning")
def test_a_schedule_keeps_the_ratio_also_after_a_resume(
    cls: type[Optimizer], scheduler: str, recwarn: pytest.WarningsRecorder
) -> None:
    def stepped(model: nn.Module, optimizer: Optimizer, schedule: LRScheduler, steps: range) -> list[list[float]]:
        seen = []
        for step in steps:
            train(model, optimizer, range(step, step + 1))
            seen.append(rates(optimizer))
            schedule.step()
        return seen

    model, optimizer = made(cls)
    schedule = SCHEDULERS[scheduler](optimizer)
    first = stepped(model, optimizer, schedule, range(3))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), schedule.state_dict()])
    second = stepped(model, optimizer, schedule, range(3, 5))
    for seen in first + second:
        assert seen == pytest.approx([FACTOR * seen[1], seen[1], seen[1]])
    assert len({seen[1] for seen in first + second}) > 1, "the rate changes"
    resumed, again = made(cls)
    schedule = SCHEDULERS[scheduler](again)
    for part, state in zip((resumed, again, schedule), saved, strict=True):
        part.load_state_dict(state)
    assert stepped(resumed, again, schedule, range(3, 5)) == second
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in resumed.named_parameters())
    assert not [w for w in recwarn if "factor" in str(w.message)]


OVERWRITERS: dict[str, Callable[[Optimizer], Any]] = {
    "loop": lambda o: [group.update(lr=LR) for group in o.param_groups],
    "tensors": lambda o: [group.update(lr=torch.tensor(LR)) for group in o.param_groups],
    "one cycle": lambda o: OneCycleLR(o, LR, total_steps=50, cycle_momentum=False),
    "cyclic": lambda o: CyclicLR(o, LR, 2 * LR, cycle_momentum=False),
    "minimum": lambda o: ReduceLROnPlateau(o, factor=1e-9, patience=0, min_lr=LR / 10)._reduce_lr(0),
}


@pytest.mark.parametrize("overwrite", OVERWRITERS)
@pytest.mark.parametrize("cls", OURS)
def test_a_lost_factor_is_told_once(cls: type[Optimizer], overwrite: str) -> None:
    model, optimizer = made(cls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        train(model, optimizer)  # a schedule that starts at 0 has lost nothing yet
    for group in optimizer.param_groups:
        group["lr"] = LR * group["lr_factor"]
    scheduler = OVERWRITERS[overwrite](optimizer)
    remedy = r'factors 30, 1, 1, but one learning rate.*group\["lr"\] = lr \* group.get\("lr_factor", 1.0\)'
    with pytest.warns(UserWarning, match=remedy) as caught:
        train(model, optimizer, range(5))
    told = [w for w in caught if "factor" in str(w.message)]
    assert len(told) == 1
    assert scheduler.__class__.__name__.endswith("LR") or told[0].filename == __file__
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            copied.step()


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.usefixtures("no_warning")
def test_a_loop_that_sets_the_rates_with_the_factor(cls: type[Optimizer]) -> None:
    model, optimizer = made(cls)
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = LR / (step + 1) * group.get("lr_factor", 1.0)
        train(model, optimizer, range(step, step + 1))
        assert rates(optimizer) == pytest.approx([FACTOR * LR / (step + 1), *[LR / (step + 1)] * 2])


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.usefixtures("no_warning")
def test_groups_that_happen_to_agree_are_no_loss(cls: type[Optimizer]) -> None:
    model, extra = Model(), nn.Parameter(torch.ones(3, 3))
    optimizer = cls([*groups(model), {"params": [("extra", extra)], "lr": LR * FACTOR}])
    train(model, optimizer)
    same = Model()
    train(same, cls(groups(same, 1.0)))
    alone = Model()
    train(alone, cls(groups(alone)[:1]))


def saved(pair: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), saved])
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.usefixtures("no_warning")
def test_a_copy_has_it(cls: type[Optimizer], copied: Callable[[Any], Any]) -> None:
    model, optimizer = made(cls)
    train(model, optimizer)
    twin, other = copied((model, optimizer))
    assert rates(other) == rates(optimizer) and other.param_groups[0]["lr_factor"] == FACTOR
    train(model, optimizer)
    train(twin, other)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in twin.named_parameters())


@pytest.mark.parametrize("cls", OURS)
def test_what_a_checkpoint_has_is_in_force_and_told(cls: type[Optimizer]) -> None:
    def state(factor: float | None) -> dict[str, Any]:
        model, optimizer = made(cls, factor)
        train(model, optimizer)
        return optimizer.state_dict()

    model, optimizer = made(cls)
    with pytest.warns(UserWarning, match="checkpoint has the learning rate factors 10, 1, 1 .* had 30, 1, 1"):
        optimizer.load_state_dict(state(10.0))
    assert rates(optimizer) == pytest.approx([10 * LR, LR, LR])
    plain = state(None)
    for group in plain["param_groups"]:
        del group["lr_factor"]  # as of a run without lr=… in param_groups
    model, optimizer = made(cls)
    optimizer.load_state_dict(plain)
    with pytest.warns(UserWarning, match="or a checkpoint without factors was loaded"):
        train(model, optimizer)


def test_switching_from_adamw_and_back_keeps_each_optimizers_rates() -> None:
    model = Model()
    adamw = AdamW(model.parameters(), lr=LR)
    train(model, adamw)
    optimizer = CoupledAdam(groups(model))
    optimizer.load_state_dict(name_checkpoint(model, adamw))
    assert rates(optimizer) == pytest.approx([LR * FACTOR, LR, LR])
    train(model, optimizer)
    back = AdamW(groups(model))
    back.load_state_dict(adamw_state_dict(optimizer, back))
    assert rates(back) == pytest.approx([LR * FACTOR, LR, LR])


@pytest.mark.parametrize("cls", OURS)
def test_two_learning_rates_that_differ_are_refused(cls: type[Optimizer]) -> None:
    for factor in (None, FACTOR):
        for lr in (1e-3, 2 * LR, torch.tensor(5e-4)):  # 1e-3 is the default, too
            with pytest.raises(
                ValueError, match=rf"given lr={float(lr):g}, and its param groups lr=0.002 .*one of them"
            ):
                cls(groups(Model(), factor), lr=lr)
        assert rates(cls(groups(Model(), factor), lr=LR)) == rates(cls(groups(Model(), factor)))
    assert set(rates(cls(param_groups(Model())))) == {1e-3}


@pytest.mark.filterwarnings("ignore:nothing is coupled")
@pytest.mark.parametrize("cls", OURS)
def test_groups_written_by_hand(cls: type[Optimizer]) -> None:
    model = Model()
    head, rest = {"params": model.heads.parameters()}, {"params": model.middle.parameters()}
    assert rates(cls([{**head, "lr_factor": 3.0}, rest], lr=LR)) == pytest.approx([3 * LR, LR])
    optimizer = cls([{**head, "lr_factor": 3}, rest], lr=torch.tensor(LR))
    assert rates(optimizer) == pytest.approx([3 * LR, LR]) and isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    with pytest.raises(ValueError, match=r"lr=0.002, and its param groups lr=0.0006"):
        cls([{**head, "lr_factor": 3.0, "lr": LR}, rest], lr=LR)
    for bad, error in ((0, ValueError), (-1.0, ValueError), (float("inf"), ValueError), ("3", TypeError)):
        with pytest.raises(error, match="Invalid lr_factor"):
            cls([{**head, "lr_factor": bad}, rest])
        _, whole = made(cls)
        with pytest.raises(error, match="Invalid lr_factor"):
            whole.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr_factor": bad})
        assert len(whole.param_groups) == 3
        whole.param_groups[0]["lr_factor"] = bad
        with pytest.raises(error, match="Invalid lr_factor"):
            whole.step()
    with pytest.raises(ValueError, match=r"Unknown key 'lr_facter'.*did you mean 'lr_factor'"):
        cls([{**head, "lr_facter": 3.0}, rest])


@pytest.mark.parametrize("optimizer", [CoupledAdam, Adams])
def test_a_tensor_for_a_rate_has_a_copy_in_each_group(optimizer: type[Optimizer]) -> None:
    lr = torch.tensor(LR)
    built = optimizer(groups(Model(), lr=lr))
    assert all(isinstance(group["lr"], torch.Tensor) and group["lr"] is not lr for group in built.param_groups)
    assert rates(built) == pytest.approx([LR * FACTOR, LR, LR])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embedding_lr_factor": 3.0}, ValueError, r"embedding_lr_factor=3 multiplies lr, which is missing.*lr=1e-3"),
        ({"embedding_lr_factor": 0, "lr": LR}, ValueError, "embedding_lr_factor: 0; .*must be positive"),
        ({"embedding_lr_factor": -2.0, "lr": LR}, ValueError, "embedding_lr_factor: -2.0"),
        ({"embedding_lr_factor": float("nan"), "lr": LR}, ValueError, "embedding_lr_factor: nan"),
        ({"embedding_lr_factor": float("inf"), "lr": LR}, ValueError, "embedding_lr_factor: inf"),
        ({"embedding_lr_factor": "10", "lr": LR}, TypeError, "embedding_lr_factor: '10'; it must be a number"),
        ({"embedding_lr_factor": True, "lr": LR}, TypeError, "embedding_lr_factor: True"),
        ({"embedding_lr_factor": torch.tensor(3.0), "lr": LR}, TypeError, "embedding_lr_factor: a tensor"),
        ({"embedding_lr_factor": 1e300, "lr": 1e300}, ValueError, r"lr · embedding_lr_factor\): inf"),
        ({"lr": -1e-3}, ValueError, r"learning rate \(lr\): -0.001"),
        ({"lr": "1e-3"}, TypeError, r"learning rate \(lr\): '1e-3'"),
        ({"lr": LR, "embedding_lr_factor": 3.0, "coupled": []}, ValueError, "nothing in Model is coupled.*AdamW"),
    ],
)
def test_what_cannot_be_a_rate_or_a_factor(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        param_groups(Model(), **options)
