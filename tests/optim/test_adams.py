"""Adams against a float64 reference of Algorithm 1, against adams-torch where that follows it, and its promises."""

import math
import warnings
from typing import Any

import adams
import pytest
import torch
from torch import Tensor, nn

from coupled_adam import Adams, CoupledAdam, param_groups
from coupled_adam.optim import reference

M, N, STEPS = 24, 16, 100


def learning_rate(step: int) -> float:
    return 2e-3 * (1 + math.sin(step / 9)) / 2


def random(*shape: int, seed: int = 0, count: int = 1) -> Tensor:
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def expected(theta: Tensor, grads: Tensor, **group: Any) -> Tensor:
    """What the steps come to in float64, each with its learning rate."""
    state: dict[str, Any] = {}
    for t, g in enumerate(grads, start=1):
        settings = {"betas": (0.9, 0.95), "direction": "atan2", "lr": learning_rate(t), "weight_decay": 3.0, **group}
        theta = reference.step(theta, g, state, **settings)
    return theta


def trained(theta: Tensor, grads: Tensor, group: dict | None = None, mark: bool | None = None, **settings) -> Tensor:
    parameter = nn.Parameter(theta.clone())
    if mark is not None:
        parameter.use_spectral_decay = mark
    optimizer = Adams([{"params": [parameter], **(group or {})}], **settings)
    for t, g in enumerate(grads, start=1):
        optimizer.param_groups[0]["lr"] = learning_rate(t)
        parameter.grad = g.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("shape", "coupled"), [((M, N), False), ((3, M, N), False), ((2, 2, 5, 7), False), ((M, N), True)]
)
def test_agrees_with_the_float64_reference(
    shape: tuple, coupled: bool, dtype: torch.dtype, bound: float, fused: bool | None
) -> None:
    theta, grads = random(*shape)[0], random(*shape, seed=1, count=STEPS)
    moment = "vocabulary" if coupled else "elementwise"
    found = trained(theta.to(dtype), grads.to(dtype), {"second_moment": moment, "fused": fused}, weight_decay=3.0)
    exact = expected(theta, grads, decay="spectral", second_moment=moment)
    assert (found.double() - exact).abs().max() / exact.abs().max() <= bound


@pytest.mark.parametrize(
    ("shape", "mark"), [((M,), None), ((), None), ((1, N), None), ((M, 1), None), ((3, M, 1), None), ((M, N), False)]
)
def test_all_else_takes_l2_decay_of_its_own(shape: tuple, mark: bool | None) -> None:
    theta, grads = random(*shape)[0], random(*shape, seed=1, count=STEPS)
    found = trained(theta, grads, mark=mark, weight_decay=0.0, scalar_vector_weight_decay=3.0)
    torch.testing.assert_close(found, expected(theta, grads), rtol=1e-9, atol=1e-12)


def peer(parameter: nn.Parameter, **settings) -> adams.Adams_ZeRO:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it remarks that there is one process
        return adams.Adams_ZeRO([parameter], **settings)


def test_the_spectral_part_is_that_of_adams_torch() -> None:
    theta = random(3, M, N)[0].float()
    ours, theirs = nn.Parameter(theta.clone()), nn.Parameter(theta.clone())
    optimizers = Adams([ours], lr=1e-3, weight_decay=1.0), peer(theirs, lr=1e-3, weight_decay=1.0)
    for _ in range(50):
        ours.grad, theirs.grad = torch.zeros_like(ours), torch.zeros_like(theirs)
        for optimizer in optimizers:
            optimizer.step()
    assert (theirs - theta).norm() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_step_is_that_of_adams_torch_once_the_bias_correction_has_died_out() -> None:
    # Until then adams-torch divides the angle by 1 − β1^t, where Algorithm 1 divides the first moment.
    theta, grads = random(M, N)[0].float(), random(M, N, seed=1, count=400).float()
    ours, theirs = nn.Parameter(theta.clone()), nn.Parameter(theta.clone())
    optimizers = Adams([ours], lr=1e-3, weight_decay=0.5), peer(theirs, lr=1e-3, weight_decay=0.5)
    for t, g in enumerate(grads):
        if t == 300:
            with torch.no_grad():
                ours.copy_(theirs)
                optimizers[0].state[ours]["u"].copy_(optimizers[1].state[theirs]["u"])
            moved = theirs.detach().clone()
        ours.grad, theirs.grad = g.clone(), g.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours - moved, theirs - moved, rtol=0, atol=1e-4 * (theirs - moved).abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_is_bounded_from_the_first_on(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(M, N, dtype=dtype))
    optimizer = Adams([parameter], lr=0.1)
    for scale in (1e-15, 1e15, 0.0, 1.0):
        before = parameter.detach().clone()
        parameter.grad = scale * random(M, N, seed=3)[0].to(dtype)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer.step()
        assert (parameter - before).abs().max() <= 0.1 * math.pi / 2 * (1 + 1e-6)


def test_nan_is_not_hidden() -> None:
    parameter = nn.Parameter(torch.zeros(4, 3))
    parameter.grad = torch.ones_like(parameter)
    parameter.grad[0] = math.nan
    Adams([{"params": [parameter], "second_moment": "vocabulary"}]).step()
    assert parameter.isnan().all(), "the shared second moment is NaN"


def test_param_groups_decide_what_is_decayed() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 9, bias=False))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Adams(param_groups(model, coupled=[model[2]]), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, False, False, False, False], "the matrix alone"


@pytest.mark.parametrize("shape", [(4, 0), (0, 4), (0,), (1, 1)])
def test_empty_and_tiny_parameters(shape: tuple) -> None:
    parameter = nn.Parameter(torch.ones(shape))
    parameter.grad = torch.ones_like(parameter)
    Adams([parameter], lr=torch.tensor([0.1])).step()
    assert torch.isfinite(parameter).all()


def test_power_iteration_finds_the_leading_singular_value() -> None:
    parameter = nn.Parameter(random(M, N)[0])
    sigma = torch.linalg.svdvals(parameter.detach())[0]
    optimizer = Adams([parameter], lr=1e-9)
    for _ in range(300):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    u = optimizer.state[parameter]["u"]
    torch.testing.assert_close(u.norm(), sigma, rtol=1e-6, atol=0)
    torch.testing.assert_close((parameter.detach().T @ u).norm(), sigma * sigma, rtol=1e-6, atol=0)


@pytest.mark.parametrize("start", ["columns sum to zero", "zeros"])
def test_u_recovers_from_a_matrix_that_maps_it_to_zero(start: str) -> None:
    theta = torch.zeros(4, 3, dtype=torch.float64)
    if start == "columns sum to zero":
        theta[0], theta[1] = 1.0, -1.0  # exactly: 1ᵀW = 0
    parameter = nn.Parameter(theta)
    optimizer = Adams([parameter], lr=1e-3, weight_decay=1.0)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if start == "zeros":
        with torch.no_grad():
            parameter.copy_(random(4, 3)[0])
    for _ in range(50):
        before = torch.linalg.svdvals(parameter.detach())[0]
        optimizer.step()
    after = torch.linalg.svdvals(parameter.detach())[0]
    assert torch.isfinite(parameter).all()
    torch.testing.assert_close(after / before, torch.tensor(1 - 1e-3 * 2, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_decay_that_overshoots_is_warned_of_once_by_name() -> None:
    parameter = nn.Parameter(torch.randn(100, 4))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = Adams([("head", parameter)], lr=0.1, weight_decay=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.12
    with pytest.warns(UserWarning, match=r"'head': lr·weight_decay·√M = 1.08; .*below 0.1.*use_spectral_decay"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_frozen_decay_leaves_u_and_the_matrix_alone() -> None:
    parameter = nn.Parameter(random(M, N)[0])
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    Adams([parameter], weight_decay=0.0).step()
    assert torch.equal(parameter, before)


def test_the_axes_are_free_in_any_group() -> None:
    theta, grads = random(M, N)[0], random(M, N, seed=1, count=STEPS)
    parameter = nn.Parameter(theta.clone())
    group = {"params": [parameter], "second_moment": "vocabulary", "direction": "atan2", "decay": "spectral"}
    optimizer = CoupledAdam([group], betas=(0.9, 0.95), weight_decay=3.0)
    for t, g in enumerate(grads, start=1):
        optimizer.param_groups[0]["lr"] = learning_rate(t)
        parameter.grad = g
        optimizer.step()
    exact = expected(theta, grads, decay="spectral", second_moment="vocabulary")
    torch.testing.assert_close(parameter.detach(), exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scalar_vector_weight_decay": -0.1}, "scalar_vector_weight_decay: -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay: nan"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]: 1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: 0"),
        ({"exp_avg_dtype": torch.float16}, "exp_avg_dtype: torch.float16; choose torch.bfloat16"),
    ],
)
def test_bad_hyperparameters_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adams([nn.Parameter(torch.zeros(2, 2))], **settings)


@pytest.mark.parametrize(("key", "value"), [("direction", "sign"), ("decay", "l2"), ("second_moment", "rows")])
def test_unknown_names_list_the_known_ones(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"Invalid {key}: '{value}'; choose from \["):
        Adams([{"params": [nn.Parameter(torch.zeros(2, 2))], key: value}])
