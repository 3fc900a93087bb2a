"""A trained run, opened from its directory."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, cast

import torch
from pydantic import ConfigDict, with_config
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from typing_extensions import TypedDict

from coupled_adam.errors import InputError
from coupled_adam.files import check_outside_made, check_writable, read_sealed, write_sealed, write_text
from coupled_adam.lm.checkpoint import latest_checkpoint, load_checkpoint, load_tensors, quiet, step_of, tensor_names
from coupled_adam.lm.config import Experiment, load_experiment
from coupled_adam.lm.corpus import Corpus, open_corpus
from coupled_adam.lm.model import LanguageModel, build_model
from coupled_adam.lm.parallel import World, parallelize

__all__ = ["Run", "open_run"]

#: Of environment.json. In the first there was no digest.
FORMAT = 2

#: What to do about an environment.json that is damaged.
RESTORE = "it holds the fingerprint of the run's corpus; restore it, or start a new run in another directory"


@with_config(ConfigDict(extra="allow"))
class Environment(TypedDict):
    """What environment.json holds: where a run was trained, and on what."""

    corpus: str
    corpus_directory: NotRequired[str]
    packages: NotRequired[dict[str, str]]
    experiment: NotRequired[dict[str, Any]]
    """The settings with which the run was started, without those of the trackers."""
    planned_steps: NotRequired[list[int]]
    """Of a run that was trained longer once it was finished: the values of ``train.steps``, one after the other."""


@dataclass(frozen=True)
class Run:
    """The newest checkpoint of a run, with the text it was trained on. Opened with ``open_run``."""

    directory: Path
    """Where it is."""
    experiment: Experiment
    """Its settings."""
    corpus: Corpus
    """Its text."""
    checkpoint: Path
    """The directory of the newest checkpoint."""
    planned: tuple[int, ...] = ()
    """The numbers of steps that it was planned for; more than one if it was trained longer."""

    @property
    def step(self) -> int:
        """Steps after which the checkpoint was saved."""
        return step_of(self.checkpoint)

    def model(self, world: World | None = None) -> LanguageModel:
        """Load the model in evaluation mode. Several ranks share it as in training.

        Args:
            world: the ranks; None for a single process.

        Returns:
            The model.

        Raises:
            InputError: the checkpoint is damaged.
        """
        world, config = world or World(), self.experiment
        sizes = self.corpus.vocab_size, config.data.sequence_length
        model = build_model(config.model, *sizes, config.run.seed, config.loss)
        model = model.to(world.device)
        parallelize(model, config.parallel, world)
        load_checkpoint(self.checkpoint, model, world=world)
        return model.eval()

    def second_moment(self) -> Tensor | None:
        """Read Adam's second moment of the output embedding, (V, H) or shared (1, H); None if there is none."""
        name = "token_embedding.weight" if self.experiment.model.tied else "head.weight"
        key = f"optimizer.state.{name}.exp_avg_sq"
        return load_tensors(self.checkpoint, [key])[key] if key in tensor_names(self.checkpoint) else None


def open_run(directory: Path, data: Path | None = None) -> Run:
    """Open a run.

    Args:
        directory: of the run.
        data: of its corpus; None for where it was during training.

    Returns:
        The newest checkpoint, and the corpus.

    Raises:
        InputError: there is no run, or it has no checkpoint yet; the corpus is missing, or is not that of the run.
    """
    experiment, checkpoint = open_checkpoint(directory)
    corpus = open_corpus(corpus_of(directory, data))
    environment = read_environment(directory)
    check_corpus(directory, environment, corpus)
    return Run(directory, experiment, corpus, checkpoint, planned_steps(environment, experiment))


def corpus_of(directory: Path, data: Path | None = None) -> Path:
    """Return ``data``, or where the corpus of the run in ``directory`` was during training. Raises InputError if it is
    not there.
    """
    found = data or Path(read_environment(directory).get("corpus_directory", directory / "corpus"))
    if not (found / "meta.json").exists():
        raise InputError(f"{found}: the corpus of {directory} was not found; pass its directory with --data")
    return found


def open_checkpoint(directory: Path) -> tuple[Experiment, Path]:
    """Find the experiment and the newest checkpoint of the run in ``directory``.

    Raises:
        InputError: no run there, one that has no checkpoint yet, or an experiment.toml that was changed.
    """
    if not (directory / "experiment.toml").exists():
        raise InputError(f"{directory}: not a run: it has no experiment.toml")
    checkpoint = latest_checkpoint(directory / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{directory}: no checkpoint yet; train it with `coupled-adam train`, which resumes it")
    return read_experiment(directory), checkpoint


def read_experiment(directory: Path) -> Experiment:
    """Read experiment.toml of a run, and compare it with what environment.json, if it is there, says the run is.

    Raises:
        InputError: it is missing, not valid, or was changed since the run was started.
    """
    path = directory / "experiment.toml"
    experiment = load_experiment(path)
    if (directory / "environment.json").exists():
        environment = read_environment(directory)
        if started := environment.get("experiment"):
            recorded = Experiment.from_dict(started, str(path))
            planned = environment.get("planned_steps", [recorded.train.steps])
            # A process that was killed between the two files has left the number before the last.
            steps = experiment.train.steps if experiment.train.steps in planned[-2:] else planned[-1]
            changed = recorded.with_values(train__steps=steps).differences(experiment, "recorded", "now")
            if changed:
                raise InputError(
                    f"{path}: changed since the run was started ({'; '.join(changed)}); restore it, or start a new run "
                    "in another directory"
                )
    return experiment


def planned_steps(environment: Environment, experiment: Experiment) -> tuple[int, ...]:
    """Return the numbers of steps that a run was to have, one after the other; the last is that of ``experiment``."""
    steps = experiment.train.steps
    return (*(n for n in environment.get("planned_steps", []) if n < steps), steps)


def trained_longer(directory: Path, experiment: Experiment) -> bool:
    """Return whether ``experiment`` is the finished run in ``directory`` with more steps.

    Raises:
        InputError: it is that run with another number of steps, and the run is not finished, or has more already.
    """
    there, steps = read_experiment(directory), experiment.train.steps
    if there.train.steps == steps or there.with_values(train__steps=steps).differences(experiment):
        return False
    newest = latest_checkpoint(directory / "checkpoints")
    done = step_of(newest) if newest else 0
    if steps < there.train.steps:
        raise InputError(
            f"{directory} contains a run of {there.train.steps:,} steps, {done:,} of them done, and a run cannot be "
            f"shortened (train.steps={steps}); set train.steps={there.train.steps}, or choose another directory"
        )
    if done < there.train.steps:
        raise InputError(
            f"{directory} contains a run of {there.train.steps:,} steps, {done:,} of them done, and only a finished "
            f"run can be trained longer: finish it with train.steps={there.train.steps} first, or choose another "
            "directory"
        )
    return True


def write_longer(directory: Path, experiment: Experiment) -> None:
    """Record that the finished run in ``directory`` goes on to the steps of ``experiment``.

    In environment.json first: a process that is killed in between leaves a finished run.
    """
    environment, there = read_environment(directory), read_experiment(directory)
    planned = [*planned_steps(environment, there), experiment.train.steps]
    content = {**environment, "format": FORMAT, "planned_steps": planned}
    write_sealed(directory / "environment.json", content)
    parts = "".join(f"# Up to step {steps} it was trained as a run of {steps} steps.\n" for steps in planned[:-1])
    write_text(directory / "experiment.toml", f"{parts}{experiment.to_toml()}")


def read_environment(directory: Path) -> Environment:
    """Read environment.json of a run. Raises InputError if it is missing or damaged."""
    return read_sealed(directory / "environment.json", Environment, RESTORE, older=True)


def write_environment(directory: Path, experiment: Experiment, corpus: Corpus, **values: Any) -> None:
    """Write environment.json of a run that begins; ``values`` say where."""
    environment = {
        "format": FORMAT,
        **values,
        "corpus": corpus.fingerprint,
        "corpus_directory": str(corpus.directory.resolve()),
        "experiment": experiment.model_dump(mode="json", exclude={"tracking"}, exclude_none=True),
    }
    write_sealed(directory / "environment.json", environment)


def check_run_directory(directory: Path, experiment: Experiment) -> None:
    """Raise InputError if training in ``directory`` would replace what is no run's. Nothing is changed.

    A run can be resumed there, or begin where nothing has the name of a file that it writes. It lies in no corpus or
    model: with other files in it, that could not be replaced any more.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: not a directory; choose another place")
    check_outside_made(directory)
    if (directory / "experiment.toml").exists():
        checkpoints = directory / "checkpoints"
        if checkpoints.exists() and not checkpoints.is_dir():
            raise InputError(f"{checkpoints}: not a directory; move it away, or choose another place for the run")
        read_environment(directory)  # written before: where it is missing, somebody else wrote the other
        return
    check_writable(directory)
    try:
        read_sealed(directory / "environment.json", Environment)
        left = {"environment.json"}  # by a process that was killed before it wrote experiment.toml
    except InputError:
        left = set()
    trackers = {"tensorboard": ["tensorboard"], "wandb": ["wandb", "tracking-id"], "trackio": ["tracking-id"]}
    written = ["experiment.toml", "environment.json", "metrics.jsonl", "checkpoints"]
    written += [name for tracker in experiment.tracking.trackers for name in trackers[tracker]]
    for path in (directory / name for name in written if name not in left):
        if path.is_symlink() or (any(path.iterdir()) if path.is_dir() else path.exists()):
            raise InputError(
                f"{path}: exists, but {directory} is not a run of coupled-adam; choose another directory, or move it "
                "away"
            )


def check_corpus(directory: Path, environment: Environment, corpus: Corpus) -> None:
    """Raise InputError unless ``corpus`` is the one that the run in ``directory`` was trained on."""
    if environment["corpus"] != corpus.fingerprint:
        raise InputError(
            f"{corpus.directory}: not the text that {directory} was trained on; use that text, or choose another "
            "run directory"
        )


def full_state_dict(model: LanguageModel) -> dict[str, Tensor]:
    """Gather all weights by name, whole, on the CPU of rank 0; empty on the others. All ranks must call it."""
    with quiet():
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def sha256_of(weights: dict[str, Tensor]) -> str:
    """Hash names, types, shapes and values with SHA-256."""
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
