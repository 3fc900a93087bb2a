"""The first moment in bfloat16, stochastically rounded."""

import copy

import pytest
import torch
from numba import njit
from torch import nn

from coupled_adam import Adams, CoupledAdam, param_groups
from coupled_adam.optim.backends import cpu_kernels
from coupled_adam.optim.rounding import dice_for, seed_of, stochastically_rounded


def test_rounding_is_right_on_average_and_to_a_neighbour() -> None:
    x = torch.tensor([1.0 + 2.0**-10, -3.0 - 2.0**-9, 1e-20, 0.0, 1.0])[:, None].expand(5, 20_000).contiguous()
    rounded = stochastically_rounded(x, step=1).float()
    # One eighth of the way from 1 to its upper neighbor 1 + 2^-7, so up in one case out of eight.
    assert rounded[0].unique().tolist() == [1.0, 1.0 + 2.0**-7]
    assert ((rounded[0] > 1).float().mean() - 1 / 8).abs() < 0.01
    assert rounded[1].unique().tolist() == [-3.0 - 2.0**-6, -3.0]
    torch.testing.assert_close(rounded.mean(1), x.mean(1), rtol=1e-3, atol=0)
    assert torch.equal(rounded[3:], x[3:]), "what bfloat16 can represent stays"


def test_the_dice_differ_by_step_and_element_and_never_by_chance() -> None:
    x = torch.full((1000,), 1.0 + 2.0**-8)
    one, again, two = (stochastically_rounded(x, step) for step in (1, 1, 2))
    assert torch.equal(one, again)
    agreement = (one == two).float().mean()
    assert 0.4 < agreement < 0.6, "independent coins agree half the time"
    assert 0.4 < (one[1:] == one[:-1]).float().mean() < 0.6


#: Indexes at which 32 bits begin to matter, by a sign or by running over.
FIRST = (0, 2**31 - 500, 2**32 - 500, 2**33, 2**40 - 500)


@pytest.mark.parametrize("first", FIRST)
def test_the_dice_are_even_and_independent(first: int) -> None:
    n = 2**16
    thrown = {
        (step, start): dice_for(torch.empty(n), step, start).double()
        for step in (1, 2, 3, 1000)
        for start in (first, first + 2**32)
    }
    dice = thrown[1, first]
    assert dice.min() >= 0 and dice.max() < 2**16
    limit = 5 / n**0.5  # five standard deviations of a correlation

    def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
        return torch.corrcoef(torch.stack([x, y]))[0, 1].item()

    for x in thrown.values():
        assert abs(x.mean().item() / 2**16 - 0.5) < limit / 12**0.5
        for part in ((x / 256).floor(), x.remainder(256)):
            counts = torch.histc(part, 256, 0, 256)
            squares = ((counts - n / 256).square() / (n / 256)).sum().item()
            assert abs(squares - 255) < 5 * (2 * 255) ** 0.5, "χ² of 256 equal shares"
        for lag in (1, 2, 16, 256, 768):
            assert abs(correlation(x[lag:], x[:-lag])) < 1.01 * limit, "of neighbors, in a row and in a column"
    others = [x for key, x in thrown.items() if key != (1, first)]
    assert all(abs(correlation(dice, x)) < limit for x in others), "of other steps and of another upper half"


def test_the_dice_of_an_element_are_even_over_the_steps() -> None:
    over = torch.stack([dice_for(torch.empty(200), step).double() for step in range(1, 1001)]) / 2**16 - 0.5
    deviation = (1 / 12 / 1000) ** 0.5
    assert over.mean(0).abs().max() < 5 * deviation
    assert (over[1:] * over[:-1]).mean(0).abs().max() < 5 / 12 / 1000**0.5


@pytest.mark.parametrize("first", FIRST)
def test_the_dice_do_not_depend_on_where_a_tensor_is_cut(first: int) -> None:
    parts = [dice_for(torch.empty(300), 7, first), dice_for(torch.empty(700), 7, first + 300)]
    assert torch.equal(dice_for(torch.empty(1000), 7, first), torch.cat(parts))


@pytest.mark.parametrize("first", FIRST)
def test_the_kernels_throw_the_same_dice(first: int) -> None:
    @njit
    def thrown(start, seed, dice):  # type: ignore[no-untyped-def]
        keys = cpu_kernels._keys(start, seed)
        for j in range(len(dice)):
            dice[j] = cpu_kernels._dice(start, j, keys)

    found = torch.empty(1000, dtype=torch.int64)
    thrown(first, seed_of(7), found.numpy())
    assert torch.equal(found, dice_for(found, 7, first))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    assert not torch.isfinite(stochastically_rounded(torch.full((100,), value), step=3)).any()


def test_a_moving_average_arrives_where_plain_rounding_sticks(fused: bool | None) -> None:
    parameter = nn.Parameter(torch.zeros(50, 40))
    optimizer = CoupledAdam(
        [{"params": [parameter], "second_moment": "vocabulary"}],
        lr=0.0,
        betas=(0.999, 0.999),
        exp_avg_dtype=torch.bfloat16,
        fused=fused,
    )
    parameter.grad = torch.ones_like(parameter)
    for _ in range(2000):
        optimizer.step()
    moment = optimizer.state[parameter]["exp_avg"]
    assert moment.dtype == torch.bfloat16
    assert moment.float().mean().item() == pytest.approx(1 - 0.999**2000, rel=0.01)

    stuck = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(2000):
        stuck.lerp_(torch.ones((), dtype=torch.bfloat16), 0.001)
    assert stuck < 0.6


@pytest.mark.parametrize("cls", [CoupledAdam, Adams])
def test_training_is_about_as_good_as_in_float32(cls: type) -> None:
    losses = {}
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 40, bias=False))
        optimizer = cls(param_groups(model, coupled=[model[1]]), lr=1e-2, exp_avg_dtype=dtype)
        for i in range(200):
            tokens = torch.randint(40, (64,), generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens), (tokens * 7 + 3) % 40)
            loss.backward()
            optimizer.step()
        losses[dtype] = loss.item()
    assert losses[None] < 1.0
    assert losses[torch.bfloat16] == pytest.approx(losses[None], rel=0.05, abs=0.01)


def test_a_resumed_run_and_a_replica_agree_bit_for_bit(tmp_path) -> None:
    def steps(optimizer: CoupledAdam, parameter: nn.Parameter, numbers: range) -> None:
        for i in numbers:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            optimizer.step()

    def make() -> tuple[CoupledAdam, nn.Parameter]:
        parameter = nn.Parameter(torch.zeros(30, 8))
        group = {"params": [parameter], "second_moment": "vocabulary"}
        return CoupledAdam([group], exp_avg_dtype=torch.bfloat16), parameter

    whole, replica = make(), make()
    torch.manual_seed(1)
    steps(*whole, range(10))
    torch.manual_seed(2)
    steps(*replica, range(6))
    torch.save(copy.deepcopy(replica[0].state_dict()), tmp_path / "checkpoint.pt")
    optimizer, parameter = make()
    with torch.no_grad():
        parameter.copy_(replica[1])
    optimizer.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.bfloat16
    steps(optimizer, parameter, range(6, 10))
    assert torch.equal(parameter, whole[1])
