"""The schema of an experiment file (TOML): one frozen section a table, defaults stated once."""

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from coupled_adam.errors import InputError


class Section(BaseModel):
    """A table of the file. Immutable; an unknown key or a value of another type is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Run(Section):
    name: str = Field(min_length=1)
    seed: int = Field(default=1, ge=0)


class Model(Section):
    """A bias-free GPT-2: learned positions, LayerNorm, GELU, tied embeddings."""

    layers: PositiveInt = 4
    heads: PositiveInt = 4
    width: PositiveInt = 128

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Data(Section):
    vocabulary: int = Field(default=8192, ge=257, le=65536)
    """Tokens of the byte-level BPE that is trained on the text: 256 bytes, the end of a document, and merges."""
    sequence_length: PositiveInt = 128


class CoreOptimizer(Section):
    """AdamW, for all that is not the output embedding."""

    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """On matrices and positions; vectors are not decayed."""


class EmbeddingOptimizer(Section):
    """The optimizer of the output embedding, which is not decayed. The moments' settings are those of the core."""

    name: Literal["adamw", "coupled_adam"] = "adamw"
    coupling_scale: PositiveFloat = 1.0
    coupling_factor: float = Field(default=0.0, ge=0, le=1)


class Optimizer(Section):
    core: CoreOptimizer = CoreOptimizer()
    embedding: EmbeddingOptimizer = EmbeddingOptimizer()


class Schedule(Section):
    """Linear warm-up from 0, then a cosine that reaches ``min_lr`` at the last step."""

    lr: PositiveFloat = 1e-3
    min_lr: NonNegativeFloat = 1e-4
    warmup_steps: int = Field(default=20, ge=0)

    @model_validator(mode="after")
    def _min_below_max(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class Train(Section):
    steps: PositiveInt = 300
    batch_tokens: PositiveInt = 2048
    """Tokens of one step, over all processes."""
    clip: PositiveFloat = 1.0
    """Bound of the global norm of the gradients."""
    checkpoint_every: PositiveInt = 100


class Evaluation(Section):
    every: PositiveInt = 25
    """Steps between two evaluations; the first is before the first step, the last after the last."""
    batches: PositiveInt = 16
    """Batches of ``train.batch_tokens`` of the validation text."""


class Experiment(Section):
    """A whole run. ``Experiment.from_toml(experiment.to_toml())`` is the same experiment."""

    run: Run
    model: Model = Model()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _batch_holds_sequences(self) -> Self:
        if self.train.batch_tokens % self.data.sequence_length:
            raise ValueError(
                f"train.batch_tokens {self.train.batch_tokens} is not a multiple of "
                f"data.sequence_length {self.data.sequence_length}"
            )
        return self

    @property
    def batch_size(self) -> int:
        """Sequences of one step."""
        return self.train.batch_tokens // self.data.sequence_length

    @classmethod
    def from_toml(cls, text: str, source: str = "experiment") -> Self:
        """Parse an experiment file. Raises InputError naming ``source``, the key, and the nearest valid key."""
        try:
            return cls.from_dict(tomllib.loads(text), source)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{source}: not TOML: {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "experiment") -> Self:
        """Build an experiment from nested tables. Raises InputError like :meth:`from_toml`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(f"{source}: {_first_error(error, cls)}") from None

    def to_toml(self) -> str:
        """The resolved file: every key with its value."""
        return tomli_w.dumps(self.model_dump())

    def with_values(self, **values: Any) -> Self:
        """A copy with other values, keys as in ``section__key=value``. Raises InputError for what does not fit."""
        tables = self.model_dump()
        for key, value in values.items():
            *sections, name = key.split("__")
            table = tables
            for section in sections:
                table = table[section]
            table[name] = value
        return self.from_dict(tables)

    def differences(self, other: Self) -> list[str]:
        """The keys at which ``other`` differs, each as ``section.key: this value, other value``."""
        mine, theirs = _flatten(self.model_dump()), _flatten(other.model_dump())
        return [f"{k}: {mine.get(k)}, {theirs.get(k)}" for k in mine | theirs if mine.get(k) != theirs.get(k)]


def load_experiment(path: Path) -> Experiment:
    """Read an experiment file. Raises InputError if it is missing or not valid."""
    try:
        return Experiment.from_toml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _flatten(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _first_error(error: ValidationError, schema: type[BaseModel]) -> str:
    first = error.errors()[0]
    *sections, key = [str(part) for part in first["loc"]] or [""]
    where = ".".join([*sections, key])
    if first["type"] != "extra_forbidden":
        return f"{where}: {first['msg']} (got {first['input']!r})" if where else first["msg"]
    for section in sections:
        annotation = schema.model_fields[section].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        schema = annotation
    near = difflib.get_close_matches(key, schema.model_fields, n=1, cutoff=0.0)
    return f"{where}: unknown key; the nearest valid one is {near[0]!r}"
