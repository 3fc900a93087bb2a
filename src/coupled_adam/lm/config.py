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
    """Which run of the experiment it is."""

    name: str = Field(min_length=1)
    """Name in reports, not empty."""
    seed: int = Field(default=1, ge=0)
    """Seed of the initial weights and of the order of the data, 0 or above."""


class Model(Section):
    """A transformer without biases in its blocks; ``family`` says which."""

    family: Literal["gpt2", "llama", "modernbert"] = "gpt2"
    """``gpt2``: learned positions, LayerNorm, GELU. ``llama``: rotary positions, RMSNorm, SwiGLU. ``modernbert``: a
    masked language model, which sees both sides of the tokens that it predicts (arXiv 2412.13663, with full attention
    in all layers): rotary positions, LayerNorm, GeGLU, and an output head with a bias."""
    n_layers: PositiveInt = 4
    """Number of blocks."""
    n_heads: PositiveInt = 4
    """Attention heads per block; they divide ``hidden_size``."""
    hidden_size: PositiveInt = 128
    """H, the width of the embeddings and of the residual stream."""
    tied: bool = True
    """Whether the token embedding is also the output head."""
    gelu: Literal["tanh", "exact"] = "tanh"
    """``gpt2`` only: GELU by the approximation that GPT-2 was trained with, or exact as in nanoGPT."""
    norm: Literal["layernorm", "rmsnorm"] | None = None
    """None: that of the family."""
    qk_norm: bool = False
    """Normalize queries and keys per head, which keeps attention stable at large learning rates."""
    qkv: Literal["fused", "split", "heads"] = "fused"
    """How the projections to queries, keys and values are stored: as one parameter, (3·hidden_size, hidden_size); as
    three; or as three batches of one matrix per head, (n_heads, hidden_size / n_heads, hidden_size). The model and its
    initial weights are the same; it matters for optimizers that treat matrices as a whole, ``muon`` and ``adams``."""
    mlp_multiple: PositiveInt = 128
    """The width of the MLP of ``llama`` and ``modernbert``, 8/3·hidden_size, is rounded up to a multiple of this."""
    logits: Literal["float32", "bfloat16"] | None = None
    """Precision of the output head's matrix product, in training and evaluation. None: as for all other products,
    ``train.precision`` in training and ``evaluation.precision`` in evaluation."""

    @model_validator(mode="after")
    def _heads_divide_hidden_size(self) -> Self:
        if self.hidden_size % self.n_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of n_heads {self.n_heads}")
        if self.family != "gpt2" and self.hidden_size // self.n_heads % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} / n_heads {self.n_heads} is odd: rotary positions rotate pairs"
            )
        return self

    @model_validator(mode="after")
    def _gelu_is_used(self) -> Self:
        if self.family != "gpt2" and self.gelu != type(self).model_fields["gelu"].default:
            mlp = {"llama": "SwiGLU", "modernbert": "GeGLU with the exact GELU"}[self.family]
            raise ValueError(
                f"gelu {self.gelu!r} applies only to the family gpt2; the MLP of {self.family} is {mlp}: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _multiple_is_used(self) -> Self:
        if self.family == "gpt2" and self.mlp_multiple != type(self).model_fields["mlp_multiple"].default:
            raise ValueError(
                f"mlp_multiple {self.mlp_multiple} applies only to the families llama and modernbert; the MLP of gpt2 "
                "is 4·hidden_size wide: leave it out"
            )
        return self

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP: 4·hidden_size, or with a gate 8/3·hidden_size rounded up to a ``mlp_multiple``."""
        multiple = self.mlp_multiple
        return 4 * self.hidden_size if self.family == "gpt2" else -(-8 * self.hidden_size // (3 * multiple)) * multiple

    @property
    def norm_name(self) -> str:
        """``norm``, resolved."""
        return self.norm or ("rmsnorm" if self.family == "llama" else "layernorm")

    @property
    def label(self) -> str:
        """What its authors call the family."""
        return {"gpt2": "GPT-2", "llama": "LLaMA", "modernbert": "ModernBERT"}[self.family]

    @property
    def masked(self) -> bool:
        """Whether it predicts masked tokens from both sides, instead of each token from those before it."""
        return self.family == "modernbert"


class Data(Section):
    """The text and its tokens."""

    source: str = Field(default="wikipedia-sample", min_length=1)
    """Where the text comes from: ``wikipedia-sample`` or ``wikipedia-leads`` (both come with packages), a file, a
    directory, or the name of a dataset."""
    tokenizer: str = Field(default="bpe", min_length=1)
    """``bpe``: a byte-level BPE of ``vocab_size`` tokens, trained on the text; or the name or directory of a
    tokenizer."""
    vocab_size: int = Field(default=8192, ge=1, le=LARGEST_VOCABULARY)
    """Tokens of the tokenizer; the embedding of the model has as many rows, padded to a multiple of 64."""
    sequence_length: PositiveInt = 128
    """Tokens per training sequence."""
    held_out: float | None = Field(default=None, ge=1e-6, le=0.5)
    """Share of the text that is held out for validation: of the characters if the text has fewer than ten million, else
    of the documents. None: 0.05 and 0.005."""

    @model_validator(mode="after")
    def _bytes_and_end(self) -> Self:
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            raise ValueError(
                "vocab_size: at least 257 with the tokenizer bpe, for the 256 bytes and the end-of-document token"
            )
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: matrix products are fastest at multiples of 64."""
        return -(-self.vocab_size // 64) * 64


class Loss(Section):
    """What is minimized in addition to the cross entropy, and what bounds the logits. Reported losses are the cross
    entropy."""

    z_loss: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """λ ≥ 0 of λ·(log Z)², averaged over the tokens; usually 1e-4."""
    mu_loss: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """λ ≥ 0 of λ·‖μ‖², with μ the mean output embedding; usually 1e-4."""
    softcap: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Soft cap: logits become cap·tanh(logits / cap), in training and evaluation; usually 30. None: no cap."""

    @property
    def label(self) -> str:
        """What people call the methods that are on; empty if none is."""
        parts = [("μ-loss", self.mu_loss, 1e-4), ("z-loss", self.z_loss, 1e-4), ("soft-cap", self.softcap, 30.0)]
        return " + ".join(name if value == usual else f"{name} ({value:g})" for name, value, usual in parts if value)


class CoreOptimizer(Section):
    """The optimizer of everything except the output embedding."""

    name: Literal["adamw", "adams", "muon"] = "adamw"
    """``muon``: torch.optim.Muon on the matrices inside the blocks, with AdamW's step size, and AdamW on the rest."""
    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    """Decay rates (β1, β2) of the moments, each in [0, 1)."""
    eps: NonNegativeFloat = 1e-8
    """ε ≥ 0, added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """λ ≥ 0 of matrices and positions; vectors are not decayed."""


#: Values of optimizer.embedding.name, and what people call them.
OPTIMIZER_LABELS = {
    "adamw": "AdamW",
    "coupled_adam": "Coupled Adam",
    "adams": "Adams",
    "sgd": "SGD",
    "adam_variant": "Adam variant",
}


class EmbeddingOptimizer(Section):
    """The optimizer of the output embedding, which has no weight decay. β and ε are those of the core."""

    name: Literal["adamw", "coupled_adam", "adams", "sgd", "adam_variant"] = "adamw"
    """``adams``: its step, with a second moment shared over the vocabulary. ``adam_variant``: differs from Adam in the
    five keys below, to find out which difference matters."""
    second_moment: Literal["element", "token", "hidden", "scalar", "frequency", "factored"] = "element"
    """``adam_variant`` only: one second moment per element (Adam), per token, per hidden unit (Coupled Adam), or a
    single one; or one per hidden unit, multiplied by a power of the token's relative frequency (``frequency``) or
    relative second moment (``factored``)."""
    frequency_exponent: float = Field(default=0.0, ge=0, le=2)
    """``adam_variant`` only: the exponent of that power, in [0, 2]."""
    zero_sum: bool = False
    """``adam_variant`` only: subtract the mean over the vocabulary from every update."""
    amsgrad: bool = False
    """``adam_variant`` only: use the largest second moment so far, as AMSGrad."""
    beta2: float | None = Field(default=None, ge=0, lt=1)
    """``adam_variant`` only: β2 in [0, 1); None for that of the core."""
    coupling_scale: PositiveFloat = 1.0
    """s > 0, multiplies a coupled second moment."""
    coupling_factor: float = Field(default=0.0, ge=0, le=1)
    """κ in [0, 1], the share of the squared first moment in the second one."""
    row_exponent: float = Field(default=0.0, ge=0, le=1)
    """``coupled_adam`` and ``adams`` only: α in [0, 1]. A row's second moment is the shared one times a power of the
    row's own relative to the others; 0 for the shared one alone."""
    lr_factor: PositiveFloat = 1.0
    """Factor > 0 on the learning rate of the schedule."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """``sgd`` only: momentum in [0, 1)."""
    center: bool = False
    """Subtract the mean of the rows after every step."""

    @model_validator(mode="after")
    def _rows_have_second_moments(self) -> Self:
        if self.row_exponent and self.name not in ("coupled_adam", "adams"):
            raise ValueError(
                f"row_exponent {self.row_exponent:g} applies only to optimizer.embedding.name 'coupled_adam' and "
                f"'adams', not to {self.name!r}: leave it out"
            )
        return self

    @property
    def label(self) -> str:
        """What people call the optimizer, with the settings that are not the defaults."""
        defaults = EmbeddingOptimizer()
        extra = [f"s={self.coupling_scale:g}"] if self.coupling_scale != defaults.coupling_scale else []
        extra += [f"κ={self.coupling_factor:g}"] if self.coupling_factor else []
        extra += [f"α={self.row_exponent:g}"] if self.row_exponent else []
        extra += [f"lr×{self.lr_factor:g}"] if self.lr_factor != defaults.lr_factor else []
        if self.name == "adam_variant":
            tempered = {"frequency": "frequency", "factored": "v of the token"}.get(self.second_moment)
            extra += [f"v ~ {tempered}^{self.frequency_exponent:g}" if tempered else f"v per {self.second_moment}"]
            extra += ["zero sum"] * self.zero_sum + ["AMSGrad"] * self.amsgrad
            extra += [f"β2={self.beta2:g}"] if self.beta2 is not None else []
        extra += [f"momentum {self.momentum:g}"] if self.name == "sgd" and self.momentum != defaults.momentum else []
        return " ".join([OPTIMIZER_LABELS[self.name], *extra])


class Optimizer(Section):
    """The two optimizers of a run."""

    core: CoreOptimizer = CoreOptimizer()
    """Of everything except the output embedding."""
    embedding: EmbeddingOptimizer = EmbeddingOptimizer()
    """Of the output embedding."""

    @property
    def embedding_beta2(self) -> float:
        """β2 of the output embedding: ``embedding.beta2``, or else that of the core."""
        return self.core.betas[1] if self.embedding.beta2 is None else self.embedding.beta2


class Schedule(Section):
    """Linear warm-up from 0, then a cosine that reaches ``min_lr`` at the last step."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 1e-4
    """Learning rate of the last step, at most ``lr``."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of the warm-up."""

    @model_validator(mode="after")
    def _min_below_max(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class Train(Section):
    """Length, batches, checkpoints and precision of the training."""

    steps: PositiveInt = 300
    """Optimizer steps."""
    batch_tokens: PositiveInt = 2048
    """Tokens per step over all processes, a multiple of ``data.sequence_length``."""
    sampling: Literal["permutation", "replacement"] = "permutation"
    """``permutation``: the text is cut into sequences, and every epoch uses each of them once. ``replacement``: every
    sequence starts at a token drawn at random, as in nanoGPT; in the held-out text too."""
    masked: float = Field(default=0.15, gt=0, lt=1)
    """``modernbert`` only: share of the tokens of a sequence that are to be predicted, rounded to a whole number. As in
    BERT, 80% of them are replaced by the mask token, 10% by a random token, and the rest are left as they are."""
    max_grad_norm: PositiveFloat = 1.0
    """Bound on the global norm of the gradients."""
    checkpoint_every: PositiveInt = 100
    """Steps between two checkpoints."""
    keep_last: PositiveInt = 2
    """How many of the newest checkpoints are kept. With more than one, a run survives a damaged checkpoint."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of this many steps are kept too; None for none."""
    micro_batch: PositiveInt | None = None
    """Sequences per forward pass of one process; gradients accumulate over its share of the batch. None: all at
    once."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16``: autocast; weights and optimizer state stay in float32."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the blocks, and recompute the rest in the backward pass."""
    compile: bool = False
    """Apply torch.compile to every block."""


class Parallel(Section):
    """How several processes share the model."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """Replicate the model (``ddp``), shard it (``fsdp``: FSDP2), or shard it within groups and replicate the groups
    (``hsdp``)."""
    shard_size: PositiveInt | None = None
    """``hsdp`` only: processes per group. None: those of one machine."""


class Evaluation(Section):
    """How often and how the model is evaluated."""

    every: PositiveInt = 25
    """Steps between two evaluations; there is also one before the first step and one after the last."""
    batches: PositiveInt = 16
    """Validation batches of ``train.batch_tokens`` tokens; at most one pass over the text, unless ``train.sampling``
    draws with replacement."""
    final_batches: PositiveInt | None = None
    """The same for the evaluation after the last step. None: ``batches``."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the validation loss, during training and afterwards; ``bfloat16``: autocast."""
    drift: bool = True
    """Split the movement of the mean output embedding by cause, in every step of AdamW or Coupled Adam."""


class Tracking(Section):
    """Where metrics are logged in addition to metrics.jsonl. It may change when a run is resumed."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(default=(), strict=False)
    """The trackers that the metrics go to."""
    project: str = Field(default="coupled-adam", min_length=1)
    """The name of the project in W&B and trackio."""


class Experiment(Section):
    """All settings of a run. ``Experiment.from_toml(experiment.to_toml())`` is the same experiment.

    Examples:
        >>> experiment = Experiment.from_toml('run.name = "mine"').overridden(["train.steps=100"])
        >>> experiment.train.steps, experiment.batch_size
        (100, 16)
    """

    run: Run
    """Name and seed."""
    model: Model = Model()
    """Architecture."""
    data: Data = Data()
    """Text and tokens."""
    loss: Loss = Loss()
    """Terms in addition to the cross entropy."""
    optimizer: Optimizer = Optimizer()
    """Of the output embedding, and of the rest."""
    schedule: Schedule = Schedule()
    """Learning rates."""
    train: Train = Train()
    """Length, batches, checkpoints, precision."""
    parallel: Parallel = Parallel()
    """Several processes."""
    evaluation: Evaluation = Evaluation()
    """During training."""
    tracking: Tracking = Tracking()
    """Where metrics are logged."""

    @model_validator(mode="after")
    def _batch_holds_sequences(self) -> Self:
        if self.train.batch_tokens % self.data.sequence_length:
            raise ValueError(
                f"train.batch_tokens {self.train.batch_tokens} is not a multiple of "
                f"data.sequence_length {self.data.sequence_length}"
            )
        return self

    @model_validator(mode="after")
    def _tokens_are_masked(self) -> Self:
        data, share = self.data, self.train.masked
        if not self.model.masked:
            if share != type(self.train).model_fields["masked"].default:
                raise ValueError(
                    f"train.masked {share:g} applies only to model.family 'modernbert'; {self.model.family} predicts "
                    "every token from those before it: leave it out"
                )
            return self
        if not self.masked_tokens:
            raise ValueError(
                f"train.masked {share:g} of data.sequence_length {data.sequence_length} rounds to no token: raise one "
                "of the two"
            )
        if data.padded_vocab_size == data.vocab_size:
            raise ValueError(
                f"data.vocab_size {data.vocab_size} is a multiple of 64, so the embedding has no row for the mask "
                f"token: set it to {data.vocab_size - 1}"
            )
        return self

    @model_validator(mode="after")
    def _muon_takes_matrices(self) -> Self:
        if self.optimizer.core.name == "muon" and self.model.qkv == "heads":
            raise ValueError(
                "model.qkv 'heads' works only with optimizer.core.name 'adams', which supports batches of matrices; "
                "Muon takes one matrix at a time: choose 'split' or 'fused'"
            )
        return self

    @property
    def method(self) -> str:
        """The usual name of the way in which the output embedding is trained; its precision is not part of it."""
        embedding = self.optimizer.embedding
        parts = [embedding.label, "center" if embedding.center else "", self.loss.label]
        return " + ".join(part for part in parts if part)

    @property
    def caveats(self) -> list[str]:
        """Possibly unexpected effects of combined settings, one line each."""
        if not self.optimizer.embedding.center:
            return []
        shifted = "optimizer.embedding.center changes what the model predicts"
        tied = f"{shifted}: the embeddings are tied, so its inputs move too; with model.tied = false it would not"
        capped = f"{shifted}: soft-capping is not invariant to a shift of the logits; without loss.softcap it would not"
        return [line for line, holds in ((tied, self.model.tied), (capped, self.loss.softcap)) if holds]

    @property
    def batch_size(self) -> int:
        """Sequences per step."""
        return self.train.batch_tokens // self.data.sequence_length

    @property
    def masked_tokens(self) -> int:
        """Tokens of a sequence that a masked language model is to predict; 0 for other models."""
        return round(self.train.masked * self.data.sequence_length) if self.model.masked else 0

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
                    raise InputError(f"{assignment!r}: {section} is not a section")
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
