"""The fast paths give what the plain functions give, over shapes, layouts and settings; and they are taken."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import one_step
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher
from torch import Tensor

import coupled_adam
from coupled_adam import Adams, CoupledAdam
from coupled_adam.optim import backends
from coupled_adam.optim.backends import cpu, cpu_kernels, gpu, plain, torch_adamw
from coupled_adam.optim.directions import DIRECTION, Direction
from coupled_adam.optim.spectral import RankOne

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


@settings(max_examples=80, deadline=None)
@given(
    shape=SHAPES,
    seed=st.integers(0, 99),
    step=st.integers(1, 1000),
    coupled=st.booleans(),
    spectral=st.booleans(),
    narrow=st.booleans(),
    direction=st.sampled_from(sorted(DIRECTION)),
    weight_decay=st.sampled_from([0.0, 0.3]),
    coupling_factor=st.sampled_from([0.0, 0.1, 1.0]),
    coupling_scale=st.sampled_from([1.0, 2.0**-5, 2.0**5]),
    row_exponent=st.sampled_from([0.0, 0.5, 1.0]),
    grad_factor=st.sampled_from([1.0, 0.37, -1.0]),
    zero=st.booleans(),
)
def test_the_kernels_agree_with_the_plain_functions(
    shape, seed, step, coupled, spectral, narrow, direction, zero, grad_factor, **numbers
) -> None:
    coupled, spectral = coupled and len(shape) == 2 and shape[0] != 1, spectral and len(shape) >= 2
    param, grad, exp_avg, noise = tensors(shape, seed, 4)
    if zero:
        grad, exp_avg, noise = torch.zeros_like(grad), torch.zeros_like(exp_avg), torch.zeros_like(noise)
    exp_avg = exp_avg.bfloat16() if narrow else exp_avg
    exp_avg_sq = noise.square().mean(0, keepdim=True).nan_to_num() if coupled else noise.square()
    triple = RankOne(*tensors(shape[:-1], seed, 1), *tensors((*shape[:-2], shape[-1]), seed, 1)) if spectral else None
    outcomes = []
    for choose in (lambda made: plain, backends.of):
        given = (param, grad, exp_avg, exp_avg_sq)
        made = one_step.job(given, coupled, step, triple, direction=direction, **numbers)
        made.clip = grad_factor
        outcomes.append(one_step.stepped(choose(made), made))
    for name, expected, found in zip(("param", "exp_avg", "exp_avg_sq"), *outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", [(40, 24), (7,), (3, 9, 11)])
def test_a_moment_in_bfloat16_falls_alike_in_every_implementation(shape: tuple[int, ...]) -> None:
    param, grad, exp_avg, noise = tensors(shape, 5, 4)
    coupled = len(shape) == 2
    exp_avg_sq = noise.square().mean(0, keepdim=True) if coupled else noise.square()
    for step in range(1, 40):
        given = (param, grad / step, exp_avg.bfloat16(), exp_avg_sq)
        moments = []
        for backend in (plain, cpu):
            made = one_step.job(given, step=step)
            made.clip = 0.37
            moments.append(one_step.stepped(backend, made)[1])
        assert torch.equal(*moments)


@pytest.mark.parametrize("compiled_form", [True, False])
def test_a_new_direction_is_one_entry_and_takes_effect_on_every_path(
    compiled_form: bool, fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = half_of_ratio if compiled_form else None
    monkeypatch.setitem(DIRECTION, "half", Direction(tensors=half_of_ratio, numbers=numbers))
    for moment in ("vocabulary", "elementwise"):
        for clip in (None, 0.1):
            moved = {}
            for direction in ("half", "ratio"):
                parameter = torch.zeros(300, 300, requires_grad=True)
                parameter.grad = torch.ones_like(parameter)
                group = {"params": [parameter], "second_moment": moment, "direction": direction, "fused": fused}
                CoupledAdam([group], lr=0.1, coupling_factor=1e-12, max_grad_norm=clip).step()
                moved[direction] = parameter.detach()
            torch.testing.assert_close(moved["half"], moved["ratio"] / 2)
            assert moved["half"].abs().min() > 0.04


def half_of_ratio(m_hat, root, eps):
    return m_hat / ((root + eps) + (root + eps))


def test_an_unusable_numba_is_said_once_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coupled_adam.optim.backends.cpu_kernels", None)
    monkeypatch.delattr("coupled_adam.optim.backends.cpu_kernels", raising=False)
    cpu.kernels.cache_clear()
    parameter = torch.ones(4, 3, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    optimizer = CoupledAdam([{"params": [parameter], "second_moment": "vocabulary"}], lr=0.1)
    with pytest.warns(UserWarning, match="numba cannot be used"):
        optimizer.step()
    optimizer.step()
    cpu.kernels.cache_clear()
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
    taken, run = [], cpu.launch
    monkeypatch.setattr(cpu, "launch", lambda kernel, *a, **k: (taken.append(kernel.__name__), run(kernel, *a, **k)))
    matrix, vector = torch.zeros(30, 4, requires_grad=True), torch.zeros(4, requires_grad=True)
    matrix.grad, vector.grad = torch.ones(30, 4), torch.ones(4)
    CoupledAdam([{"params": [matrix], "second_moment": "vocabulary"}, {"params": [vector]}]).step()
    assert taken == ["sum_of_squares_kernel", "move_rows"], "an uncoupled group is torch's own"
    taken.clear()
    Adams([matrix, vector]).step()
    assert taken == ["move_elements", "move_elements"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.0, 0.1])
def test_a_step_by_plain_operations_is_the_same(
    factor: float, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "BLOCK_ELEMENTS", 100)  # 12 rows a block, and one of 4
    param, *grads = tensors((40, 8), 2, 6)
    outcomes = []
    for fused in (None, False):
        parameter = param.clone().requires_grad_()
        group = {"params": [parameter], "second_moment": "vocabulary", "coupling_factor": factor, "fused": fused}
        optimizer = CoupledAdam([group], lr=0.01, weight_decay=0.1, max_grad_norm=1.0, exp_avg_dtype=dtype)
        for grad in grads:
            parameter.grad = grad
            optimizer.step()
        outcomes.append(parameter.detach())
    tolerance = 1e-6 if dtype is None else 1e-4
    torch.testing.assert_close(*outcomes, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------- who takes a step


def test_who_is_asked_for_no_fast_backend_takes_none() -> None:
    for shared in (False, True):
        made = one_step.job([*tensors((30, 4), 0, 3), torch.ones(1 if shared else 30, 4)], fused=False)
        assert backends.of(made) is plain
        made.group["fused"] = None
        assert backends.of(made) is (cpu if shared else torch_adamw)
        assert gpu.refuses(made) == "GPU kernels do not run on cpu"


def test_a_new_backend_is_a_module_and_its_place_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    ours = SimpleNamespace(
        refuses=lambda made: "" if made.coupled else "takes coupled matrices alone",
        sums=plain.sums,
        move=lambda jobs: (taken.extend(made.name for made in jobs), plain.move(jobs)),
    )
    outcomes = []
    for backend in (ours, plain):
        monkeypatch.setattr(backends, "BACKENDS", (backend, *backends.BACKENDS))
        table, matrix = (torch.nn.Parameter(x) for x in tensors((6, 4), 0, 2))
        groups = [{"params": [("table", table)], "second_moment": "vocabulary"}, {"params": [("matrix", matrix)]}]
        table.grad, matrix.grad = tensors((6, 4), 1, 2)
        CoupledAdam(groups, lr=0.1, max_grad_norm=0.5).step()
        outcomes.append([table.detach(), matrix.detach()])
    assert taken == ["parameter 'table'"]
    torch.testing.assert_close(*outcomes, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [10, cpu.ELEMENTS_PER_THREAD])
def test_a_scaled_gradient_is_copied_for_torch_only_where_that_is_little(size: int) -> None:
    made = one_step.job(tensors((size,), 0, 4))
    assert backends.of(made) is torch_adamw
    made.clip = 0.5
    assert backends.of(made) is (torch_adamw if size == 10 else cpu)


REFUSED = {
    "transposed": (lambda: torch.zeros(8, 6).t(), {}, r"contiguous tensors, but the parameter is not"),
    "float64": (
        lambda: torch.zeros(6, 8, dtype=torch.float64),
        {},
        r"need float32, but the parameter is",
    ),
    "direction": (
        lambda: torch.zeros(6, 8),
        {"direction": "tensors alone"},
        r"'tensors alone' has no kernel",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("cls", [CoupledAdam, Adams])
def test_who_insists_on_a_fast_backend_is_told_which_parameter_none_takes_and_why(cls, why, monkeypatch) -> None:
    monkeypatch.setitem(DIRECTION, "tensors alone", Direction(tensors=lambda m, root, eps: m.sign()))
    make, group, reason = REFUSED[why]
    first, table = (torch.nn.Parameter(x) for x in (torch.zeros(3, 2), make()))
    groups = [{"params": [("first", first)]}, {"params": [("table", table)], **group}]
    optimizer = cls([{**g, "second_moment": "vocabulary"} for g in groups], fused=True)
    first.grad, table.grad = torch.ones_like(first), torch.ones_like(table)
    with pytest.raises(RuntimeError, match=rf"^fused=True, .*'table': .*{reason}.*Leave fused=None"):
        optimizer.step()
    assert not first.any() and optimizer.state[first]["step"] == 0, "nothing has moved"
    optimizer.param_groups[1]["fused"] = None
    optimizer.step()
    assert first.any() and table.any()
    with pytest.raises(TypeError, match="Invalid fused: 1; it must be True, False or None"):
        cls([torch.nn.Parameter(torch.zeros(3, 2))], fused=1)


@pytest.mark.parametrize("cls", [CoupledAdam, Adams])
def test_an_empty_shard_is_no_reason_to_refuse(cls) -> None:
    table, rest = torch.nn.Parameter(torch.zeros(0, 4)), torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = cls([{"params": [table], "second_moment": "vocabulary"}, {"params": [rest]}], fused=True)
    table.grad, rest.grad = torch.zeros(0, 4), torch.ones(3, 4)
    optimizer.step()
    assert rest.any()


def test_a_halt_that_is_known_on_a_device_alone_reaches_no_cpu_kernel() -> None:
    # As with a parameter on the CPU beside others on a GPU, where GradScaler looks for infinities.
    made = one_step.job((*tensors((30, 4), 0, 3), torch.ones(1, 4)))
    made.found_inf = torch.tensor(1.0)
    before = made.param.clone()
    assert backends.of(made) is plain
    one_step.stepped(plain, made)
    assert torch.equal(made.param, before) and made.state["step"] == 0


@pytest.mark.parametrize("make", ["rows_kernel", "eight_bit_rows_kernel", "centered_rows_kernel", "elements_kernel"])
def test_the_cache_finds_a_kernel_again_in_another_process(make: str) -> None:
    # What a kernel encloses is in its key, and what numba has made has another key in every process.
    kernel = getattr(cpu_kernels, make)(DIRECTION["ratio"].numbers)
    enclosed = [cell.cell_contents for cell in kernel.py_func.__closure__]
    assert enclosed and not any(isinstance(x, Dispatcher) for x in enclosed)


@pytest.mark.long
def test_a_changed_equation_is_not_served_from_the_cache_of_compiled_kernels(tmp_path) -> None:
    # numba looks at the file of the kernel alone, and the equations are in another.
    package = tmp_path / "coupled_adam"
    shutil.copytree(Path(coupled_adam.__file__).parent / "optim", package / "optim")
    (package / "__init__.py").touch()
    program = (
        "import torch; from coupled_adam.optim import CoupledAdam; p = torch.zeros(9, 4, requires_grad=True);"
        "p.grad = torch.ones(9, 4); CoupledAdam([{'params': [p], 'second_moment': 'vocabulary'}], lr=0.5).step();"
        "print(round(p[0, 0].item(), 3))"
    )

    def step() -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.check_output([sys.executable, "-c", program], env=environment, text=True).strip()

    assert step() == "-0.5"
    equations = package / "optim" / "equations.py"
    equations.write_text(equations.read_text().replace("theta -= direction", "theta += direction"))
    assert step() == "0.5"
