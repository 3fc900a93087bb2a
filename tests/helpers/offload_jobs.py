"""What processes run whose shards are offloaded: on the CPU, with a mesh of accelerators, as CPUOffloadPolicy has it.

There is no accelerator: one is made up, and a tensor that is moved to it raises.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import patch

import jobs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from coupled_adam import CoupledAdam
from coupled_adam.monitor import drift, health

KIND = "hpu"


@contextlib.contextmanager
def accelerators() -> Iterator[None]:
    """Make up accelerators, as many as there are processes."""
    made_up = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: False,
        device_count=dist.get_world_size,
        current_device=dist.get_rank,
        set_device=lambda _: None,
    )
    with patch.object(torch, KIND, made_up, create=True):
        yield


def offloaded(x: DTensor, mesh: DeviceMesh) -> DTensor:
    """The shards of ``x`` as they are, with another mesh."""
    return DTensor(x.to_local(), DTensorSpec(mesh, x.placements, tensor_meta=x._spec.tensor_meta), requires_grad=False)


def stepped(optimizer: str, layout: tuple[str, ...], offload: bool) -> dict[str, Tensor]:
    """This process's part of parameters and state after some steps, a checkpoint in between; drift and health."""
    spread = jobs.spreader(layout)
    with accelerators() if offload else contextlib.nullcontext():
        sizes = (dist.get_world_size(),) if len(layout) == 1 else (2, 2)
        mesh = init_device_mesh(KIND, sizes) if offload else None

        def placed(x: Tensor) -> DTensor:
            return spread(x) if mesh is None else offloaded(spread(x), mesh)

        params = {name: nn.Parameter(placed(x)) for name, x in jobs.values(7, 0).items()}
        opt = jobs.build(params, optimizer)
        opt.param_groups[0]["center"] = True
        for step in range(6):
            for name, x in jobs.values(7, step + 1).items():
                params[name].grad = placed(x)
            opt.step()
            if step == 2:
                whole = opt.state_dict()
                for state in whole["state"].values():  # as from one process, whole and plain
                    state |= {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
                opt = jobs.build(params, optimizer)
                opt.load_state_dict(whole)
        found = {name: p.to_local().detach().clone() for name, p in params.items()}
        for name, p in params.items():
            for key, x in opt.state[p].items():
                found[f"{name} {key}"] = x.to_local().clone() if isinstance(x, DTensor) else x.clone()
        embedding = params["embedding"]
        found |= {name: torch.tensor(x) for name, x in health(embedding, isotropy=True).items()}
        if isinstance(opt, CoupledAdam):
            moved = drift(opt, embedding)
            found["drift"] = torch.stack([moved.second_moments, moved.gradients, moved.decay])
        return found


def without_gloo() -> str:
    """The error of a step whose process groups are for accelerators alone."""
    with accelerators():
        group = dist.new_group(backend=f"{KIND}:gloo")
        mesh = DeviceMesh.from_group(group, KIND)
        x = jobs.spreader(("rows",))(torch.ones(6, 4))
        param = nn.Parameter(offloaded(x, mesh))
        param.grad = offloaded(x, mesh)
        optimizer = CoupledAdam([{"params": [param], "second_moment": "vocabulary"}])
        try:
            optimizer.step()
        except ValueError as error:
            assert torch.equal(param.to_local(), x.to_local()) and Replicate() not in param.placements
            return str(error)
    return ""
