"""Figures of many runs: a row a run, means over seeds, and AdamW against Coupled Adam."""

import csv
import functools
import io
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from scipy import stats
from typing_extensions import TypedDict

from coupled_adam import experiments
from coupled_adam.errors import InputError
from coupled_adam.evaluation.by_frequency import DECILES, KAPPA_NAMES
from coupled_adam.evaluation.results import SCHEMAS
from coupled_adam.evaluation.stages import is_papers_accuracy, read_stage
from coupled_adam.evaluation.token_sample import TokenSample
from coupled_adam.figures import MISSING, Figure
from coupled_adam.files import read_json
from coupled_adam.lm.config import OPTIMIZER_LABELS, Experiment
from coupled_adam.lm.estimate import estimate
from coupled_adam.lm.metrics_jsonl import MetricsLog
from coupled_adam.lm.run import planned_steps, read_environment, read_experiment
from coupled_adam.report.paired import PairedDifference, paired_difference

__all__ = ["Evaluated", "read_runs", "table"]

Value = float | None
"""The value of a metric; None if it is not defined or was not measured."""

#: The two methods that the reports compare, as ``Evaluated.method`` calls them.
ADAMW, COUPLED = OPTIMIZER_LABELS["adamw"], OPTIMIZER_LABELS["coupled_adam"]

#: The file in a run's directory that says, under ``reason``, how it diverged. `coupled-adam reproduce` writes it.
DIVERGED = "diverged.json"


class Divergence(TypedDict):
    """What that file holds."""

    reason: str


#: What is known of the logits, from the validation stage.
LOGITS = ("logit_mean", "logit_std", "logit_max", "log_z_squared")


#: Figures of the embedding that the reference's table lacks.
EMBEDDING_FIGURES = (
    "word_similarity_bare",
    "word_similarity_centered",
    "word_similarity_post_processed",
    "second_moment_frequency_fit",
)

#: How far each cause has moved the mean embedding over the run.
DRIFT = ("drift_second_moments", "drift_gradients", "drift_decay")


@dataclass(frozen=True)
class Evaluated:
    """A run and the results of its evaluation. The results of a stage are empty if it was not run."""

    directory: Path
    """Where it is."""
    experiment: Experiment
    """Its settings."""
    curve: list[dict[str, Any]]
    """The lines of metrics.jsonl with an evaluation."""
    validation: dict[str, Any]
    """The content of validation.json."""
    embeddings: dict[str, Any]
    """The content of embeddings.json."""
    downstream: dict[str, Any]
    """The content of downstream.json."""
    frequency: dict[str, Any]
    """The content of frequency.json."""
    version: str | None = None
    """Version of the package that trained it."""
    diverged: str | None = None
    """How it diverged; None if it did not."""
    planned: tuple[int, ...] = ()
    """The numbers of steps that it was planned for; more than one if it was trained longer."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.experiment.run.name

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.experiment.run.seed

    @cached_property
    def parameters(self) -> int:
        """Trainable parameters; a tied embedding counts once."""
        return estimate(self.experiment).parameters

    @property
    def model(self) -> str:
        """Family and size, for a table."""
        return f"{self.experiment.model.label} {short(self.parameters)}"

    @property
    def tokens(self) -> int:
        """Tokens seen in training."""
        return self.experiment.train.steps * self.experiment.train.batch_tokens

    @property
    def length(self) -> str:
        """Tokens seen in training, for a table; for a run that was trained longer, also where it continued."""
        before = [short(steps * self.experiment.train.batch_tokens) for steps in self.planned[:-1]]
        return " ".join([short(self.tokens), *(["(longer from", f"{', '.join(before)})"] if before else [])])

    @property
    def setting(self) -> str:
        """Key shared by runs that differ only in seed and method."""
        return self.setting_without()

    def setting_without(self, *keys: str) -> str:
        """Key shared by runs that differ only in seed, method, and the given keys, each as ``section.key``."""
        speed = {"micro_batch", "compile", "activation_checkpointing", "checkpoint_every", "keep_last", "keep_every"}
        content = self.experiment.model_dump(include={"model", "data", "optimizer", "schedule", "train"})
        del content["optimizer"]["embedding"]
        content["train"] = {key: value for key, value in content["train"].items() if key not in speed}
        content["train"]["before"] = self.planned[:-1]
        content["model"]["logits"] = self.head
        for section, _, key in (key.partition(".") for key in keys):
            del content[section][key]
        return json.dumps(content, sort_keys=True)

    @property
    def method(self) -> str:
        """The usual name of the way in which the output embedding was trained."""
        return self.experiment.method

    @property
    def head(self) -> str:
        """Precision of the logits: ``float32`` or ``bfloat16``."""
        return self.experiment.model.logits or self.experiment.train.precision

    @property
    def initial_loss(self) -> Value:
        """The validation loss before the first step."""
        first = self.curve[0] if self.curve else {}
        return first.get("validation_loss") if first.get("step") == 0 else None

    @property
    def last(self) -> dict[str, Any]:
        """The last evaluation during training."""
        return self.curve[-1] if self.curve else {}

    @property
    def figures(self) -> dict[str, Value]:
        """All metrics by name: those of the stages, and of the last evaluation during training."""
        return {
            **self.embeddings.get("figures", {}),
            "validation_loss_during_training": self.last.get("validation_loss"),
            "validation_loss": self.validation.get("loss"),
            "perplexity": self.validation.get("perplexity"),
            **{name: self.validation.get(name) for name in LOGITS},
            "downstream_accuracy": self.downstream["acc"] if is_papers_accuracy(self.downstream) else None,
            "downstream_accuracy_error": self.downstream["acc_stderr"] if is_papers_accuracy(self.downstream) else None,
        }

    @property
    def loss_by_decile(self) -> list[Value]:
        """Loss per decile of token frequency, the rarest first, on the report half of the held-out text; None if not
        measured."""
        return self.frequency.get("loss_by_decile") or [None] * DECILES

    def beyond_memory(self, share: Literal["rows", "text"]) -> Value:
        """Share of the vocabulary or of the training text whose κ is above 1, unseen rows among them."""
        if not (ranges := self.frequency.get("kappa")):
            return None
        return float(sum(ranges[name][share] for name in ("1_to_10", "above_10", "unseen")))

    def log_ratio(self, name: str) -> Value:
        """Mean log(predicted / true share) of the rows in a range of κ, one of ``KAPPA_NAMES``."""
        ratio: Value = self.frequency.get("kappa", {}).get(name, {}).get("log_ratio")
        return ratio

    @property
    def step_rms(self) -> Value:
        """Root mean square of the output embedding's step at the evaluation that is nearest to half of the steps."""
        half = self.experiment.train.steps / 2
        middle: dict[str, Any] = min(self.curve, key=lambda line: abs(line["step"] - half), default={})
        return middle.get("embedding_step_rms")

    @property
    def token_sample(self) -> TokenSample | None:
        """Some tokens for plots, if the embedding was measured."""
        sample = self.embeddings.get("token_sample")
        return TokenSample(**sample) if sample else None


def read_runs(directories: Iterable[Path]) -> list[Evaluated]:
    """Read runs and the results of their evaluation.

    Args:
        directories: each a run, or a directory that contains runs.

    Returns:
        The runs, sorted by family, size, tokens and name; each of them once.

    Raises:
        InputError: a directory contains no runs, or a file is damaged.
    """
    found: dict[Path, Evaluated] = {}
    for directory in directories:
        inner = (
            [directory]
            if (directory / "experiment.toml").exists()
            else sorted(p.parent for p in directory.glob("*/experiment.toml") if not p.parent.name.startswith("."))
        )
        if not inner:
            raise InputError(f"{directory}: contains no runs")
        found |= {path.resolve(): _read_run(path) for path in inner}
    return sorted(found.values(), key=lambda run: (run.experiment.model.family, run.parameters, run.tokens, run.name))


def _read_run(directory: Path) -> Evaluated:
    experiment = read_experiment(directory)
    files = {stage: read_stage(directory, stage) or {} for stage in SCHEMAS}
    # Figures of a run on its way are not those of the experiment.
    for stage in ("validation", "embeddings", "frequency"):
        if files[stage].get("step") != experiment.train.steps:
            files[stage] = {}
    measured = {files[stage].get("inputs", {}).get("weights") for stage in ("validation", "embeddings")}
    if files["downstream"].get("settings", {}).get("model_digest") not in measured:
        files["downstream"] = {}
    curve = MetricsLog(directory / "metrics.jsonl").evaluations()
    why, version = directory / DIVERGED, None
    planned: tuple[int, ...] = (experiment.train.steps,)
    if (directory / "environment.json").exists():
        environment = read_environment(directory)
        version = environment.get("packages", {}).get("coupled-adam")
        planned = planned_steps(environment, experiment)
    diverged = read_json(why, Divergence, "delete it")["reason"] if why.exists() and not files["validation"] else None
    return Evaluated(directory, experiment, curve, **files, version=version, diverged=diverged, planned=planned)


#: The columns of the reference's table in its order, and the figure in each.
COLUMNS = {
    "name": "name",
    "test_loss (~)": "validation_loss_during_training",
    "test_loss": "validation_loss",
    "test_perplexity": "perplexity",
    "lm-eval-avg-acc": "downstream_accuracy",
    "lm-eval-avg-acc-std": "downstream_accuracy_error",
    "isotropy": "isotropy",
    "avg norm": "mean_of_norms",
    "mu norm": "norm_of_mean",
    "ratio norm": "mean_shift_ratio",
    "eb_cos_sim": "word_similarity",
    "eb_dot_sim": "word_similarity_dot",
    "corr_p(norm, lbp)": "norm_frequency_pearson",
    "corr_s(norm, lbp)": "norm_frequency_spearman",
    "corr_p(Emu, lbp)": "projection_frequency_pearson",
    "corr_s(Emu, lbp)": "projection_frequency_spearman",
    "Smin": "smallest_singular_value",
    "Smax": "largest_singular_value",
    "Smin/Smax": "inverse_condition",
}


def _experiment_name(run: Evaluated) -> str:
    return run.name.removesuffix(f"-s{run.seed}")


def _families() -> dict[str, str]:
    """The family of each miniature, the first one if there are several, as `coupled-adam reproduce` plans it."""
    found: dict[str, str] = {}
    for family, content in experiments.families("mini").items():
        found |= {name: family for name in content["experiments"] if name not in found}
    return found


#: The columns after those: what the run was, and figures that the reference's table lacks.
MORE_COLUMNS: dict[str, Callable[[Evaluated], str | Value]] = {
    "experiment": lambda run: _experiment_name(run),
    "seed": lambda run: run.seed,
    "model": lambda run: run.experiment.model.family,
    "parameters": lambda run: run.parameters,
    "tied": lambda run: str(run.experiment.model.tied).lower(),
    "tokens": lambda run: run.tokens,
    "steps": lambda run: run.experiment.train.steps,
    "batch_tokens": lambda run: run.experiment.train.batch_tokens,
    "vocab_size": lambda run: run.experiment.data.vocab_size,
    "corpus": lambda run: run.experiment.data.source,
    "method": lambda run: run.method,
    "core": lambda run: run.experiment.optimizer.core.name,
    "head": lambda run: run.head,
    "lr": lambda run: run.experiment.schedule.lr,
    "lr_factor": lambda run: run.experiment.optimizer.embedding.lr_factor,
    "beta2": lambda run: run.experiment.optimizer.embedding_beta2,
    "initial_loss": lambda run: run.initial_loss,
    "loss_selection": lambda run: run.frequency.get("loss_selection"),
    "loss_report": lambda run: run.frequency.get("loss_report"),
    "bits_per_byte": lambda run: run.frequency.get("bits_per_byte"),
    **{f"loss_decile_{i + 1}": functools.partial(lambda i, run: run.loss_by_decile[i], i) for i in range(DECILES)},
    "kappa_rows": lambda run: run.beyond_memory("rows"),
    "kappa_text": lambda run: run.beyond_memory("text"),
    **{f"log_ratio_{name}": functools.partial(lambda name, run: run.log_ratio(name), name) for name in KAPPA_NAMES},
    "step_rms": lambda run: run.step_rms,
    **{name: functools.partial(lambda name, run: run.figures.get(name), name) for name in EMBEDDING_FIGURES},
    **{name: functools.partial(lambda name, run: run.last.get(name), name) for name in DRIFT},
    "diverged": lambda run: str(run.diverged is not None).lower(),
    **{name: functools.partial(lambda name, run: run.figures[name], name) for name in LOGITS},
    "version": lambda run: run.version or "",
    "longer_from": lambda run: " ".join(map(str, run.planned[:-1])),
}


def table(runs: Sequence[Evaluated]) -> list[dict[str, str | Value]]:
    """Make a table of runs, with the column names of the reference implementation first.

    Args:
        runs: from ``read_runs``.

    Returns:
        One row per run: values by column, None where one was not measured. ``Smin/Smax`` is in percent.
    """
    family = _families()
    return [
        {c: run.name if f == "name" else run.figures.get(f) for c, f in COLUMNS.items()}
        | {"family": family.get(_experiment_name(run), "")}
        | {column: value(run) for column, value in MORE_COLUMNS.items()}
        for run in runs
    ]


def headings() -> list[str]:
    """List the columns of ``table``."""
    return [*COLUMNS, "family", *MORE_COLUMNS]


def as_csv(runs: Sequence[Evaluated]) -> str:
    """Format the table as comma-separated values with a header; what is not known stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, headings(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table(runs))
    return text.getvalue()


@dataclass(frozen=True)
class Moments:
    """A figure over seeds."""

    count: int
    mean: float
    deviation: float | None
    """Sample standard deviation; None of a single run."""


def spread(found: Moments | None, form: str) -> str:
    """Format ``mean ± deviation``, the mean alone for a single run, a dash for nothing."""
    if found is None:
        return MISSING
    mean = form.format(found.mean)
    return mean if found.deviation is None else f"{mean} ± {form.format(found.deviation)}"


def short(number: int) -> str:
    """Format a number with three digits: 614400 -> 0.614M."""
    for size, least, letter in ((1e9, 1e9, "B"), (1e6, 1e5, "M")):
        if number >= least:
            return f"{number / size:.3g}{letter}"
    return f"{number:,}"


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ only in their seed."""

    runs: tuple[Evaluated, ...]

    @property
    def first(self) -> Evaluated:
        return self.runs[0]

    @property
    def setting(self) -> str:
        """Model and data, for a heading."""
        return f"{self.first.model} parameters, {self.first.length} tokens"

    def by_seed(self, figure: str) -> dict[int, float]:
        """Return the figure of the runs that have it, by seed."""
        return {run.seed: value for run in self.runs if (value := run.figures.get(figure)) is not None}

    def values(self, figure: str) -> list[float]:
        """Return the figure of the runs that have it."""
        return list(self.by_seed(figure).values())

    def moments(self, figure: str) -> Moments | None:
        """Return mean and deviation; None if no run has the figure."""
        return moments(self.values(figure))


def moments(values: Sequence[float]) -> Moments | None:
    """Return mean and sample standard deviation; None of nothing."""
    if not values:
        return None
    return Moments(len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def groups(runs: Sequence[Evaluated]) -> list[SeedGroup]:
    """Group the runs by setting and method, in the order in which they come, each by seed.

    Raises:
        InputError: two runs that differ in nothing, not even the seed: they are no two observations.
    """
    found: dict[tuple[str, str], list[Evaluated]] = {}
    for run in runs:
        same = found.setdefault((run.setting, run.method), [])
        if twins := [other for other in same if other.seed == run.seed]:
            raise InputError(
                f"{twins[0].directory} and {run.directory} are the same experiment with the same seed; pass only one"
            )
        same.append(run)
    return [SeedGroup(tuple(sorted(same, key=lambda run: run.seed))) for same in found.values()]


@dataclass(frozen=True)
class Comparison:
    """AdamW against Coupled Adam, all else being equal."""

    adamw: SeedGroup
    coupled: SeedGroup

    @property
    def setting(self) -> str:
        """Model and data, for a heading."""
        return self.adamw.setting

    @property
    def of_the_paper(self) -> bool:
        """Whether both are experiments of the paper, whose figures stand beside them."""
        papers = {*experiments.names("small"), *experiments.names("large")}
        return {_experiment_name(run) for group in (self.adamw, self.coupled) for run in group.runs} <= papers

    def difference(self, figure: str) -> PairedDifference | None:
        """Coupled Adam minus AdamW, over the seeds that both have: a pair begins with the same weights and batches."""
        return paired_difference(self.adamw.by_seed(figure), self.coupled.by_seed(figure))

    def papers_p_value(self, figure: Figure) -> float | None:
        """One-sided Student's t-test that Coupled Adam is better, which takes the runs for unrelated.

        It is that of the paper, which calls a difference significant below 0.05 (arXiv 2502.08441, section 4), and
        stands beside the paper's figures alone. None without two runs of each, or any spread.
        """
        a, v = self.adamw.values(figure.name), self.coupled.values(figure.name)
        if min(len(a), len(v)) < 2 or (statistics.pvariance(a) == statistics.pvariance(v) == 0):
            return None
        p = float(stats.ttest_ind(v, a, alternative="less" if figure.better == "lower" else "greater").pvalue)
        return None if math.isnan(p) else p


def comparisons(found: Sequence[SeedGroup]) -> list[Comparison]:
    """Pair AdamW with Coupled Adam, the smallest setting first."""
    by_key = {(group.first.setting, group.first.method): group for group in found}
    return [
        Comparison(group, by_key[setting, COUPLED])
        for (setting, method), group in by_key.items()
        if method == ADAMW and (setting, COUPLED) in by_key
    ]


def largest(pairs: Sequence[Comparison]) -> Comparison:
    """Return the one that took most FLOPs to train."""
    return max(pairs, key=lambda pair: pair.adamw.first.parameters * pair.adamw.first.tokens)


def sweep(found: Sequence[SeedGroup], name: str) -> list[list[SeedGroup]]:
    """Return, for every setting with more than one value of it, the groups by coupling_scale or lr_factor, ascending.

    ``coupling_scale`` is that of Coupled Adam (1 for the plain one), ``lr_factor`` that of SGD; neither is taken with
    other methods on top.
    """
    optimizer = {"coupling_scale": "coupled_adam", "lr_factor": "sgd"}[name]

    def value(group: SeedGroup) -> float:
        return float(getattr(group.first.experiment.optimizer.embedding, name))

    plain = [g for g in found if g.first.method == g.first.experiment.optimizer.embedding.label]
    matching = [g for g in plain if g.first.experiment.optimizer.embedding.name == optimizer]
    matching.sort(key=lambda group: (group.first.setting, value(group)))
    lines = [list(same) for _, same in itertools.groupby(matching, key=lambda group: group.first.setting)]
    return [line for line in lines if len({value(group) for group in line}) > 1]
