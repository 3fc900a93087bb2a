"""What a step on an accelerator does, shown without one: it never waits, launches little, and copies nothing.

``benchmarks/gpu_counts.py`` has the fake device and the counting.
"""

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import one_step
import pytest
import torch
from torch import nn

from coupled_adam import Adams, CoupledAdam
from coupled_adam.optim.backends import gpu as gpu_backend
from coupled_adam.optim.backends import plain

ROOT = Path(__file__).parents[2]


def program(path: str) -> ModuleType:
    """Import a program of this repository."""
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


gpu = program("benchmarks/gpu_counts.py")

on_fake_device = pytest.mark.skipif(not gpu.USABLE, reason="this torch asks for the driver of a card")
with_triton = pytest.mark.skipif(not gpu_backend.INSTALLED, reason="the extra `triton` has no wheel for this system")

#: A coupled matrix, matrices and vectors.
SHAPES = [(50, 24), (24, 24), (24, 8), (24,), (3,), ()]
KINDS: dict[str, Callable] = {
    "coupled": gpu.ours,
    "factor": lambda params, clip, **settings: gpu.ours(params, clip, coupling_factor=0.1, **settings),
    "narrow": lambda params, clip, **settings: gpu.ours(params, clip, exp_avg_dtype=torch.bfloat16, **settings),
    "eight bits": lambda params, clip, **settings: gpu.ours(params, clip, exp_avg_dtype="8bit", **settings),
    "tempered": lambda params, clip, **settings: gpu.ours(params, clip, row_exponent=0.5, **settings),
    "maximize": lambda params, clip, **settings: gpu.ours(params, clip, maximize=True, **settings),
    "adams": gpu.adams,
}


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@on_fake_device
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_reads_a_number_from_the_device_or_copies_one_to_it(
    kind: str, clip: bool, capturable: bool, triton: bool
) -> None:
    counts = gpu.counted(SHAPES, KINDS[kind], clip, triton=triton, capturable=capturable)
    assert counts.launches > 0 and counts.copies == []


@on_fake_device
def test_the_fake_device_would_show_it() -> None:
    with gpu.Device(), gpu.counting() as counts:
        x = torch.ones(3, device="cuda")
        with pytest.raises(Exception, match="_local_scalar_dense"):
            x.sum().item()
        for y, device in ((x, "cpu"), (torch.ones(3, device="cpu"), "cuda")):
            torch.ops.aten._to_copy(y, device=torch.device(device))
    assert len(counts.copies) == 2


@on_fake_device
@pytest.mark.parametrize("clip", [True, False])
def test_a_learning_rate_on_the_device_is_not_read(clip: bool) -> None:
    for make in (gpu.ours, gpu.adams):

        def with_lr(params: list[nn.Parameter], clip: bool, make: Callable = make) -> Callable[[], object]:
            step = make(params, clip, capturable=True)
            for group in step.__self__.param_groups:
                group["lr"] = torch.full((), 1e-3, device="cuda")
            return step

        assert gpu.counted(SHAPES, with_lr, clip).copies == []


class Scaled:
    """A step as GradScaler calls it for optimizers that take its scale."""

    def __init__(self, step: Callable[[], object]) -> None:
        self.optimizer = step.__self__

    def __call__(self) -> None:
        self.optimizer.grad_scale = torch.full((), 1024.0, device="cuda")
        self.optimizer.found_inf = torch.zeros(1, device="cuda")
        self.optimizer.step()


@on_fake_device
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_step_does_not_wait_and_counts_on_the_device(kind: str, clip: bool, triton: bool) -> None:
    scaled: list[Scaled] = []

    def make(params: list[nn.Parameter], clip: bool) -> Scaled:
        scaled.append(Scaled(KINDS[kind](params, clip)))
        return scaled[0]

    counts = gpu.counted(SHAPES, make, clip, triton=triton)
    assert counts.copies == [], "only the first one takes the count of steps along"
    states = scaled[0].optimizer.state.values()
    assert all(state["step"].device.type == "cuda" for state in states)


@on_fake_device
@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_a_coupled_step_without_triton_is_few_operations_and_two_temporaries(device: str) -> None:
    for clip, most in ((False, 18), (True, 26)):
        counts = gpu.counted(gpu.MATRIX, gpu.ours, clip, triton=False, device=device)
        assert counts.launches <= most and counts.large <= 11
        assert counts.peak <= 2.01 * 4 * 50_304 * 768


def test_blocks_are_for_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    matrix = torch.zeros(4 * plain.BLOCK_ELEMENTS // 64, 64)
    real = plain._sum_of_squares
    monkeypatch.setattr(plain, "_sum_of_squares", lambda *a: (calls.append(1), real(*a))[1])
    for devices, expected in ((("cpu",), 4), ((), 1)):
        monkeypatch.setattr(plain, "BLOCK_DEVICES", devices)
        calls.clear()
        plain.sums(one_step.job((matrix, torch.ones_like(matrix), matrix, matrix[:1])))
        assert len(calls) == expected


@on_fake_device
@with_triton
def test_launches_of_a_coupled_matrix() -> None:
    counts = gpu.counted(gpu.MATRIX, gpu.ours, clip=False)
    ours = [name for name in counts.names if name in ("sum_rows", "move_matrix")]
    assert len(ours) == 2 and counts.launches - 2 <= 4
    assert counts.moved / (50_304 * 768) == pytest.approx(24, rel=0.01)
    assert counts.peak < 0.01 * 4 * 50_304 * 768


@on_fake_device
@with_triton
def test_a_moment_in_eight_bits_moves_eighteen_bytes_in_as_many_launches() -> None:
    counts = gpu.counted(gpu.MATRIX, gpu.ours, clip=False, exp_avg_dtype="8bit")
    assert counts.launches <= 6 and counts.moved / (50_304 * 768) == pytest.approx(18, rel=0.01)
    assert counts.peak < 0.01 * 4 * 50_304 * 768


@on_fake_device
@with_triton
def test_launches_of_a_clipped_gpt2() -> None:
    shapes = gpu.gpt2()
    assert len(shapes) == 148
    counts = gpu.counted(shapes, gpu.ours, clip=True)
    assert counts.launches <= 60
    assert counts.peak < 4 * min(p for p in map(torch.Size.numel, map(torch.Size, shapes)) if p > 10_000)
    assert counts.moved < 30 * sum(torch.Size(shape).numel() for shape in shapes)


def test_the_published_form_that_the_benchmark_times_takes_our_step() -> None:
    published = program("benchmarks/gpu_step.py").Published
    for clip in (False, True):
        outcomes = []
        for make in (gpu.ours, published):
            generator = torch.Generator().manual_seed(0)
            params = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
            step = make(params, clip)
            for _ in range(5):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator)
                step()
            outcomes.append([p.detach() for p in params])
        for x, y in zip(*outcomes, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@on_fake_device
@with_triton
def test_the_table_in_the_documentation_is_what_is_counted() -> None:
    text = (ROOT / "docs/gpu.md").read_text("utf-8")
    assert [line for line in gpu.rows() if line not in text] == []


def test_a_captured_step_needs_an_accelerator() -> None:
    parameter = nn.Parameter(torch.ones(4, 3))
    parameter.grad = torch.ones_like(parameter)
    for cls in (CoupledAdam, Adams):
        optimizer = cls([("table", parameter)], capturable=True)
        with pytest.raises(RuntimeError, match=r"capturable=True.*'table' is on cpu.*leave capturable False"):
            optimizer.step()
        with pytest.raises(TypeError, match="Invalid capturable: 1"):
            cls([parameter], capturable=1)


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", ["coupled", "factor", "adams"])
def test_a_grad_scaler_makes_the_step_of_unscaled_gradients(kind: str, clip: float | None, unscaled: bool) -> None:
    outcomes = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
        groups = gpu.groups(params)
        if kind == "adams":
            optimizer = Adams(groups, lr=0.01, max_grad_norm=clip)
        else:
            factor = 0.1 if kind == "factor" else 0.0
            optimizer = CoupledAdam(groups, lr=0.01, max_grad_norm=clip, coupling_factor=factor)
        norms = []
        for step in range(6):
            optimizer.zero_grad()
            loss = sum((p * (step + 1)).square().sum() for p in params)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                if step == 3:  # an overflow in between
                    scaler.scale(loss * float("inf")).backward()
                    before = [x.clone() for p in params for x in (p, *optimizer.state[p].values())]
                    scaler.step(optimizer)
                    scaler.update()
                    after = [x for p in params for x in (p, *optimizer.state[p].values())]
                    assert all(map(torch.equal, before, after))
                    optimizer.zero_grad()
                    loss = sum((p * (step + 1)).square().sum() for p in params)
                scaler.scale(loss).backward()
                if unscaled:
                    scaler.unscale_(optimizer)
                grads = [p.grad.clone() for p in params]
                scaler.step(optimizer)
                scaler.update()
                assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
            norms.append(optimizer.grad_norm)
        outcomes.append([x.detach() for p in params for x in (p, *optimizer.state[p].values())])
        if clip is not None:
            outcomes[-1] += norms
    for x, y in zip(*outcomes, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
