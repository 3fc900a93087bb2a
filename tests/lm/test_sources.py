"""What is read of a source: every form of the same text gives the same documents, and what is left out is said."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paragraphs import paragraphs

from coupled_adam import experiments
from coupled_adam.errors import InputError
from coupled_adam.lm import held_out, sources, tables
from coupled_adam.lm import prepare as prepare_module
from coupled_adam.lm.config import Data, Experiment
from coupled_adam.lm.held_out import labeled
from coupled_adam.lm.prepare import corpus_for, prepare, resolved
from coupled_adam.lm.sources import Dataset, TextFiles, local_source, source_of
from coupled_adam.lm.tokenizer import train_bpe

DOCUMENTS = [f"{text} “é” 𝄞\u2028\x85," for text in paragraphs(60).split("\n\n")]
DATA = Data(vocab_size=300, sequence_length=16)


def read(path: Path, column: str = "text") -> list[str]:
    return list(source_of(str(path), column).documents())


def as_csv(delimiter: str) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter).writerows([("id", "text"), *((i, d) for i, d in enumerate(DOCUMENTS))])
    return buffer.getvalue()


LINES = "".join(json.dumps({"id": 1, "text": d}) + "\n" for d in DOCUMENTS)
FORMS = {
    ".txt": "\n\n".join(DOCUMENTS),
    "": "\n\n".join(DOCUMENTS),
    ".story": "\n\n".join(DOCUMENTS),
    ".jsonl": LINES,
    ".NDJSON": LINES,
    ".json": json.dumps([{"text": d} for d in DOCUMENTS]),
    ".pretty.json": json.dumps([{"text": d} for d in DOCUMENTS], indent=2, ensure_ascii=False),
    ".strings.json": json.dumps(DOCUMENTS),
    ".lines.json": LINES,
    ".jsonl.json": "\n\r\n" + LINES.replace("\n", "\r\n"),
    ".csv": as_csv(","),
    ".TSV": as_csv("\t"),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
    ".GZ": lambda content: gzip.compress(content[:99]) + gzip.compress(content[99:]),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_documents(
    form: str, compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a b[é]{form}{compression}"
    path.write_bytes(COMPRESSIONS[compression](FORMS[form].encode()))
    assert read(path) == DOCUMENTS
    monkeypatch.setattr(tables, "CHARACTERS", 50)
    assert read(path) == DOCUMENTS, "however it is cut into pieces"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("form", FORMS)
def test_a_byte_order_mark_says_the_encoding(form: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{form}"
    path.write_bytes(FORMS[form].encode(encoding))
    assert read(path) == DOCUMENTS


@pytest.mark.parametrize(
    "column",
    [
        pa.array(DOCUMENTS),
        pa.array(DOCUMENTS, pa.large_string()),
        pa.array(DOCUMENTS, pa.string_view()),
        pa.array(DOCUMENTS).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_a_column_of_parquet(column: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": range(len(column)), "a.b": column}), tmp_path / "A.PARQUET", row_group_size=7)
    assert read(tmp_path / "A.PARQUET", "a.b") == DOCUMENTS


@settings(max_examples=50)
@given(
    st.one_of(st.text(), st.recursive(st.text() | st.floats(), st.lists).map(json.dumps)),
    st.text(" \t\n\v\ufeff\u00a0}1x"),
)
@example("{}", " \n").via("the end of a line")
@example('{"a": 1}', " x").via("more text after it")
@example("\u00a0{}", "").via("a space that JSON does not know")
def test_a_line_is_read_as_the_json_library_reads_it(line: str, end: str) -> None:
    found: list[object] = []
    for read in (json.loads, tables._decoded):
        try:
            found.append(repr(read(line + end)))
        except json.JSONDecodeError as error:
            found.append((error.msg, error.pos, error.doc))
    assert found[0] == found[1]


@settings(max_examples=50)
@given(
    st.lists(st.one_of(st.text(), st.integers(), st.none(), st.dictionaries(st.text(), st.floats()))), st.integers(1, 9)
)
def test_an_array_is_read_as_the_json_library_reads_it(values: list[object], size: int) -> None:
    for indent in (None, 1):
        text = json.dumps(values, indent=indent)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tables, "CHARACTERS", size)
            assert json.dumps(list(tables._array(io.StringIO(text[1:]), text[:1]))) == json.dumps(values)


VALUES = {"a number": 7, "a list": ["a"], "an object": {"a": 1}, "a boolean": True}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("row", [1, 4])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_what_is_not_text_is_named(kind: str, row: int, suffix: str, tmp_path: Path) -> None:
    rows = [{"text": d} for d in DOCUMENTS]
    rows[row - 1] = {"text": VALUES[kind]}
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"x{suffix}").write_text(text)
    with pytest.raises(InputError, match=rf"x{suffix}: row {row}: the column 'text' holds {kind}, not text"):
        prepare(source_of(str(tmp_path / f"x{suffix}")), DATA, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]


@pytest.mark.parametrize("value", [b"a", 7, ["a"], {"a": "b"}, 1.5, True], ids=str)
def test_a_column_of_parquet_that_is_not_text_is_named(value: object, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [value] * 9}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet: row 1: the column 'text' holds \S+.*, not text"):
        read(tmp_path / "x.parquet")


def test_rows_without_text_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": 1}, {"text": None}, {"text": " \n "}, {"text": ""}, *({"text": d} for d in DOCUMENTS)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.table({"text": [None, " ", *DOCUMENTS]}), tmp_path / "x.parquet")
    corpus = prepare(source_of(str(tmp_path / "x.jsonl")), DATA, tmp_path / "out")
    said = capsys.readouterr().err
    assert corpus.documents == len(DOCUMENTS)
    assert said.count("x.jsonl: 4 of 64 rows left out: 2 empty, 1 null, 1 without the column 'text'") == 1
    assert read(tmp_path / "x.parquet") == DOCUMENTS
    assert "x.parquet: 2 of 62 rows left out: 1 empty, 1 null" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"id": 1}\n' * 20_000, "no column 'text'; the columns are id"),
        ("x.json", "7", "no column 'text'"),
        ("x.json", '{"data": [{"text": "a"}]}', "no column 'text'; the columns are data"),
        ("x.json", '{\n"data": [{"text": "a"}]}', "neither an array of objects nor one object per line"),
        ("x.json", '[{"text": "a"}] x', "after row 1: more text after the end"),
        ("x.json", '[{"text": "a"} {"text": "b"}]', "after row 1: ',' or ']' expected"),
        ("x.json", '[{"text": "a"}', "cannot be read as a table"),
        ("x.json", "[" * 99_999, "cannot be read as a table"),
        ("x.jsonl", '{"text": "a"}\n{"text": ', "after row 1: "),
        ("x.jsonl", '{"text": "a"}\n{"text": "\\ud800"}', "row 2: half of a surrogate pair"),
        ("x.jsonl", "", "has no rows"),
        ("x.jsonl", "\n \n", "has no rows"),
        ("x.json", "[]", "has no rows"),
        ("x.csv", "", "has no rows"),
        ("x.csv", "id,text\n", "has no rows"),
        ("x.csv", "id,body\n1,a\n", "no column 'text'; the columns are id, body"),
        ("x.csv", "id,text\n1,hello, world\n", "row 1 has 3 fields, but the header has 2"),
        ("x.csv", 'id,text\n1,"hello\n', "cannot be read as a table"),
        ("x.parquet", "", "cannot be read as a table"),
    ],
)
def test_a_bad_table_is_one_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name}: .*{re.escape(message)}") as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_what_is_not_utf_8_is_named_with_its_byte(suffix: str, tmp_path: Path) -> None:
    content = FORMS[suffix].encode() * 400
    (tmp_path / f"x{suffix}").write_bytes(content + "naïve".encode("latin-1"))
    with pytest.raises(InputError, match=rf"x{suffix}: not UTF-8 \(byte {len(content) + 2:,}\); convert it"):
        read(tmp_path / f"x{suffix}")
    assert len(content) > 2**20


@pytest.mark.parametrize("suffix", [*(s for s in COMPRESSIONS if s)])
@pytest.mark.parametrize("form", [".txt", ".jsonl"])
def test_a_truncated_archive_is_one_line(form: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{form}{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](FORMS[form].encode())[:-9])
    with pytest.raises(InputError, match=rf"x{form}{suffix}: cannot be"):
        read(path)


@pytest.mark.parametrize("suffix", [".html", ".XML", ".py", ".tex", ".pdf", ".zip", ".tar.gz", ".arrow", ".html.gz"])
def test_what_is_known_not_to_be_prose_is_refused_with_the_remedy(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"x{suffix}").write_text(FORMS[".txt"])
    with pytest.raises(InputError, match=rf"x{suffix}: \.\w+ files are not read as text; \w+"):
        source_of(str(tmp_path / f"x{suffix}"))


def test_devices_pipes_and_links_to_nothing_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    for path in ("/dev/zero", "/dev/null", tmp_path / "pipe", tmp_path / "pipe.jsonl", tmp_path / "pipe.parquet"):
        with pytest.raises(InputError, match="not a regular file"):
            read(Path(path))
    with pytest.raises(InputError, match=r"link\.txt: no such file"):
        read(tmp_path / "link.txt")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def row(text: str) -> str:
    return json.dumps({"text": text})


@pytest.mark.parametrize(
    ("files", "documents", "said"),
    [
        ({"a.txt": "a", ".b.txt": "b", ".git/c.txt": "c", "d/.e/f.txt": "f", "g/H.MD": "h"}, ["a", "h"], ""),
        ({"a.txt": "a", "b.md": "b", "c.pdf": "", "d.png": "", "e.png": ""}, ["a", "b"], ".pdf (1), .png (2)"),
        ({"a.txt": "a", "b.txt": "b", "c.txt": " \n"}, ["a", "b"], "1 empty files skipped (c.txt)"),
        ({"a.jsonl": row("a"), "README.md": "x", "LICENSE.txt": "x", "dataset_info.json": "{}"}, ["a"], ".md (1)"),
        ({"a.jsonl": row("a"), "B.JSONL": row("b"), "c.json": f"[{row('c')}]", ".d.jsonl": "7"}, list("bac"), ""),
        (
            {f"data/{s}-00000-of-00001.jsonl": row(s) for s in ("train", "validation", "test", "extra")},
            ["train"],
            "no split (1), split test (1), split validation (1)",
        ),
        ({f"{s}/{i}.jsonl": row(s) for s in ("train", "dev", "test") for i in "01"}, ["train"] * 2, "split test (2)"),
        ({"train_sft-0.jsonl": row("a"), "test_sft-0.jsonl": row("b")}, ["a"], "split test (1)"),
        (
            {"training.csv": "text\na\n", "valid.csv": "text\nb\n", "Eval.csv": "text\nc\n"},
            ["a"],
            "split validation (1)",
        ),
        ({"contest.jsonl": row("a"), "latest.jsonl": row("b"), "trainer.jsonl": row("c")}, ["a", "b", "c"], ""),
        ({f"wiki.{s}.txt": s for s in ("train", "valid", "test")}, ["train"], "split test (1)"),
        ({f"{s}/a.txt": s for s in ("train", "test")}, ["train"], "split test (1)"),
        ({"the test of time.txt": "a", "train to nowhere.txt": "b"}, ["a", "b"], ""),
        ({"test.txt": "a", "b.txt": "b"}, ["b", "a"], ""),
    ],
)
def test_which_files_of_a_directory_are_read(
    files: dict[str, str], documents: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read(write(tmp_path / "d", files)) == documents
    shown = capsys.readouterr().err
    assert said in shown and bool(said) == bool(shown)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": "a", "b.jsonl": row("b")}, "files of several kinds: 1 JSON (b.jsonl), 1 text (a.txt)"),
        ({"a.parquet": "", "b.jsonl": row("b")}, "files of several kinds: 1 JSON (b.jsonl), 1 parquet (a.parquet)"),
        ({"a.csv": "text\na", "b.tsv": "text\na"}, "files of several kinds"),
        (
            {f"{c}/train-0.jsonl": row(c) for c in "ab"}
            | {"README.md": "---\nconfigs:\n- config_name: a\n  data_files: a/*\n- config_name: 'b'\n---\nText"},
            "a dataset with the configurations a, b; pass the directory or the file of one",
        ),
        ({"a.html": "a"}, "no .txt or .md files and no tables"),
        ({".a.txt": "a"}, "no .txt or .md files and no tables"),
        (
            {"test-0.jsonl": row("a"), "dev-0.jsonl": row("b")},
            "belong to the split test and validation, none to the split train",
        ),
        ({"a.jsonl": row("a"), "b.jsonl": json.dumps({"id": 1})}, "b.jsonl: no column 'text'; the columns are id"),
    ],
)
def test_a_directory_that_leaves_a_doubt_is_refused(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read(write(tmp_path / "d", files))


def test_all_bad_files_are_listed_at_once(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.txt").write_bytes(b"\xff\x00" if i % 2 else b"\xe9 \xe9")
    with pytest.raises(InputError, match=r"0\.txt: not UTF-8.*1\.txt: a binary.*4\.txt.*; and 3 more files") as error:
        TextFiles(tmp_path).documents()
    assert "\n" not in str(error.value)


def short(count: int) -> list[str]:
    return [" ".join(text.split()[:8]) + f" {i}" for i, text in enumerate(paragraphs(count).split("\n\n"))]


@pytest.mark.parametrize("count", [100, 400, 5000])
def test_a_table_is_split_like_the_same_text(count: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(short(count)))
    (tmp_path / "a.jsonl").write_text("\n".join(map(row, short(count))))
    splits = [list(labeled(local_source(tmp_path / name))) for name in ("a.txt", "a.jsonl")]
    assert splits[0] == splits[1]
    assert (
        prepare(local_source(tmp_path / "a.jsonl"), Data(vocab_size=300), tmp_path / "out").tokens("validation") > 128
    )


def test_a_long_stream_holds_out_half_a_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "IN_MEMORY", 10_000)
    (tmp_path / "a.jsonl").write_text("\n".join(map(row, short(9000))))
    found = [split for split, _ in labeled(local_source(tmp_path / "a.jsonl"))]
    assert found[1] == "validation" and 20 < found.count("validation") < 80


def test_another_share_of_a_long_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "IN_MEMORY", 10_000)
    (tmp_path / "a.jsonl").write_text("\n".join(map(row, short(9000))))
    source = local_source(tmp_path / "a.jsonl")
    half, tenth, fewest = ([split for split, _ in labeled(source, share)] for share in (0.5, 0.1, 1e-6))
    assert 4200 < half.count("validation") < 4800 and 750 < tenth.count("validation") < 1050
    assert fewest.count("validation") == 1
    assert all(a == "validation" for a, b in zip(half, tenth, strict=True) if b == "validation"), "more, not others"


@pytest.mark.parametrize("share", [None, 0.2])
def test_the_held_out_share_is_part_of_a_corpus_where_it_was_asked_for(share: float | None, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(paragraphs(400))
    source = local_source(tmp_path / "a.txt")
    corpus = prepare(source, Data(vocab_size=300, held_out=share), tmp_path / "out")
    assert corpus.meta["settings"].get("held_out") == share and ("held_out" in corpus.meta["settings"]) == bool(share)
    assert corpus.fingerprint == prepare(source, Data(vocab_size=300, held_out=share), tmp_path / "out").fingerprint
    characters = corpus.meta["characters"]
    part = characters["validation"] / sum(characters.values())
    assert part == pytest.approx(share or 0.05, rel=0.15)
    with pytest.raises(InputError, match=r"its held-out share is (the default share|0\.2), not 0\.3\); choose another"):
        prepare(source, Data(vocab_size=300, held_out=0.3), tmp_path / "out")


def test_an_experiment_takes_the_held_out_share_of_its_corpus(
    tmp_path: Path, tiny: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(paragraphs(400))
    prepare(local_source(tmp_path / "a.txt"), tiny.data.model_copy(update={"held_out": 0.2}), tmp_path / "out")
    corpus = corpus_for(tiny, tmp_path / "out")
    assert "0.2 is held out, which replaces data.held_out, the default share" in capsys.readouterr().err
    assert resolved(tiny, corpus).data.held_out == 0.2
    with pytest.raises(InputError, match=r"--tokenizer gpt2 --held-out 0\.0005 --out DIR"):
        corpus_for(experiments.load("exp12V"), None)


def hub(
    monkeypatch: pytest.MonkeyPatch, rows: Iterable[dict[str, object]], revision: str | None = None
) -> list[object]:
    """A hub with one dataset; returns what was asked of it."""
    asked: list[object] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: (asked.append((names, options)), rows)[1])
    monkeypatch.setattr(sources.Dataset, "newest_revision", lambda self: revision)
    return asked


def test_a_configuration_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, [{"text": d} for d in DOCUMENTS])
    assert read(Path("HuggingFaceFW/fineweb:sample-10BT")) == DOCUMENTS
    assert asked == [(("HuggingFaceFW/fineweb", "sample-10BT"), {"split": "train", "streaming": True})]
    names = ("a/b", "a/b:c", "a/b:d")
    assert len({source_of(name).fingerprint() for name in names}) == 3
    assert all(isinstance(source_of(name), Dataset) for name in (*names, "roneneldan/TinyStories-v1.5"))


def test_a_dataset_with_a_new_revision_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(revision: str | None, overwrite: bool = False) -> str | None:
        asked = hub(monkeypatch, [{"text": d} for d in DOCUMENTS], revision)
        corpus = prepare(source_of("a/b"), DATA, tmp_path / "out", overwrite)
        assert all(options.get("revision") == revision for _, options in asked)
        return corpus.meta["settings"]["revision"]

    assert prepared("one") == "one"
    assert prepared(None) == "one", "no network: the corpus that is there"
    with pytest.raises(InputError, match=r"its revision is one, now two\); choose another place, or replace it"):
        prepared("two")
    assert prepared("two", overwrite=True) == "two"


def test_an_interrupted_stream_goes_on_with_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stops() -> Iterator[dict[str, object]]:
        yield from ({"text": d} for d in DOCUMENTS[:40])
        raise ConnectionError("no network")

    monkeypatch.setattr(held_out, "IN_MEMORY", 1_000)
    monkeypatch.setattr(prepare_module, "BATCH_DOCUMENTS", 5)
    monkeypatch.setattr(prepare_module, "SAVE_TOKENS", 100)
    monkeypatch.setattr(held_out, "STREAM_VALIDATION_SHARE", 0.1)
    monkeypatch.setattr(prepare_module, "train_bpe", lambda texts, size, share: train_bpe(DOCUMENTS, size))
    for revision in ("one", "two"):
        asked = hub(monkeypatch, stops() if revision == "one" else [{"text": d} for d in DOCUMENTS], revision)
        if revision == "one":
            with pytest.raises(InputError, match="no network"):
                prepare(source_of("a/b"), DATA, tmp_path / "out")
    corpus = prepare(source_of("a/b"), DATA, tmp_path / "out")
    assert corpus.documents == len(DOCUMENTS) and corpus.meta["settings"]["revision"] == "one"
    assert asked[-1][1]["revision"] == "one" and "continuing with revision one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": 7}], "row 1: the column 'text' holds a number, not text"),
        ([{"id": 7}], "no column 'text'; the columns are id"),
        ([], "has no rows"),
    ],
)
def test_a_dataset_is_checked_like_a_table(
    rows: list[dict[str, object]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, rows)
    with pytest.raises(InputError, match=f"^a/b: {message}"):
        read(Path("a/b"))


def test_a_dataset_with_several_configurations_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: str, **options: object) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"one among the available configs: \['a', 'b'\]; name one: a/b:CONFIGURATION"):
        read(Path("a/b"))


@pytest.mark.parametrize("suffix", [".txt", "", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"])
@pytest.mark.parametrize("in_directory", [False, True])
def test_a_pointer_of_git_lfs_is_no_text(suffix: str, in_directory: bool, tmp_path: Path) -> None:
    if in_directory and not suffix:
        suffix = ".txt.zst"
    file = tmp_path / f"part{suffix}"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 548105171\n")
    with pytest.raises(
        InputError, match=rf"part{re.escape(suffix)}: a Git LFS pointer, not the file: run git lfs pull"
    ):
        read(tmp_path if in_directory else file)


@pytest.mark.parametrize("name", ["", " ", "\n"])
def test_an_empty_name_is_not_the_current_directory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the name of the text is"):
        source_of(name)
