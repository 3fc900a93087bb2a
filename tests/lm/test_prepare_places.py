"""coupled-adam prepare never removes what it did not make, and replaces a corpus only when it is told to."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from in_process import command
from paragraphs import paragraphs
from test_prepare import tokenizer_folder

from coupled_adam import files
from coupled_adam.errors import InputError
from coupled_adam.files import read_sealed, write_sealed
from coupled_adam.lm import prepare as module
from coupled_adam.lm.config import Data, Experiment
from coupled_adam.lm.corpus import Meta, open_corpus
from coupled_adam.lm.prepare import corpus_for, prepare, resolved
from coupled_adam.lm.sources import TextFiles, source_of

DATA = Data(vocab_size=300, sequence_length=16)


def snapshot(root: Path) -> dict[str, bytes | str | None]:
    """All that lies below a directory."""
    return {
        path.relative_to(root).as_posix(): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in root.rglob("*")
    }


@pytest.fixture
def books(tmp_path: Path) -> Path:
    for i in range(4):
        (tmp_path / "books" / "inner").mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / "inner" / f"{i}.txt").write_text(paragraphs(20, seed=i), encoding="utf-8")
    return tmp_path / "books"


def foreign_file(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("the only copy")


def foreign_meta(out: Path) -> None:
    out.mkdir()
    (out / "meta.json").write_text('{"format": 4, "mine": true}')


def broken_meta(out: Path) -> None:
    out.mkdir()
    (out / "meta.json").write_text('{"format"')


def nested(out: Path) -> None:
    (out / "chapters").mkdir(parents=True)
    (out / "chapters" / "a").write_text("the only copy")


def sibling(out: Path) -> None:
    prepare(TextFiles(out.parent / "books"), DATA, out / "another")


def added_to_a_corpus(out: Path) -> None:
    prepare(TextFiles(out.parent / "books"), DATA.model_copy(update={"vocab_size": 280}), out)
    (out / "notes.md").write_text("mine")


def a_file(out: Path) -> None:
    out.write_text("the only copy")


def a_link(out: Path) -> None:
    foreign_file(out.parent / "elsewhere")
    out.symlink_to(out.parent / "elsewhere")


def a_partial(out: Path) -> None:
    foreign_file(out.parent / f".{out.name}.partial")


def a_partial_file(out: Path) -> None:
    (out.parent / f".{out.name}.partial").write_text("mine")


def shards_without_a_record(out: Path) -> None:
    (out.parent / f".{out.name}.partial").mkdir()
    (out.parent / f".{out.name}.partial" / "train-00000.bin").write_bytes(b"mine")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "there",
    [
        foreign_file,
        foreign_meta,
        broken_meta,
        nested,
        sibling,
        added_to_a_corpus,
        a_file,
        a_link,
        a_partial,
        a_partial_file,
        shards_without_a_record,
    ],
)
def test_what_is_not_a_corpus_stays(
    there: Callable[[Path], None], overwrite: bool, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there(tmp_path / "out")
    before = snapshot(tmp_path)
    monkeypatch.setattr(module, "Shards", None)  # refused before the work
    with pytest.raises(InputError, match=r"out|elsewhere"):
        prepare(TextFiles(books), DATA, tmp_path / "out", overwrite)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "out", ["books", "books/new", "books/inner", "books/inner/new", ".", "/", "..", "link", "books/"]
)
def test_the_output_is_apart_from_the_text(
    out: str, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(books)
    monkeypatch.chdir(books.parent)
    before = snapshot(tmp_path)
    shown = command("prepare", "books", "--vocab-size", 300, "--out", out, "--overwrite")
    assert shown.returncode == 2 and shown.stderr.count("\n") == 1 and "choose" in shown.stderr
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("source", "out"),
    [
        *(("a.jsonl", out) for out in ("a.jsonl", ".", "tokenizer", "tokenizer/new")),
        *(("tables", out) for out in (".", "tokenizer", "tables", "tables/new", "tables/a.jsonl")),
    ],
)
def test_the_output_is_apart_from_tables_and_tokenizers(
    source: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in paragraphs(30).split("\n\n"))
    Path("tables").mkdir()
    for path in ("a.jsonl", "tables/a.jsonl"):
        Path(path).write_text(rows)
    tokenizer_folder(Path("tokenizer"), 300)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=f"^{out}"):
        prepare(source_of(source), DATA.model_copy(update={"tokenizer": "tokenizer"}), Path(out), overwrite=True)
    assert snapshot(tmp_path) == before


def test_an_empty_directory_is_taken_unless_a_shell_stands_in_it(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(InputError, match=r"out: the current directory; choose a new one, for instance .*out/corpus"):
        prepare(TextFiles(books), DATA, Path())
    monkeypatch.chdir(tmp_path)
    made = prepare(TextFiles(books), DATA, Path("out"))
    monkeypatch.chdir(tmp_path / "out")
    assert prepare(TextFiles(books), DATA, Path()).fingerprint == made.fingerprint, "it is there"


def test_another_corpus_is_replaced_only_with_overwrite(books: Path, tmp_path: Path) -> None:
    def arguments(size: int) -> list[str]:
        return ["prepare", str(books), "--vocab-size", str(size), "--out", str(tmp_path / "out")]

    assert command(*arguments(300)).returncode == 0
    before = snapshot(tmp_path)
    refused = command(*arguments(290))
    assert refused.returncode == 2 and snapshot(tmp_path) == before
    for part in (str(books), "training tokens, vocabulary 300", "vocabulary size is 300, not 290", "--overwrite"):
        assert part in refused.stderr
    assert command(*arguments(300)).returncode == 0 and snapshot(tmp_path) == before, "the same one is used again"
    assert command(*arguments(290), "--overwrite").returncode == 0
    assert open_corpus(tmp_path / "out").meta["tokenizer_tokens"] == 290
    assert sorted(path.name for path in tmp_path.iterdir()) == ["books", "out"], "nothing beside it"


def test_a_corpus_may_be_called_like_the_tokenizer(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare(TextFiles(books), DATA, Path("bpe")).meta == prepare(TextFiles(books), DATA, Path("bpe")).meta


def test_the_text_is_known_by_what_it_is_not_by_how_it_is_spelt(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = prepare(source_of(str(books)), DATA, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    books.rename(tmp_path / "renamed")
    assert prepare(source_of("./renamed/"), DATA, Path("moved")).fingerprint == first.fingerprint


def interrupted(books: Path, out: Path, monkeypatch: pytest.MonkeyPatch, data: Data = DATA) -> Path:
    """An unfinished corpus with some progress."""
    save = module.Shards._save

    def failing(self: module.Shards) -> None:
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "BATCH_DOCUMENTS", 1)
        patch.setattr(module, "SAVE_TOKENS", 1)
        patch.setattr(module.Shards, "_save", failing)
        prepare(TextFiles(books), data, out)
    return out.with_name(f".{out.name}.partial")


def test_an_unfinished_corpus_of_other_settings_is_kept(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = interrupted(books, tmp_path / "out", monkeypatch)
    before = snapshot(tmp_path)
    other = DATA.model_copy(update={"vocab_size": 290})
    with pytest.raises(
        InputError, match=r"\.out\.partial: contains another corpus, unfinished after 1 doc.*300, not 290"
    ):
        prepare(TextFiles(books), other, tmp_path / "out")
    assert snapshot(tmp_path) == before
    (aside / "notes.md").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"\.out\.partial: holds notes\.md"):
            prepare(TextFiles(books), other, tmp_path / "out", overwrite)
    (aside / "notes.md").unlink()
    assert prepare(TextFiles(books), other, tmp_path / "out", overwrite=True).meta["tokenizer_tokens"] == 290
    assert not aside.exists()


@pytest.mark.parametrize("damage", ["tokenizer.json", "train-00000.bin", "validation-00000.bin", "progress.json"])
def test_damage_to_an_unfinished_corpus_is_named(
    damage: str, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = interrupted(books, tmp_path / "out", monkeypatch)
    path = next(aside.glob("*.bin")) if damage.endswith(".bin") else aside / damage
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=rf"{path.name}: damaged.* delete {aside} to start again"):
        prepare(TextFiles(books), DATA, tmp_path / "out")
    assert path.exists()


def test_a_corpus_that_was_finished_but_not_moved_is_moved(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(TextFiles(books), DATA, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "put_in_place", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(TextFiles(books), DATA, tmp_path / "out")
    assert not (tmp_path / ".out.partial" / "progress.json").exists()
    monkeypatch.setattr(module.Encoder, "encode", None)  # nothing is left to encode
    assert prepare(TextFiles(books), DATA, tmp_path / "out").meta == whole.meta


def test_a_process_that_dies_at_any_moment_loses_no_progress(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 1)
    monkeypatch.setattr(module, "SAVE_TOKENS", 1_500)
    whole = prepare(TextFiles(books), DATA, tmp_path / "whole")
    synced, moments = os.fsync, 0
    for moment in range(1, 100):
        moments = 0

        def dies(descriptor: int, last: int = moment) -> None:
            nonlocal moments
            moments += 1
            if moments == last:
                raise KeyboardInterrupt
            synced(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", dies)
            try:
                prepare(TextFiles(books), DATA, tmp_path / "out")
            except KeyboardInterrupt:
                assert not (tmp_path / "out").exists()
        assert prepare(TextFiles(books), DATA, tmp_path / "out").meta == whole.meta
        assert sorted(path.name for path in tmp_path.iterdir()) == ["books", "out", "whole"]
        if moments < moment:
            break
        shutil.rmtree(tmp_path / "out")
    assert moments > 10


def test_a_second_process_is_refused_and_leaves_nothing(books: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".out.lock"):
        before = snapshot(tmp_path)
        with pytest.raises(InputError, match="out: another process is preparing it; wait for it, or choose another"):
            prepare(TextFiles(books), DATA, tmp_path / "out")
        assert snapshot(tmp_path) == before
    prepare(TextFiles(books), DATA, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["books", "out"]
    (tmp_path / ".more.lock").write_text("mine")
    prepare(TextFiles(books), DATA, tmp_path / "more")
    assert (tmp_path / ".more.lock").read_text() == "mine"


def test_what_appears_meanwhile_stays_and_no_work_is_lost(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = module.Shards.finish

    def meanwhile(self: module.Shards) -> None:
        finish(self)
        foreign_file(tmp_path / "out")

    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"out: exists and is not a corpus .*thesis"):
        patch.setattr(module.Shards, "finish", meanwhile)
        prepare(TextFiles(books), DATA, tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").unlink()
    monkeypatch.setattr(module.Encoder, "encode", None)
    assert prepare(TextFiles(books), DATA, tmp_path / "out").tokens("train")


def test_a_corpus_of_an_earlier_version_is_named(books: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    old = {"format": 3, "fingerprint": "0" * 64, "shards": {"train": [], "validation": []}, "checksums": {}}
    (tmp_path / "out" / "meta.json").write_text(json.dumps(old))
    before = snapshot(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(
            InputError, match=r"format 3, but this version reads format 4; prepare it again, .*finish the runs"
        ):
            prepare(TextFiles(books), DATA, tmp_path / "out", overwrite)
    with pytest.raises(InputError, match="format 3"):
        open_corpus(tmp_path / "out")
    assert snapshot(tmp_path) == before


def _changes(value: object) -> list[object]:
    """The same JSON with one value changed, or one key removed or renamed, at any depth."""
    match value:
        case dict():
            changed = [{**value, key: other} for key, inner in value.items() for other in _changes(inner)]
            changed += [{k: v for k, v in value.items() if k != key} for key in value]
            return [*changed, *({k + "x" * (k == key): v for k, v in value.items()} for key in value)]
        case list():
            return [[*value, 1], *([[other, *value[1:]] for other in _changes(value[0])] if value else [])]
        case bool() | None:
            return [3]
        case int():
            return [value + 1, str(value)]
        case _:
            return [f"{value}x", "<u4" if value == "<u2" else None]


def test_every_field_of_the_description_is_covered(books: Path, tmp_path: Path) -> None:
    prepare(TextFiles(books), DATA, tmp_path / "out")
    path = tmp_path / "out" / "meta.json"
    content = json.loads(path.read_text())
    changes = _changes(content)
    assert len(changes) > 100
    for changed in changes:
        path.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=r"meta\.json"):
            open_corpus(tmp_path / "out")


def test_a_description_that_contradicts_itself_is_refused(books: Path, tmp_path: Path) -> None:
    prepare(TextFiles(books), DATA, tmp_path / "out")
    path = tmp_path / "out" / "meta.json"
    meta = read_sealed(path, Meta)
    for change in (
        {"fingerprint": "0" * 64},
        {"shards": {"train": [{"file": "../x.bin", "tokens": 3}], "validation": []}},
    ):
        write_sealed(path, {**meta, **change})
        with pytest.raises(InputError, match=r"meta\.json: damaged"):
            open_corpus(tmp_path / "out")


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "train-00000.bin", "unigram_counts.npy", "progress.json", "meta.json"]
)
def test_a_full_disk_is_one_line_and_progress_is_kept(
    file: str, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(TextFiles(books), DATA, tmp_path / "whole")
    aside = interrupted(books, tmp_path / "out", monkeypatch) if file != "tokenizer.json" else tmp_path / ".out.partial"
    sizes = {"tokenizer.json": 4_000, "train-00000.bin": 2_500, "unigram_counts.npy": 700, "progress.json": 200}
    full = module.full_disk_named

    def limited(path: Path):
        limit = sizes.get(file, 1_000) if path.name == file else soft
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return full(path)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        patch.setattr(module, "full_disk_named", limited)
        patch.setattr(files, "full_disk_named", limited)
        try:
            with pytest.raises(OSError, match=rf"\.out\.partial/{file}: the disk is full") as error:
                prepare(TextFiles(books), DATA, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "rerun the same command" in str(error.value) and "\n" not in str(error.value)
    if file not in ("tokenizer.json",):
        assert json.loads((aside / "progress.json").read_text())["documents"]["train"]
    assert prepare(TextFiles(books), DATA, tmp_path / "out").meta == whole.meta
    for split in ("train", "validation"):
        pairs = zip(open_corpus(tmp_path / "out").shards(split), whole.shards(split), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)


def test_a_directory_that_may_not_be_written_to_is_one_line(books: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        shown = command("prepare", books, "--vocab-size", 300, "--out", "/proc/nowhere/x")
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        shown = command("prepare", books, "--vocab-size", 300, "--out", tmp_path / "locked" / "x")
    assert shown.returncode and shown.stderr.count("\n") == 1 and "Traceback" not in shown.stderr


def test_the_demo_leaves_nothing_behind_where_there_is_no_text(tmp_path: Path, books: Path) -> None:
    for text in ("nofile.txt", "page.html", "books/empty.txt"):
        (tmp_path / "books" / "empty.txt").touch()
        (tmp_path / "page.html").touch()
        shown = command("demo", "--text", tmp_path / text, "--out", tmp_path / "runs" / "demo")
        assert shown.returncode == 2 and not (tmp_path / "runs").exists()
    shown = command("demo", "--text", books, "--out", books / "runs")
    assert shown.returncode == 2 and "lies in" in shown.stderr and not (books / "runs").exists()


def test_the_vocabulary_that_is_trained_is_recorded(
    tiny: Experiment, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = prepare(TextFiles(books), Data(vocab_size=8192, sequence_length=16), tmp_path / "out")
    tokens = corpus.meta["tokenizer_tokens"]
    assert f"its vocabulary has {tokens:,} tokens; the text is too short for 8,192" in capsys.readouterr().err
    large = tiny.with_values(data__vocab_size=8192)
    assert corpus_for(large, tmp_path / "out").fingerprint == corpus.fingerprint
    assert f"{tokens:,} tokens, which replaces data.vocab_size = 8,192" in capsys.readouterr().err
    assert resolved(large, corpus).data.padded_vocab_size == corpus.vocab_size
