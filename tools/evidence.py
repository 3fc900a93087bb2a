"""Writes the numbers of README and docs that rest on docs/results, or checks that they are what the files say.

    python tools/evidence.py              # write every block between its markers
    python tools/evidence.py --check      # exit 1 naming the blocks that differ
    python tools/evidence.py --list       # the blocks, and whether their runs are in the files
    python tools/evidence.py --pictures   # draw docs/*.png that rest on the files; needs Chromium

The table that `coupled-adam demo` shows, src/coupled_adam/report/study.json, is written and checked too.

A block stands in a page between `<!-- evidence: NAME -->` and `<!-- /evidence -->`: in paragraphs by itself where
the first marker begins a line, else within the line.
"""

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import evidence_demo
from evidence_results import BLOCKS, NotYet, Results
from evidence_study import BATCH, WHAT

from coupled_adam.report import tuned_sections

for name in ("sweeps", "memory", "models", "programs", "benchmarks"):
    import_module(f"evidence_{name}")  # registers its blocks, as the imports above do

ROOT = Path(__file__).parents[1]

#: Of a chart in a picture, in pixels.
WIDTH = 560

#: The arms that pictures of the whole study show: all of them would hide each other.
DRAWN = ("adamw", "adamw-center", "element-zero-sum", "token", "coupled", "coupled-center", "factored-0.5")

MARKED = re.compile(r"<!-- evidence: (?P<name>[\w.-]+) -->(?P<content>.*?)<!-- /evidence -->", re.DOTALL)
ANY_MARKER = re.compile(r"<!--\s*/?evidence\b.*?-->")


def pages(root: Path) -> list[Path]:
    """List the pages that may have blocks."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def rendered(page: str, results: Results) -> tuple[str, list[str]]:
    """Return the text of a page with its blocks as the files have them, and what is wrong with it.

    A block that cannot be made stays as it is.
    """
    problems = []
    markers, blocks = len(ANY_MARKER.findall(page)), len(MARKED.findall(page))
    if markers != 2 * blocks:
        problems.append(f"{markers} markers make {blocks} blocks: one is not closed, or misspelled")

    def made(match: re.Match[str]) -> str:
        name = match["name"]
        if ANY_MARKER.search(match["content"]):
            return match[0]  # two beginnings: counted above
        if name not in BLOCKS:
            problems.append(f"no block {name}; there are {', '.join(BLOCKS)}")
            return match[0]
        try:
            content = BLOCKS[name](results)
        except NotYet as reason:
            problems.append(f"{name} cannot be made yet: {reason}; take its markers out")
            return match[0]
        alone = match.start() == 0 or page[match.start() - 1] == "\n"
        around = "\n\n" if alone else ""
        return f"<!-- evidence: {name} -->{around}{content}{around}<!-- /evidence -->"

    return MARKED.sub(made, page), problems


def differing(before: str, after: str) -> list[str]:
    """Name the blocks whose text differs."""
    pairs = zip(MARKED.finditer(before), MARKED.finditer(after), strict=True)
    return [old["name"] for old, new in pairs if old[0] != new[0]]


def update_demo(root: Path, results: Results, check: bool) -> list[str]:
    """Write the table of the demo unless ``check``, and return what is wrong: with ``check`` also that it differs."""
    path = root / evidence_demo.FILE
    try:
        content = evidence_demo.study_json(results)
    except NotYet as reason:
        return [f"{evidence_demo.FILE} cannot be made yet: {reason}"]
    if path.exists() and path.read_text("utf-8") == content:
        return []
    if check:
        return [f"{evidence_demo.FILE} is not what docs/results has; run python tools/evidence.py"]
    path.write_text(content, "utf-8")
    return []


def update(root: Path, results: Results, check: bool) -> list[str]:
    """Write the blocks of all pages unless ``check``, and return what is wrong: with ``check`` also what differs."""
    complaints = []
    for path in pages(root):
        before = path.read_text("utf-8")
        after, problems = rendered(before, results)
        complaints += [f"{path.relative_to(root)}: {problem}" for problem in problems]
        if check:
            complaints += [
                f"{path.relative_to(root)}: {name} is not what docs/results has; run python tools/evidence.py"
                for name in differing(before, after)
            ]
        elif after != before:
            path.write_text(after, "utf-8")
    return complaints


def states(results: Results) -> Iterable[str]:
    """Say of each block whether it can be made."""
    for name, block in BLOCKS.items():
        try:
            block(results)
            yield f"{name}: ready"
        except NotYet as reason:
            yield f"{name}: not yet ({reason})"


def pictures(results: Results) -> dict[str, list[tuned_sections.Chart]]:
    """Make the charts of each picture that the files have runs for, by file name."""
    found: dict[str, list[tuned_sections.Chart]] = {}
    try:
        cells = results.tuned(BATCH)
        found["batch.png"] = tuned_sections.drawn_across(cells, tuned_sections.styles(cells))
    except NotYet:
        pass
    try:
        cells = results.tuned(WHAT)
    except NotYet:
        return found
    few = [replace(each, arms={name: arm for name, arm in each.arms.items() if name in DRAWN}) for each in cells]
    styles = tuned_sections.styles(few)
    charts = [chart for each in few for chart in tuned_sections.drawn(each, styles)]
    beginnings = {"rates.png": ("Loss against",), "front.png": ("Loss and isotropy", "Loss and word similarity")}
    for file, titles in beginnings.items():
        if chosen := [chart for chart in charts if chart.name.startswith(titles)]:
            found[file] = chosen
    return found


def draw(charts: list[tuned_sections.Chart], path: Path) -> None:
    """Draw charts side by side, two in a row, to a PNG."""
    from playwright.sync_api import sync_playwright
    from plotly.offline import get_plotlyjs

    figures = [chart.figure.update_layout(width=WIDTH) for chart in charts]
    drawn = "".join(f"<div>{figure.to_html(full_html=False, include_plotlyjs=False)}</div>" for figure in figures)
    style = f"display: flex; flex-wrap: wrap; width: {WIDTH * min(2, len(charts))}px"
    head = f'<!doctype html><meta charset="utf-8"><script>{get_plotlyjs()}</script>'
    page = f'{head}<div id="all" style="{style}">{drawn}</div>'
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "charts.html"
        file.write_text(page, "utf-8")
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        opened = browser.new_page(viewport={"width": 1140, "height": 900})
        opened.goto(file.as_uri())
        opened.locator("#all").screenshot(path=path)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing, and exit 1 if a block differs")
    what.add_argument("--list", action="store_true", help="list the blocks")
    what.add_argument("--pictures", action="store_true", help="draw the pictures")
    arguments = parser.parse_args()
    results = Results(ROOT / "docs" / "results")
    if arguments.list:
        print(*states(results), sep="\n")
        return
    if arguments.pictures:
        for name, charts in pictures(results).items():
            draw(charts, ROOT / "docs" / name)
            print(f"docs/{name}: {len(charts)} charts")
        return
    if complaints := [*update(ROOT, results, arguments.check), *update_demo(ROOT, results, arguments.check)]:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
