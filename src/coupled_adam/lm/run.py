"""A trained run, opened from its folder."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from coupled_adam.errors import InputError
from coupled_adam.lm.checkpoint import latest_checkpoint, load_checkpoint, load_tensors, quiet, step_of, tensor_names
from coupled_adam.lm.config import Experiment, load_experiment
from coupled_adam.lm.corpus import Corpus, open_corpus
from coupled_adam.lm.model import LanguageModel, build_model
from coupled_adam.lm.parallel import World, share


@dataclass(frozen=True)
class Run:
    """The newest checkpoint of a run, with the text it was trained on. Opened with :func:`open_run`."""

    folder: Path
    experiment: Experiment
    corpus: Corpus
    checkpoint: Path

    @property
    def step(self) -> int:
        """Steps after which the checkpoint was saved."""
        return step_of(self.checkpoint)

    def model(self, world: World | None = None) -> LanguageModel:
        """The model with its weights, in evaluation mode. Several processes share it as they did to train it."""
        world, config = world or World(), self.experiment
        model = build_model(config.model, self.corpus.vocabulary_size, config.data.sequence_length, config.run.seed)
        model = model.to(world.device)
        share(model, config.parallel, world)
        load_checkpoint(self.checkpoint, model)
        return model.eval()

    def second_moment(self) -> Tensor | None:
        """Adam's second moment of the output embedding, (V, H) or shared (1, H); None if its optimizer has none."""
        name = "token_embedding.weight" if self.experiment.model.tied else "head.weight"
        key = f"optimizer.state.{name}.exp_avg_sq"
        return load_tensors(self.checkpoint, [key])[key] if key in tensor_names(self.checkpoint) else None


def open_run(folder: Path, data: Path | None = None) -> Run:
    """The run in ``folder``; its corpus is ``data``, or else where it was while it was trained.

    Raises:
        InputError: no run there, one that has no checkpoint yet, or a corpus that is missing or another.
    """
    if not (folder / "experiment.toml").exists():
        raise InputError(f"{folder}: holds no run: there is no experiment.toml")
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{folder}: nothing trained yet; `coupled-adam train` goes on with it")
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    found = data or Path(environment.get("corpus_folder", folder / "corpus"))
    if not (found / "meta.json").exists():
        raise InputError(f"{found}: the corpus of {folder} is not there; give its folder with --data")
    corpus = open_corpus(found)
    if corpus.fingerprint != environment["corpus"]:
        raise InputError(f"{found}: another text than {folder} was trained on; give the folder of that with --data")
    return Run(folder, load_experiment(folder / "experiment.toml"), corpus, checkpoint)


def whole_weights(model: LanguageModel) -> dict[str, Tensor]:
    """All weights by name, whole, on the CPU; in the main process, and empty in the others. All processes call it."""
    with quiet():
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
