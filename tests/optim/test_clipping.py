"""max_grad_norm against clip_grad_norm_ followed by the step."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coupled_adam import Adams, CoupledAdam, param_groups
from coupled_adam.optim import dispatch


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(50, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 50, bias=False))


def backward(m: nn.Sequential, step: int, dtype: torch.dtype = torch.float32) -> None:
    tokens = torch.randint(50, (32,), generator=torch.Generator().manual_seed(step))
    m.zero_grad()
    (F.cross_entropy(m(tokens).float(), tokens.roll(1)) * 10 ** (step % 3 - 1)).backward()


def make(kind: str, m: nn.Sequential, **settings) -> torch.optim.Optimizer:
    groups = param_groups(m, coupled=[m[3]])
    if kind == "adams":
        return Adams(groups, lr=1e-2, **settings)
    return CoupledAdam(groups, lr=1e-2, coupling_factor=0.1 if kind == "factor" else 0.0, **settings)


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("limit", [1e-3, 0.3, 1e3])
@pytest.mark.parametrize("kind", ["coupled", "factor", "adams"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_equals_clip_then_step(
    kind: str, limit: float, numba: bool, dtype: torch.dtype, rtol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "HAS_NUMBA", numba)
    ours, theirs = model().to(dtype), model().to(dtype)
    inside, outside = make(kind, ours, max_grad_norm=limit), make(kind, theirs)
    clipped = []
    for step in range(30):
        backward(ours, step)
        backward(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
        outside.step()
        inside.step()
        clipped.append(norm.item() > limit)
        torch.testing.assert_close(inside.grad_norm, norm, rtol=1e-4, atol=0)
    assert any(clipped) is (limit < 1e3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol * 10, atol=rtol)


def test_half_precision_gradients_do_not_overflow_the_norm() -> None:
    for limit, expected in ((1.0, True), (1e4, False)):
        matrix = nn.Parameter(torch.zeros(4, 3))
        vector = nn.Parameter(torch.zeros(3, dtype=torch.float16))
        groups = [{"params": [matrix], "second_moment": "vocabulary"}, {"params": [vector]}]
        optimizer = CoupledAdam(groups, lr=0.1, max_grad_norm=limit)
        matrix.grad, vector.grad = torch.ones_like(matrix), torch.full_like(vector, 300.0)
        optimizer.step()
        norm = math.sqrt(12 + 3 * 300**2)
        assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-3)
        assert (norm > limit) is expected
        assert matrix[0, 0].item() == pytest.approx(-0.1, rel=1e-3) and vector[0].item() == pytest.approx(
            -0.1, rel=1e-2
        )


def test_the_gradients_stay_as_they_were() -> None:
    m = model()
    optimizer = make("coupled", m, max_grad_norm=1e-3)
    backward(m, 0)
    before = [p.grad.clone() for p in m.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(m.parameters(), before, strict=True))


def test_gradients_within_the_bound_take_the_step_of_adamw_bit_for_bit() -> None:
    ours, theirs = model(), model()
    inside, outside = make("coupled", ours, max_grad_norm=1e6), make("coupled", theirs)
    for step in range(5):
        backward(ours, step)
        backward(theirs, step)
        inside.step()
        outside.step()
    assert torch.equal(ours[2].weight, theirs[2].weight)


def test_the_norm_is_none_without_a_bound() -> None:
    m = model()
    optimizer = make("coupled", m)
    backward(m, 0)
    optimizer.step()
    assert optimizer.grad_norm is None


def test_no_gradient_at_all_has_norm_0() -> None:
    m = model()
    optimizer = make("coupled", m, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 0.0


def test_one_bound_for_all_groups() -> None:
    m = model()
    groups = param_groups(m, coupled=[m[3]])
    groups[1]["max_grad_norm"] = 0.5
    with pytest.raises(ValueError, match="bounds the norm over all groups"):
        CoupledAdam(groups)


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan, math.inf])
def test_bad_bounds_are_refused(bad: float) -> None:
    m = model()
    with pytest.raises(ValueError, match="max_grad_norm"):
        make("coupled", m, max_grad_norm=bad)
