"""Build the documentation and check what came out, since a strict build overlooks some things.

    pip install ".[docs]" && python tools/check_docs.py

``tools/api_pages.py`` checks docstrings and tables in the sources. Here the pages that were built are searched for text
that was not understood, and for public names that are missing.
"""

import re
import subprocess
import sys
from pathlib import Path

import api_pages

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "docs"

#: What is left of Markdown or reStructuredText that was not understood, outside of code.
RAW = {
    "a table as text": re.compile(r"<p>\s*\|[^<]*|\|\s*:?-{3,}[^<]*"),
    "a role of Sphinx": re.compile(r":(?:func|class|meth|mod|attr|ref):[^<]*"),
    "a section of a docstring as text": re.compile(r"<p>(?:Args|Arguments|Returns|Raises|Yields|Examples?):\s[^<]*"),
    "an example as text": re.compile(r"<p>&gt;&gt;&gt;[^<]*"),
}
CODE = re.compile(r"<(pre|script)\b.*?</\1>", re.DOTALL)


def complaints_of_the_build() -> list[str]:
    """What is wrong enough for the build to say so, on standard output or error."""
    command = [str(Path(sys.executable).with_name("zensical")), "build", "--strict", "--clean"]
    build = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = [line for line in build.stdout.splitlines() if re.search(r"griffe|warning|error", line, re.IGNORECASE)]
    return lines or ([build.stdout] if build.returncode else [])


def raw_text() -> list[str]:
    """What stands on the pages as it was written."""
    return [
        f"{page.relative_to(SITE)}: {kind}: {match[0].strip()[:80]}"
        for page in sorted(SITE.rglob("*.html"))
        for kind, pattern in RAW.items()
        for match in pattern.finditer(CODE.sub("", page.read_text("utf-8")))
    ]


def undocumented() -> list[str]:
    """Public names without a heading on the pages, whatever path of an object the heading has."""
    read = api_pages.package()
    pages = [page.read_text("utf-8") for page in (SITE / "api").rglob("index.html")]
    headings = {name for page in pages for name in re.findall(r'<h\d id="coupled_adam\.([^"]*)"', page)}
    shown = {api_pages.resolved(read[name]).path for name in headings}
    public = api_pages.public_names(read)
    return sorted(f"{path}: on none of the API pages" for path, target in public.items() if target not in shown)


def main() -> None:
    problems = api_pages.complaints() or complaints_of_the_build() or raw_text() + undocumented()
    if problems:
        sys.exit("\n".join(problems))
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
