"""The figures of an embedding matrix that are worth following while it is trained, where it lies: on its device, in its
shards."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from coupled_adam.geometry.arrays import Matrix
from coupled_adam.geometry.metrics import principal_share_of
from coupled_adam.geometry.partition import LARGE, log_partition_around, ratio_of_extremes
from coupled_adam.models.output_heads import embedding_of
from coupled_adam.monitor.shards import blocks, complete, is_spread, precision, spread_by_rows
from coupled_adam.optim.reductions import local, vocabulary_group

#: What stands before the figures of an input embedding that is not the output embedding.
INPUT = "input_"

#: The share of the variance that the smallest squared singular value must have for products in float32 to do. Their
#: rounding errors move eigenvalues by 2e-10 to 4e-9 of the variance (50,304 × 768), so S_min is then exact to 1e-4.
SMALLEST_SHARE = 2e-5


@torch.no_grad()
def health(model_or_matrix: nn.Module | Matrix, *, isotropy: bool = False) -> dict[str, float]:
    """Measure an embedding matrix E (V, H) with mean μ, or the embeddings of a model, while it is trained.

    * ``mean_shift_ratio``: ‖μ‖ / mean_i ‖e_i‖, in [0, 1]
    * ``norm_of_mean``: ‖μ‖
    * ``principal_share``: the share of the largest principal direction in the variance around the mean, in [1/H, 1]
    * ``inverse_condition``: 100·S_min/S_max of the singular values, in percent; computed from EᵀE, so below 0.003 only
      its order of magnitude is reliable
    * ``isotropy``, on request: see ``coupled_adam.geometry.isotropy``; it takes twice as long as all the others

    The functions of ``coupled_adam.geometry`` of the same names compute the same metrics on the CPU. Here everything is
    summed in float64 on the matrix's device, one block of rows at a time. There is one exception: of a large matrix on
    a CPU, not sharded and in at most 32 bits, the products within a block are computed in float32, around the mean. The
    relative errors are then below 1e-5, and below 1e-4 for ``inverse_condition``; a matrix for which they might be
    larger is measured again in float64. So is one whose isotropy is asked for.

    Args:
        model_or_matrix: a matrix (array or tensor), or a model with ``get_output_embeddings()`` and
            ``get_input_embeddings()``, as in transformers, also inside a wrapper such as DistributedDataParallel or a
            LightningModule. If its parameters are DTensors, or vocabulary shards marked with ``vocabulary_group``, all
            ranks must call this and get the same metrics: sums of shapes (H, H) and (H,) are reduced, and the matrix
            is not gathered. A matrix sharded by columns is sent once, to be sharded by rows.
        isotropy: whether to measure isotropy too. As it is slow, do so in every n-th call.

    Returns:
        The metrics of the output embedding by name, and with the prefix ``input_`` those of an input embedding that is
        not tied to it. NaN where a metric is not defined, and for a matrix that contains NaN or infinity.

    Raises:
        ValueError: no embedding is found, or it is not a matrix with two rows or more; of two vocabulary shards, one
            lacks the mark.

    Examples:
        >>> shifted = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)) + 2
        >>> {name: round(value, 2) for name, value in health(shifted).items()}
        {'mean_shift_ratio': 0.9, 'norm_of_mean': 7.97, 'principal_share': 0.08, 'inverse_condition': 11.23}
    """
    if isinstance(model_or_matrix, nn.Module):
        found = _embeddings(model_or_matrix)
        return {prefix + k: x for prefix, e in found.items() for k, x in _figures(e, isotropy).items()}
    return _figures(torch.as_tensor(model_or_matrix), isotropy)


def _embeddings(model: nn.Module) -> dict[str, Tensor]:
    """Find output and input embedding, by the prefix of their figures."""
    weights: dict[str, Tensor] = {}
    for prefix, method in (("", "get_output_embeddings"), (INPUT, "get_input_embeddings")):
        weight = embedding_of(model, method)
        if weight is not None and all(weight is not known for known in weights.values()):
            weights[prefix] = weight
    if not weights:
        raise ValueError(
            f"{type(model).__name__} does not say what its embeddings are (get_output_embeddings() is missing, or "
            "returns None or several); pass the matrix itself"
        )
    marked = [w for w in weights.values() if vocabulary_group(w) is not None]
    for weight in weights.values():
        if not is_spread(weight) and any(weight.shape == shard.shape for shard in marked):
            raise ValueError(
                f"of two embeddings of shape {tuple(weight.shape)}, only one is marked as a vocabulary shard: set "
                "weight.vocabulary_group of the other too, or pass one matrix instead of the model"
            )
    return weights


def _figures(embedding: Tensor, isotropy: bool) -> dict[str, float]:
    if embedding.ndim != 2 or embedding.shape[1] < 1:
        raise ValueError(_no_matrix(embedding.shape))
    held = local(embedding)
    if held.numel() and not held.untyped_storage().nbytes():
        raise ValueError("the embedding matrix has no memory, as FSDP1 leaves it between two passes: gather it first")
    e = spread_by_rows(embedding)
    width = e.shape[1]
    sums = torch.zeros(3, width, dtype=precision(e), device=e.device)
    for rows in _rows(e, precision(e)):
        sums[0] += rows.sum(0)
        sums[1] += torch.linalg.vector_norm(rows, dim=1).sum()  # in all columns, so that one reduction takes all
        sums[2] += len(rows)  # of a vocabulary shard, nobody knows V
    sums = complete(sums, e)
    height = int(sums[2, 0].item())
    if height < 2:
        raise ValueError(_no_matrix((height, width)))
    mean, lengths = sums[:2] / height
    norm_of_mean, length = mean.norm().item(), lengths[0].item()
    figures = {"mean_shift_ratio": _ratio(norm_of_mean, length), "norm_of_mean": norm_of_mean}
    if not math.isfinite(length):  # the matrix has no eigenvalues either
        return dict.fromkeys((*figures, "principal_share", "inverse_condition", *["isotropy"] * isotropy), math.nan)
    quick = not isotropy and _float32_may_do(e, length)
    with _one_thread_of_torch(e.device):
        scatter, spectrum, squares = _spectra(e, height, mean, torch.float32 if quick else precision(e))
        if quick and spectrum[0] < SMALLEST_SHARE * scatter.sum():
            scatter, spectrum, squares = _spectra(e, height, mean, precision(e))
    rounding = 1e4 * torch.finfo(precision(e)).eps
    figures["principal_share"] = principal_share_of(scatter.cpu().numpy(), squares.trace().item(), rounding)
    figures["inverse_condition"] = 100 * _ratio(spectrum[0].sqrt().item(), spectrum[-1].sqrt().item())
    if isotropy:
        figures["isotropy"] = _isotropy(e, mean, torch.linalg.eigh(squares)[1])
    return figures


def _no_matrix(shape: tuple[int, ...]) -> str:
    return (
        f"an embedding matrix is (vocabulary, hidden) with two rows or more, not of shape {tuple(shape)}. FSDP1 and "
        "DeepSpeed ZeRO-3 flatten and shard parameters: gather the matrix first"
    )


def _float32_may_do(e: Tensor, length: float) -> bool:
    """Whether the products of rows may be computed in float32: where that saves time, loses no digits of the values and
    stays in its range. All ranks take part in what follows, so they must not decide differently: with several, no.
    """
    in_range, short = e.dtype.is_floating_point and 1e-10 < length < 1e10, e.dtype.itemsize <= 4
    return e.device.type == "cpu" and not is_spread(e) and short and in_range and e.numel() * e.shape[1] >= LARGE


def _spectra(e: Tensor, height: int, mean: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the eigenvalues of (E − μ)ᵀ(E − μ), ascending, those of EᵀE without the zeros of a flat matrix, and EᵀE.

    The mean is taken from the rows first, however large it is. Blocks of rows are multiplied in ``dtype``, and added up
    in float64.
    """
    width = e.shape[1]
    center = mean.to(dtype)
    scatter = torch.zeros(width, width, dtype=mean.dtype, device=e.device)
    for rows in _rows(e, dtype, times=16):
        scatter += _gram(rows.sub_(center))
    scatter = complete(scatter, e)
    rest = mean - center  # what rounding left of the mean
    scatter -= height * torch.outer(rest, rest)
    squares = scatter + height * torch.outer(mean, mean)
    spectrum = torch.linalg.eigvalsh(squares)[-min(height, width) :].clamp(min=0)
    return torch.linalg.eigvalsh(scatter), spectrum, squares


@contextmanager
def _one_thread_of_torch(device: torch.device) -> Iterator[None]:
    """On a CPU, leave the processors to numpy: threads of torch that wait for their next work keep them busy."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _gram(rows: Tensor) -> Tensor:
    """Compute RᵀR. On a CPU by numpy, which sees that it is symmetric and computes half of it."""
    if rows.device.type != "cpu":
        return rows.T @ rows
    r = rows.numpy()
    return torch.from_numpy(r.T @ r)


def _isotropy(e: Tensor, mean: Tensor, directions: Tensor) -> float:
    """min_c Z(c) / max_c Z(c) with Z(c) = Σ_i exp(e_i·c), over the columns of ``directions``, EᵀE's eigenvectors."""
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * largest.sign()  # a sign of its own has no eigenvector; so the figure is reproducible

    def centered() -> Iterator[Tensor]:
        return (rows.sub_(mean) for rows in _rows(e, precision(e), times=16))

    if e.device.type == "cpu" and not is_spread(e):
        longest = max(torch.linalg.vector_norm(rows, dim=1).max().item() for rows in centered())
        found = log_partition_around(
            mean.numpy(), lambda: (rows.numpy() for rows in centered()), directions.numpy(), len(e), longest
        )
        return ratio_of_extremes(found)
    log_z = torch.full_like(directions[0], -torch.inf)
    for rows in centered():
        log_z = torch.logaddexp(log_z, (rows @ directions).logsumexp(0))  # without rows: −∞, which adds nothing
    highest = complete(log_z[None], e, "max")[0]
    log_z = mean @ directions + highest + complete((log_z - highest).exp()[None], e)[0].log()
    return (log_z.min() - log_z.max()).exp().item()


def _rows(e: Tensor, dtype: torch.dtype, times: int = 1) -> Iterator[Tensor]:
    """Yield the rows that this process holds, a block at a time: in one place, so each block is gone with the next."""
    place: Tensor | None = None
    for (rows,) in blocks(local(e), times=times):
        place = torch.empty(rows.shape, dtype=dtype, device=rows.device) if place is None else place
        yield place[: len(rows)].copy_(rows)


def _ratio(part: float, total: float) -> float:
    return part / total if total > 0 else float("nan")
