"""The demo through the real command line, and its report in a real browser."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from conftest import fits, hovered, opened, readable, tiny_experiment
from in_process import command
from paragraphs import paragraphs
from playwright.sync_api import Browser, Page

from coupled_adam import demo as demo_module
from coupled_adam import experiments
from coupled_adam.errors import InputError
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.sources import Source
from coupled_adam.report.study import read_study

COMMAND = [sys.executable, "-m", "coupled_adam", "demo"]


def demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return command("demo", *arguments)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(paragraphs(1500), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a shortened demo on the user's own text."""
    out = tmp_path_factory.mktemp("demo")
    result = demo("--text", text, "--steps", "12", "--seed", "2", "--out", out)
    assert result.returncode == 0, result.stderr
    (out / "printed").write_text(result.stdout, encoding="utf-8")
    return out


def test_the_table_shows_both_runs_beside_the_paper(finished: Path) -> None:
    printed = (finished / "printed").read_text("utf-8")
    results = json.loads((finished / "results.json").read_text())
    line = next(line for line in printed.splitlines() if "mean shift ratio" in line)
    adamw, coupled = (results["runs"][m]["figures"]["mean_shift_ratio"] for m in ("adamw", "coupled_adam"))
    assert line.split()[-4:] == [f"{adamw:.3f}", f"{coupled:.3f}", "0.82", "0.03"]
    assert coupled < 0.1 < adamw, "the effect shows after 12 steps already"


def test_the_causes_of_the_drift_add_up(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    first, last = results["runs"]["adamw"]["curve"][0], results["runs"]["adamw"]["curve"][-1]
    causes = {cause: last[f"drift_{cause}"] for cause in ("second_moments", "gradients", "decay")}
    assert causes["second_moments"] > 0.9 * last["norm_of_mean"] and causes["decay"] == 0
    assert abs(last["norm_of_mean"] - sum(causes.values())) <= first["norm_of_mean"], "the rest is where it began"
    assert results["runs"]["coupled_adam"]["curve"][-1]["drift_second_moments"] == 0


def test_the_two_runs_differ_in_nothing_but_the_embeddings_optimizer(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    first = [results["runs"][m]["curve"][0] for m in ("adamw", "coupled_adam")]
    assert first[0] == first[1], "the same initial weights"
    experiments = [(finished / m / "experiment.toml").read_text().splitlines() for m in ("adamw", "coupled_adam")]
    assert [pair for pair in zip(*experiments, strict=True) if pair[0] != pair[1]] == [
        ('name = "adamw"', 'name = "coupled_adam"'),
        ('name = "adamw"', 'name = "coupled_adam"'),
    ]


def test_a_second_call_reuses_everything_and_prints_json(finished: Path, text: Path) -> None:
    before = json.loads((finished / "results.json").read_text())
    result = demo("--text", text, "--steps", "12", "--seed", "2", "--out", finished, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == before == json.loads((finished / "results.json").read_text())
    assert result.stderr.count("already finished with 12 steps") == 2 and "step 1 of" not in result.stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--steps", "300"], "different settings (train.steps: 12 there, 300 requested)"),
        (["--seed", "3"], "different settings (run.seed: 2 there, 3 requested)"),
        (["--text", "OTHER"], "/text.txt)"),
    ],
)
def test_another_demo_in_the_same_folder_is_refused(
    changed: list[str], message: str, finished: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(paragraphs(100), encoding="utf-8")
    files = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    options = {"--text": str(text), "--steps": "12", "--seed": "2"} | dict([changed])
    given = [value.replace("OTHER", str(other)) for pair in options.items() for value in pair]
    result = demo(*given, "--out", finished)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"coupled-adam: {finished}: already contains a demo ") and message in result.stderr
    assert "; choose another directory with --out" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == files


def test_a_longer_demo_has_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(paragraphs(200), encoding="utf-8")
    short = tiny_experiment().with_values(train__steps=1)
    monkeypatch.setattr(experiments, "load", lambda name: short)
    first, longer, again = (demo("--text", "text.txt", *steps) for steps in ([], ["--steps", "2"], ["--steps", "1"]))
    assert first.returncode == longer.returncode == again.returncode == 0
    assert first.stdout == again.stdout and again.stderr.count("already finished with 1 steps") == 2
    assert sorted(path.name for path in Path("runs").iterdir()) == ["demo", "demo-2"]
    assert first.stdout.splitlines()[-2:] == [
        "Report: runs/demo/report.html",
        "To train longer: the same command with --steps 300",
    ]


@pytest.mark.parametrize(
    ("steps", "warmup", "every"), [(None, 6, 5), (1, 1, 5), (20, 2, 5), (60, 6, 5), (300, 20, 25), (2000, 20, 166)]
)
def test_warm_up_and_evaluations_are_a_share_of_the_steps(
    steps: int | None, warmup: int, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = list[Experiment]()

    def stop(out: Path, source: Source, experiment: Experiment) -> None:
        planned.append(experiment)
        raise InputError("stopped")

    monkeypatch.setattr(demo_module, "_check_same", stop)
    (tmp_path / "text.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="stopped"):
        demo_module.run_demo(tmp_path / "out", tmp_path / "text.txt", steps)
    (found,) = planned
    assert (found.train.steps, found.schedule.warmup_steps, found.evaluation.every) == (steps or 60, warmup, every)
    assert found.schedule.warmup_steps <= found.train.steps


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"", "empty"), (b"\0\1", "binary"), (b"x", "short")]
)
def test_bad_text_is_one_line_and_exit_code_2(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    result = demo("--text", path, "--out", tmp_path / "out")
    assert result.returncode == 2
    problem = [line for line in result.stderr.splitlines() if not line.startswith("Corpus:")]
    assert len(problem) == 1 and str(path) in problem[0] and message in problem[0]
    assert not (tmp_path / "out").exists() or message == "short", "known before anything is made"


@pytest.mark.long
def test_ctrl_c_ends_cleanly_and_the_next_call_finishes_the_same(finished: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["--text", str(text), "--steps", "12", "--seed", "2", "--out", str(tmp_path / "out")]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "coupled_adam" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped and saved at step" in stderr.splitlines()[-1] and "Traceback" not in stderr

    again = demo(*arguments)
    assert again.returncode == 0, again.stderr
    for method in ("adamw", "coupled_adam"):
        final = [
            {name: value for name, value in run["figures"].items() if value is not None}
            for directory in (finished, tmp_path / "out")
            for run in [json.loads((directory / "results.json").read_text())["runs"][method]]
        ]
        # Not to the bit: the one ran in this process, the other began in its own.
        assert final[0] == pytest.approx(final[1], rel=1e-6)


@pytest.mark.long
def test_two_processes_in_one_folder(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = subprocess.Popen([*COMMAND, "--text", str(text), "--out", str(out)], stderr=subprocess.DEVNULL)
    try:
        while first.poll() is None and not (out / "corpus").exists():
            time.sleep(0.05)
        second = demo("--text", text, "--out", out)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert "another process is working there" in second.stderr


@pytest.fixture(scope="module")
def page(finished: Path, browser: Browser) -> Iterator[Page]:
    page = opened(browser, finished / "report.html")
    yield page
    page.close()


def test_the_report_opens_without_errors_and_asks_for_nothing_else(page: Page) -> None:
    assert page.problems == []
    assert [url for url in page.requested if not url.startswith(("data:", "blob:"))] == [page.url]


def test_the_charts_are_drawn(page: Page) -> None:
    for name in ("mean_shift", "isotropy", "loss"):
        assert page.locator(f"#chart-{name} .scatterlayer .trace .lines path").count() == 2
    for i in range(2):
        assert page.locator(f"#chart-drift-{i} .scatterlayer .trace .lines path").count() == 3
    dots = page.locator(".wide .scatterlayer .trace").evaluate_all(
        "traces => traces.map(trace => trace.querySelectorAll('.point').length)"
    )
    assert sorted(dots)[:4] == [1] * 4, "the origin and the mean, on each map"
    assert min(sorted(dots)[4:]) > 250


def test_no_chart_is_wider_than_its_place(page: Page) -> None:
    assert page.locator(".js-plotly-plot").count() > 3
    fits(page, 1200)


def test_hovering_over_a_dot_shows_its_token(page: Page) -> None:
    text = hovered(page, "#chart-embeddings-0")
    assert "times" in text and "'" in text


def test_the_table_is_that_of_the_terminal(page: Page, finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    row = page.locator("#figures tbody tr").filter(has_text="isotropy").locator("td").all_inner_texts()
    runs = [f"{results['runs'][m]['figures']['isotropy']:.3f}" for m in ("adamw", "coupled_adam")]
    assert row == [*runs, "0.1", "0.83"]


def test_the_study_stands_beside_the_runs_at_one_rate(page: Page, finished: Path) -> None:
    study = read_study()
    assert page.locator("#study-table thead th").all_inner_texts() == study["headings"]
    shown = page.locator("#study-table tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.cells].map(c => c.innerText))"
    )
    assert shown == study["rows"] and len(shown) > 1
    assert all("[" in row[4] for row in shown), "every difference has its interval"
    assert study["sentence"] in page.locator("#study + p").inner_text().replace("\n", " ")
    printed = " ".join((finished / "printed").read_text("utf-8").split())
    assert f"one learning rate for all parameters. {study['sentence']} Report: " in printed


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_anyone_can_read_it(page: Page, scheme: Literal["light", "dark"]) -> None:
    readable(page, scheme)


def test_the_tool_bar_covers_no_title_where_there_is_no_mouse(finished: Path, browser: Browser) -> None:
    phone = browser.new_page(viewport={"width": 380, "height": 800}, has_touch=True, is_mobile=True)
    phone.goto((finished / "report.html").as_uri(), timeout=120_000)
    bars = phone.locator(".modebar")
    assert bars.count() > 3
    assert not any(bar.is_visible() for bar in bars.all())
    phone.close()


def test_the_tool_bar_is_shown_to_a_mouse_and_not_printed(page: Page) -> None:
    chart = page.locator(".js-plotly-plot").first
    bar = chart.locator(".modebar")
    page.mouse.move(0, 0)
    assert not bar.is_visible()
    chart.hover()
    assert bar.is_visible()
    page.emulate_media(media="print")
    assert not bar.is_visible()
    page.emulate_media(media="screen")
