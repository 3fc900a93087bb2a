"""The schema of an experiment file (TOML): one frozen section a table, defaults stated once."""

import difflib
import json
import tomllib
from collections.abc import Sequence
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

from coupled_adam.errors import InputError, of_system

__all__ = [
    "CoreOptimizer",
    "Data",
    "EmbeddingOptimizer",
    "Evaluation",
    "Experiment",
    "Loss",
    "Model",
    "Optimizer",
    "Parallel",
    "Run",
    "Schedule",
    "Tracking",
    "Train",
]

#: Tokens of the largest vocabulary that is supported.
LARGEST_VOCABULARY = 2_000_000


class Section(BaseModel):
    """A table of the file. Immutable; an unknown key or a value of another type is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Run(Section):
    name: str = Field(min_length=1)
    seed: int = Field(default=1, ge=0)


class Model(Section):
    """A decoder-only transformer without biases; ``family`` says which."""

    family: Literal["gpt2", "llama"] = "gpt2"
    """``gpt2``: learned positions, LayerNorm, GELU. ``llama``: rotary positions, RMSNorm, SwiGLU."""
    n_layers: PositiveInt = 4
    n_heads: PositiveInt = 4
    hidden_size: PositiveInt = 128
    tied: bool = True
    """Whether the token embedding is also the output head."""
    gelu: Literal["tanh", "exact"] = "tanh"
    """Of ``gpt2``: GELU by the approximation that GPT-2 was trained with, or exact, as in nanoGPT."""
    norm: Literal["layernorm", "rmsnorm"] | None = None
    """None: that of the family."""
    qk_norm: bool = False
    """Normalize queries and keys, head by head, so that attention stands large learning rates."""
    qkv: Literal["fused", "split", "heads"] = "fused"
    """The projections to queries, keys and values are one parameter, (3·hidden_size, hidden_size); three; or three
    batches of one matrix per head, (n_heads, hidden_size / n_heads, hidden_size). Initial weights and the function are
    the same: it is for optimizers that take a matrix as a whole, ``muon`` and ``adams``."""
    mlp_multiple: PositiveInt = 128
    """The width of the MLP of ``llama``, 8/3·hidden_size, is rounded up to a multiple of this."""
    logits: Literal["float32", "bfloat16"] | None = None
    """What the head's products are rounded to, in training and after it, whatever the rest is. None: as all products
    are, so as ``train.precision`` in training and ``evaluation.precision`` in evaluation."""

    @model_validator(mode="after")
    def _heads_divide_hidden_size(self) -> Self:
        if self.hidden_size % self.n_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of n_heads {self.n_heads}")
        if self.family == "llama" and self.hidden_size // self.n_heads % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} / n_heads {self.n_heads} is odd: rotary positions rotate pairs"
            )
        return self

    @model_validator(mode="after")
    def _gelu_is_used(self) -> Self:
        if self.family == "llama" and self.gelu != type(self).model_fields["gelu"].default:
            raise ValueError(f"gelu {self.gelu!r} is for the family gpt2; the MLP of llama is SwiGLU: leave it out")
        return self

    @model_validator(mode="after")
    def _multiple_is_used(self) -> Self:
        if self.family == "gpt2" and self.mlp_multiple != type(self).model_fields["mlp_multiple"].default:
            raise ValueError(
                f"mlp_multiple {self.mlp_multiple} is for the family llama; the MLP of gpt2 is 4·hidden_size wide: "
                "leave it out"
            )
        return self

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP: 4·hidden_size, or for ``llama`` 8/3·hidden_size rounded up to a ``mlp_multiple``."""
        multiple = self.mlp_multiple
        return 4 * self.hidden_size if self.family == "gpt2" else -(-8 * self.hidden_size // (3 * multiple)) * multiple

    @property
    def norm_name(self) -> str:
        """``norm``, resolved."""
        return self.norm or ("layernorm" if self.family == "gpt2" else "rmsnorm")


class Data(Section):
    source: str = Field(default="wikipedia-sample", min_length=1)
    """What ``coupled-adam prepare`` is given: ``wikipedia-sample`` or ``wikipedia-leads`` (both come with packages), a
    file or directory, or a dataset's name."""
    tokenizer: str = Field(default="bpe", min_length=1)
    """``bpe``: a byte-level BPE of ``vocab_size`` tokens, trained on the text; or a tokenizer's name or directory."""
    vocab_size: int = Field(default=8192, ge=1, le=LARGEST_VOCABULARY)
    """Tokens of the tokenizer; the model's embedding has as many rows, padded to a multiple of 64."""
    sequence_length: PositiveInt = 128
    held_out: float | None = Field(default=None, ge=1e-6, le=0.5)
    """Share of the text that is held out for validation: of the characters of a text below ten million, of the
    documents of a larger table. None: 0.05 and 0.005."""

    @model_validator(mode="after")
    def _bytes_and_end(self) -> Self:
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            raise ValueError("vocab_size: at least 257 with the tokenizer bpe, for the bytes and the end of a document")
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: matrix products are fastest at multiples of 64."""
        return -(-self.vocab_size // 64) * 64


class Loss(Section):
    """What is minimized besides the cross entropy, and what bounds the logits. Figures are of the cross entropy."""

    z_loss: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """λ of λ·(log Z)², mean over the tokens; usual: 1e-4."""
    mu_loss: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """λ of λ·‖μ‖², μ the mean output embedding; usual: 1e-4."""
    softcap: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Logits are cap·tanh(logits / cap), in training and after it; usual: 30. None: as they are."""

    @property
    def label(self) -> str:
        """What people call the methods that are on; empty if none is."""
        parts = [("μ-loss", self.mu_loss, 1e-4), ("z-loss", self.z_loss, 1e-4), ("soft-cap", self.softcap, 30.0)]
        return " + ".join(name if value == usual else f"{name} ({value:g})" for name, value, usual in parts if value)


class CoreOptimizer(Section):
    """The optimizer of all that is not the output embedding."""

    name: Literal["adamw", "adams", "muon"] = "adamw"
    """``muon``: torch.optim.Muon on the matrices inside the blocks, with AdamW's step size, and AdamW on the rest."""
    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """On matrices and positions; vectors are not decayed."""


#: Values of optimizer.embedding.name, and what people call them.
OPTIMIZER_LABELS = {
    "adamw": "AdamW",
    "coupled_adam": "Coupled Adam",
    "adams": "Adams",
    "sgd": "SGD",
    "adam_variant": "Adam variant",
}


class EmbeddingOptimizer(Section):
    """The optimizer of the output embedding, which is not decayed. Adam's moments are set as the core's."""

    name: Literal["adamw", "coupled_adam", "adams", "sgd", "adam_variant"] = "adamw"
    """``adams``: its step with a second moment that is shared over the vocabulary. ``adam_variant``: one that differs
    from Adam in the five keys below, to find out which difference matters (lm/adam_variant.py)."""
    second_moment: Literal["element", "token", "hidden", "scalar", "frequency", "factored"] = "element"
    """Of ``adam_variant``: Adam's, one per token, per hidden unit (Coupled Adam's), or one; or per hidden unit, times
    the power ``frequency_exponent`` of the token's relative frequency, or (``factored``) of its relative second
    moment."""
    frequency_exponent: float = Field(default=0.0, ge=0, le=2)
    zero_sum: bool = False
    """Of ``adam_variant``: subtract from every update its mean over the vocabulary."""
    amsgrad: bool = False
    """Of ``adam_variant``."""
    beta2: float | None = Field(default=None, ge=0, lt=1)
    """Of ``adam_variant``; None: that of the core."""
    coupling_scale: PositiveFloat = 1.0
    coupling_factor: float = Field(default=0.0, ge=0, le=1)
    lr_factor: PositiveFloat = 1.0
    """Multiplies the learning rate of the schedule."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of ``sgd``."""
    center: bool = False
    """Subtract the mean row of the matrix after every step."""

    @property
    def label(self) -> str:
        """What people call the optimizer, with the settings that are not the defaults."""
        defaults = EmbeddingOptimizer()
        extra = [f"s={self.coupling_scale:g}"] if self.coupling_scale != defaults.coupling_scale else []
        extra += [f"κ={self.coupling_factor:g}"] if self.coupling_factor else []
        extra += [f"lr×{self.lr_factor:g}"] if self.lr_factor != defaults.lr_factor else []
        if self.name == "adam_variant":
            tempered = {"frequency": "frequency", "factored": "v of the token"}.get(self.second_moment)
            extra += [f"v ~ {tempered}^{self.frequency_exponent:g}" if tempered else f"v per {self.second_moment}"]
            extra += ["zero sum"] * self.zero_sum + ["AMSGrad"] * self.amsgrad
            extra += [f"β2={self.beta2:g}"] if self.beta2 is not None else []
        extra += [f"momentum {self.momentum:g}"] if self.name == "sgd" and self.momentum != defaults.momentum else []
        return " ".join([OPTIMIZER_LABELS[self.name], *extra])


class Optimizer(Section):
    core: CoreOptimizer = CoreOptimizer()
    embedding: EmbeddingOptimizer = EmbeddingOptimizer()

    @property
    def embedding_beta2(self) -> float:
        """β2 of the output embedding: its own where it has one, or that of the rest."""
        return self.core.betas[1] if self.embedding.beta2 is None else self.embedding.beta2


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
    sampling: Literal["permutation", "replacement"] = "permutation"
    """``permutation``: the text is cut into sequences, and every pass takes each of them once. ``replacement``: every
    sequence begins at a token that is drawn at random, as in nanoGPT; those of the held-out text too."""
    max_grad_norm: PositiveFloat = 1.0
    """Bound on the global norm of the gradients."""
    checkpoint_every: PositiveInt = 100
    keep_last: PositiveInt = 2
    """Checkpoints that are kept: the newest ones. With more than one, a damaged one does not end the run."""
    keep_every: PositiveInt | None = None
    """Steps whose checkpoints are kept besides: the multiples of this."""
    micro_batch: PositiveInt | None = None
    """Sequences that a process takes at a time; the rest of its share of the batch accumulates. None: all at once."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16``: autocast; weights and optimizer state stay float32."""
    activation_checkpointing: bool = False
    """Keep the inputs of the blocks alone, and compute the rest again in the backward pass."""
    compile: bool = False
    """torch.compile of every block."""


class Parallel(Section):
    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """What more than one process does: replicate the model, shard it (FSDP2), or shard it within ``shard_size``."""
    shard_size: PositiveInt | None = None
    """Processes that share one copy under ``hsdp``. None: those of one machine."""


class Evaluation(Section):
    every: PositiveInt = 25
    """Steps between two evaluations; the first is before the first step, the last after the last."""
    batches: PositiveInt = 16
    """Batches of ``train.batch_tokens`` of the validation text; one pass over it at most, unless ``train.sampling``
    draws with replacement."""
    final_batches: PositiveInt | None = None
    """The same, for the evaluation after the last step. None: ``batches``."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the validation loss, in training and after it; ``bfloat16``: autocast."""
    drift: bool = True
    """Split the movement of the mean output embedding by cause, at every step of AdamW or Coupled Adam."""


class Tracking(Section):
    """Where a run can be watched besides metrics.jsonl. No part of what the run is: it may change between resumes."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(default=(), strict=False)
    project: str = Field(default="coupled-adam", min_length=1)
    """What W&B and trackio file the run under."""


class Experiment(Section):
    """A whole run. ``Experiment.from_toml(experiment.to_toml())`` is the same experiment."""

    run: Run
    model: Model = Model()
    data: Data = Data()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train = Train()
    parallel: Parallel = Parallel()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _batch_holds_sequences(self) -> Self:
        if self.train.batch_tokens % self.data.sequence_length:
            raise ValueError(
                f"train.batch_tokens {self.train.batch_tokens} is not a multiple of "
                f"data.sequence_length {self.data.sequence_length}"
            )
        return self

    @model_validator(mode="after")
    def _muon_takes_matrices(self) -> Self:
        if self.optimizer.core.name == "muon" and self.model.qkv == "heads":
            raise ValueError(
                "model.qkv 'heads' is for optimizer.core.name 'adams', which takes batches of matrices; Muon takes "
                "single ones: choose 'split' or 'fused'"
            )
        return self

    @property
    def method(self) -> str:
        """What people call how the output embedding was trained; how the head rounds is no part of it."""
        embedding = self.optimizer.embedding
        parts = [embedding.label, "center" if embedding.center else "", self.loss.label]
        return " + ".join(part for part in parts if part)

    @property
    def caveats(self) -> list[str]:
        """What a user may not expect of settings that go together, each in one line."""
        if not self.optimizer.embedding.center:
            return []
        shifted = "optimizer.embedding.center changes what the model predicts"
        tied = f"{shifted}, as the embeddings are tied and its input moves too; with model.tied = false it would not"
        capped = f"{shifted}, as a capped logit is not just shifted; without loss.softcap it would not"
        return [line for line, holds in ((tied, self.model.tied), (capped, self.loss.softcap)) if holds]

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
        """Build an experiment from nested tables. Raises InputError like ``from_toml``."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(f"{source}: {_first_error(error, cls)}") from None

    def to_toml(self) -> str:
        """Write the resolved file: every key with its value."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def with_values(self, **values: Any) -> Self:
        """Copy with other values, keys as in ``section__key=value``. Raises InputError for what does not fit."""
        tables = self.model_dump()
        for key, value in values.items():
            *sections, name = key.split("__")
            table = tables
            for section in sections:
                table = table[section]
            table[name] = value
        return self.from_dict(tables)

    def overridden(self, assignments: Sequence[str]) -> Self:
        """Copy with ``section.key=value`` assignments, values as TOML writes them; a bare word is a string."""
        tables = self.model_dump()
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            *sections, name = key.strip().split(".")
            if not (equals and sections and name):
                raise InputError(f"{assignment!r}: write section.key=value, for instance train.steps=100")
            try:
                value = tomllib.loads(f"value = {text}")["value"]
            except tomllib.TOMLDecodeError:
                value = text.strip()
            table = tables
            for section in sections:
                table = table.setdefault(section, {})
                if not isinstance(table, dict):
                    raise InputError(f"{assignment!r}: {section} is no section")
            table[name] = value
        return self.from_dict(tables, "command line")

    def settings(self) -> dict[str, str]:
        """Return the value of every ``section.key``, as ``overridden`` takes it; None is left out."""
        flat = _flatten(self.model_dump(mode="json", exclude_none=True))
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}

    def differences(self, other: Self, this: str = "there", that: str = "requested") -> list[str]:
        """List the keys at which ``other`` is another run, each as ``section.key: A there, B requested``."""
        mine, theirs = (_flatten(each.model_dump(exclude={"tracking"})) for each in (self, other))
        return [
            f"{k}: {mine.get(k)} {this}, {theirs.get(k)} {that}" for k in mine | theirs if mine.get(k) != theirs.get(k)
        ]


def load_experiment(path: Path) -> Experiment:
    """Read an experiment file. Raises InputError if it is missing or not valid."""
    try:
        return Experiment.from_toml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise InputError(of_system(error)) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start:,}); save it as UTF-8") from None


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
