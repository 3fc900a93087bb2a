"""The GPU kernels without a GPU: run by Triton's interpreter, and compiled for a card."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_gpu import program

pytest.importorskip("triton", reason="the extra `triton` has no wheel for this system")

from coupled_adam.optim import directions, equations, rounding, triton_forms
from coupled_adam.optim.triton_forms import NoForm, triton_form

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
    return triton_forms.inspect.getsource(x)


def reads_a_tensor(x: float) -> float:
    return x + TABLE


TABLE = [1.0]


@pytest.mark.parametrize("function", [powers, loops, calls, reads_a_tensor, lambda x: x, abs])
def test_what_triton_would_compute_otherwise_has_no_form(function: Callable) -> None:
    with pytest.raises(NoForm):
        triton_form(function)
