"""Sums over the rows of a matrix that may be spread over processes: of what is held here, then in one all-reduce."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from coupled_adam.optim.reductions import as_dtensor, is_dtensor, local, vocabulary_group

#: Elements of which something of their size is held at a time: on a CPU they should stay in its cache.
ELEMENTS_ON_CPU, ELEMENTS = 2**18, 2**24


def is_spread(matrix: Tensor) -> bool:
    """Return whether other processes take part: the matrix is a DTensor, or a shard with ``vocabulary_group``."""
    return is_dtensor(matrix) or vocabulary_group(matrix) is not None


def spread_by_rows(matrix: Tensor) -> Tensor:
    """Return the matrix, detached, with whole rows on every process; one cut by columns is sent once, all to all."""
    rows = matrix.detach()
    if is_dtensor(rows) and any(getattr(p, "dim", 0) != 0 for p in rows.placements):
        from torch.distributed.tensor import Shard

        rows = rows.redistribute(placements=[Shard(0) if p.is_shard() else p for p in rows.placements])
    if (group := vocabulary_group(matrix)) is not None:
        rows.vocabulary_group = group  # type: ignore[attr-defined]  # torch copies no attributes
    return rows


def precision(x: Tensor) -> torch.dtype:
    """Return float64, or float32 on a device that has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def blocks(*matrices: Tensor, times: int = 1) -> Iterator[list[Tensor]]:
    """Yield the same rows of each of the matrices, (R, H) on this process, a part at a time; at least one, if empty.

    ``times`` as many elements as stay in the cache of a CPU suit products of matrices better.
    """
    first = matrices[0]
    elements = times * ELEMENTS_ON_CPU if first.device.type == "cpu" else ELEMENTS
    rows = max(elements // max(first.shape[1], 1), 1)
    for start in range(0, max(len(first), 1), rows):
        yield [x[start : start + rows] for x in matrices]


def complete(part: Tensor, matrix: Tensor, reduce: str = "sum") -> Tensor:
    """Reduce ``part``, (K, H) of the rows that this process holds of ``matrix``, over the processes with other rows.

    Where the matrix is cut by columns, so is ``part``, and the columns are gathered. All ranks must call it.
    """
    if is_dtensor(matrix):
        from torch.distributed.tensor import Partial, Replicate, Shard

        kinds = {0: Partial(reduce), 1: Shard(1), None: Replicate()}
        placements = [kinds[getattr(p, "dim", None)] for p in matrix.placements]
        columns = matrix.shape[1] if Shard(1) in placements else part.shape[1]
        made = as_dtensor(part, matrix.device_mesh, placements, torch.Size([len(part), columns]), (columns, 1))
        part = made.full_tensor()
    if (group := vocabulary_group(matrix)) is not None:
        operation = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}[reduce]
        part = part.clone()
        torch.distributed.all_reduce(part, operation, group)
    return part


def mean_over_rows(matrix: Tensor, functions: Callable[..., Sequence[Tensor]], *matrices: Tensor) -> Tensor:
    """Average what ``functions`` makes of blocks of ``matrices``, K times (R, H), over all rows: (K, H), in float64.

    The matrices are spread as ``matrix`` is. Sums over a block are in the precision of the matrix, at least float32.
    """
    total: Tensor | None = None
    for rows in blocks(*map(local, matrices)):
        dtypes = [torch.promote_types(x.dtype, torch.float32) for x in rows]
        made = functions(*(x.to(dtype) for x, dtype in zip(rows, dtypes, strict=True)))
        each = [x.sum(0).to(precision(matrix)) for x in made]
        sums = torch.stack([*each, torch.full_like(each[0], len(rows[0]))])  # of a vocabulary shard, nobody knows V
        total = sums if total is None else total.add_(sums)
    assert total is not None
    total = complete(total, matrix)
    return total[:-1] / total[-1]
