"""The fast paths give what the plain functions give, over shapes, layouts and settings; and they are taken."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coupled_adam import Adams, CoupledAdam
from coupled_adam.optim import fused, update

SHAPES = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(1, 40)),
    st.tuples(st.integers(1, 5000)),
    st.tuples(st.integers(2, 3), st.integers(1, 20), st.integers(1, 20)),
    st.just(()),
    st.just((0, 4)),
    st.just((1100, 3)),
    st.just((300, 500)),
)


def tensors(shape: tuple[int, ...], seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@settings(max_examples=150, deadline=None)
@given(
    shape=SHAPES,
    seed=st.integers(0, 99),
    step=st.integers(1, 1000),
    coupled=st.booleans(),
    spectral=st.booleans(),
    narrow=st.booleans(),
    direction=st.sampled_from(["ratio", "atan2"]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    coupling_factor=st.sampled_from([0.0, 0.1, 1.0]),
    coupling_scale=st.sampled_from([1.0, 2.0**-5, 2.0**5]),
    grad_scale=st.sampled_from([1.0, 0.37, -1.0]),
    zero=st.booleans(),
)
def test_the_kernels_agree_with_the_plain_functions(
    shape,
    seed,
    step,
    coupled,
    spectral,
    narrow,
    direction,
    weight_decay,
    coupling_factor,
    coupling_scale,
    grad_scale,
    zero,
) -> None:
    coupled, spectral = coupled and len(shape) == 2, spectral and len(shape) >= 2
    param, grad, exp_avg, noise = tensors(shape, seed, 4)
    if zero:
        grad, exp_avg, noise = torch.zeros_like(grad), torch.zeros_like(exp_avg), torch.zeros_like(noise)
    exp_avg = exp_avg.bfloat16() if narrow else exp_avg
    exp_avg_sq = noise.square().mean(0, keepdim=True).nan_to_num() if coupled else noise.square()
    rank_one = (
        update.RankOne(*tensors(shape[:-1], seed, 1), *tensors((*shape[:-2], shape[-1]), seed, 1)) if spectral else None
    )
    numbers = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": weight_decay}
    numbers |= {"coupling_scale": coupling_scale, "coupling_factor": coupling_factor}
    outcomes = []
    for module in (update, fused):
        state = [x.clone() for x in (param, exp_avg, exp_avg_sq)]
        square = None
        if coupled:
            square = module.sum_squares(
                grad, state[1], beta1=0.9, coupling_factor=coupling_factor, grad_scale=grad_scale
            ) / max(len(grad), 1)
        module.update_(
            *state, grad, square, step, **numbers, direction=direction, grad_scale=grad_scale, spectral=rank_one
        )
        outcomes.append(state)
    # One unit in the last place of a bfloat16 is 2^-8: where a float32 sum rounds differently, so may the dice fall.
    for plain, fast, tolerance in zip(*outcomes, (1e-6, 2.0**-7 if narrow else 1e-6, 1e-6), strict=True):
        torch.testing.assert_close(fast, plain, rtol=max(tolerance, 2e-6), atol=2e-6)


@pytest.mark.parametrize("direction", ["ratio", "atan2"])
@pytest.mark.parametrize("coupled", [False, True])
def test_torch_compile_agrees_with_the_plain_function(coupled: bool, direction: str) -> None:
    param, grad, exp_avg, noise = tensors((50, 20), 0, 4)
    exp_avg_sq = noise.square().mean(0, keepdim=True) if coupled else noise.square()
    square = grad.square().mean(0, keepdim=True) if coupled else None
    numbers = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "coupling_scale": 0.5}
    outcomes = []
    for function in (update.update_, fused.compiled_update_):
        state = [x.clone() for x in (param, exp_avg, exp_avg_sq)]
        for step in range(1, 6):
            function(*state, grad, square, step, lr=0.1 / step, coupling_factor=0.1, direction=direction, **numbers)
        outcomes.append(state)
    for plain, fast in zip(*outcomes, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)


def test_the_compiled_update_is_not_compiled_anew_for_every_step() -> None:
    torch._dynamo.reset()
    fused._compiled.cache_clear()
    torch._dynamo.utils.counters.clear()
    param, grad, exp_avg, noise = tensors((50, 20), 0, 4)
    numbers = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "coupling_scale": 1.0}
    for step in range(1, 20):
        fused.compiled_update_(
            param,
            exp_avg,
            noise.square(),
            grad,
            None,
            step,
            lr=1 / step,
            coupling_factor=0.0,
            direction="ratio",
            **numbers,
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_one_compiled_update_serves_many_shapes_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on an accelerator, where torch gives up with too many variants of one function.
    torch._dynamo.reset()
    compiled = torch.compile(update.update_, dynamic=True, backend="eager")
    monkeypatch.setattr(fused, "_compiled", lambda: compiled)
    monkeypatch.setattr(fused, "update_", fused.compiled_update_)
    shapes = [(), (3,), (5, 4), (4, 3, 2), (2, 3, 4, 5), (7, 1), (30, 6)]
    for options in ({}, {"state_dtype": torch.bfloat16}, {"coupling_factor": 0.1}, {"max_grad_norm": 0.1}):
        for dtype in (torch.float32, torch.bfloat16):
            parameters = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
            optimizer = Adams(parameters, **options)
            for _ in range(3):
                for p in parameters:
                    p.grad = torch.randn_like(p)
                optimizer.step()
            assert all(torch.isfinite(p).all() for p in parameters)
    torch._dynamo.reset()


def test_an_unusable_numba_is_said_once_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coupled_adam.optim.kernels", None)
    monkeypatch.delattr("coupled_adam.optim.kernels", raising=False)
    fused._kernels.cache_clear()
    parameter = torch.ones(4, 3, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    optimizer = CoupledAdam([{"params": [parameter], "second_moment": "vocabulary"}], lr=0.1)
    with pytest.warns(UserWarning, match="numba cannot be used"):
        optimizer.step()
    optimizer.step()
    fused._kernels.cache_clear()
    assert parameter[0, 0].item() == pytest.approx(0.8)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "strided": lambda x: x.repeat_interleave(2, dim=0)[::2],
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["coupled", "uncoupled", "adams", "clipped"])
def test_the_layout_in_memory_makes_no_difference(kind: str, param_layout: str, grad_layout: str) -> None:
    param, *grads = tensors((24, 8), 1, 4)
    outcomes = []
    for layouts in (("contiguous", "contiguous"), (param_layout, grad_layout)):
        parameter = LAYOUTS[layouts[0]](param.clone()).detach().requires_grad_()
        assert parameter.is_contiguous() is (layouts[0] == "contiguous")
        moment = {"second_moment": "vocabulary" if kind == "coupled" else "elementwise", "coupling_factor": 0.0}
        if kind == "adams":
            optimizer = Adams([parameter], lr=0.1)
        else:
            limit = 0.5 if kind == "clipped" else None
            extra = torch.zeros(2, 2, requires_grad=True)
            groups = [{"params": [parameter], **moment}, {"params": [extra], "second_moment": "vocabulary"}]
            optimizer = CoupledAdam(groups, lr=0.1, weight_decay=0.1, max_grad_norm=limit)
        for grad in grads:
            parameter.grad = LAYOUTS[layouts[1]](grad.clone())
            optimizer.step()
        outcomes.append(parameter.detach().contiguous())
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-5, atol=1e-6)


def test_the_kernels_are_taken_where_they_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("sum_squares", "update_rows", "update_elements"):
        kernel = getattr(fused._kernels(), name)
        monkeypatch.setattr(fused._kernels(), name, lambda *a, n=name, k=kernel: (taken.append(n), k(*a)))
    matrix, vector = torch.zeros(30, 4, requires_grad=True), torch.zeros(4, requires_grad=True)
    matrix.grad, vector.grad = torch.ones(30, 4), torch.ones(4)
    CoupledAdam([{"params": [matrix], "second_moment": "vocabulary"}, {"params": [vector]}]).step()
    assert taken == ["sum_squares", "update_rows"], "an uncoupled group is torch's own"
    taken.clear()
    Adams([matrix, vector]).step()
    assert taken == ["update_elements", "update_elements"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.0, 0.1])
def test_a_step_without_numba_is_the_same(
    factor: float, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    param, *grads = tensors((40, 8), 2, 6)
    outcomes = []
    for numba in (True, False):
        monkeypatch.setattr(fused, "HAS_NUMBA", numba)
        monkeypatch.setattr(fused, "BLOCK_ELEMENTS", 100)  # 12 rows a block, and one of 4
        parameter = param.clone().requires_grad_()
        group = {"params": [parameter], "second_moment": "vocabulary", "coupling_factor": factor}
        optimizer = CoupledAdam([group], lr=0.01, weight_decay=0.1, max_grad_norm=1.0, state_dtype=dtype)
        for grad in grads:
            parameter.grad = grad
            optimizer.step()
        outcomes.append(parameter.detach())
    tolerance = 1e-6 if dtype is None else 1e-4
    torch.testing.assert_close(*outcomes, rtol=tolerance, atol=tolerance)
