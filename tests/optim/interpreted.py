"""The GPU kernels in Triton's interpreter, on tensors of the CPU, against the plain functions.

A program of its own (``test_triton.py`` runs it): the interpreter is chosen before triton is imported.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import jobs
import one_step
import processes
import pytest
import torch
import triton
import triton.language as tl
from processes import Processes
from torch import Tensor

from coupled_adam import Adams, CoupledAdam
from coupled_adam.optim import backends
from coupled_adam.optim.backends import gpu, gpu_kernels, plain
from coupled_adam.optim.directions import DIRECTION, Direction
from coupled_adam.optim.eight_bit import quantized
from coupled_adam.optim.job import Job
from coupled_adam.optim.rounding import dice_for, seed_of
from coupled_adam.optim.spectral import RankOne

processes.PRELOADED = ["torch.distributed.fsdp", "triton", "jobs"]

#: Rows of any length: one, not a power of two, longer than a tile is wide; one row; more rows than a tile has.
MATRICES = [(5, 1), (1, 3), (40, 24), (3, 300)]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels take tensors of the CPU; their names, as they are launched."""
    names, launch = [], gpu.launch
    monkeypatch.setattr(gpu, "DEVICES", ["cpu"])
    monkeypatch.setattr(gpu, "launch", lambda name, *a, **k: (names.append(name), launch(name, *a, **k)))
    return names


class OnDevice(Tensor):
    """Says that it is not on the CPU where it is asked whether reading it is free."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def on_device(x: float) -> Tensor:
    """A number that a step must not read."""
    return torch.tensor(x, dtype=torch.float32).as_subclass(OnDevice)


def job(tensors: Any, step: float = 1, device: bool = False, clip: float = 1.0, **settings: Any) -> Job:
    """A job; its numbers may lie on the device."""
    made = one_step.job(tensors, step=step, **settings)
    made.clip = clip
    if device:
        made.state["step"] = made.state["step"].as_subclass(OnDevice)
        made.clip, made.group["lr"] = torch.tensor(clip, dtype=torch.float64), on_device(made.group["lr"])
    return made


def tensors(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def agree(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    for name, x, y in zip(("param", "exp_avg", "exp_avg_sq"), found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("direction", sorted(DIRECTION))
@pytest.mark.parametrize("shape", MATRICES)
def test_matrices(
    shape: tuple[int, int],
    direction: str,
    narrow: bool,
    spectral: bool,
    launched: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "ROWS", 16)  # several blocks of them
    numbers = itertools.product([0.0, 0.1], [(1.0, False), (0.37, True), (-1.0, True)], [True, False])
    for i, (factor, (clip, device), shared) in enumerate(numbers):
        param, grad, exp_avg, noise = tensors(shape, 4, seed=i)
        exp_avg = exp_avg.bfloat16() if narrow else exp_avg
        exp_avg_sq = noise.square().mean(0, keepdim=True) if shared else noise.square()
        triple = RankOne(*tensors(shape[:1], 1), *tensors(shape[1:], 1)) if spectral else None
        settings = {"step": i + 1, "clip": clip, "shared": shared, "triple": triple, "coupling_factor": factor}
        given = (param, grad, exp_avg, exp_avg_sq)
        expected = one_step.stepped(plain, job(given, direction=direction, **settings))
        monkeypatch.setattr(gpu, "moves_together", lambda job: False)
        found = one_step.stepped(gpu, job(given, direction=direction, device=device, **settings))
        agree(found, expected)
        assert torch.equal(found[1], expected[1]), "first moments to the bit"
    assert "move_matrix" in launched and set(launched) <= {"sum_rows", "root_of_rows", "move_matrix"}


@pytest.mark.parametrize("direction", sorted(DIRECTION))
@pytest.mark.parametrize("shape", [*MATRICES, (9, 256)])
def test_moments_in_eight_bits(shape: tuple[int, int], direction: str, launched: list[str]) -> None:
    for step, found_inf in ((1, None), (2, torch.tensor(0.0)), (3, torch.tensor(1.0))):
        param, grad, exp_avg, noise = tensors(shape, 4, seed=step)
        exp_avg, exp_avg_sq = exp_avg * noise.exp() ** 3, noise.square().mean(0, keepdim=True)
        exp_avg[0] = grad[0] = 0
        if step > 1:
            grad[-1, -1] = float("inf")
        given = (param, grad, quantized(exp_avg, 0), exp_avg_sq)
        settings = {"step": step, "clip": 0.37, "shared": True, "direction": direction}
        made, kernels = job(given, **settings), job(given, device=step > 1, **settings)
        made.grad = kernels.grad = tensors(shape, 1)[0]
        square = plain.sums(made) / len(grad)
        torch.testing.assert_close(gpu.sums(kernels) / len(grad), square)
        for each in (made, kernels):
            each.grad, each.means = grad, square
        kernels.found_inf = found_inf
        if step < 3:
            plain.move([made])
        gpu.move([kernels])
        torch.testing.assert_close(kernels.param, made.param, rtol=1e-6, atol=1e-6, equal_nan=True)
        assert torch.equal(kernels.exp_avg.codes, made.exp_avg.codes), "to the bit"
        torch.testing.assert_close(kernels.exp_avg.scales, made.exp_avg.scales, rtol=0, atol=0, equal_nan=True)
    assert launched == ["sum_rows", "root_of_rows", "move_matrix"] * 3


def test_a_batch_of_matrices_with_spectral_decay(launched: list[str]) -> None:
    param, grad, exp_avg, noise = tensors((2, 7, 5), 4)
    triple = RankOne(*tensors((2, 7), 1), *tensors((2, 5), 1))
    given = (param, grad, exp_avg, noise.square())
    settings = {"direction": "atan2", "step": 2, "triple": triple}
    agree(*(one_step.stepped(backend, job(given, **settings)) for backend in (gpu, plain)))
    assert launched == ["move_matrix"]


@pytest.mark.parametrize("halted", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("direction", sorted(DIRECTION))
def test_many_tensors(direction: str, narrow: bool, halted: bool, launched: list[str]) -> None:
    shapes = [(i % 5 + 1, 3 * i + 1) for i in range(30)] + [(), (1,), (1100,), (2, 3, 4)]
    found, expected = [], []
    for step, shape in enumerate(shapes, start=1):
        param, grad, exp_avg, noise = tensors(shape, 4, step)
        given = (param, grad, exp_avg.bfloat16() if narrow else exp_avg, noise.square())
        settings = {"step": step, "clip": 0.3, "direction": direction, "coupling_factor": 0.1}
        found.append(job(given, device=True, **settings))
        found[-1].found_inf = torch.tensor(float(halted))
        expected.append(given if halted else one_step.stepped(plain, job(given, **settings)))
    alike = [f for f in found if f.param.numel() % gpu.EVEN]
    for together in (alike, [f for f in found if f not in alike]):
        gpu.move_many_(together)
    assert launched == ["move_many"] * 2
    for made, given in zip(found, expected, strict=True):
        if halted:
            assert all(map(torch.equal, (made.param, made.exp_avg, made.exp_avg_sq), (given[0], *given[2:])))
            continue
        agree([made.param, made.exp_avg, made.exp_avg_sq], given)
        assert torch.equal(made.exp_avg, given[1]), "first moments to the bit"


def test_more_tensors_than_a_launch_takes(launched: list[str]) -> None:
    given = [tuple(x.abs() for x in tensors((3,), 4, seed)) for seed in range(70)]
    found = [job(x, step=2) for x in given]
    gpu.move(found)
    assert launched == ["move_many"] * 3
    for made, x in zip(found, given, strict=True):
        agree([made.param, made.exp_avg, made.exp_avg_sq], one_step.stepped(plain, job(x, step=2)))
        assert made.state["step"] == 2


@pytest.mark.parametrize("shape", [(40, 24), (7,)])
def test_a_halted_step_changes_nothing_on_any_path(shape: tuple[int, ...], launched: list[str]) -> None:
    param, grad, exp_avg, noise = tensors(shape, 4)
    grad[0] = float("inf")
    exp_avg_sq = noise.square().mean(0, keepdim=True) if len(shape) == 2 else noise.square()
    for backend in (gpu, plain):
        for moment in (exp_avg, exp_avg.bfloat16(), torch.zeros_like(exp_avg)):
            state = (param, moment, exp_avg_sq * (moment != 0).any())  # also the first step, where all is 0
            for direction in DIRECTION:
                made = job((param, grad, *state[1:]), device=True, direction=direction, eps=0.0)
                made.found_inf = torch.tensor(1.0)
                assert all(map(torch.equal, one_step.stepped(backend, made), state))
            made = job((param, *tensors(shape, 1), *state[1:]), device=True, direction="atan2")
            made.found_inf = torch.tensor(0.0)
            assert not any(map(torch.equal, one_step.stepped(backend, made), state)), "0 halts nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_and_gradients(dtype: torch.dtype, launched: list[str]) -> None:
    for shape in ((40, 24), (24,)):
        param, grad, exp_avg, noise = tensors(shape, 4)
        param, grad = param.to(dtype), grad.to(dtype)
        exp_avg_sq = noise.square().mean(0, keepdim=True) if len(shape) == 2 else noise.square()
        given = (grad, exp_avg, exp_avg_sq)
        expected = one_step.stepped(plain, job((param.float(), *given), step=2))
        found = one_step.stepped(gpu, job((param, *given), step=2))
        assert found[0].dtype == dtype
        for x, y in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
        # The interpreter cuts bits off where a GPU rounds.
        exact = expected[0]
        cut = (exact.view(torch.int32) & -0x10000).view(torch.float32) if dtype == torch.bfloat16 else exact.to(dtype)
        assert (found[0].float() == cut.float()).float().mean() > 0.99
        torch.testing.assert_close(found[0].float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_column_sums_are_exact_to_float32_and_the_same_every_time(launched: list[str]) -> None:
    grad = tensors((1500, 7), 1)[0] * torch.logspace(-3, 3, 7)
    zero = torch.zeros_like(grad)
    first, second = (gpu.sums(job((zero, grad, zero, zero[:1]), clip=0.5)) for _ in range(2))
    expected = grad.double().square().sum(0, keepdim=True) / 4
    torch.testing.assert_close(first.double(), expected, rtol=2e-7, atol=0)
    assert first.dtype == torch.float32 and torch.equal(first, second)


@pytest.mark.parametrize("direction", sorted(DIRECTION))
def test_what_is_not_finite_is_seen(direction: str, launched: list[str]) -> None:
    for moment in (torch.float32, torch.bfloat16):
        param, grad, exp_avg, noise = tensors((6, 4), 4)
        grad[1, 2], exp_avg[2, 1], grad[3, 3] = float("nan"), float("nan"), float("inf")
        given = (param, grad, exp_avg.to(moment), noise.square().mean(0, keepdim=True))
        both = (one_step.stepped(m, job(given, step=2, direction=direction))[1:] for m in (gpu, plain))
        for x, y in zip(*both, strict=True):
            assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf())


STEPS = {
    "coupled": lambda groups: CoupledAdam(groups, lr=0.01),
    "clipped": lambda groups: CoupledAdam(groups, lr=torch.tensor(0.01), max_grad_norm=0.5),
    "centered": lambda groups: CoupledAdam([{**groups[0], "center": True}, groups[1]], lr=0.01, max_grad_norm=0.5),
    "narrow": lambda groups: CoupledAdam(groups, lr=0.01, exp_avg_dtype=torch.bfloat16, max_grad_norm=0.5),
    "eight bits": lambda groups: CoupledAdam(groups, lr=0.01, exp_avg_dtype="8bit"),
    "factor": lambda groups: CoupledAdam(groups, lr=0.01, coupling_factor=0.1, max_grad_norm=0.5),
    "tempered": lambda groups: CoupledAdam(groups, lr=0.01, row_exponent=0.5, max_grad_norm=0.5),
    "tempered eight bits": lambda groups: CoupledAdam(groups, lr=0.01, row_exponent=0.5, exp_avg_dtype="8bit"),
    "adams": lambda groups: Adams(groups, lr=0.01, max_grad_norm=0.5),
    "narrow adams": lambda groups: Adams(groups, lr=0.01, exp_avg_dtype=torch.bfloat16),
}
SHAPES = [(40, 24), (24, 24), (24,), (1,), (), (0, 3), (2, 5, 7), (13, 1)]


@pytest.mark.parametrize("kind", STEPS)
def test_whole_steps(kind: str, launched: list[str]) -> None:
    outcomes = []
    for fused in (None, False):
        params = [x.requires_grad_() for i, shape in enumerate(SHAPES) for x in tensors(shape, 1, i)]
        groups = [{"params": params[:1], "second_moment": "vocabulary"}, {"params": params[1:], "weight_decay": 0.1}]
        optimizer = STEPS[kind]([{**group, "fused": fused} for group in groups])
        for step in range(3):
            for i, p in enumerate(params):
                (p.grad,) = tensors(p.shape, 1, 10 * step + i)
            grads = [p.grad.clone() for p in params]
            optimizer.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True)), "gradients stay"
        outcomes.append([x.detach() for p in params for x in (p, *optimizer.state[p].values())])
    for x, y in zip(*outcomes, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert launched.count("sum_rows") == launched.count("root_of_rows") == 3
    unclipped = ("coupled", "eight bits", "tempered eight bits")
    assert ("move_many" in launched) is (kind not in unclipped), "unclipped AdamW is torch's"


def test_what_a_kernel_cannot_reach_is_left_to_others(launched: list[str]) -> None:
    for change in (lambda x: x.double(), lambda x: x.t().contiguous().t(), lambda x: x.repeat_interleave(2, 0)[::2]):
        param, grad, exp_avg, noise = (change(x) for x in tensors((6, 4), 4))
        made = job((param, grad, exp_avg, noise.square().mean(0, keepdim=True)))
        made.param = param  # a copy is contiguous
        assert gpu.refuses(made) and backends.of(made) is plain
    odd = torch.zeros(9)[1:]
    made = job(tensors((8,), 4), direction="atan2")
    assert backends.of(made) is gpu
    made.param = odd
    assert "16 bytes" in gpu.refuses(made) and backends.of(made) is not gpu
    assert not launched


def test_a_direction_without_a_form_is_left_to_others(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sign = Direction(tensors=lambda m, root, eps: m.sign(), numbers=lambda m, root, eps: float(str(m)))
    monkeypatch.setitem(DIRECTION, "sign", sign)
    param, grad, exp_avg, noise = tensors((6, 4), 4)
    made = job((param, grad, exp_avg, noise.square()), direction="sign")
    assert "has no kernel" in gpu.refuses(made) and backends.of(made) is not gpu


def test_what_moves_together_is_alike(launched: list[str]) -> None:
    good, zero = (job([torch.zeros(6, 4)] * 4) for _ in range(2)), torch.zeros(6, 4)
    for bad in ([zero.bfloat16(), *[zero] * 3], [zero, zero, zero.bfloat16(), zero], [*[zero] * 3, zero[:1]]):
        with pytest.raises(RuntimeError, match="tensors updated together"):
            gpu.move_many_([job([zero] * 4), job(bad)])
    gpu.move_many_(list(good))
    assert launched == ["move_many"]


@pytest.fixture(scope="module")
def pair() -> Iterator[Processes]:
    """Two processes in Triton's interpreter, as this one."""
    processes = Processes(2)
    yield processes
    processes.stop()


@pytest.mark.parametrize("optimizer", ["clipped", "clipped factor", "clipped adams"])
def test_shards_of_two_processes_uneven_and_empty_ones_step_as_the_whole(optimizer: str, pair: Processes) -> None:
    expected, _ = jobs.sharded(optimizer)
    results = pair.run(jobs.sharded, optimizer, 2)
    for found, names in results:
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert {"sum_rows", "root_of_rows", "move_matrix"} <= names
    assert "move_many" in results[0][1], "of the other process not all shards lie at multiples of 16 bytes"


@triton.jit
def throw(dice, first, seed, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(dice + at, gpu_kernels._dice(tl.cast(first, tl.int64) + at, seed).to(tl.int64))


@pytest.mark.parametrize("first", [0, 2**31 - 500, 2**32 - 500, 2**33, 2**40 - 500])
def test_dice_fall_as_those_of_the_plain_functions(first: int) -> None:
    dice = torch.empty(1024, dtype=torch.int64)
    throw[(1,)](dice, first, seed_of(7), 1024)
    assert torch.equal(dice, dice_for(dice, 7, first))
