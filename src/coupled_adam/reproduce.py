"""A whole suite of experiments: trains and evaluates what is missing, resumes what was interrupted, and reports."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coupled_adam import __version__, experiments
from coupled_adam.errors import DivergedError, InputError
from coupled_adam.evaluation.during_training import evaluator
from coupled_adam.evaluation.stages import evaluate, read_stage
from coupled_adam.files import check_file_replaceable, check_outside_made, make_directory, write_json
from coupled_adam.lm.checkpoint import latest_checkpoint, step_of, verify_checkpoint
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.estimate import estimate
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.run import read_experiment
from coupled_adam.lm.sources import source_of
from coupled_adam.lm.train import train
from coupled_adam.progress import duration, say, warn
from coupled_adam.report.aggregate import DIVERGED, SeedGroup, read_runs
from coupled_adam.report.report_page import check_outputs, report

#: What stands at the top of results.json, and says that it may be replaced.
RESULTS_MARK = '"made_by": "coupled-adam '

#: Names of the figures that are averaged over seeds.
SHOWN = ("validation_loss", "isotropy", "mean_shift_ratio", "word_similarity")


@dataclass(frozen=True)
class Planned:
    """A run of the suite."""

    family: str
    name: str
    experiment: Experiment
    directory: Path

    @property
    def finished(self) -> bool:
        """Whether its last step was evaluated and saved, and is intact."""
        newest = latest_checkpoint(self.directory / "checkpoints")
        if newest is None or step_of(newest) != self.experiment.train.steps:
            return False
        try:
            verify_checkpoint(newest)
        except InputError:
            return False  # training resumes from the one before
        return True

    @property
    def diverged(self) -> bool:
        """Whether an earlier call saw this very run diverge, as it would again."""
        if not (self.directory / DIVERGED).exists() or self.finished:
            return False
        try:
            return not read_experiment(self.directory).differences(self.experiment)
        except InputError:
            return False  # training says what is wrong there


def plan(suite: str, only: Sequence[str], seeds: Sequence[int], out: Path) -> list[Planned]:
    """List the runs of the families ``only`` (of all, if empty), with ``seeds`` (those of the family, if empty).

    A run that two families share is planned once, with the first.

    Raises:
        InputError: an unknown suite or family, or a negative seed.
    """
    if suite != "mini":
        raise InputError(f"{suite}: unknown suite; choose mini")
    families = experiments.families(suite)
    if unknown := [name for name in only if name not in families]:
        raise InputError(f"{unknown[0]}: unknown family; choose from {', '.join(families)}")
    if negative := [seed for seed in seeds if seed < 0]:
        raise InputError(f"seed {negative[0]} is negative")
    planned: dict[Path, Planned] = {}
    for family, content in families.items():
        if (only and family not in only) or "tuned" in content:
            continue
        # Seed by seed, so that an early end leaves whole comparisons.
        for seed in seeds or content["seeds"]:
            for name in content["experiments"]:
                run = _planned(family, name, seed, out)
                planned.setdefault(run.directory, run)
    return list(planned.values())


@dataclass(frozen=True)
class Search:
    """Runs of one arm of a family that is tuned: along the axis of what is tuned, by seed."""

    runs: dict[int, list[Planned]]
    """By seed, in the order of the axis. The first seed chooses."""
    start: int
    """Where on the axis to begin."""

    def ordered(self) -> Iterator[Planned]:
        """Yield what is to be run next, once what was yielded before is done: downhill from the start with the first
        seed, to a place that is better than both of its neighbors, then the other seeds at that place.
        """
        first, *others = self.runs.values()
        at = self.start
        while True:
            near = [i for i in (at, at - 1, at + 1) if 0 <= i < len(first)]
            for i in near:
                yield first[i]
            best = min(near, key=lambda i: _selection_loss(first[i]))
            if best == at:
                break
            at = best
        if not 0 < at < len(first) - 1:
            warn(f"{first[at].name}: the best value lies at the edge of the range tried; widen the axis")
        yield from (runs[at] for runs in others)


def searches(suite: str, only: Sequence[str], seeds: Sequence[int], out: Path) -> list[Search]:
    """List the arms of the families ``only`` (of all, if empty) that are tuned, as ``plan`` lists the others."""
    found = []
    for family, content in experiments.families(suite).items():
        if (only and family not in only) or "tuned" not in content:
            continue
        axis = content["tuned"]
        for grid in experiments.grids():
            for chosen in itertools.product(*(v for k, v in grid.axes.items() if k != axis)):
                arm = dict(zip((k for k in grid.axes if k != axis), chosen, strict=True))
                names = [grid.pattern.format(**arm, **{axis: value}) for value in grid.axes.get(axis, ())]
                if not names or not set(names) <= set(content["experiments"]):
                    continue
                runs = {
                    seed: [_planned(family, name, seed, out) for name in names] for seed in seeds or content["seeds"]
                }
                found.append(Search(runs, grid.axes[axis].index(content["start"])))
    return found


def _planned(family: str, name: str, seed: int, out: Path) -> Planned:
    experiment = experiments.load(name, seed)
    return Planned(family, name, experiment, out / experiment.run.name)


def _selection_loss(run: Planned) -> float:
    """The loss that a rate is chosen by: of the half of the held-out text that is not reported."""
    found = read_stage(run.directory, "frequency") if run.finished else None
    return float(found["loss_selection"]) if found else math.inf


def reproduce(suite: str, only: Sequence[str], seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Train and evaluate what is not yet done of the suite in ``out``, and report on all of it.

    Writes results.json, aggregate.csv and report.html. A run that fails is named in the results (``failed``), and the
    others go on. One that diverges is a result (``diverged``): it is recorded in diverged.json in its directory, counts
    in the report, and is not trained again unless that file is deleted.

    Returns:
        What results.json holds.

    Raises:
        InputError: as ``plan``; or ``out`` holds files of those names that were not made by this package.
        ImportError: a family's text comes with a package that is not installed.
        Interrupted: the user stopped it; all that was done is saved, and the same call resumes.
    """
    runs, tuned = plan(suite, only, seeds, out), searches(suite, only, seeds, out)
    every = [*runs, *(run for search in tuned for arm in search.runs.values() for run in arm)]
    # Before anything is trained: a text may come with a package that is not installed.
    sources = {name: source_of(name) for name in sorted({run.experiment.data.source for run in every})}
    check_outputs(out)
    check_outside_made(out)
    check_file_replaceable(out / "results.json", RESULTS_MARK)
    make_directory(out)
    gone = sum(run.diverged for run in runs)
    trained = f"{sum(run.finished for run in runs)} of them trained" + (f", {gone} diverged" if gone else "")
    say(f"{len(runs)} runs in {out}, {trained}" + (f", and {len(tuned)} arms to tune" if tuned else ""))
    corpora: dict[tuple[str, str, int], Corpus] = {}
    failed: dict[str, str] = {}
    seconds = flops = 0.0
    for i, run in enumerate(itertools.chain(runs, *(search.ordered() for search in tuned))):
        if run.diverged:
            continue
        try:
            data = run.experiment.data
            key = (data.source, data.tokenizer, data.vocab_size)
            if key not in corpora:
                corpora[key] = prepare(sources[data.source], data, out / "corpus" / "-".join(map(str, key)))
            if not run.finished:
                rest = sum(estimate(r.experiment).flops for r in runs[i:] if not (r.finished or r.diverged))
                left = f", about {duration(rest * seconds / flops)} left" if flops else ""
                say(f"[{i + 1}/{len(runs) if i < len(runs) else '…'}] {run.family}: {run.experiment.run.name}{left}")
                before, began = _steps_done(run.directory), time.monotonic()
                train(run.experiment, corpora[key], run.directory, evaluator(run.experiment, corpora[key]))
                seconds += time.monotonic() - began
                flops += estimate(run.experiment).flops * (1 - before / run.experiment.train.steps)
            evaluate(run.directory, corpora[key].directory, ("validation", "embeddings", "frequency"))
        except DivergedError as error:
            write_json(run.directory / DIVERGED, {"reason": str(error), "version": __version__})
            warn(f"{run.experiment.run.name} diverged: {error}")
        except (InputError, OSError) as error:
            failed[run.experiment.run.name] = str(error)
            warn(f"{run.experiment.run.name} failed: {error}")
    # The report is over all that was made in the directory, also for another family or seed.
    others = (run for search in searches(suite, [], [], out) for arm in search.runs.values() for run in arm)
    made = {run.directory: run for run in (*every, *plan(suite, [], [], out), *others)}
    done = [run for run in made.values() if run.finished and run.experiment.run.name not in failed]
    diverged = [run for run in made.values() if run.diverged]
    if done:
        report([run.directory for run in (*done, *diverged)], out)
    results = {
        "made_by": f"coupled-adam {__version__}",
        "experiments": _summed_up(done),
        "diverged": [run.experiment.run.name for run in diverged],
        "failed": failed,
    }
    write_json(out / "results.json", results)
    return results


def _steps_done(directory: Path) -> int:
    newest = latest_checkpoint(directory / "checkpoints")
    return step_of(newest) if newest else 0


def _summed_up(runs: Sequence[Planned]) -> list[dict[str, Any]]:
    """Make one object an experiment: mean and sample standard deviation of its runs' figures."""
    experiments_run: dict[str, list[Planned]] = {}
    for run in runs:
        experiments_run.setdefault(run.name, []).append(run)
    rows = []
    for name, planned in experiments_run.items():
        group = SeedGroup(tuple(read_runs(run.directory for run in planned)))
        moments = {figure: group.moments(figure) for figure in SHOWN}
        figures = {figure: asdict(found) if found else None for figure, found in moments.items()}
        rows.append({"name": name, "family": planned[0].family, "runs": len(planned), "figures": figures})
    return rows
