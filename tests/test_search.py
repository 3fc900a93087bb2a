"""The search for the best rate of a family that is tuned."""

import math
from pathlib import Path

import pytest

from coupled_adam import experiments, reproduce
from coupled_adam.reproduce import Planned, Search, searches


def search(start: int, length: int = 7) -> Search:
    experiment = experiments.load("mini-S-300A")
    runs = {
        seed: [Planned("family", f"x{i}", experiment, Path(f"x{i}-s{seed}")) for i in range(length)]
        for seed in (1, 2, 3)
    }
    return Search(runs, start)


@pytest.mark.parametrize("start", range(7))
@pytest.mark.parametrize("best", range(7))
def test_it_goes_downhill_and_runs_the_other_seeds_there(
    start: int, best: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done: set[str] = set()

    def loss(run: Planned) -> float:
        assert str(run.directory) in done, "only what has been run has a loss"
        return abs(int(run.name[1:]) - best) + 1.0

    monkeypatch.setattr(reproduce, "_selection_loss", loss)
    warned: list[str] = []
    monkeypatch.setattr(reproduce, "warn", warned.append)
    order = []
    for run in search(start).ordered():
        order.append(str(run.directory))
        done.add(str(run.directory))
    assert order[-2:] == [f"x{best}-s2", f"x{best}-s3"]
    assert {f"x{i}-s1" for i in (best - 1, best, best + 1) if 0 <= i < 7} <= set(order)
    assert len(set(order)) <= abs(start - best) + 3 + 2
    assert (warned != []) == (best in (0, 6))


def test_a_run_that_failed_or_diverged_is_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [3.0, 2.0, math.inf, math.inf, math.inf]
    monkeypatch.setattr(reproduce, "_selection_loss", lambda run: losses[int(run.name[1:])])
    monkeypatch.setattr(reproduce, "warn", lambda text: None)
    assert [run.name for run in search(2, 5).ordered()][-1] == "x1" or losses[0] < losses[1]


def test_the_arms_of_the_study_differ_in_nothing_but_the_rate(tmp_path: Path) -> None:
    found = searches("mini", ["what-tied"], [], tmp_path)
    assert len(found) == 22
    for one in found:
        for runs in one.runs.values():
            factors = [run.experiment.optimizer.embedding.lr_factor for run in runs]
            assert factors == sorted(factors) and len(set(factors)) == 9
            assert (
                len({run.experiment.with_values(run__name="x", optimizer__embedding__lr_factor=1.0) for run in runs})
                == 1
            )
        assert one.runs[1][one.start].experiment.optimizer.embedding.lr_factor == 10
