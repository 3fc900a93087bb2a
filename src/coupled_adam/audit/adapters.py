"""Adapters on embeddings: the matrices that an adapter of PEFT and its base model make together."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from coupled_adam.audit import model_directories
from coupled_adam.audit.embedding_names import OUTPUT, candidates, find_input, find_output, plain_name
from coupled_adam.audit.tensor_files import Shape, Tensors
from coupled_adam.errors import InputError

#: The matrix A of LoRA, after the name of the module that it is added to: of an embedding, or of a linear layer.
A = re.compile(r"(.+)\.lora_(embedding_)?A(\.weight)?")

#: The rows of the tokens that are trained, after the name of the module that has these tokens.
ROWS = re.compile(r"(.+?)(\.token_adapter)?\.trainable_tokens_delta")

#: Options of LoRA, beside DoRA, with which the module computes something else than with W + s·BA.
OTHERWISE = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)

#: Initializations that leave the base model as it is. Others move a part of it into the adapter.
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


#: Kinds of adapters that can have trained tokens.
WITH_ROWS = ("LORA", "TRAINABLE_TOKENS")


@dataclass(frozen=True)
class Merged:
    """The tensors of an adapter, merged into embeddings."""

    tensors: Tensors
    """Each embedding with its adapter, computed when it is read, under the name that it has in the model, in the place
    of the embedding without; and all other tensors."""
    names: tuple[str, ...] = ()
    """The names of these embeddings."""
    base: Path | None = None
    """The directory of the base model, if an embedding came from there."""


def merged(tensors: Tensors, directory: Path) -> Merged:
    """Merge LoRA and trained tokens into the embeddings of a model, as PEFT's ``merge_and_unload`` does, in float32.

    LoRA makes W + s·BA; trained tokens have rows of their own in the place of those of W. W is the base layer that PEFT
    saves with LoRA on an embedding, else the embedding of the base model, which is opened only then. Adapters of other
    kinds, and LoRA that is more than that (DoRA, QALoRA, …), stay as they are.

    Args:
        tensors: in ``directory``.
        directory: with adapter_config.json; without that file there is nothing to merge.

    Raises:
        InputError: the configuration is damaged, the matrices do not fit together, or the base model is needed and
            cannot be opened.
    """
    config = model_directories.read_adapter_config(directory)
    if config is None or any(config.get(option) for option in OTHERWISE):
        return Merged(tensors)
    kind = config.get("peft_type")
    added = {match[1]: bool(match[2]) for name in tensors.files if kind == "LORA" and (match := A.fullmatch(name))}
    rows = {match[1]: name for name in tensors.files if kind in WITH_ROWS and (match := ROWS.fullmatch(name))}
    embeddings = set(candidates(f"{module}.weight" for module in (*added, *rows)))
    made: dict[str, _Sum | _Replaced] = {}
    base: _Base | None = None
    for module in (module for module in (*added, *rows) if f"{module}.weight" in embeddings):
        name, source, stored = f"{module}.weight", tensors, f"{module}.base_layer.weight"
        if name in tensors.files:  # saved as a whole too
            continue
        if stored not in tensors.files:
            if module in added and config.get("init_lora_weights") not in KEEPS_BASE:
                continue
            base = base or _Base.of(directory, config, name)
            source, stored = base.tensors, base.name_of(embedding=not name.endswith(OUTPUT))
        if module in added:
            scaling = _scaling(config, module, directory)
            made[name] = _Sum.of(tensors, module, added[module], (source, stored), scaling)
        else:
            made[name] = _Replaced.of(tensors, rows[module], (source, stored), _tokens(config, module, directory))

    def shape(name: str) -> Shape:
        return made[name].shape if name in made else tensors.shape(name)

    def stored_as(name: str) -> Tensor:
        return made[name].computed() if name in made else tensors.stored(name)

    parts = {f"{name.removesuffix('weight')}base_layer.weight" for name in made}
    files = {name: file for name, file in tensors.files.items() if name not in parts}
    files |= {name: whole.file for name, whole in made.items()}
    return Merged(Tensors(files, shape, stored_as), tuple(made), base.directory if base else None)


@dataclass(frozen=True)
class _Base:
    """The base model of an adapter."""

    directory: Path
    tensors: Tensors

    @classmethod
    def of(cls, directory: Path, config: Mapping[str, Any], needed: str) -> "_Base":
        name = config.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise InputError(
                f"{directory}: {needed} has an adapter, but adapter_config.json does not name its base model"
            )
        try:
            path = Path(name) if Path(name).is_dir() else model_directories.from_hub(name)
            folder = model_directories.folder_of_weights(path)
            return cls(folder, model_directories.weights_in(folder)[0])
        except InputError as error:
            raise InputError(
                f"{directory}: {needed} is its base model's with an adapter, but the base cannot be read: {error}"
            ) from None

    def name_of(self, embedding: bool) -> str:
        """Return the name of its token embedding, or of its output embedding, which may be tied."""
        name = find_input(self.tensors) if embedding else find_output(self.tensors) or find_input(self.tensors)
        if name is None:
            raise InputError(f"{self.directory}: a base model without an embedding of a known name")
        return name


@dataclass(frozen=True)
class _Sum:
    """W + s·BA, with W (V, H)."""

    file: Path
    shape: Shape
    base: tuple[Tensors, str]
    factors: tuple[Tensors, str, str]
    embedding: bool
    scaling: float

    @classmethod
    def of(cls, tensors: Tensors, module: str, embedding: bool, base: tuple[Tensors, str], scaling: float) -> "_Sum":
        a, b = (f"{module}.lora_{'embedding_' * embedding}{letter}{'' if embedding else '.weight'}" for letter in "AB")
        if b not in tensors.files:
            raise InputError(f"{tensors.files[a]}: damaged: {a!r} without {b!r}")
        shape = base[0].shape(base[1])
        # A is (r, in), B is (out, r). An embedding takes tokens in; a head gives them out.
        (rank, width), (height, other) = _matrix_shape(tensors, a), _matrix_shape(tensors, b)
        if rank != other or shape != ((width, height) if embedding else (height, width)):
            raise InputError(
                f"{tensors.files[a]}: {b!r} ({height}, {other}) times {a!r} ({rank}, {width}) does not fit "
                f"{base[1]!r} {shape}; the base model may be another"
            )
        return cls(tensors.files[a], shape, base, (tensors, a, b), embedding, scaling)

    def computed(self) -> Tensor:
        tensors, a, b = self.factors
        product = tensors.matrix(b) @ tensors.matrix(a)
        return self.base[0].matrix(self.base[1]) + self.scaling * (product.T if self.embedding else product)


@dataclass(frozen=True)
class _Replaced:
    """W, of which some rows are replaced."""

    file: Path
    shape: Shape
    base: tuple[Tensors, str]
    rows: tuple[Tensors, str]
    tokens: list[int]

    @classmethod
    def of(cls, tensors: Tensors, name: str, base: tuple[Tensors, str], tokens: list[int]) -> "_Replaced":
        shape, rows = base[0].shape(base[1]), tensors.shape(name)
        if rows != (len(tokens), *shape[1:]) or not all(0 <= token < shape[0] for token in tokens):
            raise InputError(
                f"{tensors.files[name]}: {name!r} {rows} for {len(tokens)} tokens does not fit {base[1]!r} {shape}; "
                "the base model may be another"
            )
        return cls(tensors.files[name], shape, base, (tensors, name), tokens)

    def computed(self) -> Tensor:
        whole = self.base[0].matrix(self.base[1]).clone()
        whole[self.tokens] = self.rows[0].matrix(self.rows[1]).to(whole.dtype)
        return whole


def _matrix_shape(tensors: Tensors, name: str) -> tuple[int, int]:
    if len(shape := tensors.shape(name)) != 2 or not shape[0]:
        raise InputError(f"{tensors.files[name]}: damaged: {name!r} has shape {shape}; it was not gathered when saved")
    return shape[0], shape[1]


def _tokens(config: Mapping[str, Any], module: str, directory: Path) -> list[int]:
    """Return the tokens that an adapter has rows for, which may be others for each module."""
    said = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(said, dict):
        said = next((tokens for name, tokens in said.items() if f".{module}".endswith(f".{name}")), None)
    if not isinstance(said, list) or not all(isinstance(token, int) for token in said):
        path = directory / "adapter_config.json"
        raise InputError(f"{path}: damaged: it does not say which tokens of {module} are trained")
    return said


def _scaling(config: Mapping[str, Any], module: str, directory: Path) -> float:
    """Return s = α/r, or α/√r of rsLoRA, where patterns of names may give a module an α and r of its own."""
    plain = plain_name(f"{module}.weight").removesuffix(".weight").removeprefix("base_model.model.")

    def option(name: str, pattern: str) -> float:
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", plain):
                return float(value)
        return float(config[name])

    try:
        alpha, rank = option("lora_alpha", "alpha_pattern"), option("r", "rank_pattern")
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, re.error) as error:
        path = directory / "adapter_config.json"
        raise InputError(
            f"{path}: damaged: no scaling of the LoRA of {plain} ({type(error).__name__}: {error})"
        ) from None
