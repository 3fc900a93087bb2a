"""Which definition a downstream task has: lm-eval's, that of lm-eval 0.4.3 where it differed, or a local one.

The YAML files here restore the older definitions. They include a task by its name, and ``definitions`` puts in the
file that defines it, so that local data given for ``race`` serves ``race_043`` too.
"""

import difflib
import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from coupled_adam.errors import InputError
from coupled_adam.progress import say

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry

#: Where lm-eval keeps the tasks of the papers. To look through all its directories takes 15 seconds.
PAPER_DIRECTORIES = ("hellaswag", "winogrande", "arc", "truthfulqa", "lambada", "race")


@dataclass(frozen=True)
class Definition:
    """What is known of a task before its data is read."""

    name: str
    version: float | str | None
    digest: str
    """SHA-256 of its settings, and of the modules and local data files that they name."""
    dataset: tuple[str, ...]
    """Name and, if any, configuration of a dataset of the Hugging Face hub; empty if its data is local."""


@contextmanager
def definitions(names: Sequence[str], include_path: Path | None) -> "Iterator[tuple[TaskManager, list[Definition]]]":
    """Yield the manager that loads ``names``, and their definitions; those in ``include_path`` come first.

    Raises InputError for a name that no single task has, and for a file that defines one and cannot be read.
    """
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"{include_path}: not a directory of task definitions")
    with TemporaryDirectory() as created:
        directory = Path(created).resolve()  # lm-eval resolves it too, and _content looks for its name
        manager = _manager(names, include_path, directory)
        yield manager, [_definition(manager, name, directory) for name in names]


def _manager(names: Sequence[str], include_path: Path | None, directory: Path) -> "TaskManager":
    """Make the manager of ``names``, or else of all tasks. ``directory`` receives the older definitions."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    local = [] if include_path is None else [include_path]
    paper = [Path(lm_eval.__file__).parent / "tasks" / name for name in PAPER_DIRECTORIES]
    index = TaskManager(include_path=[*paper, *local], include_defaults=False).task_index
    if include_path:
        _refuse_unreadable(include_path, index)
    for file in Path(__file__).parent.glob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        base = re.findall(r"^include: (\w+)$", text, re.MULTILINE)[0]
        if base in index:
            text = text.replace(f"include: {base}\n", f"include: {json.dumps(str(index[base].yaml_path.resolve()))}\n")
            (directory / file.name).write_text(text, encoding="utf-8")
    manager = TaskManager(include_path=[*paper, directory, *local], include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    say("searching all lm-eval tasks")
    return TaskManager(include_path=[directory, *local])


def _refuse_unreadable(include_path: Path, index: "Mapping[str, Entry]") -> None:
    """Refuse a definition that lm-eval cannot read: it would run its own task of that name instead."""
    for file in include_path.rglob("*.yaml"):
        for name in re.findall(r"^task: *['\"]?([\w.-]+)", file.read_text(encoding="utf-8"), re.MULTILINE):
            if name not in index or include_path not in index[name].yaml_path.parents:
                raise InputError(f"{file}: cannot be read as the definition of {name}; check its YAML and includes")


def _definition(manager: "TaskManager", name: str, directory: Path) -> Definition:
    if name not in manager.all_subtasks:
        if name in manager.all_tasks:
            raise InputError(f"{name}: a group of tasks; name the tasks in it instead")
        near = ", ".join(difflib.get_close_matches(name, manager.all_subtasks, n=3, cutoff=0.0))
        raise InputError(f"{name}: no such task; the nearest names are {near}")
    entry = manager.task_index[name]
    settings: dict[str, Any] = entry.cfg
    metadata, kwargs = settings.get("metadata"), settings.get("dataset_kwargs") or {}
    dataset = (settings.get("dataset_path"), settings.get("dataset_name"))
    local = "data_files" in kwargs or "data_dir" in kwargs or Path(dataset[0] or ".").exists()
    content = json.dumps(_content(settings, directory), sort_keys=True, default=str)
    return Definition(
        name,
        metadata.get("version") if isinstance(metadata, dict) else None,
        hashlib.sha256(content.encode()).hexdigest(),
        () if local else tuple(filter(None, dataset)),
    )


def _content(value: Any, directory: Path, data: bool = False) -> Any:
    """Put the digest of each file beside the name it is called by, and leave out the name of our own ``directory``.

    A function is called by directory/module.function, data by the path or the pattern that datasets takes.
    """
    if isinstance(value, dict):
        return {k: _content(v, directory, data or k in ("dataset_path", "dataset_kwargs")) for k, v in value.items()}
    if isinstance(value, list):
        return [_content(v, directory, data) for v in value]
    if not isinstance(value, str):
        return value
    if data:
        pattern = value
    elif Path(value).is_absolute():
        module = Path(value).name.rpartition(".")[0].replace(".", "/")
        pattern = glob.escape(str(Path(value).parent / f"{module}.py"))
    else:
        return value
    found = sorted(Path(f) for f in glob.glob(pattern, recursive=True))  # noqa: PTH207 (patterns may be absolute)
    return [Path(value).name, *map(_digest, found)] if found else value.replace(f"{directory}/", "")


def _digest(path: Path) -> str:
    """Hash a file's content; for a directory, which may be large, the names, sizes and times of its files."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            status = file.stat()
            digest.update(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    else:
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256")
    return digest.hexdigest()
