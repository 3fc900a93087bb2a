"""Takes a plot from a page: the part that a selector of Playwright names.

python tools/plot.py runs/demo/report.html ".wide" docs/embeddings.png
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

report, selector, plot = sys.argv[1:4]
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
    )
    page = browser.new_page(viewport={"width": 1120, "height": 900})
    page.goto(Path(report).resolve().as_uri())
    page.add_style_tag(content="details.data { display: none }")  # the data, which open on a click
    page.locator(selector).first.screenshot(path=plot)
    browser.close()
