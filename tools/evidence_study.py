"""Blocks that rest on study.csv: each method at its own learning rate of the embedding."""

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from evidence_results import NotYet, Results, block, markdown

from coupled_adam.figures import cell
from coupled_adam.report import tuned_sections
from coupled_adam.report.paired import difference_text, holm, p_text, paired_difference, pairs_needed
from coupled_adam.report.tuned import (
    Arm,
    Cell,
    Outcome,
    Row,
    Versus,
    difference_at,
    factor_text,
    number,
    text,
    versus,
)

#: The difference that the number of seeds is planned for, in nats per token.
DETECTABLE = 0.02

#: Patterns of the grids' names, as experiments/mini.toml has them.
WHAT, BATCH, REST = "mini-what-{tying}-{arm}-{factor}", "mini-{cell}-{arm}-{factor}", "mini-rest-{rate}-{arm}-{factor}"
RATES, WORDS, WARM = "mini-rates-{arm}-{factor}", "mini-words-{arm}-{factor}", "mini-warm-{arm}-{factor}"
LARGE = "mini-large-{rate}-{arm}-{factor}"
MASKED, LONGER_MASKED = "mini-masked-{arm}-{factor}", "mini-longer-masked-{arm}-{factor}"

STEPS, MUON = "mini-steps-{steps}-{arm}-{factor}", "mini-muon-{matrices}-{arm}-{factor}"

#: The cell of the largest batch, that of more steps with the smallest, and that of more steps with a larger one.
LARGEST, LONGER, LONGER_LARGER = "b16k", "1952", "b4k-976"

#: The learning rate of the rest that is best for both optimizers; elsewhere it is 3e-3.
BEST_REST = "1e-3"

#: Pairs of arms that differ in one thing: what that is, without it, and with it.
CONTRASTS = (
    ("the step sums to zero", "adamw", "element-zero-sum"),
    ("the step sums to zero", "token", "token-zero-sum"),
    ("the step sums to zero", "alpha-0.5", "alpha-0.5-zero-sum"),
    ("one second moment per token", "adamw", "token"),
    ("one second moment for all tokens, per hidden unit", "adamw", "coupled"),
    ("one second moment for all hidden units too", "coupled", "scalar"),
    ("the token's second moment to the power 0.5", "coupled", "factored-0.5"),
    ("the same, and not the power 1 of each element", "adamw", "factored-0.5"),
    ("AMSGrad", "adamw", "element-amsgrad"),
    ("β2 = 0.999 for the embedding", "adamw", "element-beta2-0.999"),
    ("no second moment at all", "coupled", "sgd"),
    ("a head that rounds to bfloat16", "adamw-center", "adamw-center-bf16-head"),
)

#: What centering is compared in.
CENTERED = (("adamw", "adamw-center"), ("coupled", "coupled-center"))

KAPPA_RANGES = ("below_0.1", "0.1_to_1", "1_to_10", "above_10")


def _text_table(table: tuned_sections.TextTable) -> str:
    return markdown([f"{name} {small}".strip() for name, small in table.headings], table.rows)


@block("what-tied")
def what_tied(results: Results) -> str:
    return _text_table(tuned_sections.table(*results.tuned(WHAT, "tied"), results.documents))


@block("what-untied")
def what_untied(results: Results) -> str:
    return _text_table(tuned_sections.table(*results.tuned(WHAT, "untied"), results.documents))


@block("warm")
def warm(results: Results) -> str:
    return _text_table(tuned_sections.table(*results.tuned(WARM), results.documents))


def _contrasts(found: Cell) -> str:
    rows, differences = [], []
    for what, without, having in CONTRASTS:
        arms = [found.arms.get(name) for name in (without, having)]
        if None in arms or any(arm.choice is None for arm in arms if arm):
            continue
        first, second = arms
        assert first and second and first.choice and second.choice
        differences.append(difference_at(first, first.choice.factor, second, second.choice.factor))
        rows.append([what, first.label, second.label, difference_text(differences[-1])])
    adjusted = holm([each.p_value if each else None for each in differences])
    counts = [str(each.count) if each else "0" for each in differences]
    told = [[*row, p_text(p), count] for row, p, count in zip(rows, adjusted, counts, strict=True)]
    return markdown(["what differs", "without", "with", "difference [95%]", "p Holm", "pairs"], told, left=3)


@block("contrasts-tied")
def contrasts_tied(results: Results) -> str:
    return _contrasts(*results.tuned(WHAT, "tied"))


@block("contrasts-untied")
def contrasts_untied(results: Results) -> str:
    return _contrasts(*results.tuned(WHAT, "untied"))


@block("noise")
def noise(results: Results) -> str:
    """How far pairs scatter, at one rate for all parameters and at the best rate of each, of three pairs or more."""
    rows = []
    for found in results.cells:
        a, v = found.reference, found.shared
        if found.grid != WHAT or a is None or v is None:
            continue
        places = [("1", 1.0, 1.0)]
        if found.tuned and a.choice and v.choice:
            places.append(("best for each", a.choice.factor, v.choice.factor))
        for name, first, second in places:
            figures = (a.figures("loss_report", first), v.figures("loss_report", second))
            difference = paired_difference(*figures)
            if difference is None or difference.deviation is None or difference.count < 3:
                continue
            shared = sorted(figures[0].keys() & figures[1].keys())
            told = [[each[seed] for seed in shared] for each in figures]
            row = [found.name, name, str(difference.count)]
            row += [f"{statistics.fmean(each):.3f} ± {statistics.stdev(each):.3f}" for each in told]
            row += [difference_text(difference), f"{difference.deviation:.3f}"]
            rows.append([*row, str(pairs_needed(difference.deviation, DETECTABLE))])
    headings = ["embeddings", "factor", "pairs", "AdamW", "Coupled Adam", "difference [95%]", "sd of the difference"]
    return markdown([*headings, f"pairs for an interval of {DETECTABLE:g}"], rows, left=2)


@block("batch")
def batch(results: Results) -> str:
    return _text_table(tuned_sections.table_across(results.tuned(BATCH), results.documents))


@block("batch-sentence")
def batch_sentence(results: Results) -> str:
    told = []
    for each in versus(results.tuned(BATCH)):
        if each.cell.name in ("b1k", "b4k", "b16k"):
            tokens = number(each.cell.rows[0], "batch_tokens")
            batch = f"{tokens:,.0f} tokens per batch" if tokens else f"the batch of {each.cell.name}"
            told.append((tokens or 0, f"{difference_text(each.coupled.difference).lstrip('+')} at {batch}"))
    if not told:
        raise NotYet("study.csv has no pairs at several batches")
    return " and ".join(", ".join(part) for part in ([t for _, t in sorted(told)][:-1], [max(told)[1]]) if part)


@block("kappa")
def kappa(results: Results) -> str:
    """How far the study is from real batches; the same for all of its runs with one batch and vocabulary."""
    (tied,) = results.tuned(WHAT, "tied")
    row = tied.rows[0]
    rows, of_text, tokens, size = (number(row, c) for c in ("kappa_rows", "kappa_text", "batch_tokens", "vocab_size"))
    if rows is None or of_text is None or tokens is None or size is None:
        raise NotYet("study.csv does not say how often rows are forgotten")
    beta2 = number(row, "beta2")
    return (
        f"At B = {tokens:,.0f} and β2 = {cell(beta2, '{:g}')}, the setting of our study, that is {rows:.0%} of a "
        f"vocabulary of {size:,.0f}, and {of_text:.0%} of the text."
    )


@block("batch-tempered")
def batch_tempered(results: Results) -> str:
    rows = []
    for found in results.tuned(BATCH):
        outcomes = found.outcomes()
        for base in (outcome for outcome in outcomes if outcome.reference):
            for other in (outcome for outcome in outcomes if "factored" in outcome.arm.name):
                losses = [f"{o.mean('loss_report'):.3f} ({factor_text(o.choice)})" for o in (base, other)]
                rows.append([found.name, *losses, difference_text(other.difference), p_text(other.adjusted)])
    headings = ["cell", "AdamW (factor)", "tempered, α = 0.5 (factor)", "difference [95%]", "p Holm in the cell"]
    return markdown(headings, rows)


@block("batch-embeddings")
def batch_embeddings(results: Results) -> str:
    rows = []
    for found in results.tuned(BATCH):
        for outcome in found.outcomes():
            row = [
                outcome.mean(column) for column in ("isotropy", "ratio norm", "eb_cos_sim", "word_similarity_centered")
            ]
            if not row[2]:  # Vocabularies so small that the benchmarks have no words in them.
                row[2:] = [None, None]
            shown = [
                cell(value, form) for value, form in zip(row, ("{:.2f}", "{:.3f}", "{:.1f}", "{:.1f}"), strict=True)
            ]
            rows.append([found.name, outcome.arm.label, factor_text(outcome.choice), *shown])
    return markdown(["cell", "method", "factor", "Iso", "‖μ‖ʳ", "r̄ raw", "r̄ centered"], rows, left=2)


def _by_rate(found: Iterable[Cell]) -> str:
    """Coupled Adam beside AdamW, each at its best factor, in cells that differ in the learning rate of the rest."""
    rows = []
    for each in sorted(versus(found), key=lambda each: float(each.cell.fact("lr"))):
        a, v = each.adamw, each.coupled
        losses = [f"{o.mean('loss_report'):.3f} ({factor_text(o.choice)})" for o in (a, v)]
        pairs = str(v.difference.count) if v.difference else "0"
        row = [f"{float(each.cell.fact('lr')):g}", *losses, difference_text(v.difference), p_text(each.adjusted)]
        rows.append([*row, pairs])
    headings = ["learning rate of the rest", "AdamW (factor)", "Coupled Adam (factor)", "difference [95%]", "p Holm"]
    return markdown([*headings, "pairs"], rows)


@block("rest")
def rest(results: Results) -> str:
    return _by_rate([*results.tuned(REST), *results.tuned(WHAT, "tied")])


@block("steps")
def steps(results: Results) -> str:
    """Coupled Adam beside AdamW by the number of steps."""
    rows = []
    shorter = [each for each in results.tuned(BATCH) if each.name in ("b1k", "b4k")] + results.tuned(WARM)
    for each in versus([*shorter, *results.tuned(STEPS)]):
        a, v = each.adamw, each.coupled
        losses = [f"{o.mean('loss_report'):.3f} ({factor_text(o.choice)})" for o in (a, v)]
        row = [_setting(each.cell), *losses, difference_text(v.difference), p_text(each.adjusted)]
        similarities = [cell(o.mean("word_similarity_centered"), "{:.1f}") for o in (a, v)]
        rows.append([*row, str(v.difference.count) if v.difference else "0", *similarities])
    headings = ["parameters; steps × tokens", "AdamW (factor)", "Coupled Adam (factor)", "difference [95%]", "p Holm"]
    return markdown([*headings, "pairs", "r̄ centered, AdamW", "r̄ centered, Coupled Adam"], rows)


@block("steps-larger")
def steps_larger(results: Results) -> str:
    """Coupled Adam minus AdamW with more steps of a larger batch, in a few words."""
    (found,) = results.tuned(STEPS, LONGER_LARGER)
    if not (compared := versus([found])):
        raise NotYet("study.csv lacks an optimizer with more steps of a larger batch")
    (each,) = compared
    steps, tokens = (number(found.rows[0], column) for column in ("steps", "batch_tokens"))
    apart = difference_text(each.coupled.difference).lstrip("+")
    return f"{apart} over {cell(steps, '{:,.0f}')} steps of {cell(tokens, '{:,.0f}')} tokens"


@block("steps-tempered")
def steps_tempered(results: Results) -> str:
    """The tempered second moment beside both, with more steps."""
    rows = []
    for found in results.tuned(STEPS):
        by_name = {outcome.arm.name: outcome for outcome in found.outcomes()}
        if "factored-0.5" not in by_name:
            continue
        tempered = by_name["factored-0.5"]
        for other in (by_name[name] for name in ("adamw", "coupled") if name in by_name):
            difference = paired_difference(other.losses, tempered.losses)
            losses = [f"{o.mean('loss_report'):.3f} ({factor_text(o.choice)})" for o in (tempered, other)]
            row = [_setting(found), other.arm.label, *losses, difference_text(difference)]
            shifts = [cell(o.mean("ratio norm"), "{:.3f}") for o in (tempered, other)]
            similarities = [cell(o.mean("word_similarity_centered"), "{:.1f}") for o in (tempered, other)]
            rows.append([*row, str(difference.count) if difference else "0", *shifts, *similarities])
    headings = ["parameters; steps × tokens", "against", "tempered, α = 0.5 (factor)", "the other (factor)"]
    headings += ["difference [95%]", "pairs", "‖μ‖ʳ tempered", "‖μ‖ʳ the other", "r̄ centered tempered"]
    return markdown([*headings, "r̄ centered the other"], rows, left=2)


@block("large-batch")
def large_batch(results: Results) -> str:
    return _by_rate([*results.tuned(LARGE), *results.tuned(BATCH, LARGEST)])


@block("masked")
def masked(results: Results) -> str:
    """All arms of the masked language models, against AdamW."""
    rows = []
    for found in (*results.tuned(MASKED), *results.tuned(LONGER_MASKED)):
        rows += _masked_rows(found)
    headings = ["steps × tokens", "method", "factor", "loss", "minus AdamW [95%]", "p Holm", "seeds", "‖μ‖ʳ"]
    return markdown([*headings, "isotropy", "r̄ centered"], rows, left=2)


def _masked_rows(found: Cell) -> Iterator[list[str]]:
    length = _setting(found).partition("; ")[2]
    for each in found.outcomes():
        row = [length, each.arm.label, factor_text(each.choice), cell(each.mean("loss_report"), "{:.3f}")]
        row += ["" if each.reference else difference_text(each.difference), p_text(each.adjusted)]
        figures = (("ratio norm", "{:.3f}"), ("isotropy", "{:.2f}"), ("word_similarity_centered", "{:.1f}"))
        yield [*row, str(len(each.losses)), *(cell(each.mean(name), form) for name, form in figures)]


#: What updates the matrices beside the embedding, by the name in the grid; AdamW is in ``WHAT``.
MATRICES = {"untied": "AdamW", "fused": "Muon, q, k and v in one matrix", "split": "Muon, q, k and v apart"}


@block("muon")
def muon(results: Results) -> str:
    rows, differences = [], []
    for found in [*results.tuned(WHAT, "untied"), *results.tuned(MUON)]:
        outcomes = {outcome.arm.name: outcome for outcome in found.outcomes()}
        a = outcomes.get("adamw")
        for other in (outcomes[name] for name in ("coupled", "sgd") if a and name in outcomes):
            assert a is not None
            differences.append(paired_difference(a.losses, other.losses))
            losses = [f"{o.mean('loss_report'):.3f} ({factor_text(o.choice)})" for o in (a, other)]
            row = [MATRICES[found.name], other.arm.label, *losses, difference_text(differences[-1])]
            similarities = [cell(o.mean("word_similarity_centered"), "{:.1f}") for o in (a, other)]
            shifts = [cell(o.mean("ratio norm"), "{:.3f}") for o in (a, other)]
            rows.append([*row, *shifts, *similarities])
    adjusted = holm([each.p_value if each else None for each in differences])
    told = [
        [*row[:5], p_text(p), str(each.count) if each else "0", *row[5:]]
        for row, p, each in zip(rows, adjusted, differences, strict=True)
    ]
    headings = ["on the matrices", "on the embedding", "AdamW (factor)", "the other (factor)", "difference [95%]"]
    headings += ["p Holm", "pairs", "‖μ‖ʳ AdamW", "‖μ‖ʳ the other", "r̄ centered AdamW", "r̄ centered the other"]
    return markdown(headings, told, left=2)


@block("muon-split")
def muon_split(results: Results) -> str:
    fused, split = (
        {outcome.arm.name: outcome for outcome in results.tuned(MUON, name)[0].outcomes()}
        for name in ("fused", "split")
    )
    told = [
        f"{difference_text(paired_difference(fused[name].losses, split[name].losses))} with {split[name].arm.label}"
        for name in ("adamw", "coupled")
        if name in fused and name in split
    ]
    if not told:
        raise NotYet("study.csv has no pairs with Muon")
    return f"{' and '.join(told)} on the embedding"


@block("word-similarity-rate")
def word_similarity_rate(results: Results) -> str:
    (found,) = results.tuned(WORDS)
    columns = (*tuned_sections.SIMILARITIES, "word_similarity_bare")
    rows = []
    for outcome in found.outcomes():
        for factor, runs in outcome.arm.runs.items():
            loss = outcome.arm.mean("loss_report", factor)
            chosen = factor == outcome.choice.factor
            row = [outcome.arm.label, f"**{factor:g}**" if chosen else f"{factor:g}", cell(loss, "{:.3f}")]
            row += [cell(outcome.arm.mean(column, factor), "{:.1f}") for column in columns]
            row += [cell(outcome.arm.mean("isotropy", factor), "{:.2f}")]
            row += [cell(outcome.arm.mean("ratio norm", factor), "{:.3f}")]
            row += [cell(outcome.arm.mean("step_rms", factor), "{:.2g}"), str(len(runs))]
            rows.append(row)
    headings = ["method", "factor", "loss", "r̄ raw", "r̄ centered", "r̄ All-but-the-Top", "r̄ bare words"]
    return markdown([*headings, "isotropy", "‖μ‖ʳ", "step rms", "seeds"], rows)


@block("word-similarity-partial")
def word_similarity_partial(results: Results) -> str:
    (found,) = results.tuned(WORDS)
    columns = ("eb_cos_sim", "ratio norm", "isotropy", "step_rms")
    values = [[number(row, column) for column in columns] for row in found.rows]
    known = np.array([row for row in values if None not in row], dtype=float)
    if len(known) < 6:
        raise NotYet("study.csv has fewer than six runs with word similarity and the size of the step")
    steps = np.log(known[:, 3])
    told = " and ".join(
        f"{_partial(known[:, 0], known[:, i], steps):+.2f} with {name}" for i, name in ((1, "‖μ‖ʳ"), (2, "isotropy"))
    )
    alone = np.corrcoef(known[:, 0], steps)[0, 1]
    return (
        f"Over the {len(known)} runs, word similarity correlates {alone:+.2f} with the logarithm of the step's "
        f"size; at a given size its partial correlation is {told}."
    )


def _partial(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """Partial correlation of x and y with a third variable held fixed."""
    (xy, xz), yz = np.corrcoef([x, y, given])[0, 1:], np.corrcoef(y, given)[0, 1]
    left = (1 - xz**2) * (1 - yz**2)
    if not left > 0:
        raise NotYet("a figure of the runs is the same throughout, or follows the size of the step exactly")
    return float((xy - xz * yz) / math.sqrt(left))


@block("centering")
def centering(results: Results) -> str:
    rows, differences = [], []
    for found in results.tuned(WHAT):
        by_name = {outcome.arm.name: outcome for outcome in found.outcomes()}
        for plain, centered in CENTERED:
            if not {plain, centered} <= by_name.keys():
                continue
            a, v = by_name[plain], by_name[centered]
            differences.append(paired_difference(a.losses, v.losses))
            row = [found.name, a.arm.label, *(f"{o.mean('loss_report'):.3f} ({factor_text(o.choice)})" for o in (a, v))]
            row += [difference_text(differences[-1])]
            rows.append(
                [
                    *row,
                    *(
                        _to_from(a, v, column, form)
                        for column, form in (("isotropy", "{:.2f}"), ("ratio norm", "{:.3f}"))
                    ),
                ]
            )
    adjusted = holm([each.p_value if each else None for each in differences])
    told = [[*row[:5], p_text(p), *row[5:]] for row, p in zip(rows, adjusted, strict=True)]
    headings = ["embeddings", "method", "plain (factor)", "centered (factor)", "difference [95%]", "p Holm"]
    return markdown([*headings, "isotropy", "‖μ‖ʳ"], told, left=2)


def _to_from(a: Outcome, v: Outcome, column: str, form: str) -> str:
    return " → ".join(cell(outcome.mean(column), form) for outcome in (a, v))


@block("front")
def front(results: Results) -> str:
    """The points that no other is better than in loss and isotropy, or in loss and word similarity."""
    rows = []
    for found in results.tuned(WHAT):
        points = []
        for outcome in found.outcomes():
            for factor in outcome.choice.losses:
                figures = [outcome.arm.figures(name, factor) for name in ("loss_report", "isotropy", "eb_cos_sim")]
                seeds = set(outcome.choice.seeds).intersection(*figures)
                if seeds:
                    means = [statistics.fmean(values[seed] for seed in seeds) for values in figures]
                    points.append((outcome.arm.label, factor, *means))
        for label, factor, loss, isotropy, similarity in sorted(points, key=lambda point: point[2]):
            better = [point for point in points if point[2] < loss]
            on = ["isotropy"] if all(point[3] < isotropy for point in better) else []
            on += ["word similarity"] if all(point[4] < similarity for point in better) else []
            if on:
                row = [found.name, label, f"{factor:g}", f"{loss:.3f}", f"{isotropy:.3f}", f"{similarity:.1f}"]
                rows.append([*row, " and ".join(on)])
    return markdown(["embeddings", "method", "factor", "loss", "isotropy", "r̄", "best for its loss in"], rows, left=2)


def headline_cells(results: Results) -> list[Cell]:
    """The settings of README: tied, untied, and the larger models; those that have been run."""
    found: list[Cell] = []
    for grid, place, name in (
        (WHAT, (), ""),
        (REST, (BEST_REST,), f"0.63M parameters, tied, the rest at {BEST_REST}"),
        (STEPS, (LONGER,), "0.63M parameters, 2M tokens"),
        (STEPS, (LONGER_LARGER,), "0.63M parameters, 4M tokens, batches of 4,096"),
        (RATES, (), "1.85M parameters, 0.6M tokens"),
        (WORDS, (), "1.85M parameters, 4M tokens"),
    ):
        try:
            tuned = results.tuned(grid, *place)
        except NotYet:
            continue
        found += [replace(each, place={"setting": name or f"0.63M parameters, {each.name}"}) for each in tuned]
    if not found:
        raise NotYet("study.csv has no tuned runs")
    return found


#: Metrics of the front page besides the loss, of the longest runs: what they are called, column, and form.
AT_THE_DOOR = (
    ("word similarity r̄, after centering", "word_similarity_centered", ".1f"),
    ("mean shift ratio ‖μ‖ʳ", "ratio norm", ".3f"),
    ("isotropy", "isotropy", ".2f"),
)


@block("door")
def door(results: Results) -> str:
    """The loss at one rate and at the best rate of each, short and long, and the embeddings of the longest runs."""
    places = ((WHAT, "tied"), (BATCH, LARGEST), (STEPS, LONGER_LARGER), (STEPS, LONGER), (WORDS,))
    found = versus(each for place in places for each in results.tuned(*place))
    if len(found) < len(places):
        raise NotYet("study.csv lacks an optimizer, or its best rate, in one of its settings")
    (short, *_, longest), best = found, "best for each"
    a, v = short.adamw, short.coupled
    one = _door_row(a.arm, 1.0, v.arm, 1.0, "loss_report", ".3f")
    shown = [(each, "loss", "loss_report", ".3f") for each in found]
    shown += [(longest, name, column, form) for name, column, form in AT_THE_DOOR]
    rows = [["loss", _setting(short.cell), "one for all parameters", *one]]
    rows += [
        [name, _setting(each.cell), best, *_door_row(*_at_their_best(each), column, form)]
        for each, name, column, form in shown
    ]
    headings = ["", "parameters; steps × tokens", "learning rate of the embedding", "AdamW", "Coupled Adam"]
    return markdown([*headings, "difference [95%]"], rows, left=3)


def _setting(found: Cell) -> str:
    row = found.rows[0]
    size, steps, tokens = (number(row, column) for column in ("parameters", "steps", "batch_tokens"))
    return f"{cell(size and size / 1e6, '{:.2f}M')}; {cell(steps, '{:,.0f}')} × {cell(tokens, '{:,.0f}')}"


def _at_their_best(each: Versus) -> tuple[Arm, float, Arm, float]:
    return each.adamw.arm, each.adamw.choice.factor, each.coupled.arm, each.coupled.choice.factor


def _door_row(first: Arm, first_factor: float, second: Arm, second_factor: float, column: str, form: str) -> list[str]:
    means = [first.mean(column, first_factor), second.mean(column, second_factor)]
    difference = difference_at(first, first_factor, second, second_factor, column)
    return [*(cell(mean, f"{{:{form}}}") for mean in means), difference_text(difference, form)]


HEADLINE = ["model", "learning rate of the embedding", "AdamW", "Coupled Adam", "difference [95%]", "pairs"]


def headline_rows(results: Results) -> list[list[str]]:
    """The rows of the block below, which the demo shows too."""
    rows = []
    for each in versus(headline_cells(results)):
        a, v = each.adamw, each.coupled
        at_one = [outcome.arm.figures("loss_report", 1.0) for outcome in (a, v)]
        shared = sorted(at_one[0].keys() & at_one[1].keys())
        if shared:
            same = [f"{statistics.fmean(m[seed] for seed in shared):.3f}" for m in at_one]
            rows.append(
                [each.cell.name, "one for all parameters", *same, difference_text(each.at_one_rate), str(len(shared))]
            )
        best = [f"{o.mean('loss_report'):.3f} (×{factor_text(o.choice)})" for o in (a, v)]
        count = str(v.difference.count) if v.difference else "0"
        rows.append([each.cell.name, "best for each", *best, difference_text(v.difference), count])
    return rows


@block("headline")
def headline(results: Results) -> str:
    return markdown(HEADLINE, headline_rows(results), left=2)


def _by_decile(found: Cell) -> str:
    outcomes = found.outcomes()
    columns = [f"loss_decile_{i}" for i in range(1, 11)]
    rows = []
    for base in (outcome for outcome in outcomes if outcome.reference):
        rows.append([base.arm.label, *(cell(base.mean(column), "{:.2f}") for column in columns)])
        for outcome in outcomes:
            if outcome is not base:
                apart = [paired_difference(base.at_the_best(c), outcome.at_the_best(c)) for c in columns]
                rows.append(
                    [
                        f"{outcome.arm.label}, minus AdamW",
                        *(difference_text(d and replace(d, interval=None), ".2f") for d in apart),
                    ]
                )
    return markdown(["tenth of the text, rare to frequent", *map(str, range(1, 11))], rows)


@block("frequency-tied")
def frequency_tied(results: Results) -> str:
    return _by_decile(*results.tuned(WHAT, "tied"))


@block("frequency-untied")
def frequency_untied(results: Results) -> str:
    return _by_decile(*results.tuned(WHAT, "untied"))


@block("calibration")
def calibration(results: Results) -> str:
    rows = [
        [found.name, outcome.arm.label] + [cell(outcome.mean(f"log_ratio_{name}"), "{:+.2f}") for name in KAPPA_RANGES]
        for found in results.tuned(WHAT)
        for outcome in found.outcomes()
    ]
    headings = ["embeddings", "method", *(f"κ {name.replace('_', ' ')}" for name in KAPPA_RANGES)]
    return markdown(headings, rows, left=2)


# Models like those of the demo


def _of_experiments(results: Results, names: Iterable[str]) -> list[Row]:
    found = {text(row, "experiment"): row for row in results.rows("study.csv")}
    if missing := [name for name in names if name not in found]:
        raise NotYet(f"study.csv has no run of {missing[0]}")
    return [found[name] for name in names]


HEALTH = {
    "AdamW, tied": "mini-M-300A",
    "Coupled Adam, tied": "mini-M-300V",
    "AdamW, untied": "mini-M-300A-untied",
    "Coupled Adam, untied": "mini-M-300V-untied",
}


@block("health")
def health(results: Results) -> str:
    lines = []
    for label, row in zip(HEALTH, _of_experiments(results, HEALTH.values()), strict=True):
        columns = ("mu norm", "drift_second_moments", "drift_gradients")
        norm, *parts = (number(row, column) or 0.0 for column in columns)
        if norm == 0:
            raise NotYet(f"{text(row, 'experiment')} has no norm of the mean")
        shares = [f"{part:z.4f} ({part / norm:z.1%})" for part in parts]
        rest = norm - sum(parts)
        lines.append([label, f"{norm:.4f}", *shares, f"{rest:.4f}", f"{number(row, 'ratio norm') or 0.0:.3f}"])
    headings = ["after 300 steps", "‖μ‖", "second moments", "gradients", "initial mean", "mean shift ratio"]
    return markdown(headings, lines)


AUDITED = {
    "mean shift ratio": ("ratio norm", "{:.3f}"),
    "mean of the norms": ("avg norm", "{:.3f}"),
    "isotropy": ("isotropy", "{:.3f}"),
    "inverse condition (%)": ("Smin/Smax", "{:.2f}"),
    "norm–frequency Spearman": ("corr_s(norm, lbp)", "{:+.2f}"),
    "projection–frequency Spearman": ("corr_s(Emu, lbp)", "{:+.2f}"),
    "word similarity": ("eb_cos_sim", "{:.1f}"),
    "word similarity, centered": ("word_similarity_centered", "{:.1f}"),
}


@block("audited")
def audited(results: Results) -> str:
    pair = _of_experiments(results, ["mini-M-300A", "mini-M-300V"])
    rows = [[label, *(cell(number(row, column), form) for row in pair)] for label, (column, form) in AUDITED.items()]
    return markdown(["", "AdamW", "Coupled Adam"], rows)
