"""Blocks of what benchmarks/all.py measured: one per run, with the machines of docs/results/benchmarks in turn."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence_results import NotYet, Results, block, markdown

Figures = Mapping[str, Any]

DIRECTORY = "benchmarks"

#: Packages that figures depend on, in the order of the text above a table.
PACKAGES = ("torch", "numba", "numpy", "triton", "transformers", "tokenizers", "fastokens", "adams-torch", "deepspeed")

#: What is compared with it in every file has these headings.
COMPARISON = ("work", "ours", "theirs", "ratio", "middle half", "target")


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


UNITS: dict[str, Callable[[float], str]] = {
    "s": _time,
    "ms": lambda x: _time(x / 1e3),
    "bytes": lambda x: f"{x / 2**20:,.1f} MiB",
    "tokens/s": lambda x: f"{x:,.0f} tokens/s",
    "MB/s": lambda x: f"{x:.2f} MB/s",
}


def _number(x: float) -> str:
    """Format a ratio: three digits, but not more than two decimals from 0.1 on."""
    return f"{x:.2f}" if abs(x) >= 0.1 else f"{x:.2g}"


def _met(figures: Figures) -> bool | None:
    """Return whether the ratio, as it is shown, reaches its target; None without one."""
    ratio = float(_number(figures["ratio"]))
    if "at_least" in figures:
        return ratio >= float(figures["at_least"])
    return ratio <= float(figures["target"]) if figures.get("target") is not None else None


def _target(figures: Figures) -> str:
    if _met(figures) is None:
        return ""
    return f"≥ {figures['at_least']:g}" if "at_least" in figures else f"≤ {figures['target']:g}"


def _shares(figures: Figures) -> list[str]:
    """Format the bytes that ours and theirs have to move, and the shares of the bandwidth that they reach."""
    if "moves" not in figures:
        return ["", ""]
    bandwidth, times = figures["bandwidth"]["in_place"], (figures["ours"], figures["theirs"])
    moves = " / ".join(f"{each / 1e6:,.0f} MB" for each in figures["moves"])
    shares = (moved / time / bandwidth for moved, time in zip(figures["moves"], times, strict=True))
    return [moves, " / ".join(f"{share:.0%}" for share in shares)]


def _sent(figures: Figures) -> list[str]:
    if "sent" not in figures:
        return ["", ""]
    return [" / ".join(figures["collectives"]), " / ".join(f"{each:,}" for each in figures["sent"])]


#: Columns that a table has if a row has this key.
FURTHER: dict[str, tuple[Sequence[str], Callable[[Figures], list[str]]]] = {
    "moves": (("moves, ours / theirs", "of the bandwidth"), _shares),
    "sent": (("collectives per step, ours / theirs", "bytes sent per process"), _sent),
}


def _comparisons(found: Mapping[str, Figures]) -> str:
    """Format what was compared."""
    further = [each for key, each in FURTHER.items() if any(key in figures for figures in found.values())]
    rows = []
    for name, figures in found.items():
        written = UNITS[figures.get("unit", "s")]
        low_high = "–".join(map(_number, figures["middle_half"])) if "middle_half" in figures else ""
        sides = [written(figures["ours"]), written(figures["theirs"])]
        more = [cell for _, cells in further for cell in cells(figures)]
        rows.append([name, *sides, _number(figures["ratio"]), low_high, _target(figures), *more])
    return markdown([*COMPARISON, *(heading for headings, _ in further for heading in headings)], rows)


def _verdict(found: Mapping[str, Figures]) -> str | None:
    """Say which targets are met."""
    met = {name: reached for name, figures in found.items() if (reached := _met(figures)) is not None}
    if not met:
        return None
    missed = [f"{name} ({_number(found[name]['ratio'])}; {_target(found[name])})" for name in met if not met[name]]
    if not missed:
        return f"Targets met: all {len(met)}." if len(met) > 1 else "The target is met."
    return f"Targets met: {len(met) - len(missed)} of {len(met)}. Missed: {'; '.join(missed)}."


def _repeated(found: Mapping[str, Sequence[float]]) -> str:
    """Format what was measured several times, against the first of them."""
    medians = {name: statistics.median(times) for name, times in found.items()}
    first = next(iter(medians))
    rows = []
    for name, median in medians.items():
        times = sorted(found[name])
        quarter = len(times) // 4
        spread = "–".join(map(_time, (times[quarter], times[-quarter - 1])))
        rows.append([name, _time(median), spread, _number(median / medians[first])])
    return markdown(["work", "median", "middle half", f"÷ {first}"], rows)


def _bandwidths(found: Mapping[str, Figures]) -> str | None:
    """Say what memory did while the rows were measured."""
    every = [figures["bandwidth"] for figures in found.values() if "bandwidth" in figures]
    if not every:
        return None
    told = {"copy": "a copy moves", "in_place": "a product in place moves", "read": "a sum reads"}
    parts = []
    for key, words in told.items():
        rates = [each[key] / 1e9 for each in every]
        low, high = f"{min(rates):.0f}", f"{max(rates):.0f}"
        parts.append(f"{words} {low if low == high else f'{low}–{high}'} GB/s")
    return f"Around these rows, {', '.join(parts)}."


def _machine(run: Mapping[str, Any]) -> str:
    about, arguments = run["machine"], run["arguments"]
    versions = ", ".join(f"{name} {about[name]}" for name in PACKAGES if about.get(name))
    given = [
        f"{key} {value}" for key, value in arguments.items() if key in ("threads", "rounds", "vocabulary", "width")
    ]
    cpus = f"{about['cpus']} CPU{'s' if about['cpus'] != 1 else ''}"
    where = ", ".join(x for x in (about.get("gpu"), about["processor"], cpus) if x)
    return f"{where}; Python {about['python']}, {versions} ({', '.join(given)})"


def table(run: Mapping[str, Any]) -> str:
    """Format one file: the machine, what was compared, what was measured alone, and what is not there."""
    figures: Mapping[str, Any] = run["figures"]
    compared = {name: x for name, x in figures.items() if isinstance(x, Mapping) and "ratio" in x}
    repeated = {name: x for name, x in figures.items() if isinstance(x, list) and x}
    absent = {name: x["absent"] for name, x in figures.items() if isinstance(x, Mapping) and "absent" in x}
    parts: list[str | None] = [_machine(run) + ("" if run["complete"] else "; interrupted") + ":"]
    if compared:
        parts += [_comparisons(compared), _verdict(compared), _bandwidths(compared)]
    if repeated:
        parts.append(_repeated(repeated))
    if absent:
        parts.append("Not measured: " + "; ".join(f"{name}: {reason}" for name, reason in absent.items()) + ".")
    return "\n\n".join(part for part in parts if part)


def runs(results: Results, name: str) -> list[dict[str, Any]]:
    """Read the files of a run, one per machine. Raises NotYet without any."""
    paths = sorted((results.directory / DIRECTORY).glob(f"{name}.*.json"))
    if not paths:
        raise NotYet(f"there is no {DIRECTORY}/{name}.*.json")
    return [json.loads(path.read_text("utf-8")) for path in paths]


def names(directory: Path) -> list[str]:
    """List the runs that have files."""
    return sorted({path.name.split(".")[0] for path in (directory / DIRECTORY).glob("*.json")})


#: The row that the README quotes.
WHOLE_STEP = "GPT-2 124M: clip + step ÷ clip + fused AdamW"


@block("clipped-step")
def clipped_step(results: Results) -> str:
    """Say how long clipping and a step take, against AdamW: one ratio, or the range of the machines."""
    found = [
        run["figures"][WHOLE_STEP]["ratio"] for run in runs(results, "optimizer_step") if WHOLE_STEP in run["figures"]
    ]
    if not found:
        raise NotYet(f"no run of optimizer_step has {WHOLE_STEP}")
    low, high = _number(min(found)), _number(max(found))
    return low if low == high else f"{low} to {high}"


def tables(results: Results, name: str) -> str:
    """Format the files of a run."""
    return "\n\n".join(map(table, runs(results, name)))


def _register(name: str) -> None:
    block(f"benchmark-{name}")(lambda results: tables(results, name))


for _name in names(Path(__file__).parents[1] / "docs" / "results"):
    _register(_name)
