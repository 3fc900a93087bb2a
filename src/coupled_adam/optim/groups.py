"""Which parameter of a model plays which role. Roles are found by identity, never by a name or a module's type."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

Coupled = nn.Module | Tensor

#: What models call the bound of a soft cap on their logits in their ``config``.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def param_groups(
    model: nn.Module, weight_decay: float = 0.1, coupled: Sequence[Coupled] | None = None, *, center: bool = False
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into the groups that language models are trained with.

    * coupled: the output embedding, tied or not; ``second_moment="vocabulary"``, no weight decay
    * matrices (two dimensions and more) that are not coupled: ``weight_decay``
    * vectors and scalars: no weight decay

    Groups without parameters are left out. They hold (name, parameter) pairs and fit any optimizer of torch, which
    takes no notice of the keys ``second_moment`` and ``decay``.

    Args:
        model: any module. The output embedding is what its ``get_output_embeddings()`` returns, as every causal
            language model of transformers has it.
        weight_decay: λ of the matrices.
        coupled: modules with a 2-D ``weight``, or parameters, to couple instead; ``[]`` for none.
        center: subtract the mean of the coupled matrices' rows in every step (μ-centering, arXiv 2601.02031). With an
            untied output embedding under a softmax this changes no probability, and a warning tells where it does.
            After the step of an optimizer of torch, which takes no notice of this key either, call
            ``coupled_adam.center_`` instead.

    Raises:
        ValueError: no output embedding is found (the message lists candidates), or an entry of ``coupled`` is no
            trainable matrix of this model.

    Examples:
        >>> from torch import nn
        >>> from coupled_adam import CoupledAdam, param_groups
        >>> model = nn.Sequential(nn.Embedding(100, 8), nn.LayerNorm(8), nn.Linear(8, 100, bias=False))
        >>> groups = param_groups(model, coupled=[model[2]])
        >>> [[name for name, _ in group["params"]] for group in groups]
        [['2.weight'], ['0.weight'], ['1.weight', '1.bias']]
        >>> optimizer = CoupledAdam(groups, lr=1e-3)
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    chosen = [output_embedding(model)] if coupled is None else coupled
    matrices = [_matrix(item, model) for item in chosen]
    is_coupled = {id(matrix) for matrix in matrices}
    if center:
        _warn_where_centering_tells(model, matrices)
    groups: list[dict[str, Any]] = [
        {
            "params": [(n, p) for n, p in named if id(p) in is_coupled],
            "weight_decay": 0.0,
            "second_moment": "vocabulary",
            "decay": "decoupled",
            **({"center": True} if center else {}),
        },
        {"params": [(n, p) for n, p in named if id(p) not in is_coupled and p.ndim >= 2], "weight_decay": weight_decay},
        {
            "params": [(n, p) for n, p in named if id(p) not in is_coupled and p.ndim < 2],
            "weight_decay": 0.0,
            "decay": "decoupled",  # Adams would take its scalar_vector_weight_decay
        },
    ]
    return [group for group in groups if group["params"]]


def output_embedding(model: nn.Module) -> nn.Module:
    """Return what ``get_output_embeddings()`` of the model returns, through wrappers. Raises ValueError without one."""
    inner = model
    # DistributedDataParallel and its like hold the model as `module` and hide its methods.
    while not hasattr(inner, "get_output_embeddings") and isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module  # type: ignore[assignment]
    head: nn.Module | None = getattr(inner, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(
            f"{type(inner).__name__} does not say what its output embedding is (get_output_embeddings() is missing or "
            f"returns None); pass it as coupled=[module or parameter], or coupled=[] to couple nothing. "
            f"Candidates: {_candidates(model.named_parameters())}"
        )
    return head


def _warn_where_centering_tells(model: nn.Module, matrices: Sequence[Tensor]) -> None:
    """Warn of what makes predictions depend on the mean of an output embedding."""
    modules = list(model.modules())
    inputs = {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
    if any(id(matrix) in inputs for matrix in matrices):
        warnings.warn(
            "center=True shifts the input embeddings too, which are tied to the output: predictions change. Untie "
            "them, or leave center False if the run must be the same but for the mean",
            UserWarning,
            stacklevel=3,
        )
    configs = (getattr(m, "config", None) for m in modules)
    caps = [cap for config in configs for key in CAPS if isinstance(cap := _setting(config, key), int | float) and cap]
    if caps:
        warnings.warn(
            f"center=True changes predictions of a model that caps its logits (at {caps[0]:g}): the cap of a shifted "
            "logit is no shifted cap. Leave one of the two out",
            UserWarning,
            stacklevel=3,
        )


def _setting(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else getattr(config, key, None)


def _matrix(item: Coupled, model: nn.Module) -> Tensor:
    """Return the trainable 2-D parameter of ``model`` that ``item`` stands for."""
    matrix = item.weight if isinstance(item, nn.Module) and hasattr(item, "weight") else item
    name = next((n for n, p in model.named_parameters(remove_duplicate=False) if p is matrix), None)
    if not isinstance(matrix, Tensor) or name is None:
        raise ValueError(
            f"coupled={type(item).__name__} is no parameter of this {type(model).__name__}, nor a module with a weight "
            f"that is one. Candidates: {_candidates(model.named_parameters())}"
        )
    if matrix.ndim != 2:
        raise ValueError(
            f"coupled parameter {name!r} has shape {tuple(matrix.shape)}; only (vocabulary, hidden) matrices couple"
        )
    if not matrix.requires_grad:
        raise ValueError(f"coupled parameter {name!r} is frozen (requires_grad=False); unfreeze it, or pass coupled=[]")
    return matrix


def _candidates(named: Iterable[tuple[str, Tensor]]) -> str:
    """Name the matrices with the most rows: an embedding is long and narrow."""
    matrices = sorted(((n, p) for n, p in named if p.ndim == 2), key=lambda item: -item[1].shape[0])
    return ", ".join(f"{n} {tuple(p.shape)}" for n, p in matrices[:5]) or "none, the model has no matrix"
