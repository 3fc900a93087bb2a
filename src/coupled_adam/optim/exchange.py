"""What a step must know of whole tensors before anything moves: the processes exchange it in one all-reduce."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coupled_adam.optim import clipping, dispatch, reductions
from coupled_adam.optim.center import column_sums, sums_of_gradient
from coupled_adam.optim.directions import DIRECTION
from coupled_adam.optim.eight_bit import Moment
from coupled_adam.optim.equations import Coefficients, Number, readable
from coupled_adam.optim.reductions import ProcessGroups, Reduction, local, run_one
from coupled_adam.optim.state import local_moment
from coupled_adam.optim.update import RankOne

ParamGroup = dict[str, Any]


@dataclass(eq=False)
class Work:
    """A parameter that has a gradient, and what its step needs."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    group: ParamGroup
    index: tuple[int, int]
    """Number of the group, and of the parameter in it."""
    shared_over: ProcessGroups
    """The process groups over which the reductions of this parameter communicate."""
    present: bool = True
    """Whether there is a gradient in this process; where only others have one, ``grad`` is 0."""
    halt: Tensor | None = None
    """1 on an accelerator where GradScaler has found an infinity, and nothing may change; else 0."""

    @property
    def steps(self) -> Number:
        """The number of steps taken; a tensor where reading it would wait."""
        step: Tensor = self.state["step"]
        if readable(step):
            return step.item()
        return step.to(torch.float64 if step.device.type in ("cpu", "cuda") else torch.float32)  # others may have none

    @property
    def coupled(self) -> bool:
        return bool(self.group["second_moment"] == "vocabulary")

    @property
    def spectral(self) -> bool:
        """Whether the step takes off the leading singular triple."""
        return is_spectral(self.state, self.group)

    @property
    def foreseen(self) -> bool:
        """Whether the mean of the rows after the step is known before it, and can be subtracted as they move."""
        linear = DIRECTION[self.group["direction"]].linear
        summed = "exp_avg" in self.state  # column sums of a moment in eight bits cost as much as centering by itself
        return bool(self.group["center"] and self.coupled and linear and summed and not self.spectral)

    @property
    def rests(self) -> Tensor | bool:
        """Whether the parameter must stay where it is: at a learning rate of 0, or halted. A tensor where reading it
        would wait."""
        lr = self.group["lr"]
        still: Tensor | bool
        if isinstance(lr, Tensor) and not readable(lr):
            still = (lr.reshape(()) == 0).to(local(self.param).device)
        else:
            still = bool(lr == 0)
        if self.halt is None or still is True:
            return still
        return self.halt > 0 if still is False else (self.halt > 0) | still

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's part of a parameter that is not coupled, its gradient, and its first and second moment."""
        return local(self.param), local(self.grad), local(self.state["exp_avg"]), local(self.state["exp_avg_sq"])

    @property
    def moment(self) -> Moment:
        """This process's part of the first moment, in whatever form."""
        return local_moment(self.state)

    def coefficients(self, step: Number, clip: Number) -> Coefficients:
        """Fold the hyperparameters at ``step``, for a gradient that is multiplied by ``clip``."""
        group = self.group
        weight_decay = group["weight_decay"]
        if group["decay"] == "spectral" and "u" not in self.state:
            weight_decay = group.get("scalar_vector_weight_decay", weight_decay)
        clip = dispatch.beside(clip, self.grad)
        return Coefficients.of(
            step=step,
            lr=group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=weight_decay,
            coupling_scale=group["coupling_scale"] if self.coupled else 1.0,
            coupling_factor=group["coupling_factor"],
            grad_factor=-clip if group["maximize"] else clip,
        )


def halt_beside(param: Tensor, halt: Tensor | bool) -> Tensor | None:
    """Return what ``Work.halt`` is for a parameter, if ``halt`` is known on some device; None if nothing halts."""
    return halt.to(local(param).device) if isinstance(halt, Tensor) else None


def advance(items: Sequence[Work]) -> None:
    """Count a step of parameters that lie alike; one that may be halted is counted on the device, which knows."""
    halt, steps = items[0].halt, [item.state["step"] for item in items]
    if halt is None and (len(steps) == 1 or steps[0].device.type == "cpu"):
        for step in steps:
            step += 1
    elif halt is None:
        torch._foreach_add_(steps, 1)
    elif halt.device == steps[0].device:
        torch._foreach_add_(steps, [1 - halt] * len(steps))
    else:  # the first time: from now on the counts stay there
        for item, step in zip(items, steps, strict=True):
            item.state["step"] = step.to(halt.device, non_blocking=True) + (1 - halt)


@dataclass(frozen=True)
class Known:
    """What was exchanged. What concerns this process alone is computed when a parameter's turn comes, and its numbers
    are about to be read anyway."""

    work: list[Work]
    """Without the parameters of which no process has a gradient."""
    means: dict[Tensor, Tensor]
    triples: dict[Tensor, tuple[RankOne, Tensor]]
    """Leading singular triples, and what their ``u`` becomes."""
    norm: Tensor | None
    """Of all gradients; None if nothing bounds it."""

    def mean(self, item: Work, clip: Number) -> Tensor:
        """Return means over the vocabulary: of g² + κ·m², (1, H), g being the gradient times ``clip``; if the mean row
        after the step is to be foreseen, also of the gradient as it is, of parameter and first moment: (4, H)."""
        found = self.means.get(item.param)
        return run_one(_mean(item, clip)) if found is None else found

    def triple(self, item: Work) -> RankOne:
        """Return the leading singular triple of a parameter, and move its ``u`` on."""
        found = self.triples.get(item.param)
        triple, u = run_one(_power_iteration(item)) if found is None else found
        before = local(item.state["u"])
        before.copy_(u if item.halt is None else torch.where(item.halt > 0, before, u))
        return triple


def exchange(work: list[Work], held: Sequence[Tensor] | None, *, rescaled: bool) -> Known:
    """Make the reductions that communicate, all at once, and the norm of the gradients.

    Nothing here waits for an accelerator but a process that lacks a gradient which others may have: it reads whether
    they do.

    Args:
        work: in the same order in every process.
        held: all parameters, with a gradient or not; None if no norm is wanted.
        rescaled: whether the gradients are yet to be multiplied by a factor.
    """
    shared = [item for item in work if item.shared_over]
    spectral = [item for item in shared if item.spectral]
    sums = _early_sums(work, norm=held is not None, rescaled=rescaled)
    squares_of = {param: part[:1] for param, part in sums.items()}
    norms = {} if held is None else clipping.partial_norms(held, {item.param: item.grad for item in work}, squares_of)
    here = norms.pop((), None)
    means, iterations, counts, squares = reductions.run(
        [reductions.vocabulary_mean(part, param) for param, part in sums.items()],
        [_power_iteration(item) for item in spectral],
        [reductions.complete(_flag(item), item.shared_over) for item in shared],
        [reductions.complete(norm.square(), over) for over, norm in norms.items()],
    )
    absent = {item.param for item, n in zip(shared, counts, strict=True) if not item.present and n.item() == 0}
    moving = [(item, found) for item, found in zip(spectral, iterations, strict=True) if item.param not in absent]
    return Known(
        work=[item for item in work if item.param not in absent],
        means=dict(zip(sums, means, strict=True)),
        triples={item.param: found for item, found in moving},
        norm=None if held is None else clipping.global_norm(here, squares),
    )


def _early_sums(work: list[Work], *, norm: bool, rescaled: bool) -> dict[Tensor, Tensor]:
    """Sum squares where this is needed before anything moves: to be exchanged, or for the norm that clips."""
    return {
        item.param: _sums(item, 1.0)
        for item in work
        # With κ the mean square is one of gradients times a factor that may not be known yet.
        if item.coupled and (norm or item.shared_over) and not (rescaled and item.group["coupling_factor"] != 0)
    }


def clipped(known: Known, clip: Number) -> Known:
    """Return the same for gradients times ``clip``. With κ this exchanges once more."""
    means = {param: _scaled(mean, clip) for param, mean in known.means.items()}
    late = [item for item in known.work if item.coupled and item.shared_over and item.param not in means]
    (found,) = reductions.run([_mean(item, clip) for item in late])
    return replace(known, means=means | {item.param: m for item, m in zip(late, found, strict=True)})


def is_spectral(state: dict[str, Any], group: ParamGroup) -> bool:
    """Return whether a parameter's step takes off its leading singular triple."""
    return "u" in state and group["weight_decay"] != 0


def shared_over(param: Tensor, state: dict[str, Any], group: ParamGroup) -> ProcessGroups:
    """The process groups over which the reductions of a parameter communicate."""
    if is_spectral(state, group):
        return reductions.holders(param)
    return reductions.holders(param, 0) if group["second_moment"] == "vocabulary" or group["center"] else ()


def _sums(item: Work, clip: Number) -> Tensor:
    """Compute this rank's part of the sums over the vocabulary behind ``Known.mean``."""
    c = item.coefficients(1, clip)  # the step does not count here
    grad = local(item.grad)
    if not item.foreseen:
        return dispatch.sum_of_squares(grad, item.moment, c)
    exp_avg = item.state["exp_avg"]
    sums = sums_of_gradient(grad, local(exp_avg), c)
    return torch.cat([sums, column_sums(item.param, exp_avg).to(sums.dtype)])


def _mean(item: Work, clip: Number) -> Reduction[Tensor]:
    return reductions.vocabulary_mean(_sums(item, clip), item.param)


def _power_iteration(item: Work) -> Reduction[tuple[RankOne, Tensor]]:
    return reductions.power_iteration(item.state["u"], item.param, item.steps)


def _flag(item: Work) -> Tensor:
    """Return what a rank adds to the number of those that have a gradient."""
    return local(item.param).new_full((1,), float(item.present), dtype=torch.float32)


def _scaled(mean: Tensor, clip: Number) -> Tensor:
    """Scale the mean square of gradients to that of gradients times ``clip``."""
    factor = dispatch.beside(clip, mean)
    square = mean[:1] * (factor * factor)
    return square if len(mean) == 1 else torch.cat([square, mean[1:]])
