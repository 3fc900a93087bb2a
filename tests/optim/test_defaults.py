"""torch's default dtype and device say nothing about what an optimizer computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_harmless import OPTIMIZERS, Model, made, same, snapshot, train

from coupled_adam.optim.optimizer import AdamFamily

OPTIONS: list[dict[str, Any]] = [
    {},
    {"exp_avg_dtype": torch.bfloat16, "max_grad_norm": 0.1},
    {"exp_avg_dtype": "8bit", "coupling_factor": 0.1},
]


def trained(cls: type, center: bool, dtype: torch.dtype, options: dict, model: Model) -> tuple[Model, AdamFamily]:
    model, optimizer = made(cls, center, model.to(dtype), **options)
    for i in range(3):
        for p in model.parameters():
            noise = torch.randn(
                p.shape, dtype=torch.float32, device="cpu", generator=torch.Generator("cpu").manual_seed(i)
            )
            p.grad = noise.to(dtype)
        optimizer.step()
    saved = optimizer.state_dict()
    model, optimizer = made(cls, center, model, **options)
    optimizer.load_state_dict(saved)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return model, optimizer


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64, "meta"], ids=str)
def default(request: pytest.FixtureRequest) -> Any:
    return request.param


@contextmanager
def under(default: Any) -> Iterator[None]:
    """With this dtype as torch's default, or with tensors made on that device."""
    if not isinstance(default, torch.dtype):
        with torch.device(default):  # torch 2.8 has no default device after set_default_device(None)
            yield
        return
    torch.set_default_dtype(default)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_defaults_of_torch_change_nothing(cls: type, options: dict, dtype: torch.dtype, default: Any) -> None:
    for fused, center in ((None, True), (None, False), (False, True)):
        options = {**options, "fused": fused}
        expected = snapshot(*trained(cls, center, dtype, options, Model()))
        model = Model()
        with under(default):
            model, optimizer = trained(cls, center, dtype, options, model)
        assert same(expected, snapshot(model, optimizer))


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_checkpoint_with_plain_numbers_for_steps_loads_under_any_default(cls: type, default: Any) -> None:
    model, optimizer = made(cls)
    train(model, optimizer)
    saved = optimizer.state_dict()
    saved["state"] = {key: {**state, "step": 3} for key, state in saved["state"].items()}
    with under(default):
        optimizer.load_state_dict(saved)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert {state["step"].item() for state in optimizer.state.values()} == {4}
