"""What an update needs to know of the whole tensor. The only place of the optimizers that may communicate.

A reduction is a generator: it computes this process's part of a sum, yields it, and is sent the whole sum; the last
that it yields is its result. ``run`` runs many of them in step, so that the sums which they need at the same time
travel in one all-reduce.
"""

import sys
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement
    from typing_extensions import TypeIs

T = TypeVar("T")

#: Process groups, whose members hold the other parts of something.
ProcessGroups = tuple[Any, ...]


class Sum(NamedTuple):
    """A sum that is not complete yet."""

    part: Tensor
    """What this process adds, of the same shape everywhere."""
    over: ProcessGroups
    """The process groups to sum over, one after the other; empty if ``part`` is the whole."""


Reduction = Generator[Sum | T, Tensor, None]


def run(*batches: Sequence[Reduction[Any]]) -> list[list[Any]]:
    """Run reductions together and return their results, batch by batch. Every rank must run the same, in order."""
    reductions = [reduction for batch in batches for reduction in batch]
    yielded: list[Any] = [next(reduction) for reduction in reductions]
    while waiting := [i for i, y in enumerate(yielded) if isinstance(y, Sum)]:
        for i, whole in zip(waiting, _complete([yielded[i] for i in waiting]), strict=True):
            yielded[i] = reductions[i].send(whole)
    results = iter(yielded)
    return [[next(results) for _ in batch] for batch in batches]


def run_one(reduction: Reduction[T]) -> T:
    """Run a single reduction and return its result."""
    ((result,),) = run([reduction])
    return result  # type: ignore[no-any-return]


def _complete(sums: Sequence[Sum]) -> list[Tensor]:
    """Complete the sums: one all-reduce for each process group."""
    parts = [s.part for s in sums]
    for group in dict.fromkeys(group for s in sums for group in s.over):
        members = [i for i, s in enumerate(sums) if group in s.over]
        flat = torch.cat([parts[i].reshape(-1) for i in members])
        torch.distributed.all_reduce(flat, group=group)
        pieces = torch.split(flat, [parts[i].numel() for i in members])
        for i, piece in zip(members, pieces, strict=True):
            parts[i] = piece.view(parts[i].shape).to(parts[i].dtype)
    return parts


def is_dtensor(x: Tensor) -> "TypeIs[DTensor]":
    """Return whether ``x`` is a DTensor.

    None exists before their module is imported. Importing it here would take as long as torch itself, and torch warns
    where NumPy is not installed.
    """
    plain = type(x) in (Tensor, torch.nn.Parameter)  # nearly all are, and this is asked often
    return not plain and isinstance(x, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def local(x: Tensor) -> Tensor:
    """Return the part of ``x`` that this rank holds: the shard of a DTensor, any other tensor itself."""
    return x.to_local() if is_dtensor(x) else x


def whole(x: Tensor) -> Tensor:
    """Return all of ``x`` in every process: communicates if it is a DTensor."""
    if is_dtensor(x):
        return x.full_tensor()
    return x


def holders(x: Tensor, dim: int | None = None) -> ProcessGroups:
    """Return the process groups that share ``x`` along ``dim``, or any dimension if None; empty for a whole tensor."""
    if not torch.distributed.is_available():
        return ()
    group = vocabulary_group(x)
    marked = (group,) if group is not None and (dim is None or dim % x.ndim == 0) else ()
    if not is_dtensor(x):
        return marked
    mesh = x.device_mesh
    cutting = (
        mesh.get_group(i)
        for i, cut in enumerate(cuts(x))
        if cut is not None and mesh.size(i) > 1 and (dim is None or cut == dim % x.ndim)
    )
    return (*cutting, *marked)


def vocabulary_group(x: Tensor) -> Any:
    """Return the process group whose members hold the other rows of ``x``, where ``x.vocabulary_group`` says so.

    That is the mark of a vocabulary shard which is a tensor like any other: nothing else tells that it is one.
    """
    group = getattr(x, "vocabulary_group", None)
    if group is None:
        return None
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"Invalid vocabulary_group of a parameter of shape {tuple(x.shape)}: {type(group).__name__}; it must be a "
            'process group, as torch.distributed.new_group() and mesh.get_group("tp") return it'
        )
    return group if torch.distributed.get_world_size(group) > 1 else None


def cuts(x: "DTensor") -> list[int | None]:
    """Return the dimension of ``x`` that each dimension of its mesh cuts; None where it replicates."""
    return [getattr(p, "dim", -1) % x.ndim if hasattr(p, "dim") else None for p in x.placements]


def placed_like(template: Tensor, x: Tensor) -> Tensor:
    """Place ``x`` as ``template`` is. Communicates where shards or pending sums come together."""
    if is_dtensor(x):
        if is_dtensor(template) and x.device_mesh == template.device_mesh:
            same = x.placements == template.placements
            return x if same else x.redistribute(placements=template.placements)
        x = x.full_tensor()
    if is_dtensor(template):
        return spread(x.to(template.device), template.device_mesh, template.placements)
    return x


def spread(whole: Tensor, mesh: "DeviceMesh", placements: Sequence["Placement"]) -> "DTensor":
    """Place a tensor that every process holds; nothing is sent."""
    from torch.distributed.tensor import Replicate

    whole = whole.contiguous()
    everywhere = as_dtensor(whole, mesh, [Replicate()] * mesh.ndim, whole.shape, whole.stride())
    return everywhere.redistribute(placements=placements)


def as_dtensor(
    part: Tensor, mesh: "DeviceMesh", placements: Sequence["Placement"], shape: torch.Size, stride: tuple[int, ...]
) -> "DTensor":
    """Make a DTensor of the part that this process holds, on the device where the part is.

    ``DTensor.from_local`` would move it to the mesh's kind of device. With FSDP2's ``CPUOffloadPolicy`` shards are on
    the CPU and their mesh is one of accelerators.

    Raises:
        ValueError: a process group of the mesh cannot communicate from the part's device.
    """
    from torch.distributed.tensor import DTensor

    kind = part.device.type
    if part.is_meta or kind == mesh.device_type:
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
    for i in range(mesh.ndim):
        backends = torch.distributed.get_backend_config(mesh.get_group(i))
        if mesh.size(i) > 1 and f"{kind}:" not in backends:
            raise ValueError(
                f"The process group ({backends}) cannot communicate from the {kind}, where CPUOffloadPolicy keeps the "
                f'parameters; create it with init_process_group("{kind}:gloo,{backends}")'
            )
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(shape, stride, part.dtype))
    return DTensor(part, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def reduced_like(param: Tensor, part: Tensor, dim: int) -> Tensor:
    """Wrap ``part``, a reduction of the local part of ``param`` over ``dim``, as the kind of tensor that ``param`` is.

    The reduction keeps the dimension, or is over the last one.
    """
    if not is_dtensor(param):
        return part
    from torch.distributed.tensor import Replicate

    dim %= param.ndim
    shape = torch.Size([*param.shape[:dim], *([1] if part.ndim == param.ndim else []), *param.shape[dim + 1 :]])
    pairs = zip(cuts(param), param.placements, strict=True)
    placements = [Replicate() if cut is None or cut == dim else placement for cut, placement in pairs]
    return as_dtensor(part, param.device_mesh, placements, shape, torch.empty(shape, device="meta").stride())


def rows_like(matrix: Tensor, part: Tensor) -> Tensor:
    """Wrap ``part``, which has the rows of ``matrix`` held here, as the kind of tensor that the matrix is.

    A DTensor must have whole rows here.
    """
    if not is_dtensor(matrix):
        return part
    shape = torch.Size([len(matrix), *part.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return as_dtensor(part, matrix.device_mesh, matrix.placements, shape, stride)


def vocabulary_mean(part: Tensor, matrix: Tensor) -> Reduction[Tensor]:
    """Average over the rows of ``matrix`` (V, H); ``part``, (1, H) or several such, are sums over those held here."""
    over = holders(matrix, 0)
    if vocabulary_group(matrix) is None:
        total = yield Sum(part, over)
        yield total / max(matrix.shape[0], 1)
    else:  # no rank knows V
        both = yield Sum(torch.cat([part, part.new_full((len(part), 1), len(local(matrix)))], 1), over)
        yield both[:, :-1] / both[:, -1:].clamp(min=1)


def complete(part: Tensor, over: ProcessGroups) -> Reduction[Tensor]:
    """Complete a sum of which ``part`` is this rank's."""
    yield (yield Sum(part, over))
