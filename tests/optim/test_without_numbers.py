"""Steps on tensors without numbers, as memory estimators take them: of the meta device, and fake ones.

Fake ones on a GPU are in test_gpu.py: without a torch for GPUs they take more than FakeTensorMode.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from test_harmless import OPTIMIZERS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from coupled_adam.optim.optimizer import AdamFamily
from coupled_adam.optim.reductions import local

SHAPES = [(37, 16), (16, 16), (16,), (3,), ()]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"exp_avg_dtype": torch.bfloat16},
    {"exp_avg_dtype": "8bit"},
    {"max_grad_norm": 0.1},
    {"coupling_factor": 0.1},
    {"row_exponent": 0.5},
    {"max_grad_norm": 0.1, "coupling_factor": 0.1, "maximize": True},
]
PLACES: dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {
    "meta": ("meta", nullcontext),
    "fake": ("cpu", FakeTensorMode),
}


def stepped(cls: type[AdamFamily], center: bool, device: str, dtype: torch.dtype, **options: Any) -> list[tuple]:
    """Step, and return what the state is made of."""
    params = [nn.Parameter(torch.randn(shape, dtype=dtype, device=device)) for shape in SHAPES]
    groups = [
        {"params": params[:1], "second_moment": "vocabulary", "decay": "decoupled", "center": center},
        {"params": params[1:]},
    ]
    optimizer = cls(groups, weight_decay=0.1, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    optimizer.zero_grad()
    found = []
    for p in params:
        for key, x in optimizer.state[p].items():
            assert key == "step" or x.device == p.device
            found.append((key, x.shape, x.dtype, local(x).nbytes))
    return found


@pytest.mark.parametrize("place", ["meta", "fake"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:spectral decay")
def test_a_step_without_numbers_makes_the_state_of_a_real_one(
    cls: type, options: dict, dtype: torch.dtype, place: str
) -> None:
    device, mode = PLACES[place]
    for center, rate in ((True, float), (False, torch.tensor)):
        found = []
        for where, around in (("cpu", nullcontext), (device, mode)):
            with around():
                found.append(stepped(cls, center, where, dtype, lr=rate(1e-2), **options))
        assert found[0] == found[1]
