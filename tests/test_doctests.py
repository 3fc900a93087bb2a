"""The examples in docstrings run as they stand there, of whatever copy of the package is imported."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import coupled_adam

#: Modules of trainers that are not installed beside the others: tools/check_integrations tests them.
ELSEWHERE = {f"coupled_adam.integrations.{trainer}" for trainer in ("axolotl", "olmo_core", "torchtitan")}

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(coupled_adam.__path__, "coupled_adam.")
    if not module.name.endswith("__main__") and module.name not in ELSEWHERE
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a Trainer makes its directory
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= 40
