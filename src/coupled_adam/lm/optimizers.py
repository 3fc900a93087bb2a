"""The optimizers of an experiment: one for the output embedding, one for the rest, or one for both."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

from coupled_adam.errors import InputError
from coupled_adam.lm.adam_variant import AdamVariant
from coupled_adam.lm.config import CoreOptimizer, EmbeddingOptimizer, Experiment
from coupled_adam.lm.model import LanguageModel
from coupled_adam.models import param_groups
from coupled_adam.optim import Adams, CoupledAdam, center_


class Optimizers:
    """Several optimizers that step together, with the learning rate of one schedule.

    A param group with an ``lr_factor`` takes that multiple of it, as those of ``coupled_adam.param_groups``.
    """

    def __init__(self, optimizers: Sequence[Optimizer], max_grad_norm: float) -> None:
        self.all, self.max_grad_norm = list(optimizers), max_grad_norm
        self.centered: list[Tensor] = []
        """Matrices whose mean row is to be subtracted after every step, where their optimizer does not do it."""

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self.all:
            optimizer.zero_grad()

    def step(self, lr: float) -> Tensor:
        """Take one step with all gradients clipped to the bound. Returns their norm before clipping, a scalar."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_factor", 1.0)
        first = self.all[0]
        if len(self.all) == 1 and isinstance(first, CoupledAdam | Adams):  # it clips in its own pass over the gradients
            first.step()
            assert first.grad_norm is not None
            return first.grad_norm
        parameters = [p for o in self.all for group in o.param_groups for p in group["params"]]
        norm = clip_grad_norm_(parameters, self.max_grad_norm)
        for optimizer in self.all:
            optimizer.step()
        for weight in self.centered if lr > 0 else ():  # a step at 0 moves nothing, with any optimizer
            center_(weight)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def build_optimizers(
    model: LanguageModel, experiment: Experiment, unigram_counts: NDArray[np.int64] | None = None
) -> Optimizers:
    """Build the optimizers that the experiment names. Where the embeddings are tied, both are the output embedding.

    ``unigram_counts``, (V,), are those of the training text, for a second moment that depends on them.
    """
    built, weight = _built(model, experiment, unigram_counts), model.get_output_embeddings().weight
    centers = isinstance(built.all[0], CoupledAdam | Adams)  # the first one has the output embedding
    built.centered = [weight] if experiment.optimizer.embedding.center and not centers else []
    return built


def _built(model: LanguageModel, experiment: Experiment, counts: NDArray[np.int64] | None) -> Optimizers:
    core, embedding = experiment.optimizer.core, experiment.optimizer.embedding
    max_grad_norm = experiment.train.max_grad_norm
    groups = param_groups(model, weight_decay=core.weight_decay)
    if embedding.center:  # what it changes, the experiment's caveats have said
        groups[0]["center"] = True
    if core.name == "adamw" and embedding.name in ("adamw", "coupled_adam") and embedding.lr_factor == 1:
        return Optimizers([_adam(groups, core, embedding, max_grad_norm)], max_grad_norm)
    if core.name == embedding.name == "adams" and embedding.lr_factor == 1:
        return Optimizers([_adams(groups, core, embedding, max_grad_norm)], max_grad_norm)
    ours, rest = groups[:1], groups[1:]
    match embedding.name:
        case "sgd":
            first: Optimizer = SGD(_plain(ours), momentum=embedding.momentum)
        case "adams":
            first = _adams(ours, core, embedding, None)
        case "adam_variant":
            first = _variant(ours, core, embedding, counts)
        case _:
            first = _adam(ours, core, embedding, None)
    match core.name:
        case "muon":
            others: list[Optimizer] = _muon(model, rest, core)
        case "adams":
            others = [_adams(rest, core, embedding, None)]
        case _:
            others = [_adam(rest, core, EmbeddingOptimizer(), None)]
    if embedding.lr_factor != 1:
        for group in first.param_groups:
            group["lr_factor"] = embedding.lr_factor
    return Optimizers([first, *others], max_grad_norm)


def _adam(
    groups: list[dict[str, object]], core: CoreOptimizer, embedding: EmbeddingOptimizer, max_grad_norm: float | None
) -> Optimizer:
    if embedding.name == "adamw":
        return AdamW(groups, betas=core.betas, eps=core.eps, fused=True)
    return CoupledAdam(
        groups,
        betas=core.betas,
        eps=core.eps,
        coupling_scale=embedding.coupling_scale,
        coupling_factor=embedding.coupling_factor,
        row_exponent=embedding.row_exponent,
        max_grad_norm=max_grad_norm,
    )


def _variant(
    groups: list[dict[str, object]],
    core: CoreOptimizer,
    embedding: EmbeddingOptimizer,
    counts: NDArray[np.int64] | None,
) -> Optimizer:
    frequency = None
    if embedding.second_moment == "frequency":
        if counts is None:
            raise InputError("optimizer.embedding.second_moment 'frequency' needs the token counts of a corpus")
        smoothed = torch.from_numpy(counts).double() + 1  # no token is without a share
        frequency = (smoothed / smoothed.sum()).float()
    return AdamVariant(
        [param for group in groups for _, param in _named(group)],
        embedding.second_moment,
        (core.betas[0], core.betas[1] if embedding.beta2 is None else embedding.beta2),
        core.eps,
        frequency,
        embedding.frequency_exponent,
        embedding.zero_sum,
        embedding.amsgrad,
    )


def _adams(
    groups: list[dict[str, object]], core: CoreOptimizer, embedding: EmbeddingOptimizer, max_grad_norm: float | None
) -> Optimizer:
    return Adams(
        groups,
        betas=core.betas,
        coupling_scale=embedding.coupling_scale,
        coupling_factor=embedding.coupling_factor,
        row_exponent=embedding.row_exponent,
        max_grad_norm=max_grad_norm,
    )


def _muon(model: LanguageModel, groups: list[dict[str, object]], core: CoreOptimizer) -> list[Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for positions and vectors."""
    try:
        from torch.optim import Muon
    except ImportError:
        raise InputError(
            f"optimizer.core.name 'muon' needs torch 2.9 or newer, this is {torch.__version__}: upgrade torch, or "
            "choose another core optimizer"
        ) from None
    inside = {id(p) for p in model.blocks.parameters() if p.ndim == 2}

    def part(within: bool) -> list[dict[str, object]]:
        parts = [{**g, "params": [(n, p) for n, p in _named(g) if (id(p) in inside) == within]} for g in groups]
        return [g for g in parts if g["params"]]

    # With AdamW's step size, so that the schedule and the decay of the core fit both.
    muon = Muon(_plain(part(True)), adjust_lr_fn="match_rms_adamw")
    return [muon, AdamW(part(False), betas=core.betas, eps=core.eps, fused=True)]


def _named(group: dict[str, object]) -> list[tuple[str, nn.Parameter]]:
    return group["params"]  # type: ignore[return-value]


def _plain(groups: list[dict[str, object]]) -> list[dict[str, object]]:
    """Drop the keys that only our optimizers know."""
    return [{key: g[key] for key in ("params", "weight_decay")} for g in groups]


def state_bytes(experiment: Experiment, model: LanguageModel) -> int:
    """Count the bytes of the optimizers' state in float32; ``model`` may be on the device ``meta``."""
    coupled = model.head.weight.numel()
    rest = sum(p.numel() for p in model.parameters()) - coupled
    moments = {"adamw": 2, "coupled_adam": 1, "adams": 1, "sgd": 1, "adam_variant": 2}[
        experiment.optimizer.embedding.name
    ]
    inside = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    saved = inside if experiment.optimizer.core.name == "muon" else 0  # it has one moment
    rows = len(model.head.weight) if experiment.optimizer.embedding.row_exponent else 0
    return torch.float32.itemsize * (moments * coupled + rows + 2 * rest - saved)
