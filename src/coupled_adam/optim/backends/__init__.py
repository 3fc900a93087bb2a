"""Who computes a step: ``of`` decides, and nobody else.

A backend is a module of three functions:

    refuses(job) -> str       why it does not take a job; empty if it does
    sums(job) -> Tensor       sums over the rows of a coupled matrix that this process holds
    move(jobs) -> None        parameters and moments move in place, and the step is counted

Results are those of ``plain`` within rounding. A backend that touches raw memory checks shapes, dtypes and strides
itself, whoever calls it.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from torch.compiler import is_compiling

from coupled_adam.optim.backends import cpu, gpu, plain, torch_adamw
from coupled_adam.optim.equations import has_numbers
from coupled_adam.optim.job import Job


class Backend(Protocol):
    __name__: str

    def refuses(self, job: Job, /) -> str: ...

    def sums(self, job: Job, /) -> Tensor: ...

    def move(self, jobs: Sequence[Job], /) -> None: ...


#: In the order in which they are asked.
BACKENDS: tuple[Backend, ...] = (torch_adamw, gpu, cpu, plain)


def of(job: Job) -> Backend:
    """Return the backend that takes a job: the first that does not refuse it."""
    if job.group["fused"] is False:
        return plain
    if is_compiling():
        return plain if torch_adamw.refuses(job) else torch_adamw
    found = next(backend for backend in BACKENDS if not backend.refuses(job))
    if found is torch_adamw and job.scaled:
        # It takes scaled gradients as copies; kernels of ours scale them as they read. Small ones cost it less.
        small = job.param.numel() < cpu.ELEMENTS_PER_THREAD
        for backend in BACKENDS:
            if backend is gpu or (backend is cpu and not small):
                found = found if backend.refuses(job) else backend
    return found


def check_fused(jobs: Sequence[Job]) -> None:
    """Raise RuntimeError for a job of a group with ``fused=True`` that no fast backend takes.

    Not for an empty shard, of which nothing is to be computed, nor where nothing is computed yet.
    """
    for job in jobs:
        if not job.group["fused"] or is_compiling() or job.param.numel() == 0 or not has_numbers(job.param):
            continue
        if of(job) is plain:
            reasons = "; ".join(backend.refuses(job) for backend in BACKENDS if backend is not plain)
            raise RuntimeError(
                f"fused=True, but no fast backend supports {job.name}: {reasons}. Leave fused=None to update it anyway"
            )
