"""Which parameter of a model plays which role. Roles are found by identity, never by a name or a module's type."""

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from coupled_adam.models.output_heads import (
    FLATTENED,
    candidates,
    computed,
    embeddings_of,
    flat,
    has_another_use,
    in_flat_parameter,
    kind,
    listed,
    name_of,
    output_matrices,
)
from coupled_adam.optim.checks import check_factor, check_number
from coupled_adam.optim.state_dict import bare

Coupled = nn.Module | Tensor | str
"""What can be coupled: a module with a 2-D ``weight``, a parameter, or the name of either in the model."""

#: What models call the bound of a soft cap on their logits in their ``config``.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.1,
    coupled: Coupled | Iterable[Coupled] | None = None,
    *,
    center: bool = False,
    lr: float | Tensor | None = None,
    embedding_lr_factor: float | None = None,
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into the groups that language models are trained with.

    * coupled: the output embedding, tied or not; ``second_moment="vocabulary"``, no weight decay
    * matrices (two dimensions and more) that are not coupled: ``weight_decay``
    * vectors and scalars: no weight decay

    With ``lr``, each group has a learning rate, which any optimizer reads from the group, and which multiplicative
    schedules such as ``LambdaLR`` keep in proportion.

    Groups without parameters are left out. The optimizers of torch ignore the keys ``second_moment``, ``decay`` and
    ``lr_factor``. The parameters are (name, parameter) pairs; for an optimizer that does not accept names, such as
    ``ZeroRedundancyOptimizer``, strip them:

        groups = [
            {**group, "params": [p for _, p in group["params"]]}
            for group in param_groups(model)
        ]

    Args:
        model: any module; wrap or resize it first. The output embedding is what its ``get_output_embeddings()``
            returns, one module or several, as in every causal language model of transformers. It must match the
            vocabulary of the model's ``config`` or of its input embedding. If a model has no output embedding, as with
            a classifier, or a frozen one, nothing is coupled, with a warning.
        weight_decay: λ ≥ 0 of the matrices.
        coupled: what to couple instead: a module with a 2-D ``weight``, a parameter, the name of either, or several of
            them; ``[]`` for nothing, without a warning. It should be matrices whose gradients sum to zero over the
            rows, as those of a softmax do. There is a warning for a single row, and for a model's input embedding
            without its output embedding.
        center: subtract the mean of the rows of coupled matrices in every step (μ-centering, arXiv 2601.02031). With an
            untied output embedding and a softmax over dot products this changes no probability. There is a warning for
            input embeddings and capped logits, but the loss is not known here: with sigmoids or cosines, predictions
            change too. The optimizers of torch ignore this key: call ``coupled_adam.center_`` after their step instead.
        lr: learning rate of all groups. Then leave it out in the optimizer; those of this package reject a different
            one.
        embedding_lr_factor: factor on the learning rate of the coupled matrices, positive and finite; needs ``lr``. An
            untied input embedding keeps the rate of the other matrices. With ``lr``, each group also stores its factor
            as ``"lr_factor"`` (1.0 unless coupled), for loops that set the rates in every step:

                for group in optimizer.param_groups:
                    group["lr"] = lr_of_this_step * group.get("lr_factor", 1.0)

    Returns:
        Up to three param groups, the coupled one first, for the constructor of an optimizer.

    Raises:
        ValueError: the model has no ``get_output_embeddings()``, or what it returns cannot be right (the message lists
            candidates); an entry of ``coupled`` is not a trainable matrix of this model; ``embedding_lr_factor`` is not
            positive and finite, comes without ``lr``, or nothing is coupled.
        TypeError: ``model`` is not a module, ``coupled`` is none of the above, or a rate or factor is not a number.

    Examples:
        >>> from torch import nn
        >>> from coupled_adam import CoupledAdam, param_groups
        >>> embedding, norm, head = nn.Embedding(100, 8), nn.LayerNorm(8), nn.Linear(8, 100, bias=False)
        >>> model = nn.Sequential(embedding, norm, head)
        >>> groups = param_groups(model, coupled=[model[2]])
        >>> [[name for name, _ in group["params"]] for group in groups]
        [['2.weight'], ['0.weight'], ['1.weight', '1.bias']]
        >>> optimizer = CoupledAdam(groups, lr=1e-3)
        >>> groups = param_groups(model, coupled=[model[2]], lr=1e-3, embedding_lr_factor=10.0)
        >>> [group["lr"] for group in CoupledAdam(groups).param_groups]
        [0.01, 0.001, 0.001]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups takes a model, not {_told(model)}: param_groups(model)")
    if embedding_lr_factor is not None:
        check_factor("embedding_lr_factor", embedding_lr_factor)
        if lr is None:
            raise ValueError(
                f"embedding_lr_factor={embedding_lr_factor:g} multiplies lr, which is missing: "
                f"param_groups(model, lr=1e-3, embedding_lr_factor={embedding_lr_factor:g}), with your learning rate"
            )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = output_matrices(model) if coupled is None else _chosen(coupled, model)
    for matrix in matrices:
        _check_matrix(matrix, model)
    if coupled is not None:
        _warn_where_coupling_is_vain(model, matrices)
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
    if embedding_lr_factor is not None and not matrices:
        raise ValueError(
            f"embedding_lr_factor={embedding_lr_factor:g} has no effect: nothing in {type(model).__name__} is "
            "coupled. Leave it out, or name the output embedding with coupled=…; for a separate learning rate "
            "without coupling, pass these groups to torch.optim.AdamW"
        )
    if lr is not None:
        check_number("learning rate (lr)", lr, tensor=True)
        for group, factor in zip(groups, (embedding_lr_factor or 1.0, 1.0, 1.0), strict=True):
            check_number("learning rate of a group (lr · embedding_lr_factor)", lr * factor, tensor=True)
            group |= {"lr": lr * factor, "lr_factor": float(factor)}
    if not matrices:  # by choice, or with a warning: CoupledAdam need not warn
        groups = [{**group, "second_moment": "elementwise"} for group in groups]
    return [group for group in groups if group["params"]]


def _warn_where_coupling_is_vain(model: nn.Module, matrices: Sequence[Tensor]) -> None:
    """Warn of matrices that keep no mean in place when they are coupled, where that is certain.

    That a matrix belongs to an ``nn.Embedding`` tells nothing: items that a softmax scores are looked up too.
    """
    for matrix in matrices:
        if matrix.shape[0] == 1:
            warnings.warn(
                f"coupled: {name_of(matrix, model)} has one row, so there is nothing to share: its second moment is "
                "that of AdamW. Leave it out, or pass coupled=[] to couple nothing",
                UserWarning,
                stacklevel=3,
            )
    heads = embeddings_of(model)
    if not heads or any(matrix is head for matrix in matrices for head in heads):
        return
    for table in embeddings_of(model, "get_input_embeddings"):
        if any(matrix is table for matrix in matrices) and not has_another_use(table, model):
            warnings.warn(
                f"coupled: {name_of(table, model)} is only the input embedding, and the output embedding, "
                f"{listed([(name_of(head, model), head) for head in heads])}, is not coupled. Gradients of rows that "
                "are looked up do not sum to zero, so their mean moves all the same. Name the output embedding, or "
                "both",
                UserWarning,
                stacklevel=3,
            )


def _warn_where_centering_tells(model: nn.Module, matrices: Sequence[Tensor]) -> None:
    """Warn of what makes predictions depend on the mean of an output embedding."""
    modules = list(model.modules())
    tables = {id(m.weight) for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    shifted = [matrix for matrix in matrices if id(matrix) in tables]
    if any(has_another_use(matrix, model) for matrix in shifted):
        warnings.warn(
            "center=True also shifts the input embeddings, which are tied to the output: predictions change. Untie "
            "them, or leave center=False to keep predictions",
            UserWarning,
            stacklevel=3,
        )
    elif shifted:
        warnings.warn(
            f"center=True shifts {name_of(shifted[0], model)}, the weight of an embedding: if the model reads its "
            "rows as input, predictions change. They do not if rows are only scored by dot products, in a softmax",
            UserWarning,
            stacklevel=3,
        )
    configs = (getattr(m, "config", None) for m in modules)
    caps = [cap for config in configs for key in CAPS if isinstance(cap := _setting(config, key), int | float) and cap]
    if caps:
        warnings.warn(
            f"center=True changes predictions of a model that caps its logits (at {caps[0]:g}): soft-capping is not "
            "invariant to a shift of the logits. Leave out one of the two",
            UserWarning,
            stacklevel=3,
        )


def _setting(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else getattr(config, key, None)


def _chosen(coupled: Coupled | Iterable[Coupled], model: nn.Module) -> list[Tensor]:
    """Return the matrices that the user's ``coupled`` stands for."""
    if isinstance(coupled, nn.Module | Tensor | str):
        coupled = [coupled]
    if isinstance(coupled, bool | Mapping) or not isinstance(coupled, Iterable):
        raise TypeError(_unexpected(coupled, model))
    items = [_named(item, model) if isinstance(item, str) else item for item in coupled]
    if any(item is None for item in items):
        raise TypeError(_unexpected(None, model))
    return [_matrix(item, model) for item in flat(items)]


def _named(name: str, model: nn.Module) -> nn.Module | Tensor:
    """Return the parameter or module of that name, with or without the names of wrappers in it."""
    known: dict[str, nn.Module | Tensor] = {bare(path): module for path, module in model.named_modules() if path}
    known |= {bare(path): p for path, p in model.named_parameters(remove_duplicate=False)}
    if bare(name) in known:
        return known[bare(name)]
    matrices = [path for path, item in known.items() if getattr(getattr(item, "weight", item), "ndim", 0) == 2]
    near = difflib.get_close_matches(name, matrices, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else f". Candidates: {candidates(model)}"
    raise ValueError(
        f"coupled: expected modules or parameters of {type(model).__name__}, or their names, got the string "
        f"{name!r}{meant}"
    )


def _matrix(item: Any, model: nn.Module) -> Tensor:
    """Return the parameter of ``model`` that an entry of ``coupled`` stands for."""
    if not isinstance(item, nn.Module | Tensor):
        raise TypeError(_unexpected(item, model))
    matrix = item if isinstance(item, Tensor) else getattr(item, "weight", None)
    parameters = {id(p) for p in model.parameters()}
    if isinstance(matrix, Tensor) and id(matrix) in parameters:
        return matrix
    if isinstance(item, nn.Module) and isinstance(matrix, Tensor) and _path(item, model):
        if in_flat_parameter(model):
            raise ValueError(f"coupled: the weight of {_path(item, model)!r} is part of a flat parameter: {FLATTENED}")
        raise ValueError(f"coupled: got the {type(item).__name__} {_path(item, model)!r}, {computed(item, model)}")
    lacks = "has no weight" if isinstance(item, nn.Module) and matrix is None else f"is not in {type(model).__name__}"
    raise ValueError(f"coupled: got {_told(item)} that {lacks}. Candidates: {candidates(model)}")


def _check_matrix(matrix: Tensor, model: nn.Module) -> None:
    """Raise ValueError for a parameter that is no trainable matrix."""
    name = name_of(matrix, model)
    if matrix.ndim != 2:
        raise ValueError(
            f"coupled parameter {name!r} has shape {tuple(matrix.shape)}; only (vocabulary, hidden) matrices couple. "
            "FSDP1 and DeepSpeed ZeRO flatten them, FSDP2 does not"
        )
    if not matrix.requires_grad:
        raise ValueError(f"coupled parameter {name!r} is frozen (requires_grad=False); unfreeze it, or pass coupled=[]")


def _unexpected(item: object, model: nn.Module) -> str:
    return (
        f"coupled: expected modules or parameters of {type(model).__name__}, or their names, got {_told(item)}; "
        "coupled=[] couples nothing, coupled=None the output embedding"
    )


def _told(item: object) -> str:
    """Name an object in words: a parameter by its shape, a plain value as it is, anything else by its type."""
    if isinstance(item, Tensor):
        return f"a tensor of shape {tuple(item.shape)}"
    return repr(item) if item is None or isinstance(item, int | float | str) else kind(item)


def _path(item: nn.Module, model: nn.Module) -> str:
    return next((path for path, module in model.named_modules() if module is item), "")
