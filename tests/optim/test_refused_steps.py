"""A step that is refused has moved nothing: not one parameter, moment or count."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_harmless import OPTIMIZERS, Model, backward, made, same, snapshot, train
from torch import Tensor, nn

from coupled_adam import Adams_ZeRO, CoupledAdam
from coupled_adam.optim.optimizer import AdamFamily

#: An edit of one parameter and its state; the last parameter of the last group is edited, when all others could move.
Corruption = Callable[[nn.Parameter, dict[str, Any], dict[str, Any]], None]


def moment_as(change: Callable[[Tensor], Any], key: str = "exp_avg") -> Corruption:
    def edit(param: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        state[key] = change(state[key])

    return edit


def without(key: str) -> Corruption:
    return lambda param, state, group: state.pop(key)


def gradient_as(change: Callable[[Tensor], Any]) -> Corruption:
    """Give a parameter a gradient that torch would not let it have, but lets others leave behind."""

    def edit(param: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        grad, data = change(param.grad), param.data
        param.grad = None
        param.data = torch.empty_like(grad)
        param.grad = grad
        param.data = data

    return edit


def setting(key: str, value: object) -> Corruption:
    return lambda param, state, group: group.__setitem__(key, value)


CORRUPTIONS: dict[str, Corruption] = {
    **{f"exp_avg {t}": moment_as(lambda x, t=t: x.to(t)) for t in (torch.float16, torch.int32, torch.complex64)},
    **{f"exp_avg_sq {t}": moment_as(lambda x, t=t: x.to(t), "exp_avg_sq") for t in (torch.float16, torch.bfloat16)},
    **{f"{k} on meta": moment_as(lambda x: x.to("meta"), k) for k in ("exp_avg", "exp_avg_sq", "step")},
    **{f"{k} of another shape": moment_as(lambda x: torch.zeros(3, 2), k) for k in ("exp_avg", "exp_avg_sq", "step")},
    **{f"{k} sparse": moment_as(lambda x: x.to_sparse(), k) for k in ("exp_avg", "exp_avg_sq")},
    **{
        f"{k} expanded": moment_as(lambda x: torch.zeros((), dtype=x.dtype).expand(x.shape), k)
        for k in ("exp_avg", "exp_avg_sq")
    },
    **{f"{k} negated": moment_as(torch._neg_view, k) for k in ("exp_avg", "exp_avg_sq", "step")},
    **{
        f"{k} nested": moment_as(lambda x: torch.nested.nested_tensor([x.reshape(-1)]), k)
        for k in ("exp_avg", "exp_avg_sq", "step")
    },
    **{f"no {k}": without(k) for k in ("exp_avg", "exp_avg_sq", "step")},
    **{f"{k} a list": moment_as(lambda x: x.tolist(), k) for k in ("exp_avg", "exp_avg_sq")},
    "step a number": moment_as(lambda x: int(x), "step"),
    "step None": moment_as(lambda x: None, "step"),
    "step float64": moment_as(lambda x: x.double(), "step"),
    "step int64": moment_as(lambda x: x.long(), "step"),
    "gradient of another shape": gradient_as(lambda g: torch.zeros(3, 2)),
    "gradient complex": gradient_as(lambda g: g.to(torch.complex64)),
    "parameter of another shape": lambda param, state, group: setattr(param, "data", torch.zeros(3, 2)),
    "parameter negated": lambda param, state, group: setattr(param, "data", torch._neg_view(param.data)),
    "parameter expanded": lambda param, state, group: setattr(param, "data", param.data[:1].expand(param.shape)),
    "lr None": setting("lr", None),
    "lr NaN": setting("lr", float("nan")),
    "lr a word": setting("lr", "6e-4"),
    "lr of two elements": setting("lr", torch.ones(2)),
    "betas above 1": setting("betas", (0.9, 1.5)),
    "eps a tensor": setting("eps", torch.tensor(1e-8)),
    "weight_decay None": setting("weight_decay", None),
    "an unknown second moment": setting("second_moment", "rowwise"),
}


def stated(model: Model, optimizer: AdamFamily) -> list[Any]:
    """Everything that a step may move, other types than tensors included."""
    found: list[Any] = []
    for p in model.parameters():
        found.append(p.detach().clone() if p.device.type != "meta" else None)
        for key, x in sorted(optimizer.state[p].items()):
            kept = isinstance(x, Tensor) and x.device.type != "meta" and x.layout is torch.strided and not x.is_nested
            found.append((key, x.clone() if kept else None))
    return found


def unmoved(a: list[Any], b: list[Any]) -> bool:
    flat = [[x[1] if isinstance(x, tuple) else x for x in y] for y in (a, b)]
    pairs = zip(*flat, strict=True)
    return all((x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"exp_avg_dtype": "8bit"}], ids=str)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_what_cannot_be_used_is_refused_by_name_before_anything_moves(cls: type, options: dict, name: str) -> None:
    model, optimizer = made(cls, **options)
    train(model, optimizer)
    group = optimizer.param_groups[-1]
    param = group["params"][-1]
    backward(model, 3)
    CORRUPTIONS[name](param, optimizer.state[param], group)
    before = stated(model, optimizer)
    with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
        optimizer.step()
    assert unmoved(before, stated(model, optimizer))
    message = str(error.value)
    assert "inner.bias" in message or "Invalid" in message


COUPLED: dict[str, Corruption] = {
    "codes of another dtype": moment_as(lambda x: x.float(), "exp_avg_codes"),
    "codes of another shape": moment_as(lambda x: x[:5], "exp_avg_codes"),
    "scales on meta": moment_as(lambda x: x.to("meta"), "exp_avg_scales"),
    "scales of another shape": moment_as(lambda x: x[:5], "exp_avg_scales"),
    "scales of another dtype": moment_as(lambda x: x.double(), "exp_avg_scales"),
    "no scales": without("exp_avg_scales"),
    "no codes": without("exp_avg_codes"),
    "a full second moment": moment_as(lambda x: x.expand(V_H).clone(), "exp_avg_sq"),
    "an expanded second moment": moment_as(lambda x: x[:, :1].expand(x.shape), "exp_avg_sq"),
}
V_H = (37, 16)


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_coupled_state_that_cannot_be_used_is_refused_too(cls: type, name: str) -> None:
    model = Model()
    groups = [
        {"params": [("embedding", model.embedding.weight), ("inner", model.inner.weight)]},
        {"params": [("head", model.head.weight)], "second_moment": "vocabulary"},
    ]
    optimizer = cls(groups, lr=1e-2, exp_avg_dtype="8bit")
    train(model, optimizer)
    backward(model, 3)
    param = model.head.weight
    COUPLED[name](param, optimizer.state[param], optimizer.param_groups[1])
    before = stated(model, optimizer)
    with pytest.raises(RuntimeError, match="'head'"):
        optimizer.step()
    assert unmoved(before, stated(model, optimizer))


@pytest.mark.parametrize("kind", ["singular vector", "master", "master on meta", "master in 8 bits"])
def test_other_state_that_cannot_be_used_is_refused_too(kind: str) -> None:
    model, optimizer = made(Adams_ZeRO)
    train(model, optimizer)
    backward(model, 3)
    state = optimizer.state[model.inner.weight]
    if kind == "singular vector":
        state["u"] = state["u"].half()
    elif kind == "master":
        del state["master"]
    elif kind == "master in 8 bits":
        state["master"] = state["master"].to(torch.float8_e4m3fn)
    else:
        state["master"] = state["master"].to("meta")
    before = stated(model, optimizer)
    with pytest.raises(RuntimeError, match=r"'inner\.weight'"):
        optimizer.step()
    assert unmoved(before, stated(model, optimizer))


def test_a_parameter_of_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        made_there = nn.Parameter(torch.zeros(3))
    fine = nn.Parameter(torch.zeros(3))
    optimizer = CoupledAdam([("fine", fine), ("made there", made_there)], coupling_factor=0.1)
    fine.grad = torch.ones(3)
    made_there.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"'made there' was created under torch.inference_mode\(\)"):
        optimizer.step()
    assert not fine.any()


@pytest.mark.parametrize("name", ["exp_avg torch.float16", "step a number", "step int64"])
def test_the_remedy_of_the_message_helps(name: str) -> None:
    model, optimizer = made(CoupledAdam)
    train(model, optimizer)
    param = model.inner.bias
    CORRUPTIONS[name](param, optimizer.state[param], optimizer.param_groups[-1])
    with pytest.raises(RuntimeError, match=r"(step|load_state_dict)"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(3, 5))
    assert optimizer.state[param]["step"] == 5


# ------------------------------------------------------------------------------------------- parameters of other dtypes


@pytest.mark.parametrize("which", ["inner", "head", "all"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"exp_avg_dtype": torch.bfloat16}, {"exp_avg_dtype": "8bit"}], ids=str)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_moments_follow_a_converted_parameter(
    cls: type, options: dict, before: torch.dtype, after: torch.dtype, which: str
) -> None:
    """As if state and parameters had been loaded into an optimizer of the converted model."""
    outcomes = []
    for anew in (False, True):
        model, optimizer = made(cls, model=Model().to(before), **options)
        train(model, optimizer)
        (model if which == "all" else getattr(model, which)).to(after)
        if anew:
            saved = copy.deepcopy(optimizer.state_dict())
            _, optimizer = made(cls, model=model, **options)
            optimizer.load_state_dict(saved)
        for i in range(3, 6):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype)
            optimizer.step()
        outcomes.append(snapshot(model, optimizer))
    assert same(*outcomes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_gradient_of_another_dtype_is_converted(dtype: torch.dtype) -> None:
    outcomes = []
    for converted in (False, True):
        model, optimizer = made(CoupledAdam)
        for i in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).bfloat16().float()
                if converted:
                    gradient_as(lambda g: g.to(dtype))(p, {}, {})
            optimizer.step()
        outcomes.append(snapshot(model, optimizer))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"exp_avg_dtype": "8bit"}], ids=str)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_gradient_that_is_a_view_of_negated_numbers_counts_as_any_other(
    cls: type, center: bool, options: dict
) -> None:
    outcomes = []
    for negated in (False, True):
        model, optimizer = made(cls, center, **options)
        for i in range(3):
            backward(model, i)
            for p in model.parameters():
                assert p.grad is not None
                p.grad = torch._neg_view(-p.grad) if negated else p.grad
            optimizer.step()
        outcomes.append(snapshot(model, optimizer))
    assert same(*outcomes)
