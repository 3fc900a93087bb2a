"""Copies, pickles, and groups that several optimizers are built of."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_harmless import OPTIMIZERS, Model, made, same, snapshot, train
from torch import nn

from coupled_adam import Adams, Adams_ZeRO, CoupledAdam, param_groups
from coupled_adam.integrations.bare_parameters import VocabularyCoupledAdam
from coupled_adam.optim.optimizer import AdamFamily

OPTIONS: list[dict[str, Any]] = [
    {},
    {"exp_avg_dtype": torch.bfloat16},
    {"exp_avg_dtype": "8bit"},
    {"max_grad_norm": 0.1, "error_if_nonfinite": True},
    {"coupling_factor": 0.1},
    {"row_exponent": 0.5},
    {"maximize": True, "betas": (0.8, 0.9)},
]
Pair = tuple[Model, AdamFamily]


def saved(pair: Pair) -> Pair:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Pair], Pair]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": saved,
}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_copy_trains_on_as_the_original(cls: type, options: dict, copied: str, steps: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        original = made(cls, True, Model().to(dtype), **options)
        scheduler = torch.optim.lr_scheduler.ConstantLR(original[1])  # puts its own step in place of the method
        train(*original, range(steps))
        model, optimizer = COPIES[copied](original)
        assert optimizer.param_groups[0]["params"][0] is model.head.weight
        assert optimizer.error_if_nonfinite == original[1].error_if_nonfinite
        before = snapshot(*original)
        train(model, optimizer, range(steps, steps + 3))
        assert same(before, snapshot(*original)), "the original does not move along"
        train(*original, range(steps, steps + 3))
        assert same(snapshot(*original), snapshot(model, optimizer))
        assert scheduler.optimizer is original[1]


class Counting(CoupledAdam):
    """Somebody's class, with attributes of its own."""

    def __init__(self, params: Any) -> None:
        self.before = "set before"
        super().__init__(params, coupling_factor=0.1)
        self.counts = {"steps": 0}

    def step(self, closure: Any = None) -> Any:
        self.counts["steps"] += 1
        return super().step(closure)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_keeps_what_a_subclass_adds(copied: str) -> None:
    model = Model()
    optimizer = Counting(model.parameters())
    train(model, optimizer)
    other_model, other = COPIES[copied]((model, optimizer))
    train(other_model, other, range(1))
    assert (other.before, other.counts, optimizer.counts) == ("set before", {"steps": 4}, {"steps": 3})
    bare = VocabularyCoupledAdam(Model().parameters(), vocabulary_size=37, which="last")
    assert COPIES[copied]((model, bare))[1].param_groups[0]["second_moment"] == "vocabulary"


def test_a_process_group_is_shared_by_copies_and_not_pickled() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, optimizer = made(Adams_ZeRO, process_group=dist.new_group([0]))
        train(model, optimizer)
        other_model, other = copy.deepcopy((model, optimizer))
        assert other.process_group is optimizer.process_group
        for m, o in ((model, optimizer), (other_model, other)):
            train(m, o, range(3, 6))
        assert same(snapshot(model, optimizer), snapshot(other_model, other))
        with pytest.raises(TypeError, match=r"process_group cannot be pickled.*state_dict\(\)"):
            pickle.dumps(optimizer)
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ the caller's objects


def settings(optimizer: AdamFamily) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


@pytest.mark.parametrize("second", [*OPTIMIZERS, torch.optim.AdamW])
@pytest.mark.parametrize("first", [*OPTIMIZERS, torch.optim.AdamW])
def test_groups_that_were_used_before_make_the_same_optimizer(first: type, second: type) -> None:
    model = Model()
    groups = param_groups(model, coupled=[model.head], center=True)
    before = [{**group, "params": list(group["params"])} for group in groups]
    alone = second(param_groups(model, coupled=[model.head], center=True))
    options = {} if first is torch.optim.AdamW else {"max_grad_norm": 1.0, "exp_avg_dtype": torch.bfloat16}
    one = first([dict(group) for group in groups] if first is torch.optim.AdamW else groups, lr=0.5, **options)
    other = second([dict(group) for group in groups] if second is torch.optim.AdamW else groups)
    assert settings(other) == settings(alone)
    assert [{**group} for group in groups] == before
    one.param_groups[0]["lr"] = 9.0
    assert other.param_groups[0]["lr"] != 9.0


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_nothing_of_the_callers_is_written_to(cls: type) -> None:
    model = Model()
    extra = {"params": [("extra", nn.Parameter(torch.zeros(3)))], "lr": 0.1}
    kept = dict(extra), list(extra["params"])
    params, betas = list(model.named_parameters()), [0.8, 0.9]
    given = list(params)
    optimizer = cls(params, betas=betas, coupling_factor=0.1)
    optimizer.add_param_group(extra)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    train(model, optimizer)
    assert (params, betas) == (given, [0.8, 0.9])
    assert (extra, extra["params"]) == kept
    saved_state = copy.deepcopy(optimizer.state_dict())
    loaded = copy.deepcopy(saved_state)
    optimizer.load_state_dict(loaded)
    train(model, optimizer)
    assert loaded["param_groups"] == saved_state["param_groups"]
    for key, state in saved_state["state"].items():
        assert all(torch.equal(x, loaded["state"][key][name]) for name, x in state.items())


def test_a_group_that_is_no_dict_is_refused() -> None:
    _, optimizer = made(Adams)
    with pytest.raises(TypeError, match="a param group is a dict, not list"):
        optimizer.add_param_group([nn.Parameter(torch.zeros(3))])
