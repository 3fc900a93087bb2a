"""The GPU kernels without a GPU: run by Triton's interpreter, compiled for a card, and launched all but the end."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_gpu import on_fake_device, program
from torch.utils._pytree import tree_map_only

pytest.importorskip("triton", reason="the extra `triton` has no wheel for this system")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from coupled_adam.optim import directions, equations, rounding
from coupled_adam.optim.backends import gpu, gpu_forms
from coupled_adam.optim.backends.gpu_forms import NoForm, triton_form

compiler = program("tools/compile_kernels.py")
VARIANTS = {variant.label: variant for variant in compiler.variants()}


@pytest.mark.long
def test_the_kernels_agree_with_the_plain_functions() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-c", os.devnull, "interpreted.py"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize("label", ["column sums", "rows, ratio", "rows, bfloat16 moment", "many tensors, ratio"])
def test_compiled_for_a_card_nothing_spills_and_memory_is_reached_in_the_widest_steps(label: str) -> None:
    figures = compiler.compiled(VARIANTS[label], 768, "sm_90")
    assert figures.spilled == 0 and figures.registers <= 64 and figures.bits == 128


@pytest.mark.parametrize("columns", [1, 3, 300])
def test_rows_of_any_length_compile(columns: int) -> None:
    for label in ("column sums", "rows, ratio"):
        assert compiler.compiled(VARIANTS[label], columns, "sm_90").spilled == 0


class Card:
    """What Triton's launcher asks a driver, answered for a card that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@on_fake_device
@pytest.mark.long
def test_what_is_launched_compiles_for_a_card_once_and_not_again_in_later_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = program("benchmarks/gpu_counts.py")
    compiled: set[tuple[str, str]] = set()

    def launch(name: str, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
        """All of Triton's launch but the last stage."""
        kernel = getattr(gpu.kernels(), name)
        given = tree_map_only(torch.Tensor, lambda x: MockTensor(x.dtype), arguments)
        options = {"num_warps": 4, "enable_fp_fusion": False}
        compiled.add((name, kernel.warmup(*given, grid=grid, **constants, **options).hash))

    for name, value in vars(driver).items():  # no name of them is the same in all of Triton's versions
        monkeypatch.setattr(driver, name, value)
    driver.set_active(Card())
    for make, settings in ((counts.ours, {"exp_avg_dtype": torch.bfloat16}), (counts.adams, {"capturable": True})):
        with counts.Device(), counts.counting():
            gpu.launch = launch  # until the counting ends
            step = make(counts.parameters([(50, 24), (24, 8), (24,), (3,), ()]), True, **settings)
            step()
            first = len(compiled)
            for _ in range(16):
                step()
        assert len(compiled) == first > 0
    assert {name for name, _ in compiled} == {"sum_rows", "root_of_rows", "move_matrix", "move_many"}


@pytest.mark.parametrize(
    "function",
    [equations.first_moment, equations.squared, equations.second_moment, equations.moved, rounding.dice_of]
    + [direction.numbers for direction in directions.DIRECTION.values()],
    ids=lambda f: f.__name__,
)
def test_every_equation_has_a_form(function: Callable) -> None:
    assert triton_form(function) is triton_form(function)


def powers(x: float) -> float:
    return x**0.3


def loops(x: float) -> float:
    for _ in range(3):
        x += 1.0
    return x


def calls(x: float) -> float:
    return gpu_forms.inspect.getsource(x)


def reads_a_tensor(x: float) -> float:
    return x + TABLE


TABLE = [1.0]


@pytest.mark.parametrize("function", [powers, loops, calls, reads_a_tensor, lambda x: x, abs])
def test_what_triton_would_compute_otherwise_has_no_form(function: Callable) -> None:
    with pytest.raises(NoForm):
        triton_form(function)
