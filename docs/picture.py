"""The picture of the README: the map of both embeddings, from the report of a finished demo.

python docs/picture.py runs/demo/report.html docs/embeddings.png
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

report, picture = map(Path, sys.argv[1:3])
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
    )
    page = browser.new_page(viewport={"width": 1120, "height": 900})
    page.goto(report.resolve().as_uri())
    page.locator("#chart-embeddings").screenshot(path=picture)
    browser.close()
