"""The house stays in order: files are found by their names, and no function asks for more than a reader keeps in mind.

``lint-imports`` holds the layers.
"""

import ast
from collections import Counter
from pathlib import Path

import coupled_adam

SOURCE = Path(coupled_adam.__file__).parent
FILES = [path for path in SOURCE.rglob("*.py") if path.name != "__init__.py"]


def test_no_two_files_have_one_name() -> None:
    assert [name for name, count in Counter(path.name for path in FILES).items() if count > 1] == []


def test_no_function_of_the_optimizers_takes_more_than_five_parameters() -> None:
    # Kernels take memory, and the constructors of the optimizers take hyperparameters: both by the dozen.
    counts = {}
    for path in (SOURCE / "optim").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__" and "kernels" not in path.stem:
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                names = [a.arg for a in arguments if a.arg not in ("self", "cls")]
                counts[f"{path.stem}.{node.name}"] = len(names)
    assert len(counts) > 100
    assert {name: count for name, count in counts.items() if count > 5} == {}


def test_a_page_lies_beside_the_template_of_its_name() -> None:
    pages = list(SOURCE.rglob("*.html"))
    assert len(pages) >= 4
    assert [path.name for path in pages if not path.with_suffix(".py").exists()] == []


def test_spelling_is_american() -> None:
    words = ("centre", "colour", "licence", "behaviour", "neighbour", "labelled", "normalis", "initialis", "optimis")
    found = [
        (path.name, word)
        for path in (*FILES, *(p for kind in ("html", "jinja", "css", "js", "toml") for p in SOURCE.rglob(f"*.{kind}")))
        for word in words
        if word in path.read_text("utf-8").lower().replace("aria-labelledby", "")
    ]
    assert found == []
