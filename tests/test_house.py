"""The house stays in order: files are found by their names, and none grows too long to be read."""

from collections import Counter
from pathlib import Path

import coupled_adam

SOURCE = Path(coupled_adam.__file__).parent
FILES = [path for path in SOURCE.rglob("*.py") if path.name != "__init__.py"]


def test_no_two_files_have_one_name() -> None:
    assert [name for name, count in Counter(path.name for path in FILES).items() if count > 1] == []


def test_a_file_is_as_long_as_its_subject() -> None:
    lengths = {path.relative_to(SOURCE).as_posix(): len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 600} == {}


def test_a_page_lies_beside_the_template_of_its_name() -> None:
    pages = list(SOURCE.rglob("*.html"))
    assert len(pages) >= 4
    assert [path.name for path in pages if not path.with_suffix(".py").exists()] == []


def test_spelling_is_american() -> None:
    words = ("centre", "colour", "licence", "behaviour", "neighbour", "labelled", "normalis", "initialis", "optimis")
    found = [
        (path.name, word)
        for path in (*FILES, *SOURCE.rglob("*.html"), *SOURCE.rglob("*.toml"))
        for word in words
        if word in path.read_text("utf-8").lower()
    ]
    assert found == []
