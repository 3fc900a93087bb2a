"""What the API pages promise, checked in the sources: no build is needed.

    pip install griffelib && python tools/api_pages.py

Griffe reads the docstrings as mkdocstrings does. Each check returns its complaints, one line each.
"""

import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]

#: One ``::: path`` of a page, with its options.
ASKED = re.compile(r"^::: (\S+)\n((?:    .*\n|\n(?=    ))*)", re.MULTILINE)

#: Bases whose fields are a class's whole content.
RECORDS = {"TypedDict", "NamedTuple", "BaseModel", "Section"}


@dataclass(frozen=True)
class Entry:
    """An object that a page asks for, and the members that are shown with it; None: all that are public."""

    page: str
    path: str
    members: tuple[str, ...] | None


def entries(root: Path = ROOT) -> list[Entry]:
    """List what the API pages ask for, in their order."""
    found = []
    for page in sorted((root / "docs" / "api").glob("*.md")):
        for path, options in ASKED.findall(page.read_text("utf-8") + "\n"):
            named = re.search(r"^ +members: (.*)$", options, re.MULTILINE)
            listed = None if named is None else tuple(re.findall(r"\w+", named[1].replace("false", "")))
            found.append(Entry(f"docs/api/{page.name}", path, listed))
    return found


def package(root: Path = ROOT) -> griffe.Module:
    """Read the package, without importing it."""
    loaded = griffe.load(
        "coupled_adam", search_paths=[root / "src"], docstring_parser="google", allow_inspection=False
    )
    assert isinstance(loaded, griffe.Module)
    return loaded


def shown(read: griffe.Module, root: Path = ROOT) -> Iterator[tuple[Entry, griffe.Object]]:
    """Yield every object that a page shows: those that it asks for, and their members."""
    for entry in entries(root):
        found = read[entry.path.partition(".")[2]]
        target = found.final_target if isinstance(found, griffe.Alias) else found
        yield entry, target
        if isinstance(target, griffe.Class):
            for name, member in target.members.items():
                wanted = not name.startswith("_") if entry.members is None else name in entry.members
                if wanted and not isinstance(member, griffe.Alias) and member.docstring is not None:
                    yield entry, member


def missing_pages(root: Path = ROOT) -> list[str]:
    """Public names, those of an ``__all__``, that no page asks for; and paths of pages that there are not."""
    read = package(root)
    paths, complaints = set(), []
    for entry in entries(root):
        try:
            found = read[entry.path.partition(".")[2]]
        except KeyError:
            complaints.append(f"{entry.page}: {entry.path}: no such object")
            continue
        paths.add(found.final_target.path if isinstance(found, griffe.Alias) else found.path)
    for path, target in public_names(read).items():
        if target not in paths:
            complaints.append(f"{path}: on none of the API pages")
    return sorted(complaints)


def public_names(read: griffe.Module) -> dict[str, str]:
    """Return the public names of all modules, and where each is defined."""
    found = {}
    for module in _modules(read):
        for name in module.exports or []:
            if str(name).startswith("__"):
                continue
            member = module.members[str(name)]
            target = member.final_target if isinstance(member, griffe.Alias) else member
            # A function has the name of its module: the package's name is the function's.
            path = f"{target.path}.{name}" if isinstance(target, griffe.Module) else target.path
            found[f"{module.path}.{name}"] = path
    return found


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for member in module.members.values():
        if isinstance(member, griffe.Module):
            yield from _modules(member)


def faulty_docstrings(root: Path = ROOT) -> list[str]:
    """Docstrings that Griffe cannot parse, that lack parameters, results, fields or an example, or hold a bad table."""
    complaints = []
    for entry, target in shown(package(root), root):
        if target.docstring is None:
            complaints.append(f"{target.path}: has no docstring")
            continue
        with _Warnings() as warnings:
            sections = target.docstring.parse("google")
        complaints += [f"{target.path}: {warning}" for warning in warnings]
        complaints += [f"{target.path}: {fault}" for fault in bad_tables(target.docstring.value)]
        if target.path == entry.path or target.name == entry.path.rpartition(".")[2]:
            complaints += [f"{target.path}: {lack}" for lack in _lacks(target, sections, entry, root)]
        elif isinstance(target, griffe.Function):
            complaints += [f"{target.path}: {lack}" for lack in _without_arguments(target, target, sections)]
    return complaints


class _Warnings(logging.Handler):
    """The warnings that Griffe logs inside the block, without the place, which the docstring's path says."""

    def __enter__(self) -> list[str]:
        self.found: list[str] = []
        griffe.logger._logger.addHandler(self)  # type: ignore[attr-defined]
        return self.found

    def __exit__(self, *_: object) -> None:
        griffe.logger._logger.removeHandler(self)  # type: ignore[attr-defined]

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.found.append(record.getMessage().partition(": ")[2])


def _lacks(
    target: griffe.Object, sections: list[griffe.DocstringSection], entry: Entry, root: Path
) -> Iterator[str]:
    """Say what a public object's docstring does not tell."""
    if isinstance(target, griffe.Class) and is_record(target):
        for name, member in target.members.items():
            if isinstance(member, griffe.Attribute) and not name.startswith("_") and member.docstring is None:
                yield f"its field {name} has no docstring"
        return
    function = target.members.get("__init__") if isinstance(target, griffe.Class) else target
    if isinstance(function, griffe.Function):
        yield from _without_arguments(target, function, sections)
    if isinstance(target, griffe.Function):
        returns = str(target.returns or "None")
        if returns != "None" and not _of_kind(sections, griffe.DocstringSectionKind.returns):
            yield "has no section Returns"
    if isinstance(target, griffe.Function | griffe.Class) and not _is_exception(target):
        assert target.docstring is not None
        if not re.search(r"^ *(>>> |```python)", target.docstring.value, re.MULTILINE):
            used = "".join(re.findall(r"```python\n.*?```", (root / entry.page).read_text("utf-8"), re.DOTALL))
            if not re.search(rf"\b{target.name}\b", used):
                yield "has no example, nor is it in one of its page"


def is_record(target: griffe.Class) -> bool:
    """Return whether a class is made of its fields."""
    decorated = any("dataclass" in str(decorator.value) for decorator in target.decorators)
    return decorated or any(str(base).rpartition(".")[2] in RECORDS for base in target.bases)


def _is_exception(target: griffe.Object) -> bool:
    return isinstance(target, griffe.Class) and any(
        str(base).endswith(("Error", "Exception")) for base in target.bases
    )


def _without_arguments(
    target: griffe.Object, function: griffe.Function, sections: list[griffe.DocstringSection]
) -> Iterator[str]:
    documented = {
        parameter.name.lstrip("*")
        for section in _of_kind(sections, griffe.DocstringSectionKind.parameters)
        for parameter in section.value
    }
    taken = [p.name.lstrip("*") for p in function.parameters if p.name not in ("self", "cls")]
    if target is function and function.parent is not None and function.parent.is_class:
        if not documented:  # a method may say it in its one sentence
            return
    for name in taken:
        if name not in documented and not name.startswith("_"):
            yield f"its parameter {name} is not under Args"


def _of_kind(
    sections: list[griffe.DocstringSection], kind: griffe.DocstringSectionKind
) -> list[griffe.DocstringSection]:
    return [section for section in sections if section.kind is kind]


def unlinked_types(root: Path = ROOT) -> list[str]:
    """Types of this package in the signatures and fields on the pages that stand on none of them themselves."""
    read = package(root)
    objects = list(shown(read, root))
    paths = {target.path for _, target in objects}
    complaints = set()
    for _, target in objects:
        for name in _names_in(target):
            kept = name.partition(".")[2]
            try:
                found = read[kept]
            except (KeyError, ValueError):
                continue
            resolved = found.final_target if isinstance(found, griffe.Alias) else found
            if isinstance(resolved, griffe.Class | griffe.Attribute | griffe.TypeAlias) and resolved.path not in paths:
                complaints.add(f"{target.path}: its type {resolved.path} is on none of the API pages")
    return sorted(complaints)


def _names_in(target: griffe.Object) -> set[str]:
    """Return the full names of what the annotations of an object name, as far as they are of this package."""
    functions = [target, target.members.get("__init__")] if isinstance(target, griffe.Class) else [target]
    annotations: list[object] = []
    for function in functions:
        if isinstance(function, griffe.Function):
            annotations += [function.returns, *(parameter.annotation for parameter in function.parameters)]
        elif isinstance(function, griffe.Attribute):
            annotations.append(function.annotation)
    if isinstance(target, griffe.Class) and is_record(target):
        annotations += [m.annotation for m in target.members.values() if isinstance(m, griffe.Attribute)]
    names = [
        part.canonical_path
        for annotation in annotations
        if isinstance(annotation, griffe.Expr)
        for part in annotation.iterate(flat=True)
        if isinstance(part, griffe.ExprName)
    ]
    return {name for name in names if name.startswith("coupled_adam.")}


def bad_tables(text: str) -> list[str]:
    """Rows of Markdown tables with more or fewer cells than the header, and headers without a line of dashes."""
    complaints = []
    for block in re.findall(r"(?:^ *\|.*\n?)+", _without_code(text), re.MULTILINE):
        rows = block.splitlines()
        if len(rows) < 2 or not re.fullmatch(r" *\|(?: *:?-+:? *\|)+ *", rows[1]):
            complaints.append(f"a table without a line of dashes below its header: {rows[0].strip()[:60]}")
            continue
        width = _cells(rows[0])
        complaints += [
            f"a table of {width} columns has a row of {_cells(row)}: {row.strip()[:60]}"
            for row in rows[1:]
            if _cells(row) != width
        ]
    return complaints


def _without_code(text: str) -> str:
    """Leave out blocks of code, and what is set as code in a line."""
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(`+)[^`\n]+?\1", "code", text)


def _cells(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", row.strip())) - 1


def faulty_tables(root: Path = ROOT) -> list[str]:
    """Look through all pages."""
    pages = [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]
    return [
        f"{page.relative_to(root)}: {fault}" for page in pages for fault in bad_tables(page.read_text(encoding="utf-8"))
    ]


def complaints(root: Path = ROOT) -> list[str]:
    """All of the above."""
    return missing_pages(root) or faulty_docstrings(root) + unlinked_types(root) + faulty_tables(root)


if __name__ == "__main__":
    sys.exit("\n".join(complaints()) or None)
