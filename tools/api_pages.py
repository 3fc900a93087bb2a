"""What the API pages promise, checked in the sources: no build is needed.

    pip install ".[docs]" && python tools/api_pages.py

Griffe reads the docstrings as mkdocstrings does. Each check returns its complaints, one line each.
"""

import ast
import functools
import logging
import re
import sys
import textwrap
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


@functools.cache
def package(root: Path = ROOT) -> griffe.Module:
    """Read the package, without importing it."""
    loaded = griffe.load("coupled_adam", search_paths=[root / "src"], docstring_parser="google", allow_inspection=False)
    assert isinstance(loaded, griffe.Module)
    return loaded


def resolved(found: griffe.Object | griffe.Alias) -> griffe.Object:
    """Return the object itself, where a name is imported from elsewhere."""
    return found.final_target if isinstance(found, griffe.Alias) else found


def shown(read: griffe.Module, root: Path = ROOT) -> Iterator[tuple[Entry, griffe.Object]]:
    """Yield every object that a page shows: those that it asks for, and their members."""
    for entry in entries(root):
        target = resolved(read[entry.path.partition(".")[2]])
        yield entry, target
        if isinstance(target, griffe.Class):
            for name, member in target.members.items():
                if _wanted(name, entry) and not isinstance(member, griffe.Alias) and member.docstring is not None:
                    yield entry, member


def _wanted(name: str, entry: Entry) -> bool:
    return not name.startswith("_") if entry.members is None else name in entry.members


def missing_pages(root: Path = ROOT) -> list[str]:
    """Public names, those of an ``__all__``, that no page asks for; and paths of pages that there are not."""
    read = package(root)
    paths, complaints = set(), []
    for entry in entries(root):
        try:
            paths.add(resolved(read[entry.path.partition(".")[2]]).path)
        except KeyError:
            complaints.append(f"{entry.page}: {entry.path}: no such object")
    for path, target in public_names(read).items():
        if target == "nothing":
            complaints.append(f"{path}: in __all__, but there is no such name")
        elif target not in paths:
            complaints.append(f"{path}: on none of the API pages")
    return sorted(complaints)


def public_names(read: griffe.Module) -> dict[str, str]:
    """Return the public names of all modules, and where each is defined."""
    found = {}
    for module in _modules(read):
        for name in module.exports or []:
            if str(name).startswith("__"):
                continue
            if str(name) not in module.members:
                found[f"{module.path}.{name}"] = "nothing"
                continue
            target = resolved(module.members[str(name)])
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
    read = package(root)
    public = set(public_names(read).values())
    examples = "".join(
        block
        for page in (root / "docs" / "api").glob("*.md")
        for block in re.findall(r"```python\n.*?```", page.read_text("utf-8"), re.DOTALL)
    )
    complaints = []
    for entry, target in shown(read, root):
        if target.docstring is None:
            complaints.append(f"{target.path}: has no docstring")
            continue
        with _Warnings() as warnings:
            sections = target.docstring.parse("google")
        complaints += [f"{target.path}: {warning}" for warning in warnings]
        complaints += [f"{target.path}: {fault}" for fault in bad_tables(target.docstring.value)]
        lacks = [*_returns_misread(target, sections)]
        if isinstance(target, griffe.Class) and is_record(target):
            lacks += _without_docstring(target, entry)
        elif target.path in public:
            lacks += _lacks(target, sections)
            if not _has_example(target, examples):
                lacks.append("has no example, nor is it in one of a page")
        elif isinstance(target, griffe.Function):
            lacks += _without_arguments(target, target, sections)
        complaints += [f"{target.path}: {lack}" for lack in lacks]
    return complaints


class _Warnings(logging.Handler):
    """The warnings that Griffe logs inside the block, without the place, which the docstring's path says."""

    def __enter__(self) -> list[str]:
        self.found: list[str] = []
        griffe.logger._logger.addHandler(self)
        return self.found

    def __exit__(self, *_: object) -> None:
        griffe.logger._logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.found.append(record.getMessage().partition(": ")[2])


def _without_docstring(target: griffe.Class, entry: Entry) -> Iterator[str]:
    """Name the fields that are shown and say nothing."""
    for name, member in target.members.items():
        if isinstance(member, griffe.Attribute) and _wanted(name, entry) and member.docstring is None:
            yield f"its field {name} has no docstring"


def _lacks(target: griffe.Object, sections: list[griffe.DocstringSection]) -> Iterator[str]:
    """Say what the docstring of a public function or class does not tell."""
    function = target.members.get("__init__") if isinstance(target, griffe.Class) else target
    if isinstance(function, griffe.Function):
        yield from _without_arguments(target, function, sections)
    if isinstance(target, griffe.Function):
        if str(target.returns or "None") != "None" and not _of_kind(sections, griffe.DocstringSectionKind.returns):
            yield "has no section Returns"
        described = {
            name
            for section in _of_kind(sections, griffe.DocstringSectionKind.raises)
            for item in section.value
            for name in re.split(r",\s*", str(item.annotation))
        }
        raised = {
            node.exc.func.id
            for node in ast.walk(ast.parse(textwrap.dedent("".join(f"{line}\n" for line in target.lines))))
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
        }
        yield from (f"raises {name}, which is not under Raises" for name in sorted(raised - described))


def _has_example(target: griffe.Object, examples: str) -> bool:
    """Return whether a function or class has an example, in its docstring or in a block of a page."""
    if not isinstance(target, griffe.Function | griffe.Class) or _is_abstract(target):
        return True
    docstring = "" if target.docstring is None else target.docstring.value
    own = re.search(r"^ *(>>> |```\w)", docstring, re.MULTILINE)
    return own is not None or re.search(rf"\b{target.name}\b", examples) is not None


def _returns_misread(target: griffe.Object, sections: list[griffe.DocstringSection]) -> Iterator[str]:
    """Find text before a colon that becomes the name or type of the result."""
    for section in _of_kind(sections, griffe.DocstringSectionKind.returns):
        for item in section.value:
            if item.name or isinstance(item.annotation, str):
                yield f"under Returns, {item.name or item.annotation!r} is read as a name or type: leave out the colon"


def is_record(target: griffe.Class) -> bool:
    """Return whether a class is made of its fields."""
    decorated = any("dataclass" in str(decorator.value) for decorator in target.decorators)
    return decorated or any(str(base).rpartition(".")[2] in RECORDS for base in target.bases)


def _is_abstract(target: griffe.Object) -> bool:
    """Return whether a class is an exception or a protocol, of which nobody makes an instance."""
    bases = [str(base) for base in target.bases] if isinstance(target, griffe.Class) else []
    return any(base.endswith(("Error", "Exception", "Protocol")) for base in bases)


def _without_arguments(
    target: griffe.Object, function: griffe.Function, sections: list[griffe.DocstringSection]
) -> Iterator[str]:
    documented = {
        parameter.name.lstrip("*")
        for section in _of_kind(sections, griffe.DocstringSectionKind.parameters)
        for parameter in section.value
    }
    taken = [p.name.lstrip("*") for p in function.parameters if p.name not in ("self", "cls")]
    is_method = target is function and function.parent is not None and function.parent.is_class
    if is_method and not documented:  # it may say it in one sentence
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
    for entry, target in objects:
        for name in _names_in(target, entry):
            kept = name.partition(".")[2]
            try:
                found = resolved(read[kept])
            except (KeyError, ValueError):
                continue
            shown_with = {found.path, found.path.rpartition(".")[0]}  # a class in a class
            if isinstance(found, griffe.Class | griffe.Attribute | griffe.TypeAlias) and not shown_with & paths:
                complaints.add(f"{target.path}: its type {found.path} is on none of the API pages")
    return sorted(complaints)


def _names_in(target: griffe.Object, entry: Entry) -> set[str]:
    """Return the full names of what the annotations of an object name, as far as they are of this package."""
    functions = [target, target.members.get("__init__")] if isinstance(target, griffe.Class) else [target]
    annotations: list[object] = []
    for function in functions:
        if isinstance(function, griffe.Function):
            annotations += [function.returns, *(parameter.annotation for parameter in function.parameters)]
        elif isinstance(function, griffe.Attribute):
            annotations.append(function.annotation)
    if isinstance(target, griffe.Class) and is_record(target):
        annotations += [
            member.annotation
            for name, member in target.members.items()
            if isinstance(member, griffe.Attribute) and _wanted(name, entry)
        ]
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
    for block in re.findall(r"(?:^ *\| .*\n?)+", _without_code(text), re.MULTILINE):
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
