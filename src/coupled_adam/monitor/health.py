"""The figures of an embedding matrix that are worth following while it is trained, where it lies: on its device, in its
shards."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from coupled_adam.geometry.arrays import Matrix
from coupled_adam.geometry.metrics import principal_share_of
from coupled_adam.models.output_heads import embedding_of
from coupled_adam.monitor.shards import blocks, complete, precision, spread_by_rows
from coupled_adam.optim.reductions import local

#: What stands before the figures of an input embedding that is not the output embedding.
INPUT = "input_"


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
    summed in float64 on the matrix's device, one block of rows at a time.

    Args:
        model_or_matrix: a matrix (array or tensor), or a model with ``get_output_embeddings()`` and
            ``get_input_embeddings()``, as in transformers, also inside a wrapper such as DistributedDataParallel or a
            LightningModule. If its parameters are DTensors, all ranks must call this and get the same metrics: sums of
            shapes (H, H) and (H,) are reduced, and the matrix is not gathered. A matrix sharded by columns is sent
            once, to be sharded by rows.
        isotropy: whether to measure isotropy too. As it is slow, do so in every n-th call.

    Returns:
        The metrics of the output embedding by name, and with the prefix ``input_`` those of an input embedding that is
        not tied to it. NaN where a metric is not defined.

    Raises:
        ValueError: no embedding is found, or it is not a matrix with two rows or more.

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
            f"{type(model).__name__} does not say what its embeddings are (get_output_embeddings() is missing or "
            "returns None); pass the matrix itself"
        )
    return weights


def _figures(embedding: Tensor, isotropy: bool) -> dict[str, float]:
    if embedding.ndim != 2 or embedding.shape[0] < 2 or embedding.shape[1] < 1:
        raise ValueError(
            "an embedding matrix is (vocabulary, hidden) with two rows or more, not of shape "
            f"{tuple(embedding.shape)}. FSDP1 and DeepSpeed ZeRO-3 flatten and shard parameters: gather the matrix "
            "first"
        )
    e = spread_by_rows(embedding.detach())
    height, width = e.shape
    sums, squares, norms = (torch.zeros(n, width, dtype=precision(e), device=e.device) for n in (1, width, 1))
    for rows in _rows(e):
        sums += rows.sum(0)
        squares.addmm_(rows.T, rows)
        norms += rows.norm(dim=1).sum()  # the same number in all columns, so that one reduction takes all three
    both = complete(torch.cat([squares, sums, norms]), e)
    squares, mean, length = both[:width], both[width] / height, both[width + 1, 0].item() / height
    scatter = torch.linalg.eigvalsh(squares - height * torch.outer(mean, mean))  # of E − μ, ascending
    spectrum, directions = torch.linalg.eigh(squares) if isotropy else (torch.linalg.eigvalsh(squares), squares)
    spectrum = spectrum[-min(height, width) :].clamp(min=0)
    figures = {
        "mean_shift_ratio": _ratio(mean.norm().item(), length),
        "norm_of_mean": mean.norm().item(),
        "principal_share": principal_share_of(scatter.cpu().numpy(), squares.trace().item()),
        "inverse_condition": 100 * _ratio(spectrum[0].sqrt().item(), spectrum[-1].sqrt().item()),
    }
    if isotropy:
        figures["isotropy"] = _isotropy(e, directions)
    return figures


def _isotropy(e: Tensor, directions: Tensor) -> float:
    """min_c Z(c) / max_c Z(c) with Z(c) = Σ_i exp(e_i·c), over the columns of ``directions``, EᵀE's eigenvectors."""
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * largest.sign()  # a sign of its own has no eigenvector; so the figure is reproducible
    log_z = torch.full_like(directions[0], -torch.inf)
    for rows in _rows(e):
        log_z = torch.logaddexp(log_z, (rows @ directions).logsumexp(0))  # without rows: −∞, which adds nothing
    highest = complete(log_z[None], e, "max")[0]
    log_z = highest + complete((log_z - highest).exp()[None], e)[0].log()
    return (log_z.min() - log_z.max()).exp().item()


def _rows(e: Tensor) -> Iterator[Tensor]:
    for (rows,) in blocks(local(e)):
        yield rows.to(precision(e))


def _ratio(part: float, total: float) -> float:
    return part / total if total > 0 else float("nan")
