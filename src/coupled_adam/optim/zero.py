"""Adams for plain replicated parameters, its state spread over the processes (ZeRO)."""

import copy
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from coupled_adam.optim.adams import Adams
from coupled_adam.optim.checks import DEFAULT_LR, Form
from coupled_adam.optim.equations import Number
from coupled_adam.optim.job import Job
from coupled_adam.optim.optimizer import Member
from coupled_adam.optim.reductions import ProcessGroups, is_dtensor, local, placed_like
from coupled_adam.optim.state import job_of, new_state
from coupled_adam.optim.typed import MomentDtype, ParamGroup, State, parameter_name

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement


class Adams_ZeRO(Adams):
    """``coupled_adam.Adams`` with moments and master weights sharded over the processes of a group.

    Every process holds the whole model as plain tensors and computes gradients of its part of the batch; the model is
    not wrapped in ``DistributedDataParallel``. A step averages the gradients over the processes (reduce-scatter),
    updates each process's shard of the master weights, and distributes the result (all-gather): the same as one process
    with the mean gradient. At the start, all processes take the parameters of the first one. From the first step on,
    the master weights are authoritative: change parameters by hand only before it.

    A group with ``second_moment="vocabulary"`` is coupled, and ``max_grad_norm`` bounds the norm of the averaged
    gradient. In processes where a parameter has no gradient it counts as 0; a parameter without a gradient in all of
    them is not updated. ``p.grad`` is never modified. All processes must call ``step`` and ``add_param_group``
    together.

    The state holds DTensors: save and load it with ``torch.distributed.checkpoint``, on any number of processes. The
    moments and master weights are restored exactly. In a single process, with or without an initialized process group,
    everything is a plain tensor.

    Args:
        params: plain parameters of any floating dtype, on a device that the process group supports.
        lr: learning rate η ≥ 0, a float or a tensor with one element; 1e-3 by default.
        betas: decay rates (β1, β2) of the moments, each in [0, 1).
        weight_decay: spectral decay λ ≥ 0.
        scalar_vector_weight_decay: decoupled decay of the parameters that take no spectral decay.
        coupling_scale: as in ``coupled_adam.CoupledAdam``, like all that follow.
        coupling_factor: κ in [0, 1], the share of the squared first moment in the second one.
        row_exponent: α in [0, 1], as of ``CoupledAdam``; the matrix must have at least as many rows as there are
            processes.
        max_grad_norm: bound on the global norm of the gradients; None for none.
        error_if_nonfinite: raise RuntimeError before anything moves if that norm is infinite or NaN.
        maximize: maximize the objective.
        exp_avg_dtype: how the first moment is stored: None for float32, ``torch.bfloat16``, or ``"8bit"``.
        fused: None for the fastest implementation available, False for plain operations, True to insist on a fast one.
        master_dtype: dtype of the master weights, in which gradients are averaged.
        process_group: the processes that share the state; None for all.

    Raises:
        ValueError, TypeError: as for ``coupled_adam.Adams``; also for parameters that are sharded already.
        RuntimeError: from ``step``, with an enabled ``GradScaler``, which would skip a step in one process only.

    Source: Rajbhandari et al., "ZeRO", arXiv 1910.02054, stages 1 and 2; the interface is that of ``adams-torch``.

    Examples:
        >>> from coupled_adam import Adams_ZeRO
        >>> model = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
        >>> optimizer = Adams_ZeRO(model.parameters(), lr=1e-3)
        >>> model(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["master"].dtype
        torch.float32
    """

    spread = True

    #: Whether the master weights were made before the first step, and are to follow the parameters until then.
    _follows = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = DEFAULT_LR,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        scalar_vector_weight_decay: float = 0.1,
        *,
        coupling_scale: float = 1.0,
        coupling_factor: float = 0.0,
        row_exponent: float = 0.0,
        max_grad_norm: float | None = None,
        error_if_nonfinite: bool = False,
        maximize: bool = False,
        exp_avg_dtype: MomentDtype = None,
        fused: bool | None = None,
        master_dtype: torch.dtype = torch.float32,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        if not (isinstance(master_dtype, torch.dtype) and master_dtype.is_floating_point):
            raise ValueError(
                f"Invalid master_dtype: {master_dtype}; choose torch.float32 or another floating-point dtype"
            )
        self.master_dtype = master_dtype
        self.process_group = process_group
        super().__init__(
            params,
            lr,
            betas,
            weight_decay,
            scalar_vector_weight_decay,
            coupling_scale=coupling_scale,
            coupling_factor=coupling_factor,
            row_exponent=row_exponent,
            max_grad_norm=max_grad_norm,
            error_if_nonfinite=error_if_nonfinite,
            maximize=maximize,
            exp_avg_dtype=exp_avg_dtype,
            fused=fused,
        )

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "Adams_ZeRO with a process_group cannot be pickled: a process group belongs to its process. Save "
                "state_dict() with torch.distributed.checkpoint, or leave process_group None, which is all processes"
            )
        return super().__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adams_ZeRO":
        """Copy all but the process group and the mesh of it, which both copies use."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        shared = {"process_group": self.process_group}
        memo.update({id(x): x for x in (self.process_group, self._mesh) if x is not None})
        copied.__setstate__({**copy.deepcopy({**super().__getstate__(), "process_group": None}, memo), **shared})
        return copied

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters become those of the first process everywhere."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for i, param in enumerate(group["params"]):
            if is_dtensor(param):
                self.param_groups.pop()
                raise ValueError(
                    f"{parameter_name(group, i)} is a DTensor, which is already sharded; pass it to Adams, which "
                    "supports DTensors"
                )
            if hasattr(param, "vocabulary_group"):
                self.param_groups.pop()
                raise ValueError(
                    f"{parameter_name(group, i)} is a vocabulary shard (vocabulary_group), but Adams_ZeRO assumes "
                    "the same parameters in every process; pass it to Adams or CoupledAdam"
                )
        self.broadcast_buffers(p.detach() for p in group["params"])

    def broadcast_buffers(self, buffers: Iterable[Tensor]) -> None:
        """Broadcast tensors such as ``model.buffers()`` from the first process to all others, in place."""
        for buffer in buffers:
            if self._processes > 1:
                dist.broadcast(buffer, group=self.process_group, group_src=0)

    @property
    def _processes(self) -> int:
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.process_group)

    @cached_property
    def _mesh(self) -> "DeviceMesh | None":
        """The processes that share the state; None where there is but one."""
        if self._processes == 1:
            return None
        from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

        device = self.param_groups[0]["params"][0].device.type
        if self.process_group is None:
            return init_device_mesh(device, (self._processes,))
        return DeviceMesh.from_group(self.process_group, device)

    def _master(self, param: Tensor) -> Tensor:
        """Return this rank's shard of the master weights, as the parameter has them now."""
        whole = param.detach().to(self.master_dtype).contiguous()
        if self._mesh is None:
            master = whole.clone()
        else:  # nothing is sent, and no memory shared with the parameter
            from torch.distributed.tensor import distribute_tensor

            master = distribute_tensor(whole, self._mesh, self._placements(param), src_data_rank=None).clone()
        if hasattr(param, "use_spectral_decay"):
            master.use_spectral_decay = param.use_spectral_decay  # type: ignore[attr-defined]
        return master

    def _placements(self, param: Tensor) -> "list[Placement]":
        """By rows, so that one all-reduce serves the coupling; a matrix with few rows by its longest dimension."""
        from torch.distributed.tensor import Replicate, Shard

        if param.ndim == 0:
            return [Replicate()]
        longest = max(range(param.ndim), key=lambda dim: param.shape[dim])
        return [Shard(0 if param.shape[0] >= self._processes else longest)]

    def _target(self, param: Tensor) -> Tensor:
        master: Tensor = self.state[param]["master"]
        return master

    def _new_state(self, param: Tensor, group: ParamGroup) -> dict[str, Any]:
        master = self._master(param)
        return {**new_state(master, group), "master": master}

    def _only_makes_state(self) -> bool:
        self._follows = super()._only_makes_state()
        return self._follows

    def _prepare_state(self, members: Iterable[Member]) -> None:
        super()._prepare_state(members)
        if not self._follows:
            return
        self._follows = False
        for param, state in self.state.items():
            here, master = local(self._master(param)), local(state["master"])
            unchanged = master.to(param.dtype).to(master.dtype) == here
            master.copy_(torch.where(unchanged, master, here))

    def _form_of_state(self, param: Tensor, group: ParamGroup, state: State) -> Form:
        master = state.get("master")
        kept = master if isinstance(master, Tensor) and master.dtype is self.master_dtype else None
        form = super()._form_of_state(param if kept is None else kept, group, state)  # another is refused by name
        return {"master": (self.master_dtype, param.device), **form}

    def _amp_scaling(self) -> tuple[Number, Tensor | bool]:
        if getattr(self, "found_inf", None) is not None:  # GradScaler sets it, whether or not it has unscaled before
            raise RuntimeError(
                "Adams_ZeRO does not work with GradScaler, which skips a step only in the processes that find an "
                "infinity; train in bfloat16, which needs no scaling, or use FSDP2 with Adams"
            )
        return super()._amp_scaling()

    def _jobs(self, found_inf: Tensor | None) -> list[Job]:
        members = list(self._members())
        jobs = []
        for (group, i, param), present in zip(members, self._anywhere([param for *_, param in members]), strict=True):
            if present:
                state = self.state[param]
                job = job_of(state["master"], self._mean_gradient(param), state, group)
                job.index = next(n for n, known in enumerate(self.param_groups) if known is group), i
                jobs.append(job)
        return jobs

    def _sharing(self, params: Sequence[Tensor]) -> ProcessGroups:
        return (self.process_group or dist.group.WORLD,) if self._processes > 1 else ()

    def _anywhere(self, params: Sequence[Tensor]) -> list[bool]:
        """Return, for every parameter, whether any rank has a gradient."""
        here = [param.grad is not None for param in params]
        if self._mesh is None or not params:
            return here
        counts = torch.tensor(here, dtype=torch.float32, device="cpu").to(params[0].device)
        dist.all_reduce(counts, group=self.process_group)
        # Reading the counts waits for them on an accelerator, which a process with all gradients need not do.
        return here if all(here) else [count > 0 for count in counts.tolist()]

    def _mean_gradient(self, param: Tensor) -> Tensor:
        """Return this rank's shard of the gradient's mean over the ranks."""
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        grad = (grad.coalesce().to_dense() if grad.is_sparse else grad.resolve_neg()).to(self.master_dtype)
        if self._mesh is None:
            return grad
        from torch.distributed.tensor import DTensor, Partial

        total = DTensor.from_local(grad.contiguous(), self._mesh, [Partial()], run_check=False)
        return total.redistribute(placements=self._placements(param)) / self._processes

    def _publish(self, jobs: Sequence[Job]) -> None:
        masters = {id(job.whole) for job in jobs if job.rests is not True}
        for group in self.param_groups:
            for param in group["params"]:
                if param in self.state and id(self.state[param]["master"]) in masters:
                    self._copy_master(param, self.state[param]["master"])

    def load_state_dict(self, state_dict: dict[str, Any], *, resize_vocabulary: bool = False) -> None:
        """Load a checkpoint, as ``Adams.load_state_dict``; the parameters are then set to its master weights.

        Whole tensors are sharded over the processes. Without master weights in the checkpoint, those of the parameters
        are used.

        Args:
            state_dict: what ``state_dict()`` returned; it is not modified.
            resize_vocabulary: accept a checkpoint of the model with fewer or more tokens.
        """
        super().load_state_dict(state_dict, resize_vocabulary=resize_vocabulary)
        for group in self.param_groups:
            for param in group["params"]:
                if state := self.state.get(param):
                    self._copy_master(param, state["master"])

    @torch.no_grad()
    def _copy_master(self, param: Tensor, master: Tensor) -> None:
        narrow = master.to(param.dtype)  # before it travels
        param.copy_(placed_like(param, narrow))
