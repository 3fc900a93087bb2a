"""What a step must know of whole tensors before anything moves: the processes exchange it in one all-reduce."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coupled_adam.optim import backends, clipping, reductions
from coupled_adam.optim.equations import Number, beside
from coupled_adam.optim.job import Job
from coupled_adam.optim.reductions import Reduction, local, run_one, vocabulary_mean
from coupled_adam.optim.spectral import RankOne, power_iteration


def exchange(jobs: list[Job], held: Sequence[Tensor] | None, *, rescaled: bool) -> tuple[list[Job], Tensor | None]:
    """Make the reductions that communicate, all at once, and the norm of the gradients.

    Nothing here waits for an accelerator but a process that lacks a gradient which others may have: it reads whether
    they do.

    Args:
        jobs: in the same order in every process.
        held: all parameters, with a gradient or not; None if no norm is wanted.
        rescaled: whether the gradients are yet to be multiplied by a factor.

    Returns:
        The jobs of which any process has a gradient, knowing what was exchanged; and the norm of all gradients.
    """
    shared = [job for job in jobs if job.shared_over]
    spectral = [job for job in shared if job.spectral]
    # With κ the mean square is one of gradients times a factor that may not be known yet.
    early = [job for job in jobs if job.coupled and (held is not None or job.shared_over)]
    early = [job for job in early if not (rescaled and job.group["coupling_factor"] != 0)]
    sums = {job.whole: backends.of(job).sums(job) for job in early}
    norms = {}
    if held is not None:
        squares_of = {param: part[:1] for param, part in sums.items()}
        norms = clipping.partial_norms(held, {job.whole: job.grad for job in jobs}, squares_of)
    here = norms.pop((), None)
    means, iterations, counts, squares = reductions.run(
        [vocabulary_mean(part, param) for param, part in sums.items()],
        [_power_iteration(job) for job in spectral],
        [reductions.complete(_flag(job), job.shared_over) for job in shared],
        [reductions.complete(norm.square(), over) for over, norm in norms.items()],
    )
    for job, mean in zip(early, means, strict=True):
        job.means = mean
    for job, found in zip(spectral, iterations, strict=True):
        job.triple, job.u = found
    absent = {id(job) for job, n in zip(shared, counts, strict=True) if not job.present and n.item() == 0}
    norm = None if held is None else clipping.global_norm(here, squares)
    return [job for job in jobs if id(job) not in absent], norm


def scale(jobs: Sequence[Job], clip: Number) -> None:
    """Have the gradients multiplied by ``clip``. With κ this exchanges once more."""
    for job in jobs:
        job.clip = clip
        if job.means is not None:
            factor = beside(clip, job.means)
            square = job.means[:1] * (factor * factor)
            job.means = square if len(job.means) == 1 else torch.cat([square, job.means[1:]])
    late = [job for job in jobs if job.coupled and job.shared_over and job.means is None]
    (found,) = reductions.run([_means(job) for job in late])
    for job, means in zip(late, found, strict=True):
        job.means = means


def finish(job: Job) -> None:
    """Find what concerns this process alone, when a parameter's turn comes: its numbers are about to be read anyway."""
    if job.coupled and job.means is None:
        job.means = run_one(_means(job))
    if job.spectral:
        if job.u is None:
            job.triple, job.u = run_one(_power_iteration(job))
        before = local(job.state["u"])
        before.copy_(job.u if job.found_inf is None else torch.where(job.found_inf > 0, before, job.u))


def _means(job: Job) -> Reduction[Tensor]:
    return vocabulary_mean(backends.of(job).sums(job), job.whole)


def _power_iteration(job: Job) -> Reduction[tuple[RankOne, Tensor]]:
    return power_iteration(job.state["u"], job.whole, job.step - 1)


def _flag(job: Job) -> Tensor:
    """Return what a rank adds to the number of those that have a gradient."""
    return job.param.new_full((1,), float(job.present), dtype=torch.float32)
