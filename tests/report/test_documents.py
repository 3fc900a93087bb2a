"""Losses by document: written and read alike, and refused where they are damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_up import write_run

from coupled_adam.errors import InputError
from coupled_adam.report.aggregate import read_runs
from coupled_adam.report.documents import DocumentLosses, formatted, interval_over_documents, of_runs, read_documents
from coupled_adam.report.tuned import read_rows, text


def measured(directory: Path, name: str, tokens: list[int], losses: list[float], **values) -> None:
    run = write_run(directory, name, **values)
    content = {
        "inputs": {"weights": "w"},
        "step": 8,
        "loss_selection": 6.0,
        "loss_report": 6.0,
        "loss_by_decile": [6.0] * 10,
        "kappa": {},
        "documents": {"tokens": tokens, "loss": losses},
    }
    (run / "evaluation" / "frequency.json").write_text(json.dumps(content))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    measured(tmp_path, "a", [3, 40, 5], [6.1, 5.0, 7.25])
    measured(tmp_path, "b", [3, 40, 5], [6.0, 5.5, 7.0], schedule__lr=1e-2)
    measured(tmp_path, "c", [9, 8], [4.0, 3.0], data__vocab_size=512)
    write_run(tmp_path, "d", schedule__lr=2e-2)  # without documents
    runs = read_runs([tmp_path])
    (tmp_path / "documents.csv").write_text(formatted(of_runs(runs)))
    found, expected = read_documents(tmp_path / "documents.csv"), of_runs(runs)
    assert found.keys() == expected.keys() == {"a-s1", "b-s1", "c-s1"}
    for name, run in expected.items():
        assert found[name].corpus == run.corpus
        assert found[name].tokens.tolist() == run.tokens.tolist() and found[name].losses.tolist() == run.losses.tolist()
    assert found["a-s1"].corpus == found["b-s1"].corpus != found["c-s1"].corpus
    lines = (tmp_path / "documents.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines][:2] == ["name", "tokens:wikipedia-sample-300-48"]


def test_documents_of_other_lengths_under_one_name_are_refused(tmp_path: Path) -> None:
    measured(tmp_path, "a", [3, 4], [6.1, 5.0])
    measured(tmp_path, "b", [4, 3], [6.0, 5.5], schedule__lr=1e-2)
    with pytest.raises(InputError, match="documents differ in length"):
        of_runs(read_runs([tmp_path]))


HEAD = "name,corpus,document_1,document_2\n"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("r,c,1.0,2.0\n", "line 2, r: no row tokens:c comes before it"),
        ("tokens:c,c,1,2\nr,c,1.0\n", "line 3, r: 1 documents where the corpus has 2"),
        ("tokens:c,c,1,2\nr,c,1.0,x\n", "line 3, r: could not convert string to float: 'x'"),
        ("tokens:c,c,1,2\nr,c,,2.0\n", "line 3, r: values are missing"),
        ("tokens:c,c,1,2\nr\n", "line 3, r: values are missing"),
        ("tokens:c,c,1,0\n", "line 2, tokens:c: a document without tokens"),
        ("tokens:c,c,1,2\ntokens:c,c,2,1\n", "line 3, tokens:c: other documents"),
        ("tokens:c,c,1,2\nr,c,1.0,2.0\nr,c,1.0,2.0\n", "line 4, r: a second row"),
    ],
)
def test_a_damaged_line_is_named(lines: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "documents.csv"
    path.write_text(HEAD + lines)
    with pytest.raises(InputError) as refused:
        read_documents(path)
    assert told in str(refused.value) and str(refused.value).endswith("restore the file")


def test_files_may_stand_below_one_another(tmp_path: Path) -> None:
    part = HEAD + "tokens:c,c,1,2\n"
    (tmp_path / "documents.csv").write_text(f"{part}a,c,1.0,2.0\n{part}b,c,1.5,2.5\n")
    assert list(read_documents(tmp_path / "documents.csv")) == ["a", "b"]


def test_runs_that_read_other_documents_are_not_compared() -> None:
    a, b = (DocumentLosses(corpus, np.array([1, 2]), np.array([1.0, 2.0])) for corpus in "ab")
    assert interval_over_documents([(a, b)]) is None and interval_over_documents([]) is None
    same = interval_over_documents([(a, a)])
    assert (same.low, same.high) == (0.0, 0.0)


def test_runs_are_collected_beside_those_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    from collect_study import collect

    def names() -> tuple[list[str], set[str]]:
        table = read_rows(tmp_path / "study.csv")
        return [text(row, "name") for row in table], set(read_documents(tmp_path / "study-documents.csv"))

    for seed in (1, 2):
        measured(tmp_path / "first", "a", [3, 40], [6.0, 5.0], seed=seed)
    write_run(tmp_path / "first", "c")  # not evaluated to its end
    collect([tmp_path / "first"], tmp_path)
    assert names() == (["a-s1", "a-s2"], {"a-s1", "a-s2"})
    measured(tmp_path / "second", "a", [3, 40], [4.0, 5.0], seed=2)
    measured(tmp_path / "second", "b", [3, 40], [6.0, 5.0])
    collect([tmp_path / "second"], tmp_path)
    assert names() == (["a-s1", "a-s2", "b-s1"], {"a-s1", "a-s2"}), "with one seed only a rate is looked for"
    losses = read_documents(tmp_path / "study-documents.csv")
    assert [losses[f"a-s{seed}"].losses.tolist() for seed in (1, 2)] == [[6.0, 5.0], [4.0, 5.0]]
