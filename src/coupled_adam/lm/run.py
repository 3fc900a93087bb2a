"""A trained run, opened from its directory."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from coupled_adam.errors import InputError
from coupled_adam.files import read_json
from coupled_adam.lm.checkpoint import latest_checkpoint, load_checkpoint, load_tensors, quiet, step_of, tensor_names
from coupled_adam.lm.config import Experiment, load_experiment
from coupled_adam.lm.corpus import Corpus, open_corpus
from coupled_adam.lm.model import LanguageModel, build_model
from coupled_adam.lm.parallel import World, parallelize


@dataclass(frozen=True)
class Run:
    """The newest checkpoint of a run, with the text it was trained on. Opened with ``open_run``."""

    directory: Path
    experiment: Experiment
    corpus: Corpus
    checkpoint: Path

    @property
    def step(self) -> int:
        """Steps after which the checkpoint was saved."""
        return step_of(self.checkpoint)

    def model(self, world: World | None = None) -> LanguageModel:
        """Load the model in evaluation mode. Several ranks share it as they did in training."""
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
    """Open the run in ``directory``; its corpus is ``data``, or else where it was during training.

    Raises:
        InputError: no run there, one that has no checkpoint yet, or a corpus that is missing or not the run's.
    """
    experiment, checkpoint = open_checkpoint(directory)
    environment = read_environment(directory)
    found = data or Path(environment.get("corpus_directory", directory / "corpus"))
    if not (found / "meta.json").exists():
        raise InputError(f"{found}: the corpus of {directory} is not there; give its directory with --data")
    corpus = open_corpus(found)
    check_corpus(directory, environment, corpus)
    return Run(directory, experiment, corpus, checkpoint)


def open_checkpoint(directory: Path) -> tuple[Experiment, Path]:
    """Find the experiment and the newest checkpoint of the run in ``directory``.

    Raises:
        InputError: no run there, or one that has no checkpoint yet.
    """
    if not (directory / "experiment.toml").exists():
        raise InputError(f"{directory}: holds no run: there is no experiment.toml")
    checkpoint = latest_checkpoint(directory / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{directory}: no checkpoint yet; train it with `coupled-adam train`, which resumes it")
    return load_experiment(directory / "experiment.toml"), checkpoint


def read_environment(directory: Path) -> dict[str, Any]:
    """Read environment.json of a run. Raises InputError if it is missing or damaged."""
    path = directory / "environment.json"
    environment = read_json(
        path, dict[str, Any], "it holds the fingerprint of the run's corpus; restore it, or start a new run"
    )
    if not isinstance(environment.get("corpus"), str):
        raise InputError(f"{path}: damaged (no fingerprint of the corpus); restore it, or start a new run")
    return environment


def check_corpus(directory: Path, environment: dict[str, Any], corpus: Corpus) -> None:
    """Raise InputError unless ``corpus`` is the one that the run in ``directory`` was trained on."""
    if environment["corpus"] != corpus.fingerprint:
        raise InputError(
            f"{corpus.directory}: not the text that {directory} was trained on; give that one, or another run directory"
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
