"""CoupledAdam against a float64 reference, against torch, and against what the paper proves."""

import copy
import gc
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coupled_adam import CoupledAdam, param_groups
from coupled_adam.optim import reference

V, H, STEPS = 37, 12, 100


def learning_rate(step: int) -> float:
    """Changes every step, and is 0 at times."""
    return 3e-3 * max(math.sin(step / 7), 0.0)


def gradients(seed: int = 0, rows: int = V) -> list[Tensor]:
    """Rows of very different size, as those of rare and frequent tokens."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-3, 1, rows, dtype=torch.float64)[:, None]
    return [size * torch.randn(rows, H, dtype=torch.float64, generator=generator) for _ in range(STEPS)]


def expected(theta: Tensor, grads: list[Tensor], **group: Any) -> Tensor:
    """What the steps come to in float64, each with its learning rate."""
    state: dict[str, Any] = {}
    for t, g in enumerate(grads, start=1):
        theta = reference.step(theta, g, state, **{"betas": (0.9, 0.99), "lr": learning_rate(t), **group})
    return theta


def trained(theta: Tensor, grads: list[Tensor], make: Callable[[nn.Parameter], torch.optim.Optimizer]) -> Tensor:
    """``theta`` after one step per gradient, each with its learning rate."""
    parameter = nn.Parameter(theta.clone())
    optimizer = make(parameter)
    for t, g in enumerate(grads, start=1):
        optimizer.param_groups[0]["lr"] = learning_rate(t)
        parameter.grad = g.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


COUPLED, PLAIN = {"second_moment": "vocabulary"}, {"second_moment": "elementwise"}
SETTINGS: list[dict[str, Any]] = [
    COUPLED,
    COUPLED | {"weight_decay": 0.1},
    COUPLED | {"coupling_scale": 2.0**-5},
    COUPLED | {"coupling_scale": 2.0**5, "weight_decay": 0.1},
    COUPLED | {"coupling_factor": 0.1},
    COUPLED | {"coupling_factor": 1.0, "coupling_scale": 0.5, "weight_decay": 0.01},
    COUPLED | {"row_exponent": 0.5},
    COUPLED | {"row_exponent": 0.25, "coupling_factor": 0.3, "coupling_scale": 2.0, "weight_decay": 0.1},
    COUPLED | {"row_exponent": 1.0, "center": True, "maximize": True},
    COUPLED | {"row_exponent": 0.5, "direction": "atan2"},
    COUPLED | {"center": True, "weight_decay": 0.1, "maximize": True},
    COUPLED | {"direction": "atan2", "weight_decay": 0.1, "center": True},
    PLAIN | {"coupling_factor": 0.1},
    PLAIN | {"weight_decay": 0.1},
    PLAIN | {"direction": "atan2", "maximize": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_agrees_with_the_float64_reference(
    settings: dict[str, Any], dtype: torch.dtype, bound: float, fused: bool | None
) -> None:
    theta = torch.randn(V, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = [g.to(dtype).double() for g in gradients()]

    def make(p: nn.Parameter) -> CoupledAdam:
        return CoupledAdam([{"params": [p], "fused": fused, "betas": (0.9, 0.99), **settings}], coupling_factor=0.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is coupled
        found = trained(theta, grads, make)
    assert relative_error(found, expected(theta.double(), grads, **settings)) <= bound


def test_one_step_by_hand() -> None:
    # g² has the column means (1 + 9)/2 = 5 and (4 + 0)/2 = 2. At the first step m̂ = g and ν̂ = mean g².
    parameter = nn.Parameter(torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
    parameter.grad = torch.tensor([[1.0, 2.0], [-3.0, 0.0]], dtype=torch.float64)
    CoupledAdam([{"params": [parameter], "second_moment": "vocabulary"}], lr=0.1, eps=0.0, weight_decay=0.5).step()
    expected = [[0.95 - 0.1 / math.sqrt(5), 0.95 - 0.2 / math.sqrt(2)], [0.95 + 0.3 / math.sqrt(5), 0.95]]
    torch.testing.assert_close(parameter.detach(), torch.tensor(expected, dtype=torch.float64))


def test_uncoupled_is_adamw_bit_for_bit() -> None:
    theta, grads = torch.randn(V, H, generator=torch.Generator().manual_seed(2)), gradients()
    ours = trained(theta, grads, lambda p: CoupledAdam([p], weight_decay=0.1))
    torchs = trained(theta, grads, lambda p: torch.optim.AdamW([p], weight_decay=0.1, fused=True))
    assert torch.equal(ours, torchs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moment", ["vocabulary", "elementwise"])
def test_narrow_parameters_keep_float32_moments(dtype: torch.dtype, moment: str) -> None:
    # A moving average of a constant 1 in bfloat16 sticks at 0.5 with β2 = 0.999; in float32 it arrives.
    parameter = nn.Parameter(torch.zeros(4, 3, dtype=dtype))
    optimizer = CoupledAdam([{"params": [parameter], "second_moment": moment}], lr=0.0, betas=(0.9, 0.999))
    for _ in range(5000):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    state = optimizer.state[parameter]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(state["exp_avg_sq"], torch.full_like(state["exp_avg_sq"], 1 - 0.999**5000))


def test_the_documented_call_of_moment_coupling_runs_unchanged() -> None:
    model = nn.Linear(H, V)
    optimizer = CoupledAdam(
        model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, coupling_factor=0.1
    )
    before = model.weight.detach().clone()
    model(torch.ones(1, H)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


class Softmax:
    """A softmax head on its own: tokens drawn with Zipf's frequencies, hidden states that depend on them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.frequency = 1.0 / torch.arange(1, V + 1, dtype=torch.float64)
        self.table = torch.randn(V, H, dtype=torch.float64, generator=generator) + 0.5
        self.head = nn.Parameter(torch.randn(V, H, dtype=torch.float64, generator=generator))
        self.generator = generator

    def backward(self) -> None:
        tokens = torch.multinomial(self.frequency, 64, replacement=True, generator=self.generator)
        self.head.grad = None
        F.cross_entropy(self.table[tokens.roll(1)] @ self.head.T, tokens).backward()

    def mean_shift(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> float:
        """How far 200 steps move the mean embedding, over the mean norm of the rows."""
        before, optimizer = self.head.detach().mean(0), make([self.head])
        for _ in range(200):
            self.backward()
            optimizer.step()
        rows = self.head.detach()
        return ((rows.mean(0) - before).norm() / rows.norm(dim=1).mean()).item()


def test_the_rows_of_a_softmax_heads_gradient_sum_to_zero() -> None:
    problem = Softmax()
    problem.backward()
    gradient = problem.head.grad
    assert gradient.sum(0).norm() <= 1e-14 * gradient.norm(dim=1).sum()
    assert gradient.norm() > 1e-3


def test_sgd_and_coupled_adam_leave_the_mean_embedding_where_it_is() -> None:
    assert Softmax().mean_shift(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)) <= 1e-9
    coupled = Softmax().mean_shift(lambda p: CoupledAdam([{"params": p, "second_moment": "vocabulary"}], lr=1e-2))
    assert coupled <= 1e-9


def test_adam_moves_the_mean_embedding() -> None:
    assert Softmax().mean_shift(lambda p: torch.optim.Adam(p, lr=1e-2)) > 0.05
    assert Softmax().mean_shift(lambda p: CoupledAdam(p, lr=1e-2)) > 0.05


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V, bias=False)).to(dtype)


def run(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        tokens = torch.randint(V, (32,), generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).float(), tokens.roll(1)).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(dtype: torch.dtype, tmp_path) -> None:
    whole = small_model(dtype)
    run(whole, CoupledAdam(param_groups(whole, coupled=[whole[2]])), range(10))

    first = small_model(dtype)
    optimizer = CoupledAdam(param_groups(first, coupled=[first[2]]))
    run(first, optimizer, range(6))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = small_model(dtype)
    second.load_state_dict(saved["model"])
    optimizer = CoupledAdam(param_groups(second, coupled=[second[2]]))
    optimizer.load_state_dict(saved["optimizer"])
    run(second, optimizer, range(6, 10))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    moments = [optimizer.state[p][m].dtype for p in second.parameters() for m in ("exp_avg", "exp_avg_sq")]
    assert set(moments) == {torch.float32}


def test_a_running_adamw_job_goes_on_with_coupled_adam() -> None:
    model = small_model()
    adamw = torch.optim.AdamW(param_groups(model, coupled=[model[2]]), lr=5e-3, betas=(0.8, 0.9))
    torch.optim.lr_scheduler.LinearLR(adamw)
    run(model, adamw, range(5))
    saved = copy.deepcopy(adamw.state_dict())

    coupled = CoupledAdam(param_groups(model, coupled=[model[2]]))
    coupled.load_state_dict(saved)
    head, inner = coupled.state[model[2].weight], coupled.state[model[1].weight]
    second_moment = adamw.state[model[2].weight]["exp_avg_sq"]
    torch.testing.assert_close(head["exp_avg_sq"], second_moment.mean(0, keepdim=True))
    assert torch.equal(inner["exp_avg_sq"], adamw.state[model[1].weight]["exp_avg_sq"])
    assert head["step"] == 5
    group = coupled.param_groups[0]
    assert (group["second_moment"], group["lr"], group["betas"]) == (
        "vocabulary",
        adamw.param_groups[0]["lr"],
        (0.8, 0.9),
    )
    assert "initial_lr" in group and "amsgrad" not in group
    assert saved["state"][0]["exp_avg_sq"].shape == (V, H), "the caller's checkpoint is left as it was"
    run(model, coupled, range(5, 7))


def test_an_adamw_job_with_other_groups_goes_on_too() -> None:
    model = small_model()
    adamw = torch.optim.AdamW([{"params": list(model.named_parameters())[::-1], "weight_decay": 0.3}], lr=5e-3)
    run(model, adamw, range(3))
    coupled = CoupledAdam(param_groups(model, coupled=[model[2]]), lr=1e-3)
    coupled.load_state_dict(adamw.state_dict())
    for parameter in model.parameters():
        assert torch.equal(coupled.state[parameter]["exp_avg"], adamw.state[parameter]["exp_avg"])
    assert [g["weight_decay"] for g in coupled.param_groups] == [0.0, 0.1, 0.0], "the groups keep what they are for"
    run(model, coupled, range(3, 5))


def test_named_parameters_are_matched_by_their_names() -> None:
    x, y = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3, 2))
    adamw = torch.optim.AdamW([("x", x), ("y", y)])
    x.grad, y.grad = torch.full_like(x, 1.0), torch.full_like(y, 5.0)
    adamw.step()
    optimizer = CoupledAdam([("y", y), ("x", x)], coupling_factor=0.1)
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.state[x]["exp_avg"][0, 0] == pytest.approx(0.1)
    assert optimizer.param_groups[0]["param_names"] == ["y", "x"]
    with pytest.raises(ValueError, match="Parameter 'y' is in the checkpoint or in this optimizer"):
        CoupledAdam([("x", x), ("z", y)], coupling_factor=0.1).load_state_dict(adamw.state_dict())


def test_a_checkpoint_in_the_form_of_the_reference_implementation_loads() -> None:
    # Its groups carry keys of their own, and its step counts may be plain numbers.
    model = small_model()
    adamw = torch.optim.AdamW(param_groups(model, coupled=[model[2]]), lr=5e-3)
    run(model, adamw, range(3))
    saved = copy.deepcopy(adamw.state_dict())
    for group in saved["param_groups"]:
        group |= {"avg_idx": [0], "avg_scale": 1.0}
        del group["param_names"]
    for state in saved["state"].values():
        state["step"] = 3
    optimizer = CoupledAdam(param_groups(model, coupled=[model[2]]))
    optimizer.load_state_dict(saved)
    folded = adamw.state[model[2].weight]["exp_avg_sq"].mean(0, keepdim=True)
    torch.testing.assert_close(optimizer.state[model[2].weight]["exp_avg_sq"], folded)
    run(model, optimizer, range(3, 5))
    assert optimizer.state[model[2].weight]["step"] == 5


def test_checkpoints_with_impossible_hyperparameters_are_refused() -> None:
    model = small_model()
    optimizer = CoupledAdam(param_groups(model, coupled=[model[2]]))
    run(model, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["betas"] = (1.0, 1.0)
    with pytest.raises(ValueError, match=r"betas\[0\]: 1.0"):
        optimizer.load_state_dict(saved)
    adam = torch.optim.Adam(param_groups(model, coupled=[model[2]]), weight_decay=0.1)
    with pytest.raises(ValueError, match="L2"):
        optimizer.load_state_dict(adam.state_dict())


def test_every_group_has_hyperparameters_of_its_own() -> None:
    grads = gradients()
    settings: list[dict[str, Any]] = [
        COUPLED | {"coupling_scale": 4.0, "coupling_factor": 0.5, "betas": (0.8, 0.9), "weight_decay": 0.3},
        COUPLED | {"coupling_scale": 0.25, "coupling_factor": 0.0, "betas": (0.95, 0.99), "weight_decay": 0.0},
        PLAIN | {"coupling_factor": 0.2, "betas": (0.7, 0.99), "weight_decay": 0.1},
        PLAIN | {"betas": (0.9, 0.99), "weight_decay": 0.5, "direction": "atan2"},
    ]
    theta = torch.randn(V, H, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    parameters = [nn.Parameter(theta.clone()) for _ in settings]
    optimizer = CoupledAdam({"params": [p], **s} for p, s in zip(parameters, settings, strict=True))
    for t, g in enumerate(grads, start=1):
        for group, parameter in zip(optimizer.param_groups, parameters, strict=True):
            group["lr"], parameter.grad = learning_rate(t), g
        optimizer.step()
    for parameter, s in zip(parameters, settings, strict=True):
        assert relative_error(parameter.detach(), expected(theta, grads, **s)) <= 1e-6


def test_frozen_parameters_have_no_state() -> None:
    frozen, free = nn.Parameter(torch.ones(3, 2), requires_grad=False), nn.Parameter(torch.ones(3, 2))
    optimizer = CoupledAdam([{"params": [frozen, free], "second_moment": "vocabulary"}])
    free.grad = torch.ones_like(free)
    optimizer.step()
    assert free in optimizer.state and frozen not in optimizer.state
    frozen.requires_grad_()
    frozen.grad = torch.ones_like(frozen)
    optimizer.step()
    assert optimizer.state[frozen]["step"] == 1


@pytest.mark.parametrize("moment", ["vocabulary", "elementwise"])
def test_a_backward_pass_through_what_the_step_changed_is_refused(moment: str) -> None:
    parameter = nn.Parameter(torch.ones(V, H))
    optimizer = CoupledAdam([{"params": [parameter], "second_moment": moment}], coupling_factor=0.1)
    loss = (parameter**3).sum()
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_checkpoints_that_do_not_fit_name_the_parameter() -> None:
    model = small_model()
    optimizer = CoupledAdam(param_groups(model, coupled=[model[2]]))
    run(model, optimizer, range(1))
    saved = optimizer.state_dict()

    with pytest.raises(ValueError, match=r"groups of \[1, 2, 1\] parameters, this optimizer of \[3\]"):
        CoupledAdam(list(model.parameters())[:3]).load_state_dict(saved)
    for key, shape in (("exp_avg", (V, H + 1)), ("exp_avg_sq", (V, H + 1)), ("exp_avg_sq", (2, H)), ("exp_avg", (H,))):
        broken = copy.deepcopy(saved)
        broken["state"][0][key] = torch.zeros(shape)
        with pytest.raises(ValueError, match=rf"{key} of parameter '2.weight' has shape {re.escape(str(shape))}, not"):
            optimizer.load_state_dict(broken)
    broken = copy.deepcopy(saved)
    del broken["state"][0]["exp_avg_sq"]
    with pytest.raises(ValueError, match=r"parameter '2.weight' has no 'exp_avg_sq'"):
        optimizer.load_state_dict(broken)
    amsgrad = torch.optim.AdamW(param_groups(model, coupled=[model[2]]), amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.load_state_dict(amsgrad.state_dict())
    assert optimizer.state[model[2].weight]["step"] == 1, "a refused checkpoint leaves the optimizer as it was"


def test_state_exists_for_parameters_without_a_gradient_and_they_stay_where_they_are() -> None:
    used, unused = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(5, 2))
    optimizer = CoupledAdam([{"params": [used, unused], "second_moment": "vocabulary", "weight_decay": 0.1}])
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert torch.equal(unused, torch.ones(5, 2))
    assert optimizer.state[unused]["step"] == 0
    assert optimizer.state[unused]["exp_avg_sq"].shape == (1, 2)


def test_a_step_with_zero_gradients_and_no_learning_rate_changes_no_parameter() -> None:
    # Distributed checkpointing makes such a step to create the state.
    parameter = nn.Parameter(torch.randn(5, 3))
    before = parameter.detach().clone()
    optimizer = CoupledAdam([{"params": [parameter], "second_moment": "vocabulary"}], lr=0.0, weight_decay=0.1)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameter, before)


def test_gradients_are_not_modified_and_the_closure_is_called_once() -> None:
    parameter = nn.Parameter(torch.randn(5, 3))
    optimizer = CoupledAdam([{"params": [parameter], "second_moment": "vocabulary"}])
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    expected, before = parameter.square().sum().item(), parameter.detach().clone()
    assert optimizer.step(closure) == expected
    assert calls == [True]
    assert torch.equal(parameter.grad, 2 * before)


def test_survives_deepcopy_and_pickle() -> None:
    model = small_model()
    optimizer = CoupledAdam(param_groups(model, coupled=[model[2]]))
    run(model, optimizer, range(3))
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        for ours, theirs in zip(optimizer.state.values(), copied.state.values(), strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        copied.step()


MATRIX = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": -1e-3}, ValueError, r"learning rate \(lr\): -0.001"),
        ({"lr": float("nan")}, ValueError, "learning rate.*nan"),
        ({"lr": "0.1"}, TypeError, "'0.1'"),
        ({"lr": torch.ones(2)}, ValueError, "one element"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\]: 1.0"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\]: -0.1"),
        ({"betas": 0.9}, ValueError, "two numbers"),
        ({"eps": -1e-8}, ValueError, "eps: -1e-08"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay: inf"),
        ({"coupling_scale": 0.0}, ValueError, "coupling_scale: 0"),
        ({"coupling_scale": -1.0}, ValueError, "coupling_scale: -1.0"),
        ({"coupling_factor": 1.5}, ValueError, "coupling_factor: 1.5.*between 0 and 1"),
        ({"coupling_factor": True}, TypeError, "True"),
        ({"row_exponent": -0.5}, ValueError, "row_exponent: -0.5"),
        ({"row_exponent": 1.5}, ValueError, "row_exponent: 1.5.*between 0 and 1"),
    ],
)
def test_bad_hyperparameters_are_refused_in_the_constructor_and_in_a_group(
    settings: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CoupledAdam([nn.Parameter(MATRIX)], **settings)
    optimizer = CoupledAdam([nn.Parameter(MATRIX)])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(MATRIX)], **settings})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"params": [nn.Parameter(torch.zeros(3))], "second_moment": "vocabulary"}, ValueError, "1 dimension"),
        ({"params": [nn.Parameter(torch.zeros(3, 2, 2))], "second_moment": "vocabulary"}, ValueError, "3 dimension"),
        ({"params": [nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))]}, TypeError, "view_as_real"),
        ({"params": [nn.Parameter(MATRIX)], "second_moment": "rowwise"}, ValueError, "'rowwise'; choose from"),
        ({"params": [nn.Parameter(MATRIX)], "coupling_scal": 2.0}, ValueError, "did you mean 'coupling_scale'"),
        ({"params": [("table", nn.Parameter(torch.zeros(3)))], "second_moment": "vocabulary"}, ValueError, "'table'"),
    ],
)
def test_bad_groups_are_refused(group: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CoupledAdam([group])


@pytest.mark.parametrize("factor", [0.0, 0.1])
def test_a_sparse_gradient_of_a_coupled_embedding_steps_as_the_dense_one(factor: float) -> None:
    results = []
    for sparse in (False, True):
        table = nn.Embedding(V, H, sparse=sparse)
        with torch.no_grad():
            table.weight.copy_(torch.randn(V, H, generator=torch.Generator().manual_seed(6)))
        group = {"params": [table.weight], "second_moment": "vocabulary"}
        optimizer = CoupledAdam([group], lr=1e-2, weight_decay=0.1, coupling_factor=factor, max_grad_norm=1.0)
        for i in range(10):
            tokens = torch.randint(V, (9,), generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            table(torch.cat([tokens, tokens[:3]])).square().sum().backward()  # some tokens twice
            assert table.weight.grad.is_sparse is sparse
            optimizer.step()
        results.append(table.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_a_sparse_gradient_elsewhere_is_refused_before_anything_moves() -> None:
    first, table = nn.Parameter(torch.ones(2, 2)), nn.Embedding(V, H, sparse=True)
    coupled = {"params": [("first", first)], "second_moment": "vocabulary"}
    optimizer = CoupledAdam([coupled, {"params": [("table", table.weight)]}])
    first.grad = torch.ones_like(first)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"'table' is sparse.*sparse=False"):
        optimizer.step()
    assert torch.equal(first, torch.ones(2, 2))
    assert not optimizer.state.get(first)


def test_nothing_coupled_is_warned_of_with_the_remedy() -> None:
    with pytest.warns(UserWarning, match=r"nothing is coupled.*param_groups\(model\)"):
        CoupledAdam([nn.Parameter(MATRIX)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CoupledAdam([nn.Parameter(MATRIX)], coupling_factor=0.1)
        CoupledAdam([{"params": [nn.Parameter(MATRIX)], "second_moment": "vocabulary"}])


def test_maximize_climbs_as_fast_as_the_default_descends() -> None:
    def moved(maximize: bool, moment: str) -> Tensor:
        parameter = nn.Parameter(torch.zeros(V, H))
        group = {"params": [parameter], "second_moment": moment}
        optimizer = CoupledAdam([group], maximize=maximize, coupling_factor=0.1)
        for g in gradients():
            parameter.grad = g.float()
            optimizer.step()
        return parameter.detach()

    for moment in ("vocabulary", "elementwise"):
        torch.testing.assert_close(moved(True, moment), -moved(False, moment))
        assert moved(True, moment).abs().max() > 1e-3


@pytest.mark.parametrize("moment", ["vocabulary", "elementwise"])
def test_a_tensor_learning_rate_is_followed(moment: str) -> None:
    results = []
    for lr in (0.1, torch.tensor(0.1)):
        parameter = nn.Parameter(torch.ones(V, H))
        optimizer = CoupledAdam([{"params": [parameter], "second_moment": moment}], lr=lr, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for g in gradients()[:5]:
            parameter.grad = g.float()
            optimizer.step()
            scheduler.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 / 2**5)
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_a_grad_scaler_unscales_and_skips_the_step_on_an_overflow() -> None:
    parameter = nn.Parameter(torch.ones(V, H))
    optimizer = CoupledAdam([{"params": [parameter], "second_moment": "vocabulary"}], lr=0.1, eps=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((parameter * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter, torch.ones(V, H)) and scaler.get_scale() == 512.0

    optimizer.zero_grad()
    scaler.scale((2 * parameter).sum()).backward()
    scaler.step(optimizer)
    expected = 1 - 0.1 * 2 / (2 + 1.0)  # as without scaling: ε makes the size of the gradient matter
    torch.testing.assert_close(parameter.detach(), torch.full((V, H), expected))


def test_hooks_see_every_step() -> None:
    parameter = nn.Parameter(torch.ones(V, H))
    optimizer = CoupledAdam([{"params": [parameter], "second_moment": "vocabulary"}])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(parameter[0, 0].item()))
    optimizer.register_step_post_hook(lambda *_: seen.append(parameter[0, 0].item()))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert seen[0] == 1.0 and seen[1] < 1.0


def test_a_thousand_steps_take_no_more_memory_than_one() -> None:
    model = small_model()
    optimizer = CoupledAdam(param_groups(model, coupled=[model[2]]), max_grad_norm=1.0)
    run(model, optimizer, range(3))

    def tensors_alive() -> int:
        gc.collect()
        return sum(isinstance(x, Tensor) for x in gc.get_objects())

    before = tensors_alive()
    run(model, optimizer, range(3, 1003))
    assert tensors_alive() <= before


def test_the_state_of_a_coupled_matrix_is_half_of_adamws() -> None:
    def state_bytes(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return sum(x.numel() * x.element_size() for x in optimizer.state[parameter].values())

    parameter = nn.Parameter(torch.zeros(500, 64))
    adamw = state_bytes(torch.optim.AdamW([parameter]), parameter)
    for dtype, share in ((None, 0.51), (torch.bfloat16, 0.26)):
        group = {"params": [parameter], "second_moment": "vocabulary"}
        assert state_bytes(CoupledAdam([group], exp_avg_dtype=dtype), parameter) / adamw <= share
