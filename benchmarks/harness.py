"""What the benchmarks share: sides that take turns, medians of paired figures, and ``--json FILE``.

tools/evidence_benchmarks.py makes the tables of the docs from these files. By what was measured they have either a list
of seconds, or what ``Pairs.figures`` returns, or ``{"absent": REASON}``.
"""

import argparse
import gc
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], object]
Clock = Callable[[Step], float]


def parser(description: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """Make the parser of a benchmark, with ``--json`` and, if it has a default, ``--rounds``."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help="(default: %(default)s)")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write every figure into this file")
    return made


def seconds(step: Step) -> float:
    """Return the wall time of a call."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def thread_seconds(step: Step) -> float:
    """Return the processor time that this thread spends in a call."""
    began = time.thread_time()
    step()
    return time.thread_time() - began


@dataclass(frozen=True)
class Pairs:
    """Figures of two sides that took turns: a slow spell of the machine hits both."""

    pairs: list[tuple[float, float]]

    @property
    def ours(self) -> float:
        return statistics.median(ours for ours, _ in self.pairs)

    @property
    def theirs(self) -> float:
        return statistics.median(theirs for _, theirs in self.pairs)

    @property
    def ratio(self) -> float:
        """Median of ours ÷ theirs."""
        return statistics.median(ours / theirs for ours, theirs in self.pairs)

    @property
    def middle_half(self) -> tuple[float, float]:
        """Where the middle half of the ratios lies."""
        ratios = sorted(ours / theirs for ours, theirs in self.pairs)
        quarter = len(ratios) // 4
        return ratios[quarter], ratios[-quarter - 1]

    def figures(self, unit: str = "s", *, target: float | None = None, at_least: bool = False) -> dict[str, Any]:
        """Return what ``--json`` gets.

        Args:
            unit: of the figures: s, ms, bytes or tokens/s.
            target: what the ratio should be at most, or at least if ``at_least``.
        """
        summary = {"ours": self.ours, "theirs": self.theirs, "ratio": self.ratio, "middle_half": self.middle_half}
        wanted = {} if target is None else {"at_least" if at_least else "target": target}
        return {"unit": unit, **summary, **wanted, "pairs": self.pairs}


def in_pairs(ours: Step, theirs: Step, rounds: int, clock: Clock = seconds) -> Pairs:
    """Measure ours, theirs, theirs, ours in every round, after two calls of each: they compile and touch memory."""
    for step in (ours, theirs, ours, theirs):
        step()
    pairs = []
    gc.disable()
    try:
        for _ in range(rounds):
            a, b, c, d = clock(ours), clock(theirs), clock(theirs), clock(ours)
            pairs += [(a, b), (d, c)]
    finally:
        gc.enable()
    return Pairs(pairs)


def in_turn(steps: Mapping[str, Step], rounds: int, clock: Clock = seconds) -> dict[str, list[float]]:
    """Measure several sides in every round, now in one order and now in the other."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            found[name].append(clock(steps[name]))
    return found


def medians(found: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(figures) for name, figures in found.items()}


#: Bytes of the tensors of ``bandwidth``: more than a cache holds.
STREAMED = 2**28


class Bandwidth:
    """Bytes a second that torch moves between memory and processor, measured around what they are compared with.

    A copy also reads the lines that it writes into, on most processors, and this is not counted. ``in_place``, a
    product, writes the lines that it has read, as optimizers do.
    """

    def __init__(self) -> None:
        source, target = (torch.ones(STREAMED // 4) for _ in range(2))
        self._streams: dict[str, tuple[float, Step]] = {
            "copy": (2.0, lambda: target.copy_(source)),
            "in_place": (2.0, lambda: target.mul_(1.0)),
            "read": (1.0, source.sum),
        }
        self._found: dict[str, list[float]] = {name: [] for name in self._streams}

    def measure(self) -> None:
        """Measure with the threads that torch has now."""
        for name, times in in_turn({name: step for name, (_, step) in self._streams.items()}, 5).items():
            passes, _ = self._streams[name]
            self._found[name] += [passes * STREAMED / each for each in times]

    def figures(self) -> dict[str, dict[str, float]]:
        return {"bandwidth": medians(self._found)}


def machine(*packages: str) -> dict[str, Any]:
    """Say what it was measured with; a package that is not there has no version."""
    found: dict[str, Any] = {"processor": processor(), "cpus": os.cpu_count(), "python": platform.python_version()}
    for name in ("torch", "numpy", "numba", "triton", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@dataclass
class Results:
    """The figures of a run, by what was measured."""

    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, figures: Any) -> None:
        self.figures[name] = figures


@contextmanager
def results(arguments: argparse.Namespace) -> Iterator[Results]:
    """Collect figures, and write them where ``--json`` says, with machine and arguments; also if interrupted."""
    found = Results()
    complete = False
    try:
        yield found
        complete = True
    finally:
        if arguments.json is not None:
            given = {key: str(x) if isinstance(x, Path) else x for key, x in vars(arguments).items() if key != "json"}
            installed = {key: x for key, x in machine(*PEERS).items() if x is not None}
            whole = {"program": Path(sys.argv[0]).stem, "complete": complete, "machine": installed, "arguments": given}
            arguments.json.write_text(written({**whole, "figures": found.figures}), encoding="utf-8")


#: What is measured beside us and has a version worth knowing.
PEERS = ("transformers", "adams-torch", "deepspeed", "tokenizers", "fastokens")


def written(whole: Mapping[str, Any]) -> str:
    """Format as JSON: numbers with five digits, and a list on one line."""

    def rounded(x: Any) -> Any:
        if isinstance(x, float):
            return float(f"{x:.5g}")
        if isinstance(x, Mapping):
            return {key: rounded(value) for key, value in x.items()}
        return [rounded(value) for value in x] if isinstance(x, list | tuple) else x

    text = json.dumps(rounded(whole), indent=1, ensure_ascii=False)
    for a_list in (r"\[[^][{}]*\]", r"\[(?:[^][{}]|\[[^][{}]*\])*\]"):  # of numbers, then of such lists
        text = re.sub(a_list, lambda found: re.sub(r"(?<=\[)\n *|\n *(?=\])", "", found[0]).replace("\n", ""), text)
    return re.sub(r", {2,}", ", ", text) + "\n"
