"""Job: one parameter's step, with all that a backend must know of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coupled_adam.optim.directions import DIRECTION
from coupled_adam.optim.eight_bit import EightBit, Moment, blocks_of
from coupled_adam.optim.equations import Coefficients, Number, beside, readable
from coupled_adam.optim.reductions import ProcessGroups
from coupled_adam.optim.spectral import RankOne
from coupled_adam.optim.typed import ParamGroup, State, parameter_name


@dataclass(eq=False)
class Job:
    """What the step of a parameter needs. Made by ``state.job_of``; tensors are the part that this process holds."""

    whole: Tensor
    """The parameter as its owner has it: a DTensor, if it is one."""
    state: State
    group: ParamGroup
    param: Tensor
    grad: Tensor
    """Where only other processes have one, 0."""
    exp_avg: Moment
    exp_avg_sq: Tensor
    exp_avg_sq_rows: Tensor | None = None
    """With a ``row_exponent``: the second moment of each row, (V, 1)."""
    shared_over: ProcessGroups = ()
    """The process groups over which the reductions of this parameter communicate."""

    index: tuple[int, int] = (0, 0)
    """Number of the group, and of the parameter in it."""
    present: bool = True
    """Whether there is a gradient in this process."""
    found_inf: Tensor | None = None
    """1 on an accelerator where GradScaler has found an infinity, and nothing may change; else 0."""
    clip: Number = 1.0
    """What the gradient is yet to be multiplied by."""

    means: Tensor | None = None
    """Of a coupled matrix, once known: means over all rows, of the scaled (f·g)² + κ·m², (1, H); if the mean row after
    the step is to be foreseen, also of the gradient as it is, of parameter and first moment: (4, H)."""
    triple: RankOne | None = None
    """With spectral decay, once known: what one unit of decay η·λ takes off."""
    u: Tensor | None = None
    """What the ``u`` of the state becomes."""
    column_sums: Tensor | None = None
    """Of a matrix whose mean row is foreseen, once moved: what a kernel has summed of parameter and first moment as it
    wrote them, by thread: (threads, 2, H), float64."""
    first: int = 0
    """The index of the first element of ``param`` in the tensor that it is a part of."""
    _step: Number | None = None

    @property
    def step(self) -> Number:
        """The number of this step, from 1; a tensor where reading it would wait."""
        if self._step is None:
            step = self.state["step"]
            wide = torch.float64 if step.device.type in ("cpu", "cuda") else torch.float32  # others lack it
            self._step = step.item() + 1 if readable(step) else step.to(wide) + 1
        return self._step

    @property
    def name(self) -> str:
        """The parameter's name for messages."""
        return parameter_name(self.group, self.index[1])

    @property
    def first_row(self) -> int:
        """The index of the first row of ``param`` in the matrix that it is a part of."""
        return self.first // max(self.param.shape[1], 1)

    @property
    def coupled(self) -> bool:
        return self.group["second_moment"] == "vocabulary"

    @property
    def spectral(self) -> bool:
        """Whether the step takes off the leading singular triple."""
        return is_spectral(self.state, self.group)

    @property
    def scaled(self) -> bool:
        """Whether the gradient is multiplied by something, as far as is known."""
        return self.found_inf is not None or not is_one(self.clip)

    @property
    def foreseen(self) -> bool:
        """Whether the mean of the rows after the step is known before it, and can be subtracted as they move."""
        linear = DIRECTION[self.group["direction"]].linear
        summed = not isinstance(self.exp_avg, EightBit)  # column sums of codes cost as much as centering by itself
        same = self.exp_avg_sq_rows is None  # else the rows do not share √ν̂
        return self.group["center"] and self.coupled and linear and summed and same and not self.spectral

    @property
    def rests(self) -> Tensor | bool:
        """Whether the parameter must stay where it is: at a learning rate of 0, or halted. A tensor where reading it
        would wait."""
        lr = self.group["lr"]
        still: Tensor | bool
        if isinstance(lr, Tensor) and not readable(lr):
            still = (lr.reshape(()) == 0).to(self.param.device)
        else:
            still = bool(lr == 0)
        if self.found_inf is None or still is True:
            return still
        return self.found_inf > 0 if still is False else (self.found_inf > 0) | still

    def unless_it_rests(self, mean: Tensor) -> Tensor:
        """Return the mean to subtract: 0 of a parameter that must stay where it is."""
        if isinstance(self.rests, Tensor):
            return torch.where(self.rests, 0, mean)
        return torch.zeros_like(mean) if self.rests else mean

    def coefficients(self, step: Number) -> Coefficients:
        """Fold the hyperparameters at ``step``, for a gradient that is multiplied by ``clip``."""
        group, decay = self.group, self.group["weight_decay"]
        if group["decay"] == "spectral" and "u" not in self.state:
            decay = group.get("scalar_vector_weight_decay", decay)
        clip = beside(self.clip, self.grad)
        return Coefficients.of(group, step, -clip if group["maximize"] else clip, decay)


def is_spectral(state: State, group: ParamGroup) -> bool:
    """Return whether a parameter's step takes off its leading singular triple."""
    return "u" in state and group["weight_decay"] != 0


def is_one(clip: Number) -> bool:
    """Return whether nothing is clipped; of a tensor that is not known."""
    return isinstance(clip, float) and clip == 1.0


def advance(jobs: Sequence[Job]) -> None:
    """Count a step of parameters on one device; one that may be halted is counted on the device, which knows."""
    found_inf, steps = jobs[0].found_inf, [job.state["step"] for job in jobs]
    if found_inf is None and (len(steps) == 1 or steps[0].device.type == "cpu"):
        for step in steps:
            step += 1
    elif found_inf is None:
        torch._foreach_add_(steps, 1)
    elif found_inf.device == steps[0].device:
        torch._foreach_add_(steps, [1 - found_inf] * len(steps))
    else:  # the first time: from now on the counts stay there
        for job, step in zip(jobs, steps, strict=True):
            job.state["step"] = step.to(found_inf.device, non_blocking=True) + (1 - found_inf)


def check_shapes(job: Job) -> None:
    """Raise RuntimeError unless the tensors of a job fit together: whoever touches raw memory asks."""
    shape, rows = job.param.shape, job.group["second_moment"] == "vocabulary"
    fit = shape == job.grad.shape == job.exp_avg.shape and not (rows and len(shape) != 2)
    fit = fit and job.exp_avg_sq.shape == ((1, shape[1]) if rows else shape)
    tensors = [job.param, job.grad, job.exp_avg, job.exp_avg_sq]
    if job.exp_avg_sq_rows is not None:
        fit = fit and rows and job.exp_avg_sq_rows.shape == (shape[0], 1)
        tensors.append(job.exp_avg_sq_rows)
    if isinstance(job.exp_avg, EightBit):
        fit = fit and len(shape) == 2 and job.exp_avg.scales.shape == (shape[0], blocks_of(shape[1]))
        tensors.append(job.exp_avg.scales)
    if job.means is not None:
        fit = fit and job.means.shape == (4 if job.foreseen else 1, *shape[1:])
        tensors.append(job.means)
    if job.triple is not None:
        fit = fit and job.triple.column.shape == shape[:-1] and job.triple.row.shape == (*shape[:-2], *shape[-1:])
        tensors += job.triple
    if not fit:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise RuntimeError(f"parameter, gradient and state do not fit together: they have the shapes {shapes}")


def check_vectors(job: Job, *rows: Tensor | None) -> None:
    """Raise RuntimeError unless ``rows`` are (1, H), and these and the vectors of spectral decay float32 beside it."""
    for x in (*rows, *(job.triple or ())):
        if x is not None and not (x.dtype == torch.float32 and x.device == job.param.device):
            raise RuntimeError(f"kernels need float32 vectors on the parameter's device, not {x.dtype} on {x.device}")
    for x in rows:
        if x is not None and x.shape != (1, job.param.shape[-1]):
            raise RuntimeError(f"a row of shape {tuple(x.shape)} and a matrix of {tuple(job.param.shape)} do not fit")


def check_factors(job: Job, factors: Tensor | None) -> None:
    """Raise RuntimeError unless ``factors``, if any, are (V, 1), float32, beside the parameter."""
    if factors is None:
        return
    found = (tuple(factors.shape), factors.dtype, factors.device)
    if found != ((len(job.param), 1), torch.float32, job.param.device):
        raise RuntimeError(f"factors of {len(job.param)} rows on {job.param.device} cannot be {found}")
