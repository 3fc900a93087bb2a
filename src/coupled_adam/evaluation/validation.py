"""Loss on held-out text."""

import torch

from coupled_adam.errors import InputError
from coupled_adam.lm.batches import Batches
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.loss import STATISTICS
from coupled_adam.lm.masking import IGNORED, masking_of
from coupled_adam.lm.model import LanguageModel
from coupled_adam.lm.parallel import World
from coupled_adam.progress import Update


def held_out(experiment: Experiment, corpus: Corpus) -> Batches:
    """Batch the validation text like the training text; the batches are the same for every run and evaluation."""
    shards, drawn = corpus.shards("validation"), experiment.train.sampling == "replacement"
    length, masking = experiment.data.sequence_length, masking_of(experiment, corpus)
    return Batches(shards, length, experiment.batch_size, 0, corpus.vocab_size, drawn, masking)


def batches_used(batches: Batches, count: int) -> int:
    """Return ``count``, or the batches of one pass over the data if that is less and they are not drawn at random."""
    return count if batches.replacement else min(count, max(len(batches) // batches.batch_size, 1))


@torch.no_grad()
def validate(
    model: LanguageModel,
    batches: Batches,
    count: int,
    world: World | None = None,
    precision: str = "float32",
    show: Update | None = None,
) -> dict[str, float]:
    """Measure how the model predicts ``batches_used(batches, count)`` batches, in ``precision`` as of training.

    ``validation_loss`` is the mean cross entropy per target, in nats, of the logits as the model makes them: capped and
    rounded, without penalties. ``logit_mean``, ``logit_std``, ``logit_max`` and ``log_z_squared`` are means over the
    targets of what ``lm.loss.STATISTICS`` says, in float32. The ranks share each batch, and all get the result; the
    model is called equally often on each. ``show`` is told how many batches are done.

    Raises:
        InputError: there are more ranks than sequences in a batch.
    """
    world = world or World()
    if batches.batch_size < world.size:
        raise InputError(
            f"{world.size} ranks share batches of {batches.batch_size} sequences: start at most "
            f"{batches.batch_size} processes"
        )
    total = torch.zeros(2 + len(STATISTICS), dtype=torch.float64)
    for step in range(batches_used(batches, count)):
        inputs, targets = (x.tensor_split(world.size)[world.rank].to(world.device) for x in batches.batch(step))
        with torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            losses = model(inputs, targets)
        predicted = (targets != IGNORED).sum()
        total += torch.tensor([predicted, losses.cross_entropy, *losses.statistics], dtype=torch.float64)
        if show is not None:
            show(step + 1)
    targets_seen, *sums = world.sum(total.to(world.device)).tolist()
    return {name: value / targets_seen for name, value in zip(("validation_loss", *STATISTICS), sums, strict=True)}
