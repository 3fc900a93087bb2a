"""Experiments that are products of named axes, and families that name experiments by pattern."""

import itertools
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from coupled_adam.errors import InputError

#: What the table of a grid holds.
KEYS = {"name", "parts", "axes"}


@dataclass(frozen=True)
class Grid:
    """Experiments of one name pattern."""

    pattern: str
    """``mini-drift-{method}-{lr}``: every axis once, in braces."""
    axes: dict[str, tuple[str, ...]]
    """By axis, the names of its entries as they stand in the experiments' names."""
    experiments: dict[str, list[str]]
    """Name and parts of every experiment, the last axis varying fastest."""


def expand(where: str, table: Mapping[str, Any], parts: Collection[str]) -> Grid:
    """Expand one ``[grids.NAME]`` of a suite.

    ``name`` is the pattern of the names, ``parts`` (optional) what all experiments have, and ``axes`` what they differ
    in: by axis a list of parts; an entry that is a list itself is laid over in its order and named by its parts with
    hyphens between.

    Args:
        where: What errors call the grid.
        table: The table of the file.
        parts: Names of the suite's parts.

    Raises:
        InputError: a key is missing or unknown, the pattern does not name every axis once, an axis has no entries, a
            part is unknown, or two experiments would have one name.
    """
    if wrong := sorted(set(table) ^ KEYS - ({"parts"} - set(table))):
        raise InputError(f"{where}: {wrong[0]} is missing or unknown; a grid has name, axes and, optionally, parts")
    pattern, axes = table["name"], {axis: [_listed(e) for e in entries] for axis, entries in table["axes"].items()}
    fields = [field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None]
    if sorted(fields) != sorted(axes):
        raise InputError(f"{where}: name {pattern!r} must hold every axis once, in braces: {', '.join(axes)}")
    if empty := [axis for axis, entries in axes.items() if not entries]:
        raise InputError(f"{where}: axis {empty[0]} has no entries")
    common = list(table.get("parts", []))
    check_parts(where, [*common, *itertools.chain(*itertools.chain(*axes.values()))], parts)
    found: dict[str, list[str]] = {}
    for chosen in itertools.product(*axes.values()):
        name = pattern.format(**{axis: "-".join(entry) for axis, entry in zip(axes, chosen, strict=True)})
        if name in found:
            raise InputError(f"{where}: two of its experiments would be called {name}")
        found[name] = [*common, *itertools.chain(*chosen)]
    return Grid(pattern, {axis: tuple("-".join(e) for e in entries) for axis, entries in axes.items()}, found)


def check_parts(where: str, named: Sequence[str], parts: Collection[str]) -> None:
    """Raise InputError unless all parts that ``where`` names are there."""
    if unknown := [part for part in named if part not in parts]:
        raise InputError(f"{where}: unknown part {unknown[0]!r}; choose from {', '.join(parts)}")


def matching(where: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names that match each pattern (``*`` and ``?``, as in a shell), in its order, and each name once.

    Raises:
        InputError: nothing matches a pattern.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(f"{where}: no experiment is called {pattern}")
        found |= dict.fromkeys(matched)
    return list(found)


def _listed(entry: str | list[str]) -> list[str]:
    return [entry] if isinstance(entry, str) else entry
