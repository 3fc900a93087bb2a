"""Grids in which each method has its own rate: what is chosen by which text, and what is compared."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from made_up_study import FACTORS, TRUTH, documents, row, study

from coupled_adam.errors import InputError
from coupled_adam.report.paired import holm, paired_difference
from coupled_adam.report.tuned import (
    cells,
    factor_text,
    fitted_optimum,
    label_of,
    number,
    read_rows,
    tuned_cells,
)


def cell(rows: list, tying: str = "tied"):
    (found,) = [each for each in cells(rows) if each.name == tying]
    return found


def test_the_rows_fall_into_cells_arms_and_factors_in_the_order_of_the_grid() -> None:
    found = cells(reversed(study()))
    assert [each.name for each in found] == ["tied", "untied"]
    assert list(found[0].arms) == ["adamw", "coupled", "token"]
    assert list(found[0].arms["token"].runs) == list(FACTORS)
    assert found[0].fact("batch_tokens") == "1024" and found[0].fact("seed") == ""


def test_rows_of_other_experiments_are_left_out() -> None:
    assert cells([{"name": "a", "experiment": "mini-drift-adamw-1e-3", "seed": 1}, {"name": "b"}]) == []


def test_each_arm_is_taken_at_the_factor_of_its_lowest_selection_loss() -> None:
    for each in cells(study()):
        for name, (_, best) in TRUTH.items():
            choice = each.arms[name].choice
            assert (choice.factor, choice.seeds, choice.at_end) == (best, (1,), False)
            assert choice.fitted == pytest.approx(best), "the parabola is exact"


def test_the_reported_half_has_no_say_in_the_choice() -> None:
    rows = [{**each, "loss_report": 1.0 if each["lr_factor"] == 300.0 else 9.0} for each in study()]
    outcomes = cell(rows).outcomes()
    assert [outcome.choice.factor for outcome in outcomes] == [30.0, 10.0, 100.0]
    assert all(set(outcome.losses.values()) == {9.0} for outcome in outcomes)


def test_seeds_that_were_run_everywhere_choose_together() -> None:
    rows = [row("tied", "adamw", factor, seed) for factor in FACTORS for seed in (1, 2)]
    rows += [row("tied", "adamw", 1.0, seed) for seed in range(3, 11)]
    # The first seed alone would choose 100.
    rows = [{**r, "loss_selection": 5.0} if (r["lr_factor"], r["seed"]) == (100.0, 1) else r for r in rows]
    rows = [{**r, "loss_selection": 6.9} if (r["lr_factor"], r["seed"]) == (100.0, 2) else r for r in rows]
    choice = cell(rows).arms["adamw"].choice
    assert choice.seeds == (1, 2) and choice.factor == 30.0
    assert choice.losses[100.0] == pytest.approx((5.0 + 6.9) / 2)


def test_where_no_seed_was_run_everywhere_the_one_with_most_factors_chooses() -> None:
    rows = [row("tied", "adamw", factor, 1) for factor in FACTORS[:4]]
    rows += [row("tied", "adamw", factor, 2) for factor in FACTORS[3:]]
    choice = cell(rows).arms["adamw"].choice
    assert choice.seeds == (1,) and list(choice.losses) == list(FACTORS[:4])


@pytest.mark.parametrize(
    ("factors", "told"), [((1.0, 3.0, 10.0), "≥ 10"), ((100.0, 300.0), "≤ 100"), ((30.0,), "30 (")]
)
def test_an_optimum_at_the_end_of_what_was_tried_is_flagged(factors: tuple[float, ...], told: str) -> None:
    choice = cell([row("tied", "adamw", factor, 1) for factor in factors]).arms["adamw"].choice
    assert choice.at_end and choice.fitted is None
    assert factor_text(choice).startswith(told)


def test_a_run_that_diverged_is_no_choice_and_bounds_the_axis() -> None:
    rows = [row("tied", "adamw", factor, 1) for factor in (3.0, 10.0, 30.0)]
    rows.append(row("tied", "adamw", 100.0, 1, loss_selection="", loss_report="", diverged="true"))
    choice = cell(rows).arms["adamw"].choice
    assert (choice.factor, choice.at_end, choice.fitted) == (30.0, False, None)
    assert choice.losses[100.0] == math.inf
    every = [{**each, "diverged": "true", "loss_selection": None} for each in rows]
    assert cell(every).arms["adamw"].choice is None and cell(every).outcomes() == []


def test_rows_without_the_half_that_chooses_choose_nothing() -> None:
    rows = [{k: v for k, v in each.items() if k != "loss_selection"} for each in study()]
    assert tuned_cells(rows) == [] and cell(rows).outcomes() == []


def test_one_factor_alone_is_nothing_that_was_tuned() -> None:
    assert tuned_cells([row("untied", arm, 1.0, seed) for arm in ("adamw", "coupled") for seed in (1, 2)]) == []


def test_the_differences_are_those_of_the_pairs_at_the_optima() -> None:
    reference, *others = cell(study()).outcomes()
    assert reference.difference is None and reference.adjusted is None and reference.over_documents is None
    expected = []
    for outcome in others:
        losses = {seed: reference.losses[seed] for seed in (1, 2, 3)}
        expected.append(paired_difference(losses, outcome.losses))
        assert outcome.difference == expected[-1] and outcome.difference.count == 3
        assert outcome.difference.mean == pytest.approx(TRUTH[outcome.arm.name][0] - 5.7, abs=0.003)
    assert [outcome.adjusted for outcome in others] == holm([each.p_value for each in expected])


def test_the_bootstrap_needs_the_documents_of_all_pairs() -> None:
    rows = study()
    known = documents(rows)
    _, coupled, _ = cell(rows).outcomes(known)
    assert coupled.over_documents.low == pytest.approx(coupled.difference.mean, abs=0.002)
    del known["mini-what-tied-coupled-x10-s2"]
    assert cell(rows).outcomes(known)[1].over_documents is None


def test_two_rows_of_one_run_are_refused() -> None:
    again = row("tied", "adamw", 1.0, 1)
    assert len(cell([*study(), again]).rows) == len(cell(study()).rows), "the same row twice is one"
    with pytest.raises(InputError, match=r"mini-what-tied-adamw-x1-s1: two rows of this experiment and seed differ"):
        cells([*study(), {**again, "loss_report": 5.0}])


@pytest.mark.parametrize(("column", "told"), [("seed", "no seed"), ("lr_factor", "no lr_factor")])
def test_a_row_that_lacks_what_it_was_is_named(column: str, told: str) -> None:
    with pytest.raises(InputError, match=f"mini-what-tied-adamw-x1-s1: the row has {told}"):
        cells([{**row("tied", "adamw", 1.0, 1), column: ""}])


def test_a_table_is_the_same_from_a_file(tmp_path: Path) -> None:
    rows = study()
    with (tmp_path / "study.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    read = cell(read_rows(tmp_path / "study.csv")).outcomes()
    assert [o.difference for o in read] == [o.difference for o in cell(rows).outcomes()]


def test_cells_of_a_table() -> None:
    for missing in ({}, {"a": ""}, {"a": None}, {"a": "nan"}, {"a": "inf"}):
        assert number(missing, "a") is None
    assert number({"a": "1e-3"}, "a") == 1e-3 and number({"a": 2}, "a") == 2.0
    with pytest.raises(InputError, match="r1, column a: 'x' is not a number"):
        number({"name": "r1", "a": "x"}, "a")


def test_the_vertex_of_a_parabola() -> None:
    losses = {float(f): 5 + 0.2 * (np.log(f) - np.log(17)) ** 2 for f in (1, 3, 10, 30, 100)}
    assert fitted_optimum(losses) == pytest.approx(17)
    assert fitted_optimum({1.0: 1.0, 3.0: 1.0, 10.0: 1.0}) is None, "level"
    assert fitted_optimum({1.0: 2.0, 3.0: 1.0}) is None


@pytest.mark.parametrize(
    ("arm", "label"),
    [
        ("adamw", "AdamW"), ("element", "AdamW"), ("coupled", "Coupled Adam"), ("hidden", "Coupled Adam"),
        ("element-zero-sum", "AdamW, zero-sum step"), ("factored-0.5", "tempered, α = 0.5"),
        ("alpha-0.5-zero-sum", "tempered by frequency, α = 0.5, zero-sum step"),
        ("element-beta2-0.999", "AdamW, β2 = 0.999"), ("adamw-center", "AdamW + center"),
        ("something-new", "something-new"),
    ],
)  # fmt: skip
def test_labels(arm: str, label: str) -> None:
    assert label_of(arm) == label
