"""How the suite runs, and text and settings that several tests share."""

import json
import os
import shutil
import signal
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the processes of the suite share the cores
os.environ["HF_HUB_OFFLINE"] = "1"  # no network, and no model that somebody has downloaded
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="coupled-adam-tests-")

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from paragraphs import paragraphs
from playwright.sync_api import Browser, Error, Page, sync_playwright
from processes import Processes

from coupled_adam import progress
from coupled_adam.lm.config import Experiment

progress.show_log()  # as the command line does

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # the suite runs in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)  # its programs are interrupted all the same

collect_ignore = ["lm/kill_run.py"]  # a program, not a module


def pytest_configure() -> None:
    """What a shell or CI has set for programs' output is not for the programs that are tested."""
    for name in ("COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "NO_COLOR", "PYTHONIOENCODING", "PYTHONWARNINGS"):
        os.environ.pop(name, None)


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that a test asks for end with it: two that share a busy core make others ten times as slow."""
    yield
    progress.show_log()  # also after a command that was told to be quiet
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    assert sys.float_info.min / 2 > 0, "denormal numbers are still flushed, for every library in this process"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Some files are run in this process, where a debugger works; the whole suite on all cores."""
    some = any(Path(argument.split("::")[0]).suffix == ".py" for argument in config.args)
    return 0 if some else min(os.cpu_count() or 1, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many long tests first: the last worker should not be left alone with one of them."""
    long = Counter(item.path for item in items if item.get_closest_marker("long"))
    items.sort(key=lambda item: -long[item.path])
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


@pytest.fixture(params=[None, False], ids=["fast", "plain"])
def fused(request: pytest.FixtureRequest) -> bool | None:
    """Asks a property of every backend that is there: what to build an optimizer with.

    None takes the fastest backend for each parameter, False the plain one alone.
    """
    return request.param


@pytest.fixture(scope="session")
def processes() -> Iterator[Callable[[int], Processes]]:
    """So many processes that run functions together; started when first asked for, and kept for other tests."""
    started: dict[int, Processes] = {}
    yield lambda count: started.setdefault(count, Processes(count))
    for each in started.values():
        each.stop()


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A real browser, without a network of its own: an installed one, or the one that playwright has downloaded.

    Where none starts, its tests are skipped; in CI they fail.
    """
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        try:
            launched = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        except Error as error:
            found = f"{CHROMIUM} does not start ({error.message.splitlines()[0]})" if CHROMIUM else "no Chromium here"
            end = pytest.fail if os.environ.get("CI", "").lower() not in ("", "0", "false") else pytest.skip
            end(f"{found}; to install it on Debian: apt-get install chromium")
        yield launched
        launched.close()


def opened(browser: Browser, path: Path) -> Page:
    """A page of ours; ``problems`` collects what the console says, ``requested`` the addresses it asks for."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.problems, page.requested = [], []
    page.on("console", lambda message: message.type in ("error", "warning") and page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.requested.append(request.url))
    page.goto(path.as_uri(), timeout=120_000)
    return page


def fits(page: Page, width: int) -> None:
    """Waits until a screen of that width shows the page without scrolling sideways, and every chart fits its place.

    The charts follow the screen when the browser gets to it; one that never does is a TimeoutError.
    """
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_function(
        """() => document.documentElement.scrollWidth <= innerWidth
        && [...document.querySelectorAll(".js-plotly-plot")].every(
            chart => chart.querySelector(".main-svg").clientWidth <= chart.parentElement.clientWidth)""",
        timeout=30_000,
    )


def readable(page: Page, scheme: Literal["light", "dark"]) -> None:
    """No rule of axe is violated, on a wide screen and on a phone, and the keyboard reaches the content first."""
    page.emulate_media(color_scheme=scheme)
    for width in (1200, 390):
        fits(page, width)
        found = Axe().run(page).response["violations"]
        assert not found, [(each["id"], each["nodes"][0]["html"]) for each in found]
    pictures = page.locator(".main-svg[role=img]")
    assert pictures.count() == page.locator(".js-plotly-plot").count() == page.locator("figure h3").count()
    assert all(picture.get_attribute("aria-labelledby") for picture in pictures.all())
    background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.emulate_media(color_scheme="light")


def hovered(page: Page, chart: str) -> str:
    """What the first chart of that selector says of a dot under the mouse."""
    dot = page.locator(f"{chart} .scatterlayer .trace").first.locator(".point").nth(5)
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    return str(page.locator(f"{chart} .hoverlayer .hovertext").first.text_content(timeout=5000))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(paragraphs(200), encoding="utf-8")
    return path


@pytest.fixture
def tiny() -> Experiment:
    """As :func:`tiny_experiment`."""
    return tiny_experiment()


def tiny_experiment() -> Experiment:
    """A run that takes a second: two layers, 16 wide, 24 steps."""
    return Experiment.from_dict(
        {
            "run": {"name": "tiny", "seed": 3},
            "model": {"n_layers": 2, "n_heads": 2, "hidden_size": 16},
            "data": {"vocab_size": 300, "sequence_length": 16},
            "optimizer": {"embedding": {"name": "coupled_adam"}},
            "schedule": {"warmup_steps": 4},
            "train": {"steps": 24, "batch_tokens": 64, "checkpoint_every": 10},
            "evaluation": {"every": 8, "batches": 2},
        }
    )


def as_of_an_older_version(path: Path, *unknown: str) -> None:
    """Leaves a sealed file as the version before there were digests wrote it, without the keys ``unknown`` to it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in ("sha256", "format", *unknown)}
    path.write_text(json.dumps(kept), encoding="utf-8")
