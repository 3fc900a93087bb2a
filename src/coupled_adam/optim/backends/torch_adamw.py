"""torch's own AdamW, fused where it can be: takes whatever it computes the same."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.optim.adamw import adamw

from coupled_adam.optim.checks import CAPTURE_DEVICES
from coupled_adam.optim.equations import beside, has_numbers, working_dtype
from coupled_adam.optim.job import Job, check_shapes, is_one

#: Where torch has a fused AdamW; elsewhere it chooses for itself.
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def refuses(job: Job) -> str:
    """Return why this backend does not take a job; empty if it does."""
    if not is_plain_adamw(job.param, job.group):
        return "torch's AdamW computes a different step"
    if not job.param.dtype == job.grad.dtype == cast(Tensor, job.exp_avg).dtype:
        return (
            "torch's AdamW needs parameter, gradient and first moment in one dtype, not a gradient in "
            f"{job.grad.dtype} with others"
        )
    if job.found_inf is not None and not _fuses(job):
        return "torch's fused AdamW does not support this memory layout"
    return ""


def is_plain_adamw(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether the group asks for what ``torch.optim.AdamW`` does, in the precision it has."""
    return bool(
        group["second_moment"] == "elementwise"
        and group["coupling_factor"] == 0
        and group["direction"] == "ratio"
        and group["decay"] == "decoupled"
        and not isinstance(group["exp_avg_dtype"], torch.dtype)
        and group["fused"] is not False
        and param.dtype == working_dtype(param)
    )


def sums(job: Job) -> Tensor:
    """Nothing that it takes has sums over rows."""
    raise NotImplementedError


def move(jobs: Sequence[Job]) -> None:
    """Step parameters of one group, with their gradients scaled; torch counts the step."""
    for job in jobs:
        check_shapes(job)
    group, clip, found_inf = jobs[0].group, jobs[0].clip, jobs[0].found_inf
    params, grads = [job.param for job in jobs], [job.grad for job in jobs]
    steps = [job.state["step"] for job in jobs]
    if not is_one(clip):
        if is_compiling() or len({grad.device for grad in grads}) > 1:
            grads = [grad * beside(clip, grad) for grad in grads]
        else:
            grads = list(torch._foreach_mul(grads, beside(clip, grads[0])))
    beta1, beta2 = group["betas"]
    fused = not is_compiling() and all(map(_fuses, jobs))
    fused = fused and (has_numbers(params[0]) or not isinstance(group["lr"], Tensor))  # of which there is no fake form
    adamw(
        params,
        grads,
        [cast(Tensor, job.exp_avg) for job in jobs],
        [job.exp_avg_sq for job in jobs],
        [],
        steps,
        foreach=is_compiling() or None,
        capturable=is_compiling() or steps[0].device.type in CAPTURE_DEVICES,  # or it reads the step, and waits
        fused=fused,
        found_inf=found_inf,  # the scale is in clip already: given it, the kernel would write the gradient back
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=cast(float, group["lr"]),
        weight_decay=float(group["weight_decay"]),
        eps=float(group["eps"]),
        maximize=group["maximize"],
    )


def _fuses(job: Job) -> bool:
    """Return whether the fused kernel takes them; it walks memory, and mixes up elements where the layouts differ."""
    if job.param.device.type not in FUSED_DEVICES:
        return False
    stride = job.param.stride()
    return stride == job.grad.stride() == cast(Tensor, job.exp_avg).stride() == job.exp_avg_sq.stride()
