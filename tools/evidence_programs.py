"""Blocks that rest on a table of one program in tools/, or on what the paper has published."""

import statistics
from collections.abc import Iterable, Sequence
from functools import cache

import torch
from evidence_memory import SMOLLM2_135M
from evidence_results import NotYet, Results, block, markdown

from coupled_adam import CoupledAdam, describe, experiments, param_groups
from coupled_adam.audit.verdict import FREQUENCY, ISOTROPY, SHIFT, SIMILARITY
from coupled_adam.figures import MISSING
from coupled_adam.report.paired import difference_text, paired_difference
from coupled_adam.report.tuned import Row, number, text

FINETUNED = {"adamw": "AdamW", "coupled_adam": "Coupled Adam"}


def _figure(row: Row, name: str) -> float:
    value = number(row, name)
    if value is None:
        raise NotYet(f"no {name}")
    return value


def _spread(values: Sequence[float], form: str) -> str:
    if len(values) < 2:
        raise NotYet("a single seed")
    return f"{statistics.fmean(values):{form}} ± {statistics.stdev(values):{form}}"


def _by_seed(rows: Iterable[Row], name: str) -> dict[int, float]:
    return {round(_figure(row, "seed")): _figure(row, name) for row in rows}


# Fine-tuning


def _arm(rows: Sequence[Row], optimizer: str, lr: float, factor: float) -> list[Row]:
    return [
        row
        for row in rows
        if (text(row, "optimizer"), _figure(row, "lr"), _figure(row, "lr_factor")) == (optimizer, lr, factor)
    ]


def _chosen(rows: Sequence[Row], optimizer: str) -> tuple[float, float]:
    """The rate of all parameters that was best for the first seed, and the embedding's factor that was best at it."""
    tried = [row for row in rows if text(row, "optimizer") == optimizer]
    seed = min(_figure(row, "seed") for row in tried)
    tried = sorted(tried, key=lambda row: _figure(row, "loss_selection"))
    of_first = [row for row in tried if _figure(row, "seed") == seed]
    lr = next(_figure(row, "lr") for row in of_first if _figure(row, "lr_factor") == 1)
    return lr, next(_figure(row, "lr_factor") for row in of_first if _figure(row, "lr") == lr)


def _compared(rows: Sequence[Row], own_factor: bool) -> dict[str, tuple[str, list[Row]]]:
    """The rates of each optimizer, and its runs at them."""
    found = {}
    for optimizer, label in FINETUNED.items():
        lr, factor = _chosen(rows, optimizer)
        rate = f"{lr:g}, embedding ×{factor:g}" if own_factor else f"{lr:g}"
        found[label] = (rate, _arm(rows, optimizer, lr, factor if own_factor else 1.0))
    return found


FINETUNING = (
    ("loss on the new text", "loss_report", ".3f"),
    ("loss on the text of the pretraining", "loss_old", ".3f"),
    ("mean shift ratio", "mean_shift_ratio", ".3f"),
    ("isotropy", "isotropy", ".2f"),
)


@block("finetuning")
def finetuning(results: Results) -> str:
    rows = results.rows("finetuning.csv")
    before = _arm(rows, "", 0.0, 0.0)
    one, own = _compared(rows, False), _compared(rows, True)
    made = []
    for label, name, form in FINETUNING:
        cells = [label, f"{statistics.fmean(_by_seed(before, name).values()):{form}}"]
        for compared in (one, own):
            a, v = (_by_seed(found, name) for _, found in compared.values())
            cells += [f"{statistics.fmean(values.values()):{form}}" for values in (a, v)]
            cells.append(difference_text(paired_difference(a, v), form))
        made.append(cells)
    headings = ["after 96 steps", "before"]
    for compared in (one, own):
        headings += [f"{label}, {rate}" for label, (rate, _) in compared.items()] + ["difference [95%]"]
    return markdown(headings, made)


@block("finetuning-difference")
def finetuning_difference(results: Results) -> str:
    a, v = (_by_seed(found, "loss_report") for _, found in _compared(results.rows("finetuning.csv"), True).values())
    return difference_text(paired_difference(a, v))


# Toy


def _range(results: Results, file: str, name: str) -> str:
    values = [_figure(row, name) for row in results.rows(file)]
    return f"{min(values):.2f} to {max(values):.2f}"


@block("toy-drift")
def toy_drift(results: Results) -> str:
    second, gradients = (_range(results, "toy-drift.csv", name) for name in ("second_moments", "gradients"))
    return f"{second} for uneven second moments and {gradients} for the gradients"


# First moments in fewer bits


@block("first-moments")
def first_moments(results: Results) -> str:
    rows = results.rows("first-moments.csv")
    named = {"float32": "float32", "bfloat16": "bfloat16", "8bit": "eight bits"}
    found = {name: [row for row in rows if text(row, "exp_avg_dtype") == name] for name in named}
    made = []
    for name, label in named.items():
        loss, shift = (_by_seed(found[name], figure) for figure in ("loss", "mean_shift_ratio"))
        told = difference_text(paired_difference(_by_seed(found["float32"], "loss"), loss), ".4f")
        cells = [_spread(list(loss.values()), ".3f"), MISSING if name == "float32" else told]
        made.append([label, *cells, _spread(list(shift.values()), ".4f")])
    return markdown(["first moment", "validation loss", "minus float32's [95%]", "mean shift ratio"], made)


@block("eight-bit-error")
def eight_bit_error(results: Results) -> str:
    by_beta: dict[float, list[float]] = {}
    for row in results.rows("eight-bit-error.csv"):
        by_beta.setdefault(_figure(row, "beta1"), []).append(_figure(row, "error"))
    told = [f"{100 * statistics.fmean(errors):.1f}% at β1 = {beta:g}" for beta, errors in by_beta.items()]
    return f"{', '.join(told[:-1])} and {told[-1]}"


# A model that comes in a package


@block("described")
def described(_: Results) -> str:
    return _described()


@cache
def _described() -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M))
    lines = [
        *describe(CoupledAdam(param_groups(model))).splitlines(),
        "  clipping by the Trainer: to a global norm of 1",
    ]
    return "\n".join(f"    {line}" for line in lines)


@block("isotropy-by-sign")
def isotropy_by_sign(results: Results) -> str:
    row = results.rows("isotropy-signs.csv")[0]
    first, flipped, ours = (_figure(row, name) for name in ("isotropy_numpy", "isotropy_flipped", "isotropy"))
    return (
        f"the signs of numpy's `eigh` give {first:.3f}, all of them flipped {flipped:.3f}, and ours, which make the "
        f"largest component positive and are the same everywhere, {ours:.3f}"
    )


# What the paper has published


def _published(name: str, method: str, form: str) -> str:
    values = [
        value
        for row in experiments.published()
        if row.method == method and (value := getattr(row, name, None)) is not None
    ]
    return f"{min(values):{form}}–{max(values):{form}}" if values else ""


@block("verdict-bounds")
def verdict_bounds(results: Results) -> str:
    rows = []
    for label, criterion, form in (
        ("mean shift ratio", SHIFT, ".2f"),
        ("isotropy", ISOTROPY, ".2f"),
        ("|norm–frequency Spearman|", FREQUENCY, ".2f"),
        ("word similarity", SIMILARITY, ".0f"),
    ):
        low_is_good = criterion.good < criterion.poor
        good, poor = ("up to", "above") if low_is_good else ("from", "below")
        published = [
            _published(criterion.published, method, form) if criterion.published else ""
            for method in ("AdamW", "Coupled Adam")
        ]
        rows.append([label, f"{good} {criterion.good:g}", f"{poor} {criterion.poor:g}", *published])
    return markdown(["", "good", "poor", "the paper, AdamW", "the paper, Coupled Adam"], rows)
