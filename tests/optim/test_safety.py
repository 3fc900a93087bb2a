"""In several processes: who asks for the state, infinite gradients, copies, and the way back to AdamW."""

import pytest
import safety_jobs
import torch

pytestmark = pytest.mark.long


@pytest.mark.parametrize(("optimizer", "wrapping"), [("clipped", "fsdp"), ("adams", "fsdp"), ("adams", "zero")])
def test_whoever_asks_for_the_state_changes_nothing(processes, optimizer: str, wrapping: str) -> None:
    plain = processes(2).run(safety_jobs.peeked, optimizer, wrapping, False)[0]
    for result in processes(2).run(safety_jobs.peeked, optimizer, wrapping, True):
        assert all(torch.equal(x, result[name]) for name, x in plain.items())


def test_processes_agree_whether_a_first_step_counts(processes) -> None:
    assert processes(2).run(safety_jobs.first_step_at_0) == [[1.0, 1.0]] * 2


@pytest.mark.parametrize("which", ["table", "matrix"])
def test_all_processes_raise_where_one_has_an_infinite_gradient(processes, which: str) -> None:
    first, second = processes(2).run(safety_jobs.one_infinity, which)
    assert f"infinite or NaN in parameter '{which}'" in first
    assert "the norm of the gradients is inf (all are finite in this process" in second


@pytest.mark.parametrize("exp_avg_dtype", [None, torch.bfloat16, "8bit"])
def test_adamw_goes_on_from_a_spread_state(processes, exp_avg_dtype) -> None:
    alone, spread = (processes(n).run(safety_jobs.back_to_adamw, exp_avg_dtype)[0] for n in (1, 2))
    for a, b in zip(alone, spread, strict=True):
        # The dice of rounding fall on the elements of each shard.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if exp_avg_dtype is None else 2e-3)


@pytest.mark.parametrize("rows", [5, 9])
def test_a_spread_state_is_resized(processes, rows: int) -> None:
    alone, spread = (processes(n).run(safety_jobs.resized, rows)[0] for n in (1, 2))
    for a, b in zip(alone, spread, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert spread[0].shape == (rows, 5)


def test_a_copy_of_a_spread_zero_trains_on(processes) -> None:
    assert processes(2).run(safety_jobs.copied_zero) == [True, True]
