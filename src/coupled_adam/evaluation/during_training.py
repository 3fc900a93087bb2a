"""Measure a model while it trains."""

import functools
import math

import torch
from torch.distributed.tensor import DTensor

from coupled_adam import geometry, monitor
from coupled_adam.errors import DivergedError
from coupled_adam.evaluation.embedding_figures import defined, figures_while_training
from coupled_adam.evaluation.validation import held_out, validate
from coupled_adam.figures import Figures
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.model import LanguageModel
from coupled_adam.lm.parallel import World
from coupled_adam.lm.train import Evaluate


def evaluator(experiment: Experiment, corpus: Corpus, world: World | None = None) -> Evaluate:
    """Make the function that ``coupled_adam.lm.train.train`` calls: validation loss and embedding metrics.

    All ranks call that function together. Metrics that depend on the frequency and meaning of tokens are computed and
    returned on rank 0 only. It raises DivergedError if the loss or the logits are not finite.

    Args:
        experiment: the settings of the run.
        corpus: its text.
        world: the ranks; None for a single process.

    Returns:
        The function.

    Raises:
        ImportError: a package with word-similarity benchmarks is not installed.
    """
    world, settings = world or World(), experiment.evaluation
    benchmarks, token_of = geometry.published_benchmarks(), functools.cache(corpus.words.token_of)
    batches = held_out(experiment, corpus)

    def evaluate(model: LanguageModel, last: bool) -> Figures:
        count = settings.final_batches if last and settings.final_batches else settings.batches
        figures: Figures = {**validate(model, batches, count, world, settings.precision)}
        if not all(value is not None and math.isfinite(value) for value in figures.values()):
            loss = figures["validation_loss"]
            raise DivergedError(f"validation loss {loss}, or infinite logits. Lower schedule.lr, and start a new run")
        figures |= defined(dict(monitor.health(model, isotropy=True)))
        embedding = output_embedding(model)
        if world.is_main_process:
            figures |= figures_while_training(embedding, corpus.unigram_counts, token_of, benchmarks)
        return figures

    return evaluate


@torch.no_grad()
def output_embedding(model: LanguageModel) -> torch.Tensor:
    """Gather the whole output embedding. All ranks must call it."""
    weight = model.get_output_embeddings().weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
