"""Blocks that rest on sweeps.csv and long.csv: one learning rate for all parameters."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from evidence_results import NotYet, Results, block, markdown

from coupled_adam.figures import cell
from coupled_adam.report.paired import difference_text, holm, p_text, paired_difference
from coupled_adam.report.sensitivity import lr_sensitivity
from coupled_adam.report.tuned import Row, number, seed_of, text

#: The methods of the sweeps in the order of their tables.
METHODS = (
    "AdamW", "AdamW + center", "AdamW + μ-loss", "AdamW + z-loss", "AdamW + soft-cap", "Coupled Adam",
    "Coupled Adam + center",
)  # fmt: skip

Lines = Mapping[str, Mapping[float, Row]]


def _by_rate(
    rows: Iterable[Row], name: Callable[[Row], str] = lambda row: text(row, "method")
) -> dict[str, dict[float, Row]]:
    found: dict[str, dict[float, Row]] = {}
    for row in rows:
        found.setdefault(name(row), {})[number(row, "lr") or 0.0] = row
    return {key: dict(sorted(line.items())) for key, line in found.items()}


def _family(results: Results, family: str) -> list[Row]:
    found = [row for row in results.rows("sweeps.csv") if text(row, "family") == family]
    if not found:
        raise NotYet(f"sweeps.csv has no runs of {family}")
    return found


def _small(value: float | None, form: str) -> str:
    """A figure, and 0 for what rounds to it; three digits (``g``) are three decimals where it is small."""
    made = cell(value, "{:.3f}" if value is not None and abs(value) < 0.1 and form.endswith("g}") else form)
    return "0" if value is not None and float(made) == 0 else made


def _rate(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")


def _sweep(first: str, lines: Lines, isotropy: bool = False) -> str:
    """A row a method: the loss at each rate that all have, sensitivity, and figures at the largest of these rates."""
    rates = sorted(set.intersection(*(set(line) for line in lines.values())))
    figures = [("mu norm", "‖μ‖", "{:.3g}"), ("ratio norm", "‖μ‖ʳ", "{:.3f}")]
    figures += [("isotropy", "isotropy", "{:.2f}")] if isotropy else []
    figures += [("logit_mean", "mean logit", "{:.2f}"), ("logit_max", "max |logit|", "{:.1f}")]
    rows = []
    for name, line in lines.items():
        losses = [number(line[rate], "test_loss") for rate in rates]
        best = min(loss for loss in losses if loss is not None)
        shown = [f"**{loss:.3f}**" if loss == best else cell(loss, "{:.3f}") for loss in losses]
        initial = number(next(iter(line.values())), "initial_loss")
        assert initial is not None, f"{name}: no initial loss"
        told = [_small(number(line[rates[-1]], column), form) for column, _, form in figures]
        rows.append([name, *shown, f"{lr_sensitivity(losses, initial):.2f}", *told])
    return markdown([first, *map(_rate, rates), "LRS", *(heading for _, heading, _ in figures)], rows)


def _ordered(lines: Lines) -> dict[str, Mapping[float, Row]]:
    return {name: lines[name] for name in METHODS if name in lines}


@block("drift")
def drift(results: Results) -> str:
    return _sweep("method", _ordered(_by_rate(_family(results, "drift"))))


@block("precision")
def precision(results: Results) -> str:
    rounded = _ordered(_by_rate(_family(results, "precision")))
    control = _by_rate(_family(results, "drift"))["AdamW"]
    return _sweep("method", {**rounded, "AdamW, float32 head (control)": control})


@block("tied")
def tied(results: Results) -> str:
    return _sweep("method", _ordered(_by_rate(_family(results, "tied"))), isotropy=True)


@block("core")
def core(results: Results) -> str:
    coupled = [row for row in _family(results, "drift") if text(row, "method") == "Coupled Adam"]
    names = {"adamw": "AdamW", "adams": "Adams", "muon": "Muon"}
    lines = _by_rate([*coupled, *_family(results, "core")], lambda row: names[text(row, "core")])
    return _sweep("optimizer of the rest", lines, isotropy=True)


@block("rounding")
def rounding(results: Results) -> str:
    lines = _by_rate(_family(results, "drift"))
    plain, centered = lines["AdamW"], lines["AdamW + center"]
    apart = {
        rate: abs((number(plain[rate], "test_loss") or 0) - (number(centered[rate], "test_loss") or 0))
        for rate in plain
    }
    told = ", ".join(f"{value:.3f} at {_rate(rate)}" for rate, value in apart.items())
    return f"In float32 the test losses of AdamW with and without centering differ by {told}."


def _listed(values: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(values[:-1]), values[-1]]))


def _figures(line: Mapping[float, Row], column: str) -> dict[float, float]:
    return {rate: value for rate, row in line.items() if (value := number(row, column)) is not None}


def _range(values: Iterable[float], form: str = ".2f") -> str:
    known = list(values)
    return f"{min(known):{form}} to {max(known):{form}}"


@block("drift-lowest")
def drift_lowest(results: Results) -> str:
    lines = _by_rate(_family(results, "drift"))
    coupled = _figures(lines.pop("Coupled Adam"), "test_loss")
    others = [_figures(line, "test_loss") for line in lines.values()]
    ahead = {rate: min(other[rate] for other in others if rate in other) - loss for rate, loss in coupled.items()}
    rates = [_rate(rate) for rate, apart in ahead.items() if apart > 0]
    return f"the lowest loss at {_listed(rates)}, by up to {max(ahead.values()):.2f}"


@block("drift-norms")
def drift_norms(results: Results) -> str:
    norms = _figures(_by_rate(_family(results, "drift"))["AdamW"], "mu norm")
    return _listed([f"{value:.2g}" for value in norms.values()])


@block("drift-range")
def drift_range(results: Results) -> str:
    norms = list(_figures(_by_rate(_family(results, "drift"))["AdamW"], "mu norm").values())
    return f"{norms[0]:.2g} → {norms[-1]:.2g}"


@block("tied-shift")
def tied_shift(results: Results) -> str:
    lines = _by_rate(_family(results, "tied"))
    coupled, adamw = (_range(_figures(lines[name], "ratio norm").values()) for name in ("Coupled Adam", "AdamW"))
    return f"a shift of {coupled} of the mean norm where AdamW has {adamw}"


@block("tied-isotropy")
def tied_isotropy(results: Results) -> str:
    lines = _by_rate(_family(results, "tied"))
    plain, centered = (_figures(lines[name], "isotropy") for name in ("Coupled Adam", "Coupled Adam + center"))
    rate = max(plain.keys() & centered.keys())
    return f"isotropy at {_rate(rate)} goes from {plain[rate]:.2f} to {centered[rate]:.2f}"


@block("core-isotropy")
def core_isotropy(results: Results) -> str:
    rows = [row for row in _family(results, "drift") if text(row, "method") == "Coupled Adam"]
    cored = _family(results, "core")
    rates = {number(row, "lr") for row in cored}
    known = [number(row, "isotropy") for row in (*rows, *cored) if number(row, "lr") in rates]
    return _range(value for value in known if value is not None)


# What rests on long.csv: four million tokens at one learning rate


LONG = (
    ("test_loss", "validation loss", "{:.3f}", ".3f"),
    ("eb_cos_sim", "word similarity, 100·correlation with human ratings", "{:.1f}", ".1f"),
    ("isotropy", "isotropy", "{:.3f}", ".3f"),
    ("ratio norm", "mean shift ratio", "{:.3f}", ".3f"),
    ("Smin/Smax", "inverse condition, 100·S_min/S_max", "{:.2f}", ".2f"),
)


@block("long")
def long(results: Results) -> str:
    rows = results.rows("long.csv")
    compared, shown = [], []
    for column, label, form, signed in LONG:
        by_method: dict[str, dict[int, float]] = {}
        for row in rows:
            if (value := number(row, column)) is not None:
                by_method.setdefault(text(row, "method"), {})[seed_of(row)] = value
        a, v = by_method["AdamW"], by_method["Coupled Adam"]
        compared.append(paired_difference(a, v))
        spreads = [
            f"{form} ± {form}".format(statistics.fmean(m), statistics.stdev(m))
            for m in map(list, (a.values(), v.values()))
        ]
        shown.append([label, *spreads, difference_text(compared[-1], signed)])
    adjusted = holm([found.p_value if found else None for found in compared])
    rows_out = [[*row, p_text(p)] for row, p in zip(shown, adjusted, strict=True)]
    return markdown(["after 4M tokens", "AdamW", "Coupled Adam", "difference [95%]", "p"], rows_out)
