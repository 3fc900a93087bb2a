"""The sections on methods with a rate of the embedding for each, in a real browser."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import fits, opened
from made_up import write_run
from made_up_study import TRUTH, documents, row, study
from playwright.sync_api import Browser, Page
from typer.testing import CliRunner

from coupled_adam.cli import app
from coupled_adam.report import tuned_sections
from coupled_adam.report.report_page import report
from coupled_adam.report.tuned import cells, versus


def write_study(directory: Path) -> None:
    """The rows of the made-up study as directories of runs, with what the half of a text gives."""
    rows = study()
    by_document = documents(rows)
    for each in rows:
        experiment, seed, loss = str(each["experiment"]), int(each["seed"] or 0), float(each["loss_report"] or 0)
        arm, factor = experiment.split("-")[3], float(each["lr_factor"] or 0)
        values = {"optimizer__embedding__name": {"adamw": "adamw", "coupled": "coupled_adam"}.get(arm, "adam_variant")}
        if arm == "token":
            values["optimizer__embedding__second_moment"] = "token"
        values |= {"optimizer__embedding__lr_factor": factor, "model__tied": each["tied"] == "true"}
        figures = {"isotropy": each["isotropy"], "mean_shift_ratio": each["ratio norm"]}
        figures |= {name: each[name] for name in ("word_similarity_centered", "word_similarity_post_processed")}
        run = write_run(directory, experiment, seed, loss, {**figures, "word_similarity": each["eb_cos_sim"]}, **values)
        measured = by_document[str(each["name"])]
        kappa = {"rows": 0.3, "text": 0.05, "held_out": 0.05, "predicted": 0.05, "log_ratio": 0.1}
        content = {
            "inputs": {"weights": "w"},
            "step": 8,
            "loss_selection": each["loss_selection"],
            "loss_report": loss,
            "bits_per_byte": loss / 3,
            "documents": {"tokens": measured.tokens.tolist(), "loss": measured.losses.tolist()},
            "loss_by_decile": [each[f"loss_decile_{i + 1}"] for i in range(10)],
            "kappa": dict.fromkeys(("below_0.1", "0.1_to_1", "1_to_10", "above_10", "unseen", "padding"), kappa),
        }
        (run / "evaluation" / "frequency.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    directory = tmp_path_factory.mktemp("study")
    write_study(directory / "runs")
    result = CliRunner().invoke(app, ["report", str(directory / "runs"), "--out", str(directory / "out")])
    assert result.exit_code == 0, result.exception
    page = opened(browser, directory / "out" / "report.html")
    yield page
    page.close()


def test_it_opens_without_errors_and_asks_for_nothing_else(page: Page) -> None:
    assert page.problems == []
    assert [url for url in page.requested if not url.startswith(("data:", "blob:"))] == [page.url]


def test_a_grid_has_a_section_across_its_cells_and_one_for_each(page: Page) -> None:
    headings = page.locator("h2").all_inner_texts()
    assert [h.split(":")[0] for h in headings] == [
        "The loss at each method's best rate of the embedding",
        "Each method at its own rate of the embedding",
        "Each method at its own rate of the embedding",
        "All runs",
    ]
    assert headings[0].endswith(": tied, untied")
    assert page.locator("#comparison").count() == 0, "runs at one rate for all are not the comparison"


def test_the_lead_says_what_came_out(page: Page) -> None:
    lead = page.locator(".lead").inner_text()
    assert lead.startswith("Tied: With the embedding's learning rate chosen for each (AdamW 30, Coupled Adam 10 times")
    assert "Coupled Adam's loss minus AdamW's is +0.101 [+0.100, +0.102] (3 pairs)" in lead
    # At one rate for all: 0.3 · (log10 1/30)² against 0.3 · 1², one pair.
    one = 5.8 + 0.3 - (5.7 + 0.3 * 1.4771213**2) + 0.0005
    assert f"at one rate for all parameters it is {one:+.3f} (1 pair)" in lead and " Untied: " in lead


def test_the_tables_name_choices_differences_and_their_intervals(page: Page) -> None:
    across, tied = page.locator("section table").nth(0), page.locator("section table").nth(1)
    first = across.locator("tbody tr").first.locator("th, td").all_inner_texts()
    assert first[0] == "tied" and first[3] == "0.95" and first[4:6] == ["90.0%", "15.0%"]
    assert first[6:8] == ["5.720 (30)", "5.821 (10)"] and first[-1] == "3"
    rows = [row.locator("th, td").all_inner_texts() for row in tied.locator("tbody tr").all()]
    assert [r[:3] for r in rows] == [
        ["AdamW", "30", "30"],
        ["Coupled Adam", "10", "10"],
        ["v per token (V,1)", "100", "100"],
    ]
    assert rows[0][4:7] == ["–", "–", "–"] and rows[1][4] == "+0.101 [+0.100, +0.102]"
    assert rows[1][6].startswith("[+0.1"), "the bootstrap over documents"


def test_every_chart_has_a_name_axes_and_a_sentence(page: Page) -> None:
    charts = page.locator(".js-plotly-plot")
    assert charts.count() == 2 + 2 * 7
    names = page.locator("figure h3").all_inner_texts()
    assert names[:3] == ["At its best: tied", "At its best: untied", "Loss against the embedding's rate: tied"]
    assert len(set(names)) == len(names) == charts.count()
    titles = charts.evaluate_all("all => all.map(c => [c.layout.xaxis.title?.text, c.layout.yaxis.title?.text])")
    assert all(x for x, _ in titles) and all(y for _, y in titles[2:]), "the first two have names for their rows"
    captions = page.locator("figcaption").all_inner_texts()
    assert len(captions) == charts.count() and all(caption.endswith(".") for caption in captions)


def test_each_arm_has_one_color_and_a_star_at_its_best(page: Page) -> None:
    charts = page.locator(".js-plotly-plot")
    lines = charts.nth(2).evaluate("c => c.data.map(t => [t.name, t.line.color, t.marker.symbol, t.x])")
    for name, _, symbols, factors in lines:
        best = {"AdamW": 30, "Coupled Adam": 10, "v per token (V,1)": 100}[name]
        assert [x for x, symbol in zip(factors, symbols, strict=True) if symbol == "star"] == [best]
    colors = [
        charts.nth(i).evaluate("c => Object.fromEntries(c.data.map(t => [t.name, t.line.color]))") for i in (2, 8)
    ]
    assert colors[0] == colors[1] and len(set(colors[0].values())) == 3
    ticks = charts.nth(2).locator(".xtick text").all_text_contents()
    assert ticks == ["1", "3", "10", "30", "100", "300"]


def test_pairs_at_one_rate_stand_behind_it(tmp_path: Path) -> None:
    write_study(tmp_path / "runs")
    for name, method in (("a", "adamw"), ("v", "coupled_adam")):
        write_run(tmp_path / "runs", name, 1, 6.0, optimizer__embedding__name=method, schedule__lr=1e-2)
    report([tmp_path / "runs"], tmp_path / "out")
    (lead,) = re.findall(r'<p class="lead">(.*?)</p>', (tmp_path / "out" / "report.html").read_text("utf-8"))
    assert lead.startswith("Tied: With") and "not both better centered and more isotropic" in lead


def test_it_fits_wide_and_narrow_screens(page: Page) -> None:
    for width in (1120, 380):
        fits(page, width)


def test_the_loss_by_frequency_is_that_of_the_pairs() -> None:
    outcomes = cells(study())[0].outcomes()
    figure = tuned_sections.by_decile("", outcomes, tuned_sections.styles(cells(study())))
    by_name = {trace.name: trace for trace in figure.data}
    assert set(by_name["AdamW"].y) == {0.0}
    assert by_name["Coupled Adam"].y == pytest.approx([0.101] * 10) and list(by_name["AdamW"].x) == list(range(1, 11))


def test_points_of_a_line_are_of_the_same_seeds() -> None:
    rows = [{**each, "loss_report": 99.0} if each["seed"] != 1 else each for each in study()]
    found = cells(rows)
    figure = tuned_sections.against_factor("", found[0].outcomes(), "loss_report", tuned_sections.styles(found))
    assert max(value for trace in figure.data for value in trace.y) < 99


def test_losses_far_above_the_lowest_do_not_press_the_others_together() -> None:
    rows = [*study(), row("tied", "adamw", 1000.0, 1, loss_report=80.0, loss_selection=80.0)]
    found = cells(rows)
    figure = tuned_sections.against_factor("", found[0].outcomes(), "loss_report", tuned_sections.styles(found))
    assert figure.layout.yaxis.range[1] < 8


@pytest.mark.parametrize(
    "missing", ["eb_cos_sim", "isotropy", "loss_decile_1", "step_rms", "lr", "tokens", "kappa_rows"]
)
def test_a_column_that_is_missing_leaves_out_what_needs_it(missing: str) -> None:
    rows = [{k: v for k, v in each.items() if k != missing} for each in study()]
    found = cells(rows)
    styled = tuned_sections.styles(found)
    for each in found:
        assert tuned_sections.heading(each) and len(tuned_sections.drawn(each, styled)) >= 5
        assert len(tuned_sections.table(each).rows) == len(TRUTH)
    assert len(tuned_sections.table_across(found).rows) == 2


def test_a_cell_without_coupled_adam_is_no_comparison() -> None:
    rows = [each for each in study() if "-coupled-" not in str(each["experiment"])]
    assert versus(cells(rows)) == [] and tuned_sections.table_across(cells(rows)).rows == ()


def test_the_comparisons_of_a_table_are_corrected_together() -> None:
    (tied, untied) = versus(cells(study()))
    assert tied.adjusted == pytest.approx(2 * tied.coupled.difference.p_value)
    assert untied.adjusted >= untied.coupled.difference.p_value
