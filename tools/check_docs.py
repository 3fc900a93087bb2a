"""Build the documentation and look at what came out, since a strict build overlooks some things.

    pip install ".[docs,geometry]" && python tools/check_docs.py

Tables and docstrings that do not parse become running text there, and a function disappears if a module has its name.
"""

import importlib
import re
import subprocess
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "docs"
PUBLIC = ("coupled_adam", "coupled_adam.geometry")

#: What is left of Markdown or reStructuredText that was not understood.
RAW = {
    "a table as text": re.compile(r"<p>\s*\|[^<]*"),
    "a role of Sphinx": re.compile(r":(?:func|class|meth|mod|attr|ref):[^<]*"),
}


def complaints_of_the_build() -> list[str]:
    """What is wrong enough for the build to say so, on standard output or error."""
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict", "--clean"]
    build = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = [line for line in build.stdout.splitlines() if re.search(r"griffe|warning|error", line, re.IGNORECASE)]
    return lines or ([build.stdout] if build.returncode else [])


def raw_text() -> list[str]:
    return [
        f"{page.relative_to(SITE)}: {kind}: {match[0].strip()[:80]}"
        for page in sorted(SITE.rglob("*.html"))
        for kind, pattern in RAW.items()
        for match in pattern.finditer(page.read_text("utf-8"))
    ]


def undocumented() -> list[str]:
    """Public names that are neither under their own path nor under that of their definition in the inventory."""
    inventory = (SITE / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    missing = []
    for package in map(importlib.import_module, PUBLIC):
        for name in set(package.__all__) - {"__version__"}:
            value = getattr(package, name)
            if not documented & {f"{package.__name__}.{name}", f"{value.__module__}.{value.__qualname__}"}:
                missing.append(f"{package.__name__}.{name}: on none of the API pages")
    return sorted(missing)


def main() -> None:
    problems = complaints_of_the_build() or raw_text() + undocumented()
    if problems:
        sys.exit("\n".join(problems))
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
