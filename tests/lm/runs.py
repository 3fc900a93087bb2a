"""What the processes of the training tests run.

As a program it trains one experiment: python runs.py EXPERIMENT.toml CORPUS RUN, alone or under torchrun. With
DIE_AT_STEP in the environment the second process kills itself there, unless torchrun has restarted it before.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from coupled_adam import progress
from coupled_adam.evaluation.during_training import output_embedding
from coupled_adam.evaluation.stages import evaluate
from coupled_adam.evaluation.validation import validate
from coupled_adam.lm import train as loop
from coupled_adam.lm.batches import Batches
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.corpus import open_corpus
from coupled_adam.lm.model import LanguageModel
from coupled_adam.lm.optimizers import Optimizers
from coupled_adam.lm.parallel import World, init_distributed


def run(toml: str, corpus_directory: Path, run_dir: Path, stop_at: int | None = None) -> dict[str, Any]:
    """Train; at ``stop_at`` steps the last process is asked to stop. The final embedding and held-out figures."""
    experiment, corpus = Experiment.from_toml(toml), open_corpus(corpus_directory)
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_world_size()) if dist.is_initialized() else World()
    held_out = Batches(corpus.shards("validation"), experiment.data.sequence_length, experiment.batch_size, seed=0)
    calls = 0

    def evaluate(model: LanguageModel, last: bool) -> loop.Figures:
        nonlocal calls
        calls += 1
        if stop_at == calls and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {**validate(model, held_out, 2, world)}

    try:
        model = loop.train(experiment, corpus, run_dir, evaluate, world)
    except loop.Interrupted as stopped:
        return {"stopped": str(stopped), "signal": stopped.signal_number}
    if experiment.train.precision == "float32":
        assert all(p.dtype == torch.float32 for p in model.parameters())
    return {"embedding": output_embedding(model), "figures": validate(model, held_out, 2, world)}


def evaluated(run_dir: Path) -> dict[str, Any]:
    """What the stages without a download find, in the processes there are."""
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_world_size())
    return evaluate(run_dir, only=("validation", "embeddings", "export"), world=world)


def main() -> None:
    progress.show_log()
    if os.environ.get("DIE_AT_STEP") and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        step, steps = Optimizers.step, iter(range(1, 1_000))

        def mortal(self: Optimizers, lr: float) -> torch.Tensor:
            if next(steps) == int(os.environ["DIE_AT_STEP"]):
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, lr)

        Optimizers.step = mortal  # type: ignore[method-assign]
    toml, corpus, run_dir = map(Path, sys.argv[1:])
    with init_distributed():
        run(toml.read_text(), corpus, run_dir)


if __name__ == "__main__":
    main()
