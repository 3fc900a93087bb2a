"""max_grad_norm against clip_grad_norm_ followed by the step."""

import math

import pytest
import torch
from old_torch import tells_errors_of_compiled_steps
from torch import nn
from torch.nn import functional as F

from coupled_adam import Adams, Adams_ZeRO, CoupledAdam, param_groups


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


@pytest.mark.parametrize("limit", [1e-3, 0.3, 1e3])
@pytest.mark.parametrize("kind", ["coupled", "factor", "adams"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_equals_clip_then_step(kind: str, limit: float, fused: bool | None, dtype: torch.dtype, rtol: float) -> None:
    ours, theirs = model().to(dtype), model().to(dtype)
    inside, outside = make(kind, ours, max_grad_norm=limit, fused=fused), make(kind, theirs, fused=fused)
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


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan, -math.inf])
def test_bad_bounds_are_refused(bad: float) -> None:
    m = model()
    with pytest.raises(ValueError, match="max_grad_norm"):
        make("coupled", m, max_grad_norm=bad)


# ------------------------------------------------------------------------------------------------- norms of 16 bits


@pytest.mark.parametrize("size", [1e-3, 300.0, 3e4])
@pytest.mark.parametrize("dtypes", [[torch.float16], [torch.bfloat16], [torch.float16, torch.float32, torch.bfloat16]])
@pytest.mark.parametrize("cls", [CoupledAdam, Adams, Adams_ZeRO])
def test_the_norm_of_narrow_gradients_is_that_of_float64(
    cls: type, dtypes: list[torch.dtype], size: float, fused: bool | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(50, 8), (40, 30), (30,), (), (7, 5)]
    params = [nn.Parameter(torch.zeros(s, dtype=dtypes[i % len(dtypes)])) for i, s in enumerate(shapes)]
    groups = [{"params": params[:1], "second_moment": "vocabulary"}, {"params": params[1:], "decay": "decoupled"}]
    optimizer = cls(groups, lr=0.1, max_grad_norm=1.0, fused=fused)
    for p in params:
        p.grad = (torch.rand(p.shape, generator=generator) * 2 * size).clamp(max=6e4).to(p.dtype)
    norm = torch.cat([p.grad.double().flatten() for p in params]).norm()
    assert size < 3e4 or norm > torch.finfo(torch.float16).max
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    assert all(p.any() and p.isfinite().all() for p in params)


# ---------------------------------------------------------------------------------------------- infinite gradients


def spoil(m: nn.Sequential, which: list[int], number: float) -> None:
    backward(m, 0)
    for i in which:
        m[i].weight.grad.view(-1)[3] = number


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("which", [[0], [2], [3], [0, 3]])
@pytest.mark.parametrize("limit", [None, 0.3, math.inf])
@pytest.mark.parametrize("cls", [CoupledAdam, Adams, Adams_ZeRO])
def test_a_norm_that_is_not_finite_raises_by_name_before_anything_moves(
    cls: type, limit: float | None, which: list[int], number: float
) -> None:
    m = model()
    optimizer = cls(param_groups(m, coupled=[m[3]], center=True), max_grad_norm=limit, error_if_nonfinite=True)
    backward(m, 0)
    optimizer.step()
    before = [x.detach().clone() for p in m.parameters() for x in (p, *optimizer.state[p].values())]
    spoil(m, which, number)
    names = ".*".join(f"'{i}.weight'" for i in (3, 0, 2) if i in which)
    with pytest.raises(
        RuntimeError, match=rf"norm of the gradients is .*in parameter {names}.*No parameter was updated"
    ):
        optimizer.step()
    after = [x.detach() for p in m.parameters() for x in (p, *optimizer.state[p].values())]
    assert all(map(torch.equal, before, after))
    optimizer.error_if_nonfinite = False
    optimizer.step()
    assert not all(p.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize("kind", ["coupled", "factor", "adams"])
@pytest.mark.parametrize("settings", [{"error_if_nonfinite": True}, {"max_grad_norm": math.inf}], ids=str)
def test_a_norm_that_bounds_nothing_changes_nothing(kind: str, settings: dict) -> None:
    plain, normed = model(), model()
    one, other = make(kind, plain), make(kind, normed, **settings)
    for step in range(5):
        for m, optimizer in ((plain, one), (normed, other)):
            backward(m, step)
            optimizer.step()
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        torch.testing.assert_close(other.grad_norm, norm)
    assert all(map(torch.equal, plain.parameters(), normed.parameters()))


def test_an_infinite_norm_that_bounds_nothing_is_told() -> None:
    m = model()
    optimizer = make("coupled", m, max_grad_norm=math.inf)
    spoil(m, [2], math.inf)
    optimizer.step()
    assert optimizer.grad_norm == math.inf and m[3].weight.isfinite().all()


def test_a_step_that_grad_scaler_skips_raises_nothing() -> None:
    m = model()
    optimizer = make("coupled", m, max_grad_norm=1.0, error_if_nonfinite=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for scale in (math.inf, 1.0):
        before = m[3].weight.detach().clone()
        scaler.scale(m(torch.tensor([1, 2])).square().sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, m[3].weight) is (scale == math.inf)
        m.zero_grad()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)  # a scaler that has found none
    spoil(m, [3], math.nan)
    with pytest.raises(RuntimeError, match=r"parameter '3.weight'"):
        optimizer.step()


def test_what_is_no_flag_is_refused() -> None:
    with pytest.raises(TypeError, match="error_if_nonfinite: 1"):
        make("coupled", model(), error_if_nonfinite=1)


@tells_errors_of_compiled_steps
def test_what_cannot_read_the_norm_is_refused_with_the_remedy() -> None:
    m = model()
    optimizer = make("coupled", m, error_if_nonfinite=True)
    backward(m, 0)
    with pytest.raises(Exception, match=r"torch.compile.*error_if_nonfinite = False"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
