"""What long work shows: an end in sight, on any terminal, or nothing at all."""

import contextlib
import fcntl
import os
import pty
import random
import re
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from coupled_adam import progress
from coupled_adam.lm import tokenizer
from coupled_adam.lm.sources import Dataset
from coupled_adam.lm.tables import TableFiles


class Clock:
    """A time that passes only when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


@pytest.fixture
def quiet() -> Iterator[None]:
    progress.show_log(quiet=True)
    yield
    progress.show_log()


@pytest.mark.parametrize("begun", [0, 100])
def test_lines_tell_the_share_and_the_time_left(begun: int, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("run", begun, 200) as show:
        for done in range(begun + 1, 201):
            clock.now += 6.0
            show(done, "loss 3.0")
    lines = capsys.readouterr().err.splitlines()
    told = [re.fullmatch(r"run: step (\d+) of 200 \((\d+)%\)(, about (.+) left)?, loss 3\.0", line) for line in lines]
    assert all(told) and len(lines) == pytest.approx((200 - begun) / 2, abs=2)
    for each in told[:-1]:
        done, percent, _, left = each.groups()
        assert abs(int(percent) - int(done) / 2) <= 0.5 and left == progress.duration(6.0 * (200 - int(done)))
    assert told[-1][1] == "200" and told[-1][3] is None


def test_a_short_part_says_nothing_and_a_long_one_does(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for seconds, lines in ((0.5, 0), (11.0, 4)):
        with progress.progress_bar("part", 0, 4, unit="batch", passing=True) as show:
            for done in range(1, 5):
                clock.now += seconds
                show(done)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines
    assert said[1] == "part: batch 2 of 4 (50%), about 22 s left"


def test_what_has_no_known_end_says_how_much_is_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("text", 0, 100, unit="%", passing=True) as show:
        for done in (None, 50):
            clock.now += 11.0
            show(done, "7 documents")
    assert capsys.readouterr().err == "text: 7 documents\ntext: 50%, about 22 s left, 7 documents\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_is_quiet(
    quiet: None, terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    progress.say("a line")
    with progress.progress_bar("run", 0, 2) as show:
        show(1)
        show(2, "text")
    progress.warn("a warning")
    assert capsys.readouterr().err == "a warning\n"


#: A bar as training shows it, in a process of its own.
BAR = """
from coupled_adam import progress
progress.show_log()
with progress.progress_bar("a-rather-long-name-of-a-run ‖μ‖", 0, 123456) as show:
    for done in range(0, 123457, 41152):
        show(done, "loss 3.214, 123,456 tokens/s, 12.3 TFLOP/s (41% of the peak) [x]")
    progress.say("a line between")
"""


def in_terminal(code: str, columns: int, encoding: str) -> list[str]:
    """What a program shows on a terminal of that width, line by line, without the codes that move the cursor."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"TERM": "xterm-256color", "PYTHONIOENCODING": encoding, "COLUMNS": str(columns)}
        os.execv(sys.executable, [sys.executable, "-c", code])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    shown = b""
    with contextlib.suppress(OSError):  # that is how its end is told
        while part := os.read(terminal, 65536):
            shown += part
    assert os.waitpid(process, 0)[1] == 0, shown
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(encoding)))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_bar_fits_one_line_of_any_terminal(columns: int, encoding: str) -> None:
    lines = in_terminal(BAR, columns, encoding)
    assert max(map(len, lines)) <= columns
    bars = [line for line in lines if "123456/123456" in line]
    assert bars and all(line.startswith("a-rather-") for line in bars)
    assert any("loss 3.2" in line for line in bars) == (columns > 40)
    assert "a line between" in lines


ROWS = [{"text": f"document {i} " * 50} for i in range(4_000)]


def written(directory: Path, kind: str) -> Path:
    import bz2
    import gzip
    import json
    import lzma

    table = pa.Table.from_pylist(ROWS)
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    directory.mkdir()
    match kind:
        case "parquet":
            parquet.write_table(table, directory / "a.parquet", compression=None)
        case "two files":
            for name in ("a", "b"):
                parquet.write_table(table, directory / f"{name}.parquet")
        case "array":
            (directory / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
        case "csv":
            (directory / "a.csv").write_text("text\n" + "".join(row["text"] + "\n" for row in ROWS), encoding="utf-8")
        case "jsonl":
            (directory / "a.jsonl").write_text(text, encoding="utf-8")
        case _:
            compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(kind, zstandard)
            (directory / f"a.jsonl.{kind}").write_bytes(compress(text.encode()))
    return directory


def zstandard(content: bytes) -> bytes:
    compressed: bytes = pa.compress(content, "zstd", asbytes=True)
    return compressed


@pytest.mark.parametrize("kind", ["parquet", "two files", "array", "csv", "jsonl", "gz", "bz2", "xz", "zst"])
def test_of_a_table_it_is_known_how_much_is_read(kind: str, tmp_path: Path) -> None:
    source = TableFiles(written(tmp_path / "table", kind))
    for _ in range(2):  # the second time for the tokens, after the tokenizer
        shares = [source.share(0) for _ in source.documents()]
        assert shares == sorted(shares) and 0 <= shares[0] <= 1 and source.share(0) == 1
        if kind in ("parquet", "two files", "array", "csv", "jsonl"):  # compressed, it is read in one piece
            half = shares[len(shares) // 2]
            assert 0.3 < half < 0.8


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_of_a_compressed_file_it_is_known_how_much_is_read(suffix: str, tmp_path: Path) -> None:
    """Whatever does not compress: the libraries read compressed bytes in large pieces."""
    import gzip

    content = "".join(f'"{random.Random(i).randbytes(500).hex()}"\n' for i in range(4_000)).encode()
    compress = {"gz": gzip.compress, "zst": zstandard}[suffix]
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(compress(content))
    source = TableFiles(tmp_path / f"a.jsonl.{suffix}")
    shares = [source.share(0) for _ in source.documents()]
    assert shares == sorted(shares) and len(set(shares)) > 3 and 0.3 < shares[len(shares) // 2] < 0.9
    assert source.share(0) == 1


@pytest.mark.parametrize(("characters", "half"), [(10**9, 50), (4_000, 50), (1_000, 100)])
def test_the_training_of_a_tokenizer_says_how_far_it_is(
    characters: int, half: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    monkeypatch.setattr(tokenizer, "LINE_EVERY", 0.0)
    monkeypatch.setattr(tokenizer, "SHOW_EVERY", 1_000)
    monkeypatch.setattr(tokenizer, "TOKENIZER_CHARACTERS", characters)
    made = tokenizer.train_bpe(["word " * 100] * 8, 300, lambda read: read / 4_000 if characters > 4_000 else None)
    lines = capsys.readouterr().err.splitlines()
    assert made.get_vocab_size() > 256
    assert lines[-1] == "tokenizer: trained in 1 s"
    shown = [line for line in lines if "characters" in line]
    assert all(line.startswith("tokenizer: ") for line in shown)
    percents = [int(line.split("%")[0].split()[-1]) for line in shown]
    assert percents == sorted(percents) and percents[-1] == 100 and half in percents


def test_what_does_not_say_how_far_it_is_says_how_long_it_has_taken() -> None:
    before, shown = threading.active_count(), list[tuple[int | None, str]]()
    with progress.waiting(lambda done, text="": shown.append((done, text)), "merging"):
        time.sleep(1.2)
    assert shown == [(None, "merging, 2 s so far")] and threading.active_count() == before


def test_of_a_stream_it_is_known_how_many_rows_or_files_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets import SplitDict, SplitInfo

    rows = datasets.Dataset.from_list([{"text": f"document {i}"} for i in range(80)]).to_iterable_dataset(num_shards=8)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: rows)
    for known in (False, True):
        rows.info.splits = SplitDict({"train": SplitInfo("train", num_examples=80)}) if known else None
        source = Dataset("a/b")
        assert source.share(0) is None
        shares = [source.share(0) for _ in source.documents()]
        assert shares == sorted(shares) and 0.4 <= shares[40] <= 0.7
        assert shares[-1] > 0.8 and source.share(0) == 1
