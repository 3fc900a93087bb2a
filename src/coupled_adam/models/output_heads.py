"""The output embedding of a model: what ``get_output_embeddings()`` says it is, and whether that can be right."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

#: Rows by which an output embedding may differ from the vocabulary: padding adds fewer than 1024 (Megatron: a multiple
#: of 128 for each of 8 processes), and tokens that are never predicted, such as ImageGPT's first one, have none.
PADDING, UNPREDICTED = 1024, 4

#: What the modules of output embeddings are called.
HEADLIKE = re.compile(r"head|logit|unembed|predict|output_proj|embed_out|vocab", re.IGNORECASE)

#: As many candidates as a message names.
SHOWN = 5

#: What a message says of a model whose matrices are gone.
FLATTENED = (
    "parameters flattened by DeepSpeed ZeRO or FSDP1 cannot be coupled; FSDP2 keeps matrices. coupled=[] couples "
    "nothing"
)


def output_matrices(model: nn.Module) -> list[Tensor]:
    """Return the trainable matrices that ``get_output_embeddings()`` of the model means, through wrappers.

    Without an output embedding, as in classifiers, or with a frozen one, a UserWarning says so and the list is empty.

    Raises:
        ValueError: there is no such method, or its answer is not the output embedding of a vocabulary.
    """
    owner = unwrapped(model)
    if owner is None:
        raise ValueError(_undeclared(model))
    says = f"get_output_embeddings() of {type(owner).__name__} returns"
    sizes = vocabulary_sizes(model, owner)
    answer = _answer(owner, "get_output_embeddings")
    items = list(flat(answer))
    if not items:
        if found := _headlike(model, sizes, chosen=[]):
            raise ValueError(
                f"{says} {'None' if answer is None else 'nothing'}, but the output embedding seems to be "
                f"{listed(found)}: pass {_spelled(found)} to couple that, or coupled=[] to couple nothing"
            )
        _warn(
            f"nothing is coupled, so CoupledAdam behaves exactly like AdamW: {type(owner).__name__} has no output "
            "embedding (get_output_embeddings() returns None), which is normal for classifiers and reward models. "
            "If it has one, pass coupled=[module, parameter or name]; to silence this warning, pass coupled=[]"
        )
        return []
    matrices = [_matrix_of(item, model, sizes, says) for item in items]
    trained = [matrix for matrix in matrices if matrix.requires_grad]
    if not trained:
        frozen = ", ".join(name_of(matrix, model) for matrix in matrices)
        _warn(
            f"nothing is coupled, so CoupledAdam behaves exactly like AdamW: the output embedding ({frozen}) is "
            'frozen, as with LoRA. To train and couple it, use LoraConfig(modules_to_save=["lm_head"]); to silence '
            "this warning, pass coupled=[]"
        )
        return []
    for matrix in trained:
        _check_rows(matrix, model, sizes, says)
    _check_others(model, trained, sizes, says)
    return trained


def vocabulary_sizes(model: nn.Module, owner: nn.Module) -> dict[int, str]:
    """Return the vocabulary sizes that the model tells, each with where it stands."""
    sizes: dict[int, str] = {}
    for module in model.modules():
        for key, size in _sizes_in(getattr(module, "config", None), "config"):
            sizes.setdefault(size, key)
    for item in flat(_answer(owner, "get_input_embeddings")):
        if isinstance(item, nn.Embedding):
            sizes.setdefault(item.num_embeddings, "the input embedding")
    return sizes


def flat(answer: Any) -> Iterator[Any]:
    """Yield the modules and parameters in an answer: itself, or those of a list or dictionary of any depth."""
    if isinstance(answer, Mapping | nn.ModuleDict | nn.ParameterDict):
        answer = list(answer.values())
    if isinstance(answer, nn.ModuleList | nn.ParameterList | list | tuple):
        for item in answer:
            yield from flat(item)
    elif answer is not None:
        yield answer


def name_of(matrix: Tensor, model: nn.Module) -> str:
    """Return the first name of a parameter in the model; empty if it is none of its parameters."""
    return next((name for name, p in model.named_parameters(remove_duplicate=False) if p is matrix), "")


def kind(item: object) -> str:
    """Name the type of an object, with its article."""
    name = type(item).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def listed(named: Iterable[tuple[str, Tensor]]) -> str:
    """Name matrices with their shapes."""
    found = [f"{name} {tuple(p.shape)}" for name, p in named]
    return ", ".join(found[:SHOWN]) + (", …" if len(found) > SHOWN else "")


def candidates(model: nn.Module) -> str:
    """Name matrices that may be meant: those of heads, which models register last, before input embeddings."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    tied = {id(p) for _, p in _matrices_beside_embeddings(model)}
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    tables = [(name, p) for name, p in matrices if id(p) in embeddings and id(p) not in tied]
    # The outermost modules first, as `classifier`, and what is registered late before what is registered early.
    heads = [(name, p) for name, p in reversed(matrices) if id(p) not in embeddings or id(p) in tied]
    heads.sort(key=lambda item: item[0].count("."))
    tables.sort(key=lambda item: -item[1].shape[0])
    return listed([*heads[: SHOWN - min(len(tables), 2)], *tables]) or "none (the model has no matrix)"


def computed(item: nn.Module, model: nn.Module) -> str:
    """Say what the weight of a module that is no parameter is computed from."""
    own = {id(p) for p in item.parameters()}
    sources = [name for name, p in model.named_parameters() if id(p) in own]
    return (
        f"whose weight is not a parameter: it is computed from {', '.join(sources[:SHOWN])}, as with weight_norm. "
        "Coupling those would not couple the weight; remove the parametrization, or pass coupled=[] to couple "
        "nothing"
    )


def in_flat_parameter(model: nn.Module) -> bool:
    """Return whether FSDP1 has put the weights of modules into flat parameters (``use_orig_params=False``)."""
    return any(name.endswith("_flat_param") for name, _ in model.named_parameters())


def unwrapped(model: nn.Module, method: str = "get_output_embeddings") -> nn.Module | None:
    """Return the model inside wrappers that has ``method``; None without one."""
    inner = model
    # DistributedDataParallel and its like hold the model as `module` and hide its methods.
    while not hasattr(inner, method) and isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module  # type: ignore[assignment]
    return inner if hasattr(inner, method) else None


def embeddings_of(model: nn.Module, method: str = "get_output_embeddings") -> list[Tensor]:
    """Return the weights of all embeddings that ``method`` returns.

    The method is that of the model, or of the outermost part of it that has one, as in a LightningModule.
    """
    owner = unwrapped(model, method) or next((m for m in model.modules() if hasattr(m, method)), None)
    items = () if owner is None else flat(_answer(owner, method))
    weights = (item if isinstance(item, Tensor) else getattr(item, "weight", None) for item in items)
    return [weight for weight in weights if isinstance(weight, Tensor)]


def embedding_of(model: nn.Module, method: str = "get_output_embeddings") -> Tensor | None:
    """Return the weight of the only embedding that ``method`` returns, found as by ``embeddings_of``; None without
    one."""
    found = embeddings_of(model, method)
    return found[0] if len(found) == 1 else None


def has_another_use(matrix: Tensor, model: nn.Module) -> bool:
    """Whether a matrix also belongs to a module that is no embedding, or is said to be the output embedding."""
    elsewhere = [p for _, p in _matrices_beside_embeddings(model)]
    return any(matrix is p for p in (*elsewhere, *embeddings_of(model)))


def _answer(owner: nn.Module, method: str) -> Any:
    try:
        return getattr(owner, method, lambda: None)()
    except NotImplementedError:  # as transformers says it of models without an embedding
        return None


def _undeclared(model: nn.Module) -> str:
    """Say what to pass for a model that has no ``get_output_embeddings``."""
    part = next(((n, m) for n, m in model.named_modules() if n and hasattr(m, "get_output_embeddings")), None)
    inside = ""
    if part is not None and _answer(part[1], "get_output_embeddings") is not None:
        inside = f" Its part {part[0]!r} does: coupled=model.{part[0]}.get_output_embeddings()."
    return (
        f"{type(model).__name__} does not say what its output embedding is (get_output_embeddings() is missing): pass "
        f"coupled=[module, parameter or name], or coupled=[] if no softmax over a vocabulary is trained.{inside} "
        f"Candidates: {candidates(model)}"
    )


def _sizes_in(config: Any, path: str, depth: int = 3) -> Iterator[tuple[str, int]]:
    """Yield the vocabulary sizes of a configuration and those in it: ``("config.text_config.vocab_size", 32000)``."""
    entries = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    size = None if isinstance(config, Mapping) else getattr(config, "vocab_size", None)  # may be computed
    for key, value in [("vocab_size", size), *entries.items()]:
        if isinstance(value, int) and value > 1 and "vocab" in str(key) and "type_vocab" not in str(key):
            yield f"{path}.{key}", value
        elif depth and str(key).endswith("config"):
            yield from _sizes_in(value, f"{path}.{key}", depth - 1)


def _matrix_of(item: Any, model: nn.Module, sizes: Mapping[int, str], says: str) -> Tensor:
    """Return the parameter that an item of the answer stands for: itself, its weight, or what it wraps."""
    weight = item if isinstance(item, Tensor) else getattr(item, "weight", None)
    if isinstance(weight, Tensor) and name_of(weight, model):
        return weight
    if not isinstance(item, nn.Module):
        raise ValueError(f"{says} {kind(item)}, which is not a parameter of the model; {_remedy(model)}")
    known = {id(p) for p in model.parameters()}
    inside = [p for p in item.parameters() if id(p) in known and p.ndim == 2 and (p.shape[0] in sizes or not sizes)]
    if isinstance(weight, Tensor) and any(p.requires_grad for p in inside):
        raise ValueError(f"{says} {kind(item)}, {computed(item, model)}")
    if isinstance(weight, Tensor) and in_flat_parameter(model):
        raise ValueError(f"{says} {kind(item)}, whose weight is part of a flat parameter: {FLATTENED}")
    if len(inside) != 1:
        raise ValueError(
            f"{says} {kind(item)}, which has no weight that is a parameter of the model, and "
            f"{len(inside)} matrices with as many rows as the vocabulary; {_remedy(model)}"
        )
    return inside[0]


def _remedy(model: nn.Module) -> str:
    return f"pass coupled=[module, parameter or name], or coupled=[] to couple nothing. Candidates: {candidates(model)}"


def _check_rows(matrix: Tensor, model: nn.Module, sizes: Mapping[int, str], says: str) -> None:
    """Raise ValueError for a matrix that cannot have one row per entry of the vocabulary."""
    if matrix.ndim != 2:
        raise ValueError(
            f"{says} {listed([(name_of(matrix, model), matrix)])}, which is not a (vocabulary, hidden) matrix: "
            f"{FLATTENED}"
        )
    rows, name = len(matrix), name_of(matrix, model)
    if not sizes:  # then any of the embeddings may be that of the vocabulary
        tables = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Embedding)]
        sizes = {module.num_embeddings: path for path, module in tables}
    if not sizes or rows in sizes or hasattr(matrix, "vocabulary_group"):
        return
    fitting = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and p.shape[0] in sizes]
    near = any(-UNPREDICTED <= rows - size < PADDING for size in sizes)
    if near and (not fitting or any(map(HEADLIKE.search, _called(name)[-1:]))):
        return
    known = ", ".join(f"{size:,} ({where})" for size, where in list(sizes.items())[:SHOWN])
    raise ValueError(
        f"{says} {listed([(name, matrix)])}, which does not fit the vocabulary of {known}: pass the output embedding "
        "as coupled=[module, parameter or name], or coupled=[] to couple nothing. "
        f"Candidates: {listed(fitting) or candidates(model)}"
    )


def _check_others(model: nn.Module, chosen: list[Tensor], sizes: Mapping[int, str], says: str) -> None:
    """Warn of further matrices that look like output embeddings; ValueError if the chosen one then is an input."""
    others = _headlike(model, {**sizes, **dict.fromkeys((len(matrix) for matrix in chosen), "")}, chosen)
    if not others:
        return
    names = [(name_of(matrix, model), matrix) for matrix in chosen]
    heads = {id(p) for _, p in _matrices_beside_embeddings(model)}
    if not any(id(matrix) in heads for matrix in chosen):
        raise ValueError(
            f"{says} {listed(names)}, the weight of an input embedding only, but the output embedding seems to be "
            f"{listed(others)}: pass {_spelled(others)}, or {_spelled(names)} if that is right"
        )
    _warn(
        f"{says} {listed(names)}, and only that is coupled, but {listed(others)} seems to be an output embedding "
        f"too. To couple all, pass {_spelled([*names, *others])}; to silence this warning, pass {_spelled(names)}"
    )


def _matrices_beside_embeddings(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices of modules other than embeddings, also those tied to an embedding, by name."""
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            for name, p in module.named_parameters(prefix=path, recurse=False):
                if p.ndim == 2:
                    yield name, p


def _called(name: str) -> list[str]:
    """Return the names of the modules around a parameter, without numbers."""
    return [part for part in name.split(".")[:-1] if not part.isdecimal()]


def _headlike(model: nn.Module, sizes: Mapping[int, str], chosen: list[Tensor]) -> list[tuple[str, Tensor]]:
    """List trainable matrices that are called like an output embedding and have as many rows as a vocabulary."""
    seen = {id(matrix) for matrix in chosen}
    found = []
    for name, p in _matrices_beside_embeddings(model):
        # A square matrix has as many rows as the vocabulary by chance.
        fits = p.shape[0] in sizes and p.shape[0] != p.shape[1]
        if fits and p.requires_grad and id(p) not in seen and any(map(HEADLIKE.search, _called(name)[-2:])):
            seen.add(id(p))
            found.append((name, p))
    return found


def _spelled(named: Iterable[tuple[str, Tensor]]) -> str:
    return f"coupled={[name for name, _ in named]}"


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)  # to the caller of param_groups
