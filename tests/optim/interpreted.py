"""The GPU kernels in Triton's interpreter, on tensors of the CPU, against the plain functions.

A program of its own (``test_triton.py`` runs it): the interpreter is chosen before triton is imported.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

sys.path.append(str(Path(__file__).parents[1]))

import jobs
import processes
import pytest
import torch
from processes import Processes
from torch import Tensor

from coupled_adam import Adams, CoupledAdam
from coupled_adam.optim import dispatch, triton_launch, update
from coupled_adam.optim.directions import DIRECTION, Direction
from coupled_adam.optim.eight_bit import EightBit, quantized
from coupled_adam.optim.equations import Coefficients
from coupled_adam.optim.rounding import dice_of, seed_of

dispatch.HAS_NUMBA = False
processes.PRELOADED = ["torch.distributed.fsdp", "triton", "jobs"]

#: Rows of any length: one, not a power of two, longer than a tile is wide; one row; more rows than a tile has.
MATRICES = [(5, 1), (1, 3), (40, 24), (3, 300)]
HOST = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels take tensors of the CPU; their names, as they are launched."""
    names, launch = [], triton_launch.launch
    monkeypatch.setattr(triton_launch, "DEVICES", ["cpu"])
    monkeypatch.setattr(triton_launch, "launch", lambda name, *a, **k: (names.append(name), launch(name, *a, **k)))
    return names


def tensors(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def stepped(
    module, param, exp_avg, exp_avg_sq, grad, c, direction, step, spectral=None, *halt, shared: bool | None = None
) -> list[Tensor]:
    """One step by the functions of ``update`` or of ``dispatch``; a second moment of another shape is shared."""
    state = [x.clone() for x in (param, exp_avg, exp_avg_sq)]
    if not (exp_avg_sq.shape != param.shape if shared is None else shared):
        module.move_elements_(*state, grad, c, direction, step, spectral, *halt)
    else:
        square = module.sum_of_squares(grad, state[1], c) / len(grad)
        root = module.root_of_rows_(state[2], square, c, *halt)
        module.move_rows_(*state[:2], grad, root, c, direction, step, spectral, *halt)
    return state


def on_device(c: Coefficients) -> Coefficients:
    """The numbers that a device may hold, as tensors."""
    held = {"grad_factor", "first_scale", "root_scale", "lr", "decay"}
    return c._replace(**{name: torch.tensor(getattr(c, name), dtype=torch.float64) for name in held})


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
    monkeypatch.setattr(triton_launch, "ROWS", 16)  # several blocks of them
    numbers = itertools.product([0.0, 0.1], [(1.0, False), (0.37, True), (-1.0, True)], [True, False])
    for i, (factor, (grad_factor, device), shared) in enumerate(numbers):
        param, grad, exp_avg, noise = tensors(shape, 4, seed=i)
        exp_avg = exp_avg.bfloat16() if narrow else exp_avg
        exp_avg_sq = noise.square().mean(0, keepdim=True) if shared else noise.square()
        rank_one = update.RankOne(*tensors(shape[:1], 1), *tensors(shape[1:], 1)) if spectral else None
        c = Coefficients.of(step=i + 1, coupling_factor=factor, grad_factor=grad_factor, **HOST)
        expected = stepped(update, param, exp_avg, exp_avg_sq, grad, c, direction, i + 1, rank_one, shared=shared)
        step = torch.tensor(float(i + 1)) if device else i + 1
        c = on_device(c) if device else c
        found = stepped(dispatch, param, exp_avg, exp_avg_sq, grad, c, direction, step, rank_one, shared=shared)
        agree(found, expected)
        assert torch.equal(found[1], expected[1]), "first moments to the bit"
    assert "move_matrix" in launched and set(launched) <= {"sum_rows", "root_of_rows", "move_matrix"}


@pytest.mark.parametrize("direction", sorted(DIRECTION))
@pytest.mark.parametrize("shape", [*MATRICES, (9, 256)])
def test_moments_in_eight_bits(shape: tuple[int, int], direction: str, launched: list[str]) -> None:
    for step, halt in ((1, None), (2, torch.tensor(0.0)), (3, torch.tensor(1.0))):
        param, grad, exp_avg, noise = tensors(shape, 4, seed=step)
        exp_avg, exp_avg_sq = exp_avg * noise.exp() ** 3, noise.square().mean(0, keepdim=True)
        exp_avg[0] = grad[0] = 0
        if step > 1:
            grad[-1, -1] = float("inf")
        kept = quantized(exp_avg, 0)
        c = Coefficients.of(step=step, grad_factor=0.37, **HOST)
        plain, found = ((param.clone(), EightBit(*(x.clone() for x in kept))) for _ in range(2))
        square = update.sum_of_squares(tensors(shape, 1)[0], kept, c) / len(grad)
        torch.testing.assert_close(dispatch.sum_of_squares(tensors(shape, 1)[0], kept, c) / len(grad), square)
        root = update.root_of_rows_(exp_avg_sq, square, c)
        if step < 3:
            update.move_rows_(*plain, grad, root, c, direction, step)
        numbers = (on_device(c), direction, torch.tensor(float(step))) if step > 1 else (c, direction, step)
        dispatch.move_rows_(*found, grad, root, *numbers, None, halt)
        torch.testing.assert_close(found[0], plain[0], rtol=1e-6, atol=1e-6, equal_nan=True)
        assert torch.equal(found[1].codes, plain[1].codes), "to the bit"
        torch.testing.assert_close(found[1].scales, plain[1].scales, rtol=0, atol=0, equal_nan=True)
    assert launched == ["sum_rows", "move_matrix"] * 3


def test_a_batch_of_matrices_with_spectral_decay(launched: list[str]) -> None:
    param, grad, exp_avg, noise = tensors((2, 7, 5), 4)
    rank_one = update.RankOne(*tensors((2, 7), 1), *tensors((2, 5), 1))
    given = (param, exp_avg, noise.square(), grad, Coefficients.of(step=2, **HOST), "atan2", 2, rank_one)
    agree(stepped(dispatch, *given), stepped(update, *given))
    assert launched == ["move_matrix"]


@pytest.mark.parametrize("halted", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("direction", sorted(DIRECTION))
def test_many_tensors(direction: str, narrow: bool, halted: bool, launched: list[str]) -> None:
    shapes = [(i % 5 + 1, 3 * i + 1) for i in range(30)] + [(), (1,), (1100,), (2, 3, 4)]
    params, grads, exp_avgs, exp_avg_sqs = (
        [tensors(shape, 4, seed)[k] for seed, shape in enumerate(shapes)] for k in range(4)
    )
    exp_avgs = [x.bfloat16() for x in exp_avgs] if narrow else exp_avgs
    exp_avg_sqs = [x.square() for x in exp_avg_sqs]
    before = [x.clone() for x in (*params, *exp_avgs, *exp_avg_sqs)]
    steps = torch.arange(1, len(shapes) + 1, dtype=torch.float64)
    numbers = {**HOST, "coupling_factor": 0.1, "grad_factor": 0.3}
    expected = [
        stepped(update, *given, Coefficients.of(step=step, **numbers), direction, step)
        for *given, step in zip(params, exp_avgs, exp_avg_sqs, grads, steps.tolist(), strict=True)
    ]
    c = Coefficients.of(step=steps, **numbers)
    halt = torch.tensor(float(halted))
    triton_launch.move_many_(params, exp_avgs, exp_avg_sqs, grads, c, direction, steps, halt)
    assert launched == ["move_many"] * 2, "32 and the rest"
    if halted:
        assert all(map(torch.equal, (*params, *exp_avgs, *exp_avg_sqs), before))
        return
    for found, reference in zip(zip(params, exp_avgs, exp_avg_sqs, strict=True), expected, strict=True):
        agree(found, reference)
        assert torch.equal(found[1], reference[1]), "first moments to the bit"


@pytest.mark.parametrize("shape", [(40, 24), (7,)])
def test_a_halted_step_changes_nothing_on_any_path(
    shape: tuple[int, ...], launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    param, grad, exp_avg, noise = tensors(shape, 4)
    grad[0] = float("inf")
    exp_avg_sq = noise.square().mean(0, keepdim=True) if len(shape) == 2 else noise.square()
    c = on_device(Coefficients.of(step=1, **{**HOST, "eps": 0.0}))
    for devices in (["cpu"], []):
        monkeypatch.setattr(triton_launch, "DEVICES", devices)
        for moment in (exp_avg, exp_avg.bfloat16(), torch.zeros_like(exp_avg)):
            state = (param, moment, exp_avg_sq * (moment != 0).any())  # also the first step, where all is 0
            for direction in DIRECTION:
                found = stepped(dispatch, *state, grad, c, direction, 1, None, torch.tensor(1.0))
                assert all(map(torch.equal, found, state))
            found = stepped(dispatch, *state, tensors(shape, 1)[0], c, "atan2", 1, None, torch.tensor(0.0))
            assert not any(map(torch.equal, found, state)), "0 halts nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_and_gradients(dtype: torch.dtype, launched: list[str]) -> None:
    for shape in ((40, 24), (24,)):
        param, grad, exp_avg, noise = tensors(shape, 4)
        param, grad = param.to(dtype), grad.to(dtype)
        exp_avg_sq = noise.square().mean(0, keepdim=True) if len(shape) == 2 else noise.square()
        c = Coefficients.of(step=2, **HOST)
        expected = stepped(update, param.float(), exp_avg, exp_avg_sq, grad, c, "ratio", 2)
        if len(shape) == 2:
            found = stepped(dispatch, param, exp_avg, exp_avg_sq, grad, c, "ratio", 2)
        else:
            found = [param.clone(), exp_avg.clone(), exp_avg_sq.clone()]
            triton_launch.move_many_(*([x] for x in found), [grad], c, "ratio", 2, None)
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
    c = Coefficients.of(step=1, grad_factor=0.5, **HOST)
    first, second = (dispatch.sum_of_squares(grad, torch.zeros_like(grad), c) for _ in range(2))
    expected = grad.double().square().sum(0, keepdim=True) / 4
    torch.testing.assert_close(first.double(), expected, rtol=2e-7, atol=0)
    assert first.dtype == torch.float32 and torch.equal(first, second)


@pytest.mark.parametrize("direction", sorted(DIRECTION))
def test_what_is_not_finite_is_seen(direction: str, launched: list[str]) -> None:
    for moment in (torch.float32, torch.bfloat16):
        param, grad, exp_avg, noise = tensors((6, 4), 4)
        grad[1, 2], exp_avg[2, 1], grad[3, 3] = float("nan"), float("nan"), float("inf")
        given = (param, exp_avg.to(moment), noise.square().mean(0, keepdim=True), grad)
        c = Coefficients.of(step=2, **HOST)
        for x, y in zip(*(stepped(m, *given, c, direction, 2)[1:] for m in (dispatch, update)), strict=True):
            assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf())


STEPS = {
    "coupled": lambda groups: CoupledAdam(groups, lr=0.01),
    "clipped": lambda groups: CoupledAdam(groups, lr=torch.tensor(0.01), max_grad_norm=0.5),
    "centered": lambda groups: CoupledAdam([{**groups[0], "center": True}, groups[1]], lr=0.01, max_grad_norm=0.5),
    "narrow": lambda groups: CoupledAdam(groups, lr=0.01, state_dtype=torch.bfloat16, max_grad_norm=0.5),
    "eight bits": lambda groups: CoupledAdam(groups, lr=0.01, state_dtype="8bit"),
    "factor": lambda groups: CoupledAdam(groups, lr=0.01, coupling_factor=0.1, max_grad_norm=0.5),
    "adams": lambda groups: Adams(groups, lr=0.01, max_grad_norm=0.5),
    "narrow adams": lambda groups: Adams(groups, lr=0.01, state_dtype=torch.bfloat16),
}
SHAPES = [(40, 24), (24, 24), (24,), (1,), (), (0, 3), (2, 5, 7), (13, 1)]


@pytest.mark.parametrize("kind", STEPS)
def test_whole_steps(kind: str, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for devices in (["cpu"], []):
        monkeypatch.setattr(triton_launch, "DEVICES", devices)
        params = [x.requires_grad_() for i, shape in enumerate(SHAPES) for x in tensors(shape, 1, i)]
        groups = [{"params": params[:1], "second_moment": "vocabulary"}, {"params": params[1:], "weight_decay": 0.1}]
        optimizer = STEPS[kind](groups)
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
    assert ("move_many" in launched) is (kind not in ("coupled", "eight bits")), "unclipped AdamW is torch's"


def test_what_a_kernel_cannot_reach_is_left_to_the_plain_functions(launched: list[str]) -> None:
    c = Coefficients.of(step=1, **HOST)
    for change in (lambda x: x.double(), lambda x: x.t().contiguous().t(), lambda x: x.repeat_interleave(2, 0)[::2]):
        param, grad, exp_avg, noise = (change(x) for x in tensors((6, 4), 4))
        given = (param, exp_avg, noise.square().mean(0, keepdim=True), grad, c, "ratio", 1)
        agree(stepped(dispatch, *given), stepped(update, *given))
    assert set(launched) <= {"root_of_rows"}
    odd = torch.zeros(9)[1:]
    assert not dispatch.moves_together(odd, odd, odd, odd, "ratio"), "not at a multiple of 16 bytes"


def test_a_direction_without_a_form_is_left_to_the_plain_functions(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sign = Direction(tensors=lambda m, root, eps: m.sign(), numbers=lambda m, root, eps: float(str(m)))
    monkeypatch.setitem(DIRECTION, "sign", sign)
    param, grad, exp_avg, noise = tensors((6, 4), 4)
    given = (param, exp_avg, noise.square(), grad, Coefficients.of(step=1, **HOST), "sign", 1)
    agree(stepped(dispatch, *given), stepped(update, *given))
    assert not launched and not dispatch.moves_together(param, grad, exp_avg, noise, "sign")


def test_nothing_reaches_a_kernel_unchecked_whoever_calls_it(launched: list[str]) -> None:
    c = Coefficients.of(step=1, **HOST)
    for wrong in range(4):
        params = [[torch.zeros(6, 4)] for _ in range(4)]
        for bad in (torch.zeros(60, 4), torch.zeros(4, 6).t(), torch.zeros(6, 4).double()):
            given = [*params[:wrong], [bad], *params[wrong + 1 :]]
            with pytest.raises(RuntimeError, match=r"do not fit together|a GPU kernel takes|one dtype"):
                triton_launch.move_many_(*given, c, "ratio", 1, None)
            matrices = [x[0] for x in given]
            rank_one = update.RankOne(torch.zeros(6), torch.zeros(4))
            with pytest.raises(RuntimeError, match=r"do not fit together|a GPU kernel takes"):
                triton_launch.move_elements_(*matrices, c, "ratio", 1, rank_one, None)
    good = [torch.zeros(6, 4) for _ in range(3)]
    with pytest.raises(RuntimeError, match=r"has the shape \(1, 5\)"):
        triton_launch.move_rows_(*good, torch.zeros(1, 5), c, "ratio", 1, None, None, None)
    with pytest.raises(RuntimeError, match="spectral decay needs"):
        rank_one = update.RankOne(torch.zeros(5), torch.zeros(4))
        triton_launch.move_rows_(*good, torch.zeros(1, 4), c, "ratio", 1, rank_one, None, None)
    with pytest.raises(RuntimeError, match="do not fit together"):
        triton_launch.sum_of_squares(torch.zeros(6, 4), torch.zeros(7, 4), c)
    assert not launched


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


def test_dice_fall_alike_beyond_32_bits_of_index() -> None:
    # The kernel keeps the lower half of an index; the plain functions all of it.
    for index in (0, 2**31 - 1, 2**31, 2**33 + 5):
        low = index & 0xFFFFFFFF
        assert dice_of(index, seed_of(7)) == dice_of(low, seed_of(7))
