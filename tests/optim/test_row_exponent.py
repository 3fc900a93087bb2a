"""A tempered second moment, between Coupled Adam's and Adam's: what it is, keeps, and becomes elsewhere."""

import copy

import pytest
import torch
from torch import Tensor, nn

from coupled_adam import CoupledAdam, adamw_state_dict, describe
from coupled_adam.lm.adam_variant import AdamVariant
from coupled_adam.optim.moments import ROWS

V, H = 40, 12


def gradient(step: int, rows: int = V) -> Tensor:
    """Rows of very different size; those of odd number come only now and then."""
    generator = torch.Generator().manual_seed(step)
    sizes = torch.logspace(-3, 1, rows)[:, None] * ((torch.arange(rows) % 2 == 0) | (step % 4 == 0))[:, None]
    return sizes * torch.randn(rows, H, generator=generator)


def table(rows: int = V, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, H, generator=torch.Generator().manual_seed(seed)))


def tempered(p: nn.Parameter, exponent: float = 0.5, **options) -> CoupledAdam:
    group = {"params": [("table", p)], "second_moment": "vocabulary"}
    return CoupledAdam([group], lr=1e-2, betas=(0.9, 0.95), row_exponent=exponent, **options)


def train(optimizer: torch.optim.Optimizer, p: nn.Parameter, first: int = 0, steps: int = 20) -> Tensor:
    for step in range(first, first + steps):
        p.grad = gradient(step, len(p))
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_it_is_the_second_moment_that_the_study_calls_factored(exponent: float, fused: bool | None) -> None:
    ours, theirs = table(), table()
    found = train(tempered(ours, exponent, fused=fused), ours)
    peer = AdamVariant([theirs], "factored", betas=(0.9, 0.95), exponent=exponent)
    peer.param_groups[0]["lr"] = 1e-2
    torch.testing.assert_close(found, train(peer, theirs), rtol=1e-5, atol=1e-6)


def test_without_it_nothing_changes_and_nothing_is_kept() -> None:
    ours, plain = table(), table()
    optimizer = tempered(ours, 0.0)
    reference = CoupledAdam([{"params": [plain], "second_moment": "vocabulary"}], lr=1e-2, betas=(0.9, 0.95))
    assert torch.equal(train(optimizer, ours), train(reference, plain))
    assert optimizer.state[ours].keys() == reference.state[plain].keys()
    assert "row_exponent" not in describe(optimizer)


def test_rows_cost_a_number_each_and_their_mean_is_that_of_the_columns(fused: bool | None) -> None:
    p = table()
    optimizer = tempered(p, fused=fused)
    train(optimizer, p)
    state = optimizer.state[p]
    assert state[ROWS].shape == (V, 1) and state["exp_avg_sq"].shape == (1, H)
    torch.testing.assert_close(state[ROWS].mean(), state["exp_avg_sq"].mean(), rtol=1e-5, atol=0)
    text = describe(optimizer)
    assert "row_exponent 0.5" in text
    sizes = [f"{4 * numbers / 1000:.1f} kB" for numbers in (V * H + H + V + 1, 2 * V * H + 1)]
    assert "state: {}; uncoupled it would be {}".format(*sizes) in text


def test_rare_rows_move_further_than_with_adam_and_less_than_coupled() -> None:
    moved = {}
    for exponent in (0.0, 0.5, 1.0):
        p = table()
        start = p.detach().clone()
        train(tempered(p, exponent), p)
        moved[exponent] = (p.detach() - start).norm(dim=1)
    smallest, largest = slice(0, 8), slice(-4, None)
    assert (moved[0.0][smallest] < moved[0.5][smallest]).all() and (moved[0.5][smallest] < moved[1.0][smallest]).all()
    assert (moved[0.0][largest] > moved[0.5][largest]).all() and (moved[0.5][largest] > moved[1.0][largest]).all()


@pytest.mark.parametrize("moment", [None, torch.bfloat16, "8bit"])
def test_a_resumed_run_is_the_undisturbed_one(moment) -> None:
    p, q = table(), table()
    optimizer = tempered(p, exp_avg_dtype=moment)
    train(optimizer, p)
    whole = tempered(q, exp_avg_dtype=moment)
    train(whole, q)
    saved, resumed = copy.deepcopy(optimizer.state_dict()), nn.Parameter(p.detach().clone())
    other = tempered(resumed, exp_avg_dtype=moment)
    other.load_state_dict(saved)
    assert torch.equal(train(other, resumed, 20), train(whole, q, 20))


def test_a_running_adamw_goes_on_with_it_and_back() -> None:
    p, q = table(), table()
    adamw = torch.optim.AdamW([("table", q)], lr=1e-2, betas=(0.9, 0.95))
    train(adamw, q)
    optimizer = tempered(p)
    optimizer.load_state_dict(adamw.state_dict())
    square, state = adamw.state[q]["exp_avg_sq"], optimizer.state[p]
    torch.testing.assert_close(state[ROWS], square.mean(1, keepdim=True))
    torch.testing.assert_close(state["exp_avg_sq"], square.mean(0, keepdim=True))
    back = adamw_state_dict(optimizer)["state"][0]["exp_avg_sq"]
    torch.testing.assert_close(back, state["exp_avg_sq"] * state[ROWS] / state[ROWS].mean())
    for dim in (0, 1):
        torch.testing.assert_close(back.mean(dim), square.mean(dim), msg="Adafactor keeps both margins")
    plain = CoupledAdam([("table", nn.Parameter(p.detach().clone()))], coupling_factor=0.1)
    plain.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(plain.state_dict()["state"][0]["exp_avg_sq"], back)


def test_a_running_coupled_adam_goes_on_with_it() -> None:
    p, q = table(), table()
    coupled = tempered(q, 0.0)
    train(coupled, q)
    optimizer = tempered(p)
    optimizer.load_state_dict(coupled.state_dict())
    rows = optimizer.state[p][ROWS]
    torch.testing.assert_close(rows, coupled.state[q]["exp_avg_sq"].mean().expand(V, 1), msg="all alike at first")
    assert optimizer.param_groups[0]["row_exponent"] == 0.5, "what is computed is the optimizer's own"
    back = tempered(table(), 0.0)
    back.load_state_dict(optimizer.state_dict())
    assert all(ROWS not in state for state in back.state.values())


@pytest.mark.parametrize("rows", [V - 7, V + 5])
def test_a_resized_vocabulary_keeps_its_rows(rows: int) -> None:
    p = table()
    optimizer = tempered(p)
    train(optimizer, p)
    resized = table(rows)
    other = tempered(resized)
    other.load_state_dict(optimizer.state_dict(), resize_vocabulary=True)
    before, after = optimizer.state[p][ROWS], other.state[resized][ROWS]
    kept = min(rows, V)
    assert torch.equal(after[:kept], before[:kept])
    torch.testing.assert_close(after[kept:], before.mean().expand(rows - kept, 1))
    train(other, resized, 20, 3)


def test_a_state_without_rows_is_refused_with_the_remedy() -> None:
    p = table()
    optimizer = tempered(p, 0.0)
    train(optimizer, p, steps=2)
    optimizer.param_groups[0]["row_exponent"] = 0.5
    with pytest.raises(RuntimeError, match=r"state of parameter 'table' has no 'exp_avg_sq_rows'\. Load a checkpoint"):
        train(optimizer, p, 2, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, p, 2, 1)
    optimizer.state[p][ROWS] = optimizer.state[p][ROWS][:-1]
    with pytest.raises(RuntimeError, match="it was resized after the first step"):
        train(optimizer, p, 3, 1)


def test_before_any_gradient_nothing_moves() -> None:
    for direction in ("ratio", "atan2"):
        p = table()
        start = p.detach().clone()
        optimizer = tempered(p)
        optimizer.param_groups[0]["direction"] = direction
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert torch.equal(p.detach(), start)


def test_a_step_that_grad_scaler_skips_leaves_the_rows_alone() -> None:
    p = table()
    optimizer = tempered(p)
    train(optimizer, p, steps=3)
    before, rows = p.detach().clone(), optimizer.state[p][ROWS].clone()
    p.grad = torch.full_like(p, torch.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(p.detach(), before) and torch.equal(optimizer.state[p][ROWS], rows)
