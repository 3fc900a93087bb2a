"""The generic properties that PyTorch asks of its own optimizers, driven by PyTorch's own tables of inputs.

``torch.testing._internal.common_optimizers`` lists, for every optimizer of torch, the settings to test it with and the
inputs that it must refuse. AdamW's serve for CoupledAdam and Adams, which have its interface.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR, ReduceLROnPlateau, SequentialLR
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    optim_db,
    optim_error_inputs_func_adam,
)

from coupled_adam import Adams, CoupledAdam

ADAMW: OptimizerInfo = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
CPU = torch.device("cpu")


def inputs(cls: type) -> list:
    """AdamW's optimizer inputs without what our classes do not have: amsgrad, and eps for Adams."""
    known = {"lr", "betas", "weight_decay", "maximize"} | ({"eps"} if cls is CoupledAdam else set())
    return [i for i in ADAMW.optim_inputs_func(device=CPU) if set(i.kwargs) <= known]


def make(cls: type, params, **settings) -> torch.optim.Optimizer:
    """Everything coupled where it can be: the class's own path, not torch's."""
    return cls(
        [{"params": [p], "second_moment": "vocabulary" if p.ndim == 2 else "elementwise"} for p in params], **settings
    )


CASES = [
    pytest.param(cls, i.kwargs, id=f"{cls.__name__} {i.desc}") for cls in (CoupledAdam, Adams) for i in inputs(cls)
]


def problem(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[list[nn.Parameter], callable]:
    """A matrix and a vector, and the closure of a convex loss."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(10, 5, generator=generator).to(dtype))
    bias = nn.Parameter(torch.randn(10, generator=generator).to(dtype))
    x = torch.randn(5, generator=generator).to(dtype)

    def closure() -> torch.Tensor:
        weight.grad = bias.grad = None
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss

    return [weight, bias], closure


def test_the_tables_are_not_empty() -> None:
    assert len(inputs(CoupledAdam)) >= 4 and len(inputs(Adams)) >= 4 and len(ERRORS) >= 8


@pytest.mark.parametrize(("cls", "settings"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lowers_a_convex_loss_or_raises_it_when_told_so(cls: type, settings: dict, dtype: torch.dtype) -> None:
    params, closure = problem(dtype)
    optimizer = make(cls, params, **{"lr": 1e-2, **settings})
    first = closure().item()
    for _ in range(20):
        optimizer.step(closure)
    last = closure().item()
    if float(settings.get("lr", 1)) == 0:
        assert last == first
    else:
        assert (last > first) if settings.get("maximize") else (last < first)


@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_state_dict_round_trip_deepcopy_and_pickle_go_on_alike(cls: type, settings: dict) -> None:
    params, closure = problem()
    optimizer = make(cls, params, **settings)
    for _ in range(3):
        optimizer.step(closure)

    def twin(how: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        if how == "deepcopy":
            return copy.deepcopy((params, optimizer))
        if how == "pickle":
            return pickle.loads(pickle.dumps((params, optimizer)))
        fresh, _ = problem()
        for new, old in zip(fresh, params, strict=True):
            new.data.copy_(old.data)
        other = make(cls, fresh, **settings)
        other.load_state_dict(optimizer.state_dict())
        return fresh, other

    twins = {how: twin(how) for how in ("deepcopy", "pickle", "state_dict")}
    closure()
    grads = [p.grad.clone() for p in params]
    optimizer.step()
    for how, (others, other) in twins.items():
        for p, g in zip(others, grads, strict=True):
            p.grad = g.clone()
        other.step()
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q), how
        assert repr(other) == repr(optimizer)


@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_param_groups_take_the_defaults_and_keep_their_own(cls: type, settings: dict) -> None:
    weight, bias = problem()[0]
    optimizer = cls([{"params": [weight], "lr": 0.5, "second_moment": "vocabulary"}], **settings)
    optimizer.add_param_group({"params": [bias]})
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[1]["lr"] == optimizer.defaults["lr"]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [weight]})
    weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
    optimizer.step()


ERRORS = [
    e for e in optim_error_inputs_func_adam(CPU, torch.float32) if "foreach" not in e.optimizer_error_input.kwargs
]


@pytest.mark.parametrize("cls", [CoupledAdam, Adams])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.optimizer_error_input.desc)
def test_what_adam_must_refuse_is_refused(cls: type, error) -> None:
    given = error.optimizer_error_input
    params = [nn.Parameter(torch.zeros(2, 2))] if given.params is None else given.params
    # Hyperparameters are refused in our own words, names and duplicates in torch's.
    message = r"Invalid (betas|weight_decay|learning rate)" if given.kwargs else error.error_regex
    expected = (ValueError, TypeError) if given.kwargs else error.error_type
    if expected is UserWarning:
        with pytest.warns(UserWarning, match=message):
            cls(params, **given.kwargs)
        return
    with pytest.raises(expected, match=message):
        cls(params, **given.kwargs)


SCHEDULERS = {
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "cosine": lambda o: CosineAnnealingLR(o, 10),
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.1, total_steps=20),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=1),
    "sequence": lambda o: SequentialLR(o, [ExponentialLR(o, 0.9), CosineAnnealingLR(o, 5)], milestones=[3]),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("cls", [CoupledAdam, Adams])
def test_schedulers_drive_it_as_they_drive_adamw(cls: type, name: str, tensor_lr: bool) -> None:
    rates = []
    for ours in (True, False):
        params, closure = problem()
        lr = torch.tensor(0.01) if tensor_lr else 0.01
        optimizer = make(cls, params, lr=lr) if ours else torch.optim.AdamW([{"params": [p]} for p in params], lr=lr)
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for i in range(8):
            optimizer.step(closure)
            scheduler.step(*([1.0 + i] if name == "plateau" else []))
            seen.append(float(optimizer.param_groups[0]["lr"]))
        rates.append(seen)
        assert all(torch.isfinite(p).all() for p in params)
    assert rates[0] == pytest.approx(rates[1])


@pytest.mark.parametrize("cls", [CoupledAdam, Adams])
def test_pre_and_post_hooks_of_step_and_of_checkpoints_run(cls: type) -> None:
    params, closure = problem()
    optimizer = make(cls, params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("step post"))
    optimizer.register_state_dict_post_hook(lambda _, saved: calls.append("save") or {**saved, "mark": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: calls.append(f"load pre {saved['mark']}"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("load post"))
    optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["step pre", "step post", "save", "load pre 1", "load post"]


@pytest.mark.parametrize("cls", [CoupledAdam, Adams])
def test_nothing_is_done_without_gradients(cls: type) -> None:
    params, _ = problem()
    before = [p.detach().clone() for p in params]
    make(cls, params).step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
