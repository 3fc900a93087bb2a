"""What the trackers are told is what metrics.jsonl holds, however the run is cut; and the run does not need them."""

import json
import os
import signal
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from coupled_adam import __main__
from coupled_adam.errors import InputError
from coupled_adam.lm import tracking
from coupled_adam.lm import train as loop
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.metrics_jsonl import MetricsLog
from coupled_adam.lm.model import LanguageModel
from coupled_adam.lm.parallel import World
from coupled_adam.lm.prepare import prepare
from coupled_adam.lm.sources import TextFiles

#: Of metrics.jsonl, and so of every tracker; the loss and its companions lack step 0.
TRAINED, EVALUATED = list(range(1, 13)), [0, 4, 8, 12]


@pytest.fixture
def tiny(tiny: Experiment) -> Experiment:
    return tiny.with_values(train__steps=12, train__checkpoint_every=5, evaluation__every=4, evaluation__drift=False)


@pytest.fixture
def corpus(text_file: Path, tiny: Experiment, tmp_path: Path) -> Corpus:
    return prepare(TextFiles(text_file), tiny.data, tmp_path / "corpus")


def tracked(tiny: Experiment, *names: str) -> Experiment:
    return tiny.with_values(tracking__trackers=names)


def train(experiment: Experiment, corpus: Corpus, run_dir: Path, stop_at: int | None = None) -> LanguageModel:
    """Train; the evaluation says 42 and nothing, and at step ``stop_at`` it asks the run to stop."""

    def evaluate(model: LanguageModel, last: bool) -> loop.Figures:
        if stop_at and (run_dir / "metrics.jsonl").read_text().count("\n") == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"answer": 42.0, "unknown": None}

    return loop.train(experiment, corpus, run_dir, evaluate)


class Killed(BaseException):
    """What ends a process between two checkpoints."""


def train_killed_at(step: int, experiment: Experiment, corpus: Corpus, run_dir: Path) -> None:
    write = MetricsLog.write

    def write_until_killed(self: MetricsLog, line: dict) -> None:
        if line["step"] == step:
            raise Killed
        write(self, line)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsLog, "write", write_until_killed)
        train(experiment, corpus, run_dir)


def lines(run_dir: Path, key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in MetricsLog(run_dir / "metrics.jsonl").read() if key in line}


class Told(tracking.Tracker):
    """Remembers what it was told."""

    seen: ClassVar[list["Told"]]

    def __init__(self, experiment: Experiment, run_dir: Path, start: int) -> None:
        self.start, self.lines, self.closed = start, {}, []
        self.seen.append(self)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self.lines[step] = dict(figures)

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> type[Told]:
    """In the place of trackio."""
    made = type("Told", (Told,), {"seen": []})
    monkeypatch.setitem(tracking.TRACKERS, "trackio", made)
    return made


@pytest.mark.parametrize("killed_at", [3, 8])
def test_tensorboard_shows_every_step_once(killed_at: int, tiny: Experiment, corpus: Corpus, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, experiment = tmp_path / "run", tracked(tiny, "tensorboard")
    train_killed_at(killed_at, experiment, corpus, run)  # before the first checkpoint, and after it
    train(experiment, corpus, run)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    every = {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "flops_per_second"}
    assert set(found) == {*every, "answer", "embedding_step_rms"}
    assert [e.step for e in found["loss"]] == TRAINED and [e.step for e in found["answer"]] == EVALUATED
    assert [e.value for e in found["loss"]] == pytest.approx(list(lines(run, "loss").values()))
    (text, *_) = events.Tensors("experiment/text_summary")
    assert "    hidden_size = 16\n" in text.tensor_proto.string_val[0].decode()


def records(file: Path) -> list[Any]:
    """What a .wandb file holds: after 7 bytes records of checksum, length and kind, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, found, part = file.read_bytes(), 7, [], b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def test_wandb_offline_holds_one_run_however_often_it_is_resumed(
    tiny: Experiment, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, experiment = tmp_path / "run", tracked(tiny, "wandb")
    with pytest.raises(loop.Interrupted):
        train(experiment, corpus, run, stop_at=4)
    time.sleep(1.1)  # W&B names directories by the second
    train(experiment, corpus, run)
    for _ in range(100):  # a process of W&B's own writes, and may be late on a busy machine
        written = [r for file in run.glob("wandb/offline-run-*/run-*.wandb") for r in records(file)]
        if sum(r.WhichOneof("record_type") == "exit" for r in written) == 2:
            break
        time.sleep(0.1)
    started, losses, exits = [], {}, []
    for file in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        content = records(file)
        started += [r.run for r in content if r.WhichOneof("record_type") == "run"]
        exits += [r.exit.exit_code for r in content if r.WhichOneof("record_type") == "exit"]
        for record in content:
            if record.WhichOneof("record_type") == "history":
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                losses |= {row["_step"]: row["loss"]} if "loss" in row else {}
    assert len({r.run_id for r in started}) == 1 and len(list(run.glob("wandb/offline-run-*"))) == 2
    assert (started[0].project, started[0].display_name) == ("coupled-adam", "tiny")
    config = {item.key: json.loads(item.value_json) for item in started[0].config.update}
    assert config["model"]["hidden_size"] == 16 and "tracking" not in config
    assert losses == pytest.approx(lines(run, "loss")) and list(losses) == TRAINED
    assert exits == [0, 0]


def test_trackio_holds_every_step_once(
    tiny: Experiment,
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(directory))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # imported before, by TRL, it would write elsewhere
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    assert directory == trackio.TRACKIO_DIR
    experiment = tracked(tiny, "trackio").with_values(tracking__project="ours")
    train_killed_at(8, experiment, corpus, tmp_path / "run")
    train_killed_at(3, experiment, corpus, tmp_path / "another")  # of the same name
    train(experiment, corpus, tmp_path / "run")
    first, second = sorted(
        trackio.Api().runs("ours"), key=lambda run: (tmp_path / "another/tracking-id").read_text() in run.name
    )
    rows = [SQLiteStorage.get_logs("ours", found.name) for found in (first, second)]
    assert [[row["step"] for row in each] for each in rows] == [[0, *TRAINED], [0, 1, 2]]
    assert {row["step"]: row["loss"] for row in rows[0][1:]} == pytest.approx(lines(tmp_path / "run", "loss"))
    assert first.config["model"]["hidden_size"] == 16
    trackio._cleanup_current_run()  # as when the program ends
    assert capsys.readouterr().out == "", "standard output is for results"


@pytest.mark.parametrize(
    ("end", "failed"), [("finished", False), ("interrupted", False), ("diverged", True), ("killed", True)]
)
def test_wandb_is_told_how_the_run_ended_and_no_step_twice(
    end: str, failed: bool, tiny: Experiment, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    class Run:
        """What W&B gives for a run of which it has steps 0 to 3."""

        step = 4

        def __init__(self, **settings: Any) -> None:
            self.settings, self.steps, self.exits = settings, [], []
            runs.append(self)

        def log(self, figures: dict[str, float], step: int) -> None:
            self.step = step
            self.steps.append(step)

        def finish(self, exit_code: int) -> None:
            self.exits.append(exit_code)

    runs: list[Run] = []
    monkeypatch.setattr(wandb, "init", Run)
    run, experiment = tmp_path / "run", tracked(tiny, "wandb")

    def diverging(model: torch.nn.Module, *_: object) -> torch.Tensor:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return torch.full((2,), float("nan"))

    if end == "diverged":
        monkeypatch.setattr(loop, "backward", diverging)
    if end == "killed":
        train_killed_at(10, experiment, corpus, run)
    else:
        try:
            train(experiment, corpus, run, stop_at=8 if end == "interrupted" else None)
        except (loop.Interrupted, loop.DivergedError):
            assert end != "finished"
    last = {"finished": 12, "interrupted": 8, "diverged": 0, "killed": 9}[end]
    assert runs[0].steps == list(range(4, last + 1)) and runs[0].exits == [int(failed)]
    assert runs[0].settings["resume"] == "allow" and runs[0].settings["dir"] == run
    assert runs[0].settings["id"] == (run / "tracking-id").read_text()


@pytest.mark.parametrize("failing_at", [0, 5, "close"])
def test_a_tracker_that_fails_does_not_stop_the_run(
    failing_at: int | str,
    told: type[Told],
    tiny: Experiment,
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Failing(Told):
        seen: ClassVar[list[Told]] = []

        def write(self, step: int, figures: Mapping[str, float]) -> None:
            super().write(step, figures)
            if step == failing_at:
                raise ConnectionError("the network\nis gone")

        def close(self, failed: bool) -> None:
            super().close(failed)
            if failing_at == "close":
                raise TimeoutError

    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Failing)
    train(tracked(tiny, "tensorboard", "trackio"), corpus, tmp_path / "run")
    said = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    reason = "TimeoutError" if failing_at == "close" else "the network is gone"
    assert said == [f"tensorboard failed; the run continues without it: {reason}"]
    ((failed,), (other,)) = Failing.seen, told.seen
    assert max(failed.lines) == (12 if failing_at == "close" else failing_at)
    assert list(other.lines) == [0, *TRAINED] and other.closed == [False]
    assert other.lines[0] == {"tokens": 0, "answer": 42.0}


def test_a_tracker_that_cannot_be_opened_is_an_error_before_the_first_step(
    told: type[Told], tiny: Experiment, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Told:
        raise RuntimeError("no API key:\nlog in")

    monkeypatch.setitem(tracking.TRACKERS, "wandb", refuse)
    with pytest.raises(InputError, match=r"^wandb cannot be initialized .*tracking\.trackers.*no API key: log in$"):
        train(tracked(tiny, "trackio", "wandb"), corpus, tmp_path / "run")
    assert told.seen[0].closed == [True] and lines(tmp_path / "run", "answer") == {}


def test_tracking_may_be_turned_on_and_off_between_resumes(
    told: type[Told], tiny: Experiment, corpus: Corpus, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(loop.Interrupted):
        train(tiny, corpus, run, stop_at=4)
    file = run / "experiment.toml"
    without, section, _ = file.read_text().partition("\n[tracking]")
    assert section, "an experiment file of before has none"
    file.write_text(without)
    with pytest.raises(loop.Interrupted):
        train(tracked(tiny, "trackio"), corpus, run, stop_at=8)
    (tracker,) = told.seen
    assert tracker.start == 4 and list(tracker.lines) == [5, 6, 7, 8] and tracker.closed == [False]
    train(tiny, corpus, run)
    train(tracked(tiny, "trackio"), corpus, run)
    assert told.seen == [tracker], "without tracking, and for a finished run, none is opened"


def test_the_main_process_alone_tracks(told: type[Told], tiny: Experiment, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        World, "broadcast_from_main", lambda world, function: function() if world.is_main_process else None
    )
    for rank in (1, 0):
        with tracking.trackers(tracked(tiny, "trackio"), tmp_path, 0, World(rank, 2)) as track:
            track({"step": 1, "loss": 2.0})
        assert len(told.seen) == 1 - rank


def test_a_missing_package_is_one_line_before_anything_is_made(
    tiny: Experiment,
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    message = "trackio not installed; in a clone of the repository: pip install '.[track]'"
    with pytest.raises(InputError) as raised:
        train(tracked(tiny, "tensorboard", "trackio"), corpus, tmp_path / "run")
    assert str(raised.value) == message and not (tmp_path / "run").exists()

    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(sys, "argv", ["coupled-adam", "train", "mini-M-300V", "tracking.trackers=['trackio']"])
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    assert capsys.readouterr().err == f"coupled-adam: {message}\n"
    assert list((tmp_path / "empty").iterdir()) == [], "the corpus is not prepared in vain"
