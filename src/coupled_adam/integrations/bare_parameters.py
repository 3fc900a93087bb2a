"""Trainers that hand an optimizer bare ``model.parameters()``: litgpt, torchtune, LightningCLI.

There are no names and no model to ask, so the user says how many rows the embedding matrix has.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import Tensor

from coupled_adam.integrations.announce import announce
from coupled_adam.optim import CoupledAdam
from coupled_adam.optim.checks import check_factor

__all__ = ["VocabularyCoupledAdam", "Which"]

Which = Literal["first", "last", "all"]
"""Which of several matrices with as many rows as the vocabulary is coupled, in the order of the parameters."""


class VocabularyCoupledAdam(CoupledAdam):
    """``coupled_adam.CoupledAdam`` for bare parameters: couples the matrix with exactly as many rows as the vocabulary.

    That matrix has no weight decay; other matrices have ``weight_decay``, vectors and scalars none.

    Args:
        params: all parameters of the model, as from ``model.parameters()``; not param groups.
        vocabulary_size: rows of the output embedding, including padding (litgpt: ``padded_vocab_size``).
        which: which of several such matrices is the output embedding, in the order of ``params``: the "first", the
            "last", or "all" of them. An untied model has two. Models usually register the output embedding last; litgpt
            registers it first.
        betas: decay rates (β1, β2) of the moments, each in [0, 1); a list is accepted too, as from YAML.
        eps: ε ≥ 0, added to the root of the second moment.
        weight_decay: decoupled weight decay λ ≥ 0 of matrices that are not coupled.
        coupling_scale: s > 0, multiplies the coupled second moment.
        embedding_lr_factor: factor on the steps of that matrix, with the effect of another learning rate; positive and
            finite. Its group keeps the rate of the others, because litgpt sets one rate for all groups in every step
            and torchtune accepts only one; instead, second moment and ε are scaled: η·m̂/(sqrt(v̂/f²) + ε/f).
        options: the other arguments of ``coupled_adam.CoupledAdam``, among them ``lr``.

    Raises:
        ValueError: no matrix has that many rows, or several have and ``which`` is not given; the message lists them.
            ``embedding_lr_factor`` is not positive and finite.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8), nn.Linear(8, 100, bias=False))
        >>> optimizer = VocabularyCoupledAdam(model.parameters(), vocabulary_size=100, which="last", lr=1e-3)
        >>> optimizer.param_groups[0]["params"][0] is model[2].weight
        True
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        vocabulary_size: int,
        which: Which | None = None,
        *,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        coupling_scale: float = 1.0,
        embedding_lr_factor: float = 1.0,
        **options: Any,
    ) -> None:
        groups = _groups(list(params), vocabulary_size, which, weight_decay)
        check_factor("embedding_lr_factor", embedding_lr_factor)
        groups[0] |= {"coupling_scale": coupling_scale / embedding_lr_factor**2, "eps": eps / embedding_lr_factor}
        beta1, beta2 = betas  # a list, where it comes from YAML
        super().__init__(
            groups, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, coupling_scale=coupling_scale, **options
        )
        announce(self, "the trainer: see its settings")


def _groups(given: list[Any], rows: int, which: Which | None, weight_decay: float) -> list[dict[str, Any]]:
    """Sort parameters into groups: the matrix with so many rows, other matrices, vectors."""
    if any(isinstance(item, dict) for item in given):
        raise ValueError("VocabularyCoupledAdam takes parameters, not param groups; pass groups to CoupledAdam")
    if which not in (None, "first", "last", "all"):
        raise ValueError(f"Invalid which: {which!r}; choose 'first', 'last' or 'all'")
    params: list[Tensor] = [item[1] if isinstance(item, tuple) else item for item in given]
    found = [i for i, p in enumerate(params) if p.ndim == 2 and p.shape[0] == rows and p.requires_grad]
    if not found:
        shapes = sorted({tuple(p.shape) for p in params if p.ndim == 2}, key=lambda shape: -shape[0])
        raise ValueError(
            f"vocabulary_size={rows}: no trainable matrix has that many rows; the longest are {shapes[:5]}. Pass the "
            "number of rows of the output embedding, including padding; FSDP1 and DeepSpeed flatten it, FSDP2 does "
            "not"
        )
    if len(found) > 1 and which is None:
        listed = ", ".join(f"parameter {i} {tuple(params[i].shape)}" for i in found)
        raise ValueError(
            f"vocabulary_size={rows}: several matrices have that many rows ({listed} of {len(params)}); pass "
            "which='last' or which='first' for the output embedding, or which='all'"
        )
    chosen = set({"first": found[:1], "last": found[-1:]}.get(which or "all", found))
    rest = [i for i in range(len(params)) if i not in chosen]
    groups: list[dict[str, Any]] = [
        {"params": [given[i] for i in chosen], "weight_decay": 0.0, "second_moment": "vocabulary"},
        {"params": [given[i] for i in rest if params[i].ndim >= 2], "weight_decay": weight_decay},
        {"params": [given[i] for i in rest if params[i].ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
