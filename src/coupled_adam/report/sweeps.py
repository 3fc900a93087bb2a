"""Sweeps over learning rates: which runs form one, and what they say of a method."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from coupled_adam.report.aggregate import ADAMW, Evaluated, SeedGroup
from coupled_adam.report.sensitivity import counted, lr_sensitivity

#: So many learning rates are a sweep.
LEAST = 3


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in their learning rate and seed alone."""

    groups: tuple[SeedGroup, ...]
    """One a learning rate, ascending."""
    name: str
    """What tells it from the others beside it."""

    @property
    def first(self) -> Evaluated:
        return self.groups[0].first

    @cached_property
    def losses(self) -> dict[float, float]:
        """The loss that each learning rate counts with, the mean over seeds."""
        return {rate_of(group): statistics.fmean(self._counted(run) for run in _known(group)) for group in self.groups}

    @cached_property
    def initial_loss(self) -> float:
        """The mean loss before the first step."""
        return statistics.fmean(loss for group in self.groups for run in group.runs if (loss := run.initial_loss))

    @property
    def diverged(self) -> list[float]:
        """The learning rates at which some run diverged."""
        return [rate_of(group) for group in self.groups if any(run.diverged for run in group.runs)]

    def sensitivity(self, rates: Iterable[float]) -> float:
        """Compute the learning-rate sensitivity over ``rates``."""
        return lr_sensitivity([self.losses[rate] for rate in rates], self.initial_loss)

    def deviation(self, rate: float) -> float:
        """Return the sample standard deviation of the loss over seeds; 0 of a single one."""
        losses = [self._counted(run) for run in _known(self.at(rate))]
        return statistics.stdev(losses) if len(losses) > 1 else 0.0

    def best(self, rates: Iterable[float]) -> float:
        """Return the learning rate of the lowest loss among ``rates``."""
        return min(rates, key=lambda rate: self.losses[rate])

    def at(self, rate: float) -> SeedGroup:
        """Return the runs of a learning rate."""
        return next(group for group in self.groups if rate_of(group) == rate)

    def _counted(self, run: Evaluated) -> float:
        return counted(run.figures["validation_loss"], self.initial_loss)


@dataclass(frozen=True)
class Sweeps:
    """Sweeps that are compared with each other."""

    of: Literal["method", "core"]
    """What they differ in."""
    lines: tuple[Sweep, ...]

    @property
    def rates(self) -> list[float]:
        """The learning rates that all of them have, ascending: those that their sensitivities are computed over."""
        return sorted(set.intersection(*(set(line.losses) for line in self.lines)))

    @property
    def setting(self) -> str:
        """Model, data, embeddings and head, for a heading."""
        run = self.lines[0].first
        tied = "tied" if run.experiment.model.tied else "untied"
        return f"{run.model} parameters, {run.length} tokens, {tied}, {run.head} head"


def rate_of(group: SeedGroup) -> float:
    """Return the highest learning rate of the runs' schedule."""
    return group.first.experiment.schedule.lr


def sweeps(found: Sequence[SeedGroup]) -> list[Sweeps]:
    """Find the sweeps over learning rates, and which of them are compared.

    Methods are compared within one setting; beside a head that rounds to bfloat16 stands AdamW whose head does not, as
    the control. Optimizers of the rest (``core``) are compared where all else, the method too, is the same.
    """
    known = [g for g in found if _known(g) and any(run.initial_loss is not None for run in g.runs)]
    alone = _gathered(known, lambda run: (run.setting_without("schedule.lr"), run.method))
    all_of_them = [Sweep(groups, groups[0].first.method) for groups in alone if len(groups) >= LEAST]
    by_core = _compared(all_of_them, lambda run: (run.setting_without("schedule.lr", "optimizer.core"), run.method))
    cores = [lines for lines in by_core if len(lines) > 1]
    in_core = {id(sweep) for lines in cores for sweep in lines}
    made: list[Sweeps] = []
    for lines in _compared(all_of_them, lambda run: run.setting_without("schedule.lr")):
        if len(lines) == 1 and id(lines[0]) in in_core:
            continue  # shown with the other cores
        made.append(Sweeps("method", tuple(_with_control(lines, all_of_them))))
    for lines in cores:
        cored = tuple(replace(sweep, name=_core(sweep.first)) for sweep in lines)
        made.append(Sweeps("core", cored))
    return made


def _with_control(lines: Sequence[Sweep], others: Sequence[Sweep]) -> list[Sweep]:
    """Add AdamW with a float32 head, if these have another one; where a method stands twice, its head is named."""
    run = lines[0].first
    setting = run.setting_without("schedule.lr", "model.logits")
    controls = [
        sweep
        for sweep in others
        if run.head != "float32"
        and sweep.first.head == "float32"
        and sweep.first.method == ADAMW
        and sweep.first.setting_without("schedule.lr", "model.logits") == setting
    ]
    twice = {sweep.name for sweep in lines} & {sweep.name for sweep in controls}
    return [
        replace(sweep, name=f"{sweep.name}, {sweep.first.head} head") if sweep.name in twice else sweep
        for sweep in (*lines, *controls)
    ]


def _gathered(groups: Iterable[SeedGroup], key: Callable[[Evaluated], object]) -> list[tuple[SeedGroup, ...]]:
    found: dict[object, list[SeedGroup]] = {}
    for group in groups:
        found.setdefault(key(group.first), []).append(group)
    return [tuple(sorted(same, key=rate_of)) for same in found.values()]


def _compared(lines: Iterable[Sweep], key: Callable[[Evaluated], object]) -> list[list[Sweep]]:
    found: dict[object, list[Sweep]] = {}
    for line in lines:
        found.setdefault(key(line.first), []).append(line)
    return list(found.values())


def _known(group: SeedGroup) -> list[Evaluated]:
    """The runs whose outcome is known: those that were evaluated, and those that diverged."""
    return [run for run in group.runs if run.diverged or run.figures["validation_loss"] is not None]


def _core(run: Evaluated) -> str:
    return {"adamw": "AdamW", "adams": "Adams", "muon": "Muon"}[run.experiment.optimizer.core.name] + " inside"
