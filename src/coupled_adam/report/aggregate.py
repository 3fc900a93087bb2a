"""Figures of many runs: a row a run, means over seeds, and AdamW against Coupled Adam."""

import csv
import io
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from scipy import stats

from coupled_adam.errors import InputError
from coupled_adam.evaluation.stages import is_papers_accuracy, read_stage
from coupled_adam.evaluation.tokens import TokenSample
from coupled_adam.lm.config import EmbeddingOptimizer, Experiment, load_experiment
from coupled_adam.lm.estimate import estimate
from coupled_adam.lm.train import Metrics

Value = float | None

#: Value of optimizer.embedding.name, and what people call it.
METHODS = {"adamw": "AdamW", "coupled_adam": "Coupled Adam", "adams": "Adams", "sgd": "SGD"}


@dataclass(frozen=True)
class Evaluated:
    """A run and what its stages have written."""

    folder: Path
    experiment: Experiment
    curve: list[dict[str, Any]]
    """The lines of metrics.jsonl that hold an evaluation."""
    validation: dict[str, Any]
    embeddings: dict[str, Any]
    downstream: dict[str, Any]

    @property
    def name(self) -> str:
        return self.experiment.run.name

    @property
    def seed(self) -> int:
        return self.experiment.run.seed

    @cached_property
    def parameters(self) -> int:
        """Trainable numbers; a tied embedding counts once."""
        return estimate(self.experiment).parameters

    @property
    def model(self) -> str:
        """Family and size, for a table."""
        family = {"gpt2": "GPT-2", "llama": "LLaMA"}[self.experiment.model.family]
        return f"{family} {short(self.parameters)}"

    @property
    def tokens(self) -> int:
        """Seen in training."""
        return self.experiment.train.steps * self.experiment.train.batch_tokens

    @property
    def setting(self) -> str:
        """What runs have in common that differ in seed and in the optimizer of the embedding alone."""
        speed = {"micro_batch", "compile", "activation_checkpointing", "checkpoint_every", "keep_every"}
        content = self.experiment.model_dump(include={"model", "data", "optimizer", "schedule", "train"})
        del content["optimizer"]["embedding"]
        content["train"] = {key: value for key, value in content["train"].items() if key not in speed}
        return json.dumps(content, sort_keys=True)

    @property
    def method(self) -> str:
        """What people call the optimizer of the embedding, with what it is set to."""
        e = self.experiment.optimizer.embedding
        name = METHODS[e.name]
        extra = [f"s={e.coupling_scale:g}"] if e.coupling_scale != 1 else []
        extra += [f"κ={e.coupling_factor:g}"] if e.coupling_factor else []
        extra += [f"f={e.lr_factor:g}"] if e.lr_factor != 1 else []
        extra += [f"momentum {e.momentum:g}"] if e.name == "sgd" and e.momentum != EmbeddingOptimizer().momentum else []
        return " ".join([name, *extra])

    @property
    def figures(self) -> dict[str, Value]:
        """All figures by name: those of the stages, and of the last evaluation while it was trained."""
        last = self.curve[-1] if self.curve else {}
        return {
            **self.embeddings.get("figures", {}),
            "validation_loss_during_training": last.get("validation_loss"),
            "validation_loss": self.validation.get("loss"),
            "perplexity": self.validation.get("perplexity"),
            "downstream_accuracy": self.downstream["acc"] if is_papers_accuracy(self.downstream) else None,
            "downstream_accuracy_error": self.downstream["acc_stderr"] if is_papers_accuracy(self.downstream) else None,
        }

    @property
    def token_sample(self) -> TokenSample | None:
        """Some tokens for pictures, if the embedding was measured."""
        sample = self.embeddings.get("token_sample")
        return TokenSample(**sample) if sample else None


def read_runs(folders: Iterable[Path]) -> list[Evaluated]:
    """The runs in ``folders``, each a run or a folder that holds runs; sorted by size, then name.

    Raises:
        InputError: a folder without runs, or a damaged file.
    """
    found: dict[Path, Evaluated] = {}
    for folder in folders:
        inner = (
            [folder]
            if (folder / "experiment.toml").exists()
            else sorted(p.parent for p in folder.glob("*/experiment.toml"))
        )
        if not inner:
            raise InputError(f"{folder}: holds no run, and no folder in it does")
        found |= {path.resolve(): _read_run(path) for path in inner}
    return sorted(found.values(), key=lambda run: (run.experiment.model.family, run.parameters, run.tokens, run.name))


def _read_run(folder: Path) -> Evaluated:
    experiment = load_experiment(folder / "experiment.toml")
    lines = Metrics(folder / "metrics.jsonl").read()
    files = {stage: read_stage(folder, stage) or {} for stage in ("validation", "embeddings", "downstream")}
    # Figures of a run on its way are not those of the experiment.
    for stage in ("validation", "embeddings"):
        if files[stage].get("step") != experiment.train.steps:
            files[stage] = {}
    measured = {files[stage].get("inputs", {}).get("weights") for stage in ("validation", "embeddings")}
    if files["downstream"].get("settings", {}).get("model_digest") not in measured:
        files["downstream"] = {}
    curve = [line for line in lines if "validation_loss" in line]
    return Evaluated(folder, experiment, curve, **files)


#: The columns of the reference's table in its order, and the figure in each.
COLUMNS = {
    "name": "name",
    "test_loss (~)": "validation_loss_during_training",
    "test_loss": "validation_loss",
    "test_perplexity": "perplexity",
    "lm-eval-avg-acc": "downstream_accuracy",
    "lm-eval-avg-acc-std": "downstream_accuracy_error",
    "isotropy": "isotropy",
    "avg norm": "average_norm",
    "mu norm": "mean_norm",
    "ratio norm": "mean_shift_ratio",
    "eb_cos_sim": "word_similarity",
    "eb_dot_sim": "word_similarity_dot",
    "corr_p(norm, lbp)": "norm_frequency_pearson",
    "corr_s(norm, lbp)": "norm_frequency_spearman",
    "corr_p(Emu, lbp)": "projection_frequency_pearson",
    "corr_s(Emu, lbp)": "projection_frequency_spearman",
    "Smin": "smallest_singular_value",
    "Smax": "largest_singular_value",
    "Smin/Smax": "condition",
}


def table(runs: Sequence[Evaluated]) -> list[dict[str, str | Value]]:
    """A row a run, with the columns of :data:`COLUMNS`; ``Smin/Smax`` is in percent, as the paper has it."""
    return [{c: run.name if f == "name" else run.figures.get(f) for c, f in COLUMNS.items()} for run in runs]


def as_csv(runs: Sequence[Evaluated]) -> str:
    """The table as comma-separated values with a header; what is not known stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
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
    """``mean ± deviation``, the mean alone of a single run, a dash of nothing."""
    if found is None:
        return "–"
    mean = form.format(found.mean)
    return mean if found.deviation is None else f"{mean} ± {form.format(found.deviation)}"


def short(number: int) -> str:
    """Three digits: 614400 -> 0.614M."""
    for size, least, letter in ((1e9, 1e9, "B"), (1e6, 1e5, "M")):
        if number >= least:
            return f"{number / size:.3g}{letter}"
    return f"{number:,}"


@dataclass(frozen=True)
class Group:
    """The runs that differ in their seed alone."""

    runs: tuple[Evaluated, ...]

    @property
    def first(self) -> Evaluated:
        return self.runs[0]

    @property
    def setting(self) -> str:
        """Model and data, for a heading."""
        return f"{self.first.model} parameters, {short(self.first.tokens)} tokens"

    def values(self, figure: str) -> list[float]:
        """Of the runs that have it."""
        return [value for run in self.runs if (value := run.figures.get(figure)) is not None]

    def moments(self, figure: str) -> Moments | None:
        """Mean and deviation; None if no run has the figure."""
        return moments(self.values(figure))


def moments(values: Sequence[float]) -> Moments | None:
    """Mean and sample standard deviation; None of nothing."""
    if not values:
        return None
    return Moments(len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def groups(runs: Sequence[Evaluated]) -> list[Group]:
    """The runs by setting and method, in the order in which they come, each by seed.

    Raises:
        InputError: two runs that differ in nothing, not even the seed: they are no two observations.
    """
    found: dict[tuple[str, str], list[Evaluated]] = {}
    for run in runs:
        same = found.setdefault((run.setting, run.method), [])
        if twins := [other for other in same if other.seed == run.seed]:
            raise InputError(f"{twins[0].folder} and {run.folder} are the same experiment with the same seed; give one")
        same.append(run)
    return [Group(tuple(sorted(same, key=lambda run: run.seed))) for same in found.values()]


@dataclass(frozen=True)
class Comparison:
    """AdamW against Coupled Adam, all else being equal."""

    adamw: Group
    coupled: Group

    @property
    def setting(self) -> str:
        """Model and data, for a heading."""
        return self.adamw.setting

    def p_value(self, figure: str, lower_is_better: bool) -> float | None:
        """Of Student's t-test that Coupled Adam is better, one-sided; None without two runs of each, or any spread.

        The paper calls a difference significant below 0.05 (arXiv 2502.08441, section 4).
        """
        a, v = self.adamw.values(figure), self.coupled.values(figure)
        if min(len(a), len(v)) < 2 or (statistics.pvariance(a) == statistics.pvariance(v) == 0):
            return None
        p = float(stats.ttest_ind(v, a, alternative="less" if lower_is_better else "greater").pvalue)
        return None if math.isnan(p) else p


def comparisons(found: Sequence[Group]) -> list[Comparison]:
    """The pairs of AdamW and Coupled Adam, the smallest setting first."""
    by_key = {(group.first.setting, group.first.method): group for group in found}
    return [
        Comparison(group, by_key[setting, "Coupled Adam"])
        for (setting, method), group in by_key.items()
        if method == "AdamW" and (setting, "Coupled Adam") in by_key
    ]


def largest(pairs: Sequence[Comparison]) -> Comparison:
    """The one that took most arithmetic to train."""
    return max(pairs, key=lambda pair: pair.adamw.first.parameters * pair.adamw.first.tokens)


def sweep(found: Sequence[Group], name: str) -> list[list[Group]]:
    """For every setting with more than one value of it: the groups by coupling_scale or lr_factor, ascending.

    ``coupling_scale`` is that of Coupled Adam (1 for the plain one), ``lr_factor`` that of SGD.
    """
    optimizer = {"coupling_scale": "coupled_adam", "lr_factor": "sgd"}[name]

    def value(group: Group) -> float:
        return float(getattr(group.first.experiment.optimizer.embedding, name))

    matching = [g for g in found if g.first.experiment.optimizer.embedding.name == optimizer]
    matching.sort(key=lambda group: (group.first.setting, value(group)))
    lines = [list(same) for _, same in itertools.groupby(matching, key=lambda group: group.first.setting)]
    return [line for line in lines if len({value(group) for group in line}) > 1]
