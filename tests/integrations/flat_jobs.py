"""What processes are told that would train with FSDP1; run by :class:`processes.Processes`."""

import pytest
import torch
from fsdp2_jobs import batch, llama
from torch.distributed.fsdp import FullyShardedDataParallel

from coupled_adam import CoupledAdam, param_groups
from coupled_adam.monitor import health


def told_by_fsdp1(use_orig_params: bool) -> dict[str, str]:
    """The errors with optimizers built before wrapping and after it, and of the model's health."""
    model = llama()
    early = CoupledAdam(param_groups(model), lr=1e-2)
    wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    wrapped(input_ids=batch(0), labels=batch(0)).loss.backward()
    attempts = {
        "model": lambda: param_groups(wrapped),
        "name": lambda: param_groups(wrapped, coupled="lm_head"),
        "health": lambda: health(wrapped),
    }
    if use_orig_params:  # else the wrapped model has parameters of its own, and the early ones no gradient
        attempts["step"] = early.step
    told = {}
    for name, attempt in attempts.items():
        with pytest.raises((ValueError, RuntimeError)) as error:
            attempt()
        told[name] = str(error.value)
    return told
