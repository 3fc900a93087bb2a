"""Sweeps over learning rates: what belongs together, and the page that shows it, in a real browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import fits, opened
from made_up import METHODS, RATES, STEEP, diverge, write_run, write_sweeps
from playwright.sync_api import Browser, Page
from typer.testing import CliRunner

from coupled_adam.cli import app
from coupled_adam.report import aggregate, sweep_sections
from coupled_adam.report.sweeps import Sweeps, sweeps

INITIAL = 13.0  # of a made-up run, its loss plus 8


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Sweeps]:
    directory = tmp_path_factory.mktemp("sweeps")
    write_sweeps(directory)
    return sweeps(aggregate.groups(aggregate.read_runs([directory])))


def names(each: Sweeps) -> set[str]:
    return {line.name for line in each.lines}


def test_methods_are_compared_within_a_head_and_cores_within_a_method(found: list[Sweeps]) -> None:
    methods = {"AdamW", "AdamW + center", "AdamW + z-loss", "Coupled Adam"}
    by_head = {each.lines[0].first.head: each for each in found if each.of == "method"}
    assert names(by_head["float32"]) == methods
    assert names(by_head["bfloat16"]) == methods - {"AdamW"} | {"AdamW, float32 head", "AdamW, bfloat16 head"}
    (cores,) = [each for each in found if each.of == "core"]
    assert names(cores) == {"AdamW inside", "Adams inside", "Muon inside"} and len(found) == 3
    assert all(each.rates == list(RATES) for each in found)


def test_the_sensitivities_are_those_of_the_losses(found: list[Sweeps]) -> None:
    (plain,) = [each for each in found if each.of == "method" and each.lines[0].first.head == "float32"]
    for line in plain.lines:
        (steepness,) = [s for values, s in METHODS.values() if _method(values) == line.name]
        assert line.sensitivity(RATES) == pytest.approx(steepness * (0.5 + 0.0 + 3.0) / 2)
        assert line.best(RATES) == 1e-2 and line.losses[1e-2] == 5.0


def _method(values: dict) -> str:
    named = {"optimizer__embedding__center": "AdamW + center", "loss__z_loss": "AdamW + z-loss"}
    named["optimizer__embedding__name"] = "Coupled Adam"
    return named[next(iter(values))] if values else "AdamW"


def test_what_centering_changes_where_only_rounding_can_is_told(found: list[Sweeps]) -> None:
    told = {each.setting.split(", ")[-1]: sweep_sections.rounding(each) for each in found if each.of == "method"}
    expected = [(0.6 - 0.1) * above for above in STEEP]
    assert list(told["float32 head"]) == list(RATES) and told["bfloat16 head"] == {}
    assert list(told["float32 head"].values()) == pytest.approx(expected)
    (plain,) = [each for each in found if sweep_sections.rounding(each)]
    assert "differ by 0.250 at 0.001, 0.000 at 0.01, 1.500 at 0.1:" in sweep_sections.sentences(plain)


def test_a_run_that_diverged_counts_with_the_loss_before_the_first_step(found: list[Sweeps]) -> None:
    (rounded,) = [each for each in found if each.of == "method" and each.lines[0].first.head == "bfloat16"]
    (line,) = [each for each in rounded.lines if each.name == "AdamW, bfloat16 head"]
    assert line.diverged == [RATES[-1]]
    assert line.losses[RATES[-1]] == line.initial_loss
    assert line.sensitivity(RATES) == pytest.approx((2 * 0.6 * 0.5 + line.initial_loss - 5.0) / 2)
    (row,) = [row for row in sweep_sections.table(rounded).rows if row[0] == "AdamW, bfloat16 head"]
    assert row[-1] == "0.1" and row[-2] == "–", "no figures of what is no model"


def test_one_seed_that_diverged_counts_beside_one_that_did_not(tmp_path: Path) -> None:
    for rate in RATES:
        for seed in (1, 2):
            run = write_run(tmp_path, f"a-{rate:g}", seed, 5.0, schedule__lr=rate, schedule__min_lr=1e-5)
    diverge(run)
    ((line,),) = (each.lines for each in sweeps(aggregate.groups(aggregate.read_runs([tmp_path]))))
    assert line.losses == {1e-3: 5.0, 1e-2: 5.0, 1e-1: (5.0 + INITIAL) / 2}
    assert line.diverged == [1e-1]


def test_two_rates_are_no_sweep_and_rates_that_only_one_line_has_do_not_count(tmp_path: Path) -> None:
    for rate in RATES[:2]:
        write_run(tmp_path, f"a-{rate:g}", 1, 5.0, schedule__lr=rate, schedule__min_lr=1e-5)
    assert sweeps(aggregate.groups(aggregate.read_runs([tmp_path]))) == []
    for name, rates in (("adamw", (1e-1, 1.0)), ("coupled_adam", RATES)):
        for rate in rates:
            values = {"schedule__lr": rate, "schedule__min_lr": 1e-5, "optimizer__embedding__name": name}
            write_run(tmp_path, f"{name}-{rate:g}", 1, 5.0 + rate, **values)
    (both,) = sweeps(aggregate.groups(aggregate.read_runs([tmp_path])))
    assert both.rates == list(RATES)
    assert {line.name: len(line.losses) for line in both.lines} == {"AdamW": 4, "Coupled Adam": 3}


def test_a_run_that_is_not_evaluated_yet_is_no_point(tmp_path: Path) -> None:
    for rate in (*RATES, 1.0):
        run = write_run(tmp_path, f"a-{rate:g}", 1, 5.0, schedule__lr=rate, schedule__min_lr=1e-5)
    (run / "evaluation" / "validation.json").unlink()
    (only,) = sweeps(aggregate.groups(aggregate.read_runs([tmp_path])))
    assert only.rates == list(RATES)


def test_the_published_table_has_all_fifty() -> None:
    table = sweep_sections.published()
    assert [text for text, _ in table.headings[:6]] == ["method", "16M", "29M", "57M", "109M", "221M"]
    assert table.headings[6:] == (("‖μ‖", "16M at 0.3"), ("max |logit|", "16M at 0.3")) and len(table.rows) == 10
    losses = ("0.306 (3.841)", "0.391 (3.591)", "0.508 (3.369)", "0.344 (3.202)", "0.412 (3.050)")
    assert table.rows[0] == ("baseline", *losses, "331", "1176")
    assert ("μ-loss, λ = 1e-7", "0.182", "0.052", "0.110", "0.125", "0.129", "–", "–") in table.rows


@pytest.fixture(scope="module")
def page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    directory = tmp_path_factory.mktemp("swept")
    write_sweeps(directory / "runs")
    result = CliRunner().invoke(app, ["report", str(directory / "runs"), "--out", str(directory / "out")])
    assert result.exit_code == 0, result.exception
    page = opened(browser, directory / "out" / "report.html")
    yield page
    page.close()


def test_the_sweeps_have_their_sections_and_nothing_else_is_flooded(page: Page) -> None:
    assert page.problems == []
    headings = page.locator("h2").all_inner_texts()
    assert [h.split(":")[0] for h in headings] == [
        "Learning rates", "Learning rates", "The optimizer of the rest, with Coupled Adam on the embedding",
        "Learning-rate sensitivity in the paper on output embedding centering, arXiv 2601.02031", "All runs",
    ]  # fmt: skip
    assert {h.split(", ")[-1] for h in headings[:2]} == {"float32 head", "bfloat16 head"}
    assert page.locator("#comparison").count() == 0
    assert "Diverged: bfloat16-adamw-0.1-s1." in page.locator("body").inner_text()
    assert "evaluated:" not in page.locator("body").inner_text(), "what diverged is not missing"
    assert page.locator("table.published").count() == 1


def test_the_charts_name_sensitivities_heads_and_what_diverged(page: Page) -> None:
    section = page.locator("section", has=page.locator("h2", has_text="bfloat16 head"))
    charts = section.locator(".js-plotly-plot")
    assert section.locator("h3").all_text_contents() == [
        "Validation loss", "Norm of the mean ‖μ‖", "Largest logit", "Mean shift ratio ‖μ‖ʳ", "Isotropy Iso",
    ]  # fmt: skip
    legend = charts.first.locator(".legendtext").all_text_contents()
    assert "AdamW, float32 head (LRS 1.050)" in legend and "AdamW + center (LRS 0.350)" in legend
    assert [text.split(" (")[0] for text in legend] == charts.nth(1).locator(".legendtext").all_text_contents()
    assert charts.first.locator(".xtick text").all_text_contents() == ["0.001", "0.01", "0.1"]
    symbols = charts.first.evaluate("chart => chart.data.map(t => t.marker.symbol.includes('x'))")
    assert [text.split(" (")[0] for text, crossed in zip(legend, symbols, strict=True) if crossed] == [
        "AdamW, bfloat16 head"
    ]


def test_sweeps_fit_wide_and_narrow_screens(page: Page) -> None:
    for width in (1120, 380):
        fits(page, width)
