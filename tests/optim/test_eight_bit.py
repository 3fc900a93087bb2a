"""The first moment of a coupled matrix in eight bits."""

import copy

import one_step
import pytest
import torch
from torch import Tensor, nn

from coupled_adam import Adams, CoupledAdam, describe, param_groups
from coupled_adam.monitor import drift
from coupled_adam.optim import eight_bit
from coupled_adam.optim.backends import cpu, plain
from coupled_adam.optim.eight_bit import EightBit, quantized, widened

MAGNITUDES = [0.0] + [10.0 ** (i - 6) * (0.1 + 0.9 * k / 2**i) for i in range(7) for k in range(1, 2**i + 1)]


def matrices(shape: tuple[int, int], count: int, seed: int = 0) -> list[Tensor]:
    """Of numbers over many decades."""
    generator = torch.Generator().manual_seed(seed)
    found = (torch.randn(shape, generator=generator) for _ in range(2 * count))
    return [x * y.exp() ** 3 for x, y in zip(found, found, strict=True)]


def coupled(parameter: nn.Parameter, **settings: object) -> CoupledAdam:
    settings = {"exp_avg_dtype": "8bit", **settings}
    return CoupledAdam([{"params": [("table", parameter)], "second_moment": "vocabulary"}], **settings)


def steps(optimizer: CoupledAdam, parameter: nn.Parameter, numbers: range) -> None:
    for i in numbers:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        optimizer.step()


def test_the_codes_stand_for_the_magnitudes_that_are_documented() -> None:
    codes = torch.arange(-127, 128, dtype=torch.int8)[None]
    found = widened(EightBit(codes, torch.full((1, 1), 2.0)))[0].double()
    expected = 2 * torch.tensor([*(-x for x in reversed(MAGNITUDES[1:])), *MAGNITUDES], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found[0] == -2 and found[-1] == 2, "the scale itself is kept exactly"
    assert len(MAGNITUDES) == 128


def test_the_formulas_of_numbers_and_of_tensors_are_the_same_to_the_bit() -> None:
    n = torch.arange(128, dtype=torch.float32)
    values = eight_bit._chosen(torch.maximum, n, eight_bit.INVERSES)
    assert [float(eight_bit.magnitude_of(x)) for x in n.numpy()] == values.tolist()
    y = torch.cat([values, torch.rand(1000), torch.rand(1000) ** 20])
    numbers = eight_bit._chosen(torch.minimum, y, eight_bit.LINES)
    assert [float(eight_bit.number_of(x)) for x in y.numpy()] == numbers.tolist()
    assert (numbers[:128] - n).abs().max() < 1e-4 and numbers[127] == 127


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 700])
def test_rounding_is_to_a_neighbor_and_right_on_average(columns: int) -> None:
    (row,) = matrices((1, columns), 1)
    x = row.expand(4000, -1).contiguous()
    kept = quantized(x, step=1)
    assert kept.codes.dtype == torch.int8 and kept.scales.shape == (4000, -(-columns // 256))
    spread = kept.scales[0].repeat_interleave(256)[:columns]
    assert torch.equal(kept.scales[0], torch.stack([part.max() for part in row[0].abs().split(256)]))
    values = torch.tensor(MAGNITUDES)
    y = (row[0].abs() / spread).clamp(max=1)
    upper = torch.searchsorted(values, y - 1e-6 * y).clamp(1, 127)
    found = widened(kept).abs() / spread
    near = (found - values[upper - 1]).abs().minimum((found - values[upper]).abs())
    assert (near <= 1e-5 * values[upper]).all()
    deviation = (values[upper] - values[upper - 1]) / 2 / 4000**0.5
    assert ((found.mean(0) - y).abs() <= 5 * deviation + 1e-6).all()
    assert (widened(kept) * row >= 0).all(), "signs stay"


def test_a_block_of_zeros_stays_zero_and_what_is_not_finite_is_seen() -> None:
    x = torch.ones(4, 300)
    x[0], x[1, :256], x[2, 299], x[3, 0] = 0, 1e-39, float("nan"), float("-inf")
    kept = quantized(x, step=1)
    assert kept.scales[0].tolist() == [0, 0] and kept.scales[1].tolist() == [0, 1]
    found = widened(kept)
    assert torch.equal(found[0], x[0]) and not found[1, :256].any()
    assert found[2, 256:].isnan().all() and found[3, :256].isnan().all()
    assert found[2, :256].eq(1).all() and found[3, 256:].eq(1).all(), "only in that block"


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (40, 256), (33, 700), (3, 2100), (1100, 3)])
@pytest.mark.parametrize("direction", ["ratio", "atan2"])
def test_the_kernel_keeps_what_the_plain_functions_keep_to_the_bit(shape: tuple[int, int], direction: str) -> None:
    for step in range(1, 4):
        param, grad, moment, noise = matrices(shape, 4, seed=step)
        grad[0] = moment[0] = 0
        if step == 2:  # the largest scale, and blocks that have none
            grad[-1], moment[-1] = 1e38, 3e38
            grad[0] = 1e-39
        if step == 3:
            grad[-1, -1], moment[-1, 0] = float("inf"), float("nan")
        given = param, grad, quantized(moment, 0), noise.square().mean(0, keepdim=True)
        outcomes = []
        for backend in (plain, cpu):
            made = one_step.job(given, True, step, direction=direction)
            made.clip, made.means = 0.37, grad.square().mean(0, keepdim=True).nan_to_num(posinf=1.0)
            backend.move([made])
            outcomes.append((made.param, made.exp_avg))
        (theta, slow), (moved, fast) = outcomes
        assert torch.equal(slow.codes, fast.codes)
        torch.testing.assert_close(slow.scales, fast.scales, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(theta, moved, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_a_moving_average_arrives_where_rounding_to_the_nearest_sticks(
    fused: bool | None,
) -> None:
    parameter = nn.Parameter(torch.zeros(20, 300))
    optimizer = coupled(parameter, lr=0.0, betas=(0.999, 0.999), fused=fused)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parameter.grad[:, 1:] = -0.5  # the first of a row keeps the scale where it is
    for _ in range(1500):
        optimizer.step()
    found = optimizer.first_moment(parameter)[:, 1:256]
    exact = 0.001 * 0.999**1500 - 0.5 * (1 - 0.999**1500)
    assert found.mean().item() == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("factor", [0.0, 0.1])
def test_steps_are_those_of_float32_within_the_rounding(
    factor: float, fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "BLOCK_ELEMENTS", 3000)
    outcomes = []
    for dtype in (None, "8bit"):
        parameter = nn.Parameter(torch.zeros(30, 300))
        settings = {"coupling_factor": factor, "max_grad_norm": 1.0, "fused": fused}
        optimizer = coupled(parameter, lr=0.01, exp_avg_dtype=dtype, **settings)
        steps(optimizer, parameter, range(8))
        outcomes.append((parameter.detach(), optimizer.first_moment(parameter), optimizer.state[parameter]))
    (theta, moment, _), (rounded, found, state) = outcomes
    assert (found - moment).abs().max() < 0.05 * moment.abs().max() and not torch.equal(found, moment)
    assert (rounded - theta).norm() < 0.02 * theta.norm()
    assert sorted(state) == ["exp_avg_codes", "exp_avg_scales", "exp_avg_sq", "step"]


def test_the_state_is_little_more_than_a_byte_a_number_and_others_keep_theirs() -> None:
    table, vector = nn.Parameter(torch.zeros(1000, 768)), nn.Parameter(torch.zeros(7))
    groups = [{"params": [table], "second_moment": "vocabulary"}, {"params": [vector]}]
    optimizer = CoupledAdam(groups, exp_avg_dtype="8bit")
    for p in (table, vector):
        p.grad = torch.ones_like(p)
    text = describe(optimizer)
    optimizer.step()
    assert sum(x.nbytes for x in optimizer.state[table].values()) < 1.021 * table.numel()
    assert optimizer.state[vector]["exp_avg"].dtype == torch.float32
    assert describe(optimizer) == text and "state: 783.1 kB" in text


def test_a_resumed_run_and_a_replica_agree_bit_for_bit(tmp_path) -> None:
    def make() -> tuple[CoupledAdam, nn.Parameter]:
        parameter = nn.Parameter(torch.zeros(30, 8))
        return coupled(parameter), parameter

    whole, replica = make(), make()
    steps(*whole, range(10))
    steps(*replica, range(6))
    torch.save(copy.deepcopy(replica[0].state_dict()), tmp_path / "checkpoint.pt")
    optimizer, parameter = make()
    with torch.no_grad():
        parameter.copy_(replica[1])
    optimizer.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    steps(optimizer, parameter, range(6, 10))
    assert torch.equal(parameter, whole[1])
    for x, y in zip(optimizer.state[parameter].values(), whole[0].state[whole[1]].values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_any_form_of_the_moment_loads_into_any_other(param_dtype: torch.dtype) -> None:
    for before, after in [(None, "8bit"), (torch.bfloat16, "8bit"), ("8bit", None), ("8bit", torch.bfloat16)]:
        parameter = nn.Parameter(torch.zeros(30, 300, dtype=param_dtype))
        old, new = (coupled(parameter, exp_avg_dtype=dtype) for dtype in (before, after))
        for i in range(3):
            parameter.grad = torch.randn(30, 300, generator=torch.Generator().manual_seed(i)).to(param_dtype)
            old.step()
        new.load_state_dict(old.state_dict())
        moment = old.first_moment(parameter).float()
        assert (new.first_moment(parameter) - moment).abs().max() < 0.02 * moment.abs().max()
        assert ("exp_avg" in new.state[parameter]) == (after != "8bit")
        new.step()


def test_a_running_adamw_can_be_switched() -> None:
    parameter = nn.Parameter(torch.zeros(30, 8))
    adamw = torch.optim.AdamW([parameter])
    steps(adamw, parameter, range(3))
    optimizer = coupled(parameter)
    optimizer.load_state_dict(adamw.state_dict())
    moment = adamw.state[parameter]["exp_avg"]
    assert (optimizer.first_moment(parameter) - moment).abs().max() < 0.02 * moment.abs().max()


def test_training_is_about_as_good_as_in_float32() -> None:
    losses = {}
    for dtype in (None, "8bit"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 40, bias=False))
        optimizer = Adams(param_groups(model, coupled=[model[1]]), lr=1e-2, exp_avg_dtype=dtype)
        for i in range(200):
            tokens = torch.randint(40, (64,), generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens), (tokens * 7 + 3) % 40)
            loss.backward()
            optimizer.step()
        losses[dtype] = loss.item()
    assert losses[None] < 1.0
    assert losses["8bit"] == pytest.approx(losses[None], rel=0.05, abs=0.01)


def test_drift_reads_it() -> None:
    parameter = nn.Parameter(torch.randn(30, 8))
    optimizer = coupled(parameter, lr=0.1)
    with pytest.raises(ValueError, match="no moments yet: call step"):
        optimizer.first_moment(parameter)
    steps(optimizer, parameter, range(3))
    before = parameter.detach().mean(0)
    steps(optimizer, parameter, range(3, 4))
    found = drift(optimizer, parameter)
    torch.testing.assert_close(found.total.float(), parameter.detach().mean(0) - before, rtol=0.02, atol=1e-3)


def test_what_cannot_be_is_said() -> None:
    parameter = nn.Parameter(torch.zeros(30, 8))
    with pytest.raises(ValueError, match=r"Invalid exp_avg_dtype: '4bit'; choose torch.bfloat16, '8bit', or None"):
        coupled(parameter, exp_avg_dtype="4bit")
    optimizer = coupled(parameter)
    steps(optimizer, parameter, range(1))
    checkpoint = optimizer.state_dict()
    checkpoint["state"][0]["exp_avg_scales"] = torch.zeros(30, 2)
    with pytest.raises(ValueError, match=r"exp_avg_scales of parameter 'table' has shape \(30, 2\), not \(30, 1\)"):
        coupled(parameter).load_state_dict(checkpoint)
    del checkpoint["state"][0]["exp_avg_scales"]
    with pytest.raises(ValueError, match="has no 'exp_avg_scales'"):
        coupled(parameter).load_state_dict(checkpoint)
    with pytest.raises(RuntimeError, match="do not fit together"):
        wrong = EightBit(torch.zeros(30, 8, dtype=torch.int8), torch.zeros(30, 2))
        made = one_step.job((parameter.detach(), torch.zeros(30, 8), wrong, torch.ones(1, 8)))
        made.means = torch.ones(1, 8)
        cpu.move([made])
