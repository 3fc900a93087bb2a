"""The report over many runs in a real browser."""

import re
from collections.abc import Iterator

import pytest
from conftest import fits, hovered, opened, readable
from made_up import write_suite
from playwright.sync_api import Browser, Page
from typer.testing import CliRunner

from coupled_adam.cli import app


@pytest.fixture(scope="module")
def page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    directory = tmp_path_factory.mktemp("suite")
    write_suite(directory / "runs")
    result = CliRunner().invoke(app, ["report", str(directory / "runs"), "--out", str(directory / "out")])
    assert result.exit_code == 0, result.exception
    assert result.stdout == f"20 runs: {directory / 'out' / 'aggregate.csv'}, {directory / 'out' / 'report.html'}\n"
    page = opened(browser, directory / "out" / "report.html")
    yield page
    page.close()


def column(page: Page, table: str, heading: str) -> list[str]:
    headings = page.locator(f"#{table} thead th").all_inner_texts()
    index = [h.rstrip(" ▲▼") for h in headings].index(heading) + 1
    return page.locator(f"#{table} tbody tr > :nth-child({index})").all_inner_texts()


def test_it_opens_without_errors_and_asks_for_nothing_else(page: Page) -> None:
    assert page.problems == []
    assert [url for url in page.requested if not url.startswith(("data:", "blob:"))] == [page.url]


def test_every_section_has_its_charts_and_every_chart_its_sentence(page: Page) -> None:
    headings = page.locator("h2").all_inner_texts()
    assert [h.split(":")[0] for h in headings] == [
        "AdamW against Coupled Adam", "During training", "Why the mean embedding moves", "Model and data size",
        "Scaled Coupled Adam", "SGD on the embedding", "The embeddings", "Word similarity", "All runs",
    ]  # fmt: skip
    drawn = page.locator(".js-plotly-plot").evaluate_all(
        "charts => charts.map(c => c.querySelectorAll('.scatterlayer .trace').length)"
    )
    assert len(drawn) == 3 + 2 + 2 + 3 + 3 + 6
    assert min(drawn) >= 1 and drawn[0] == 4, "two seeds of two optimizers"
    captions = page.locator("figcaption").all_inner_texts()
    assert len(captions) == len(drawn) and all(caption.endswith(".") for caption in captions)
    assert page.locator("figure h3").count() == len(drawn)


def test_no_chart_is_wider_than_its_place(page: Page) -> None:
    assert page.locator(".js-plotly-plot").count() > 3
    fits(page, 1200)


def test_the_tables_stand_beside_the_published_figures(page: Page) -> None:
    assert column(page, "comparison", "method")[:3] == ["AdamW", "Coupled Adam", "difference"]
    losses = column(page, "comparison", "test loss")[:3]
    assert losses == ["6.115 ± 0.007", "6.015 ± 0.007", "-0.100 [-0.100, -0.100]"]
    assert "one-sided" not in page.locator("#about-comparison").inner_text(), "no run here is one of the paper's"
    assert column(page, "published", "‖μ‖ʳ")[:2] == ["0.82", "0.03"]
    assert "0.00M" not in page.locator("body").inner_text()


def test_a_table_sorts_by_number_and_back(page: Page) -> None:
    heading = page.locator("#runs thead th", has_text="ratio norm")
    heading.get_by_role("button").click()
    rising = [float(value) for value in column(page, "runs", "ratio norm")]
    assert rising == sorted(rising) and rising[0] < rising[-1]
    heading.get_by_role("button").press("Enter")
    assert [float(value) for value in column(page, "runs", "ratio norm")] == rising[::-1]
    assert heading.get_attribute("aria-sort") == "descending"


def test_sizes_sort_by_size(page: Page) -> None:
    page.locator("#published thead button", has_text="model").click()
    assert list(dict.fromkeys(column(page, "published", "model"))) == ["125M", "355M", "760M", "1.3B", "2.6B"]
    page.locator("#comparison thead button", has_text="tokens").click()
    assert list(dict.fromkeys(column(page, "comparison", "tokens"))) == ["512", "1,024"]


def test_hovering_over_a_dot_shows_its_token(page: Page) -> None:
    text = hovered(page, ".wide .js-plotly-plot")
    assert "'<t" in text and "times" in text


def test_the_drift_is_drawn_by_cause(page: Page) -> None:
    section = page.locator("section", has_text="Why the mean embedding moves")
    charts = section.locator(".js-plotly-plot")
    assert section.locator("h3").all_text_contents() == ["Drift with AdamW", "Drift with Coupled Adam"]
    legend = charts.first.locator(".legendtext").all_text_contents()
    assert legend == ["uneven second moments", "gradient sum", "‖μ‖, total"], "nothing decayed"
    ranges = [chart.locator(".ytick text").all_text_contents() for chart in charts.all()]
    assert ranges[0] == ranges[1], "one scale"
    charts.first.scroll_into_view_if_needed()
    box = charts.first.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + 0.99 * box["width"], box["y"] + box["height"] / 2, steps=4)
    told = charts.first.locator(".hoverlayer .legend").filter(has_text="step 8")  # where the mouse came to rest
    told.wait_for(timeout=10_000)
    text = str(told.text_content())
    assert "moments : 0.8000" in text and "sum : 0.0800" in text and "total : 0.9000" in text


def test_it_fits_a_narrow_screen_and_paper(page: Page) -> None:
    fits(page, 380)
    assert page.pdf(format="A4")[:5] == b"%PDF-"
    assert not page.locator(":root.printing").count(), "and back on the screen"
    fits(page, 1200)


def test_every_axis_has_a_title_and_no_tick_a_prefix(page: Page) -> None:
    axes = page.locator(".js-plotly-plot").evaluate_all("all => all.map(c => [c.layout.xaxis, c.layout.yaxis])")
    assert all(axis["title"].get("text") for pair in axes for axis in pair)
    ticks = page.locator(".xtick text, .ytick text").all_text_contents()
    assert len(ticks) > 50 and not [tick for tick in ticks if re.search("[a-zµμ]", tick)]


def test_maps_have_one_scale_on_both_axes(page: Page) -> None:
    maps = page.locator(".wide .js-plotly-plot").evaluate_all(
        """all => all.map(c => ["xaxis", "yaxis"].map(name => {
            const axis = c._fullLayout[name];
            return [axis.range[1] - axis.range[0], axis._length / (axis.range[1] - axis.range[0])];
        }))"""
    )
    assert len(maps) == 2
    spans, units = zip(*(axis for both in maps for axis in both), strict=True)
    assert spans == pytest.approx([spans[0]] * 4) and units == pytest.approx([units[0]] * 4)


def test_the_data_of_a_chart_can_be_read_without_a_mouse(page: Page) -> None:
    figure = page.locator("figure").filter(has=page.locator("h3", has_text="Validation loss")).first
    figure.locator("summary").press("Enter")
    table = figure.locator("table")
    table.wait_for()
    assert table.locator("thead th").all_inner_texts() == ["series", "training step", "nats per token"]
    first = table.locator("tbody tr").first
    assert [first.locator("th").inner_text(), *first.locator("td").all_inner_texts()] == ["AdamW", "0", "14.11"]
    tokens = page.locator(".wide figure").first
    tokens.locator("summary").press("Enter")
    tokens.locator("table").wait_for()
    assert "token" in tokens.locator("thead th").all_inner_texts()
    assert "'<t" in tokens.locator("tbody").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_anyone_can_read_it(page: Page, scheme: str) -> None:
    readable(page, scheme)
