"""Where a run can be watched besides metrics.jsonl, which needs none of it: TensorBoard, W&B, trackio."""

import re
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from coupled_adam.errors import InputError, one_line, require
from coupled_adam.files import write_text
from coupled_adam.lm.config import Experiment, Tracking
from coupled_adam.lm.parallel import World
from coupled_adam.progress import warn

Track = Callable[[dict[str, Any]], None]

#: Seconds that a run may wait at its end for figures that are still to be uploaded.
UPLOAD_SECONDS = 300


class Tracker(Protocol):
    """Takes the figures of a run that goes on after ``start`` steps. Its packages are imported when it is made."""

    def __init__(self, experiment: Experiment, run_dir: Path, start: int) -> None: ...

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step; steps only grow."""

    def close(self, failed: bool) -> None:
        """Write out what is left. A run that was interrupted, and can be resumed, did not fail."""


class TensorBoard:
    """Event files in ``run_dir``/tensorboard."""

    def __init__(self, experiment: Experiment, run_dir: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that were done after the checkpoint come again: from here on the older events do not count. A run
        # without a checkpoint begins again with step 0.
        purge = start + 1 if start else 0
        # A process that is killed loses what is not flushed, and the steps before its checkpoint do not come again.
        self.writer = SummaryWriter(run_dir / "tensorboard", purge_step=purge, flush_secs=10)
        self.writer.add_text("experiment", textwrap.indent(experiment.to_toml(), "    "), start)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, figure in figures.items():
            self.writer.add_scalar(name, figure, step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of W&B; its environment variables, WANDB_MODE=offline among them, count. Files in ``run_dir``/wandb."""

    def __init__(self, experiment: Experiment, run_dir: Path, start: int) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",  # every redrawing of the progress bar would be a line of its log
            finish_timeout=UPLOAD_SECONDS,
            finish_timeout_raises=True,
        )
        self.run = wandb.init(
            project=experiment.tracking.project,
            id=_identity(run_dir),
            name=experiment.run.name,
            dir=run_dir,
            resume="allow",
            reinit="create_new",  # a run that the calling program has opened is left alone
            config=_settings(experiment),
            settings=settings,
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        # A step that W&B has, from before the process died, is refused with a warning; its figures are the same.
        if step >= self.run.step:
            self.run.log(dict(figures), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio: in its database on this machine, or where its environment variables say."""

    def __init__(self, experiment: Experiment, run_dir: Path, start: int) -> None:
        import trackio

        with redirect_stdout(sys.stderr):  # standard output is for results
            self.run = trackio.init(
                project=experiment.tracking.project,
                name=f"{experiment.run.name}-{_identity(run_dir)}",  # it tells runs apart by their names alone
                resume="allow",
                config=_settings(experiment),
            )
        # It would take a step twice. What it has is told by nothing public that also knows of remote storage.
        self.first = self.run._next_step

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if step >= self.first:
            self.run.log(dict(figures), step=step)

    def close(self, failed: bool) -> None:
        import trackio

        with redirect_stdout(sys.stderr):
            trackio.finish()  # self.run.finish() would be called again, and talk, when the program ends


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}


def require_trackers(tracking: Tracking) -> None:
    """Raise InputError, naming the extra, if the package of a tracker is not installed."""
    try:
        require("track", *tracking.trackers)
    except ImportError as error:
        raise InputError(str(error)) from None


@contextmanager
def trackers(experiment: Experiment, run_dir: Path, start: int, world: World) -> Iterator[Track]:
    """Yield the function that gives a line of metrics.jsonl to the experiment's trackers (rank 0 only).

    A tracker that fails is named and given up; the run goes on. A finished run opens none.

    Raises:
        InputError: a tracker cannot be opened.
    """
    running: dict[str, Tracker] = {}

    def each(action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(running.items()):
            try:
                action(tracker)
            except Exception as error:
                # Not closed: what waits for a lost connection would hold up the training.
                del running[name]
                warn(f"{name} failed; the run continues without it: {one_line(error)}")

    def open_all() -> None:
        wanted = experiment.tracking.trackers if start < experiment.train.steps else ()
        for name in dict.fromkeys(wanted):
            try:
                running[name] = TRACKERS[name](experiment, run_dir, start)
            except Exception as error:
                raise InputError(
                    f"{name} cannot be initialized (it is in tracking.trackers): {one_line(error)}"
                ) from error

    def track(line: dict[str, Any]) -> None:
        figures = {key: value for key, value in line.items() if key != "step" and value is not None}
        each(lambda tracker: tracker.write(line["step"], figures))

    failed = True
    try:
        world.broadcast_from_main(open_all)
        yield track
        failed = False
    finally:
        each(lambda tracker: tracker.close(failed))


def _settings(experiment: Experiment) -> dict[str, Any]:
    """Return all that defines the run, as plain values."""
    return experiment.model_dump(mode="json", exclude={"tracking"})


def _identity(run_dir: Path) -> str:
    """Return the stable ID of the run; it survives resumes and moving the directory.

    Kept there, not derived from its path: a directory that is deleted and filled anew holds another run.
    """
    file = run_dir / "tracking-id"
    if not file.exists():
        write_text(file, uuid.uuid4().hex[:8])
    identity = file.read_text(encoding="utf-8", errors="replace")
    if not re.fullmatch("[0-9a-f]{8}", identity):
        raise InputError(f"{file}: damaged ({one_line(identity, 40)}); delete it to show the run as a new one")
    return identity
