"""The stages that follow training: validation, embeddings, frequency, export, downstream tasks. Each writes one file.

``validation.json``, ``embeddings.json``, ``frequency.json`` and ``downstream.json`` in ``evaluation/``, and the
directory ``model/`` of a run, say what they were made from; a second call computes only what is missing or out of date.
"""

import functools
import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from coupled_adam import __version__, geometry
from coupled_adam.errors import InputError
from coupled_adam.evaluation.by_frequency import by_frequency
from coupled_adam.evaluation.downstream import PAPER_TASKS, downstream
from coupled_adam.evaluation.embedding_figures import as_json, defined, read_benchmarks
from coupled_adam.evaluation.results import SCHEMAS, read_results, write_results
from coupled_adam.evaluation.token_sample import sample_tokens
from coupled_adam.evaluation.validation import batches_used, held_out, validate
from coupled_adam.figures import FIGURES, figures
from coupled_adam.files import check_writable, output_path, remove_leftovers
from coupled_adam.geometry.measurements import PARTS
from coupled_adam.lm.export import check_target, export, transformers_config, write_model_card
from coupled_adam.lm.loss import STATISTICS
from coupled_adam.lm.model import LanguageModel
from coupled_adam.lm.parallel import World
from coupled_adam.lm.run import Run, full_state_dict, open_run, sha256_of
from coupled_adam.progress import progress_bar, say, warn

__all__ = ["Downstream", "evaluate"]

STAGES = ("validation", "embeddings", "frequency", "export", "downstream")

#: In nats. There is no float for the perplexity of a model that is far worse than chance.
HIGHEST_LOSS = 700.0


@dataclass(frozen=True)
class Downstream:
    """Settings of the stage ``downstream``, as in ``coupled_adam.evaluation.downstream.downstream``."""

    tasks: tuple[str, ...] = PAPER_TASKS
    """Names of lm-eval tasks."""
    limit: int | None = None
    """Samples per task; None for all."""
    include_path: Path | None = None
    """Directory of further task definitions."""


def evaluate(
    directory: Path,
    data: Path | None = None,
    only: Collection[str] = STAGES,
    benchmarks: Path | None = None,
    tasks: Downstream | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Evaluate a trained run. Stages that are done already are not repeated.

    Args:
        directory: of the run.
        data: of its corpus; None for where it was during training.
        only: the stages to run: ``"validation"``, ``"embeddings"``, ``"frequency"``, ``"export"``, ``"downstream"``.
            ``downstream`` exports the model first.
        benchmarks: a directory of word-similarity benchmarks; None for those that come with packages.
        tasks: settings of the stage ``downstream``; None for the tasks of the paper.
        world: the ranks that share the validation text; all call this, and rank 0 does the rest. None for a single
            process.

    Returns:
        The results of each stage by its name, as in its JSON file; for ``export``, the directory. Empty on other ranks.

    Raises:
        InputError: the run is not trained, or its checkpoint is damaged; the corpus is missing; a stage is unknown;
            benchmarks cannot be read; the directory holds foreign files under the names of results, or is not writable.
    """
    if unknown := [stage for stage in only if stage not in STAGES]:
        raise InputError(f"{unknown[0]}: unknown stage; choose from {', '.join(STAGES)}")
    world = world or World()
    exported = "export" in only or "downstream" in only
    run = world.broadcast_from_main(lambda: _opened(directory, data, only, exported))
    model = run.model(world)
    weights = full_state_dict(model)
    sha256 = world.broadcast_from_main(lambda: sha256_of(weights))
    if exported:
        world.broadcast_from_main(lambda: check_target(directory / "model", sha256))
    results: dict[str, Any] = {}
    if "validation" in only:
        results["validation"] = _validation(run, model, sha256, world)
    if not world.is_main_process:
        return {}
    if "embeddings" in only:
        results["embeddings"] = _embeddings(run, weights["head.weight"], sha256, benchmarks)
    if "frequency" in only and world.size > 1:
        warn(f"{run.experiment.run.name}: loss by frequency runs in one process only: start it without torchrun")
    elif "frequency" in only:
        results["frequency"] = _frequency(run, model, sha256)
    if exported:
        say(f"{run.experiment.run.name}: exporting to {directory / 'model'}")
        export(run, weights, sha256, directory / "model")
        results["export"] = str(directory / "model")
    if "downstream" in only:
        results["downstream"] = _downstream(run, sha256, tasks or Downstream())
    if exported:
        write_model_card(run, directory / "model", card_figures(directory, sha256))
    return results


def _opened(directory: Path, data: Path | None, only: Collection[str], exported: bool) -> Run:
    """Open the run; what cannot be done is refused before it costs."""
    run = open_run(directory, data)
    remove_leftovers(directory, {"model"}.__contains__)
    remove_leftovers(directory / "evaluation", {f"{stage}.json" for stage in STAGES}.__contains__)
    for stage in SCHEMAS:
        if exported or stage in only:
            read_stage(directory, stage)
    if exported:
        transformers_config(run.experiment, run.corpus)
        check_target(directory / "model")
    return run


def export_run(directory: Path, data: Path | None = None, out: Path | None = None) -> Path:
    """Export the run in ``directory`` to ``out`` (None: its own ``model``), and return that.

    Raises:
        InputError: not a trained run, no corpus, an architecture that transformers does not provide, or something else
            in ``out``.
    """
    run, target = open_run(directory, data), directory / "model"
    if out is not None:
        target = output_path(out, run.corpus.directory, directory / "checkpoints")
    transformers_config(run.experiment, run.corpus)
    check_target(target)
    for stage in ("validation", "embeddings", "downstream"):
        read_stage(directory, stage)  # of the model card; what is damaged is named before anything is written
    weights = full_state_dict(run.model())
    sha256 = sha256_of(weights)
    export(run, weights, sha256, target)
    write_model_card(run, target, card_figures(directory, sha256))
    return out or target


def read_stage(directory: Path, stage: str) -> dict[str, Any] | None:
    """Read the file that a stage has written for the run in ``directory``; None if there is none."""
    path = directory / "evaluation" / f"{stage}.json"
    return read_results(path, stage) if path.exists() else None


def card_figures(directory: Path, weights: str) -> dict[str, str]:
    """Return the figures for the model card: those measured on weights with this hash."""
    files = {stage: read_stage(directory, stage) or {} for stage in ("validation", "embeddings", "downstream")}
    measured = {
        stage: content.get("inputs", {}).get("weights") or content.get("settings", {}).get("model_digest")
        for stage, content in files.items()
    }
    return summary({stage: content for stage, content in files.items() if measured[stage] == weights})


def summary(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures that say most of what ``evaluate`` returns, label and value ready to print."""
    validation, embeddings, tasks = (results.get(s, {}) for s in ("validation", "embeddings", "downstream"))
    found = {"validation_loss": validation.get("loss"), "perplexity": validation.get("perplexity")}
    found |= {
        name: embeddings.get("figures", {}).get(name) for name in ("isotropy", "mean_shift_ratio", "word_similarity")
    }
    shown = {
        figure.label: figure.cell(found[figure.name]) for figure in figures(found) if found[figure.name] is not None
    }
    if tasks.get("acc") is not None:
        shown[accuracy_label(tasks)] = FIGURES["downstream_accuracy"].cell(tasks["acc"])
    return shown


def accuracy_label(downstream: Mapping[str, Any]) -> str:
    """Return a label that says which tasks the mean accuracy covers."""
    if is_papers_accuracy(downstream):
        return FIGURES["downstream_accuracy"].meaning
    limit = downstream.get("settings", {}).get("limit")
    tasks = ", ".join(downstream.get("mean_over", []))
    return f"mean accuracy of {tasks}" + (f" ({limit} samples each)" if limit else "")


def is_papers_accuracy(downstream: Mapping[str, Any]) -> bool:
    """Return whether the mean accuracy is that of the paper: over its seven tasks, with all of their samples."""
    return bool(downstream.get("complete")) and downstream["settings"]["limit"] is None


def _known(run: Run, stage: str, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Read the stage's file, if it was made from ``inputs`` by this version."""
    found = read_stage(run.directory, stage)
    return found if found and found.get("inputs") == {**inputs, "version": __version__} else None


def _written(run: Run, stage: str, inputs: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Write the stage's file, and return what it holds."""
    made = {"inputs": {**inputs, "version": __version__}, "step": run.step, **content}
    write_results(run.directory / "evaluation" / f"{stage}.json", made)
    return made


def _validation(run: Run, model: LanguageModel, weights: str, world: World) -> dict[str, Any]:
    settings = run.experiment.evaluation
    batches, count = held_out(run.experiment, run.corpus), settings.final_batches or settings.batches
    inputs = {"weights": weights, "corpus": run.corpus.fingerprint, "batches": count}
    known = world.broadcast_from_main(lambda: _known(run, "validation", inputs))
    if known and STATISTICS[0] in known:  # else it is from before there were those of the logits
        return known
    world.broadcast_from_main(lambda: check_writable(run.directory / "evaluation"))
    if world.is_main_process:
        say(f"{run.experiment.run.name}: evaluating validation loss")
    used = batches_used(batches, count)
    with progress_bar(run.experiment.run.name, 0, used, world.is_main_process, "batch", passing=True) as show:
        found = validate(model, batches, count, world, settings.precision, show)
    loss = found.pop("validation_loss")
    tokens = used * batches.batch_size * (run.experiment.masked_tokens or batches.sequence_length)
    perplexity = math.exp(loss) if loss < HIGHEST_LOSS else None
    content = {"loss": loss, "perplexity": perplexity, "tokens": tokens, **found}
    return world.broadcast_from_main(lambda: _written(run, "validation", inputs, content))


def _embeddings(run: Run, embedding: Tensor, weights: str, directory: Path | None) -> dict[str, Any]:
    benchmarks = read_benchmarks(directory)
    inputs = {
        "weights": weights,
        "corpus": run.corpus.fingerprint,
        "benchmarks": hashlib.sha256(repr(benchmarks).encode()).hexdigest(),
    }
    known = _known(run, "embeddings", inputs)
    if known and "word_similarity_bare" in known["figures"]:  # else it is from before that was measured
        return known
    check_writable(run.directory / "evaluation")
    say(f"{run.experiment.run.name}: measuring {_size(embedding)} embeddings")
    counts, moment = run.corpus.unigram_counts, run.second_moment()
    if moment is not None and moment.shape != embedding.shape:
        moment = None  # shared over the vocabulary, it says nothing of the tokens
    words = run.corpus.words
    try:
        with progress_bar(run.experiment.run.name, 0, PARTS, unit="part", passing=True) as show:
            statistics = geometry.Statistics(embedding)
            measured = geometry.measure(
                statistics, counts=counts, token_of=functools.cache(words.token_of), benchmarks=benchmarks, show=show
            )
    except ValueError as error:
        raise InputError(f"{run.directory}: {error}") from None
    content = as_json(measured)
    fit = None if moment is None else geometry.second_moment_frequency_fit(moment, counts)
    content["figures"]["second_moment_frequency_fit"] = None if fit is None or math.isnan(fit) else fit
    bare = functools.cache(words.bare_token_of)
    found = geometry.mean_similarity([geometry.word_similarity(statistics, bare, each) for each in benchmarks])
    content["figures"] |= defined({"word_similarity_bare": found})
    content["token_sample"] = sample_tokens(statistics, words.text_of, counts, moment).as_json()
    return _written(run, "embeddings", inputs, content)


def _size(matrix: Tensor) -> str:
    return " × ".join(f"{length:,}" for length in matrix.shape)


def _frequency(run: Run, model: LanguageModel, weights: str) -> dict[str, Any]:
    settings = run.experiment.evaluation
    inputs = {
        "weights": weights,
        "corpus": run.corpus.fingerprint,
        "batches": settings.final_batches or settings.batches,
    }
    known = _known(run, "frequency", inputs)
    if known and "documents" in known:  # else it is from before they were measured
        return known
    check_writable(run.directory / "evaluation")
    say(f"{run.experiment.run.name}: evaluating loss by frequency")
    try:
        found = by_frequency(model, run.experiment, run.corpus)
    except InputError as error:  # what the other stages found is kept, and shown
        warn(f"loss by frequency: {error}")
        return {}
    return _written(run, "frequency", inputs, found)


def _downstream(run: Run, weights: str, settings: Downstream) -> dict[str, Any]:
    try:
        if run.experiment.model.masked:
            raise InputError(
                f"{run.experiment.run.name} is a masked language model; the tasks of lm-eval are for models that "
                "predict the next token"
            )
        return downstream(
            run.directory / "model",
            run.directory / "evaluation" / "downstream.json",
            digest=weights,
            tasks=settings.tasks,
            limit=settings.limit,
            include_path=settings.include_path,
        )
    except (InputError, ImportError) as error:  # what the other stages found is kept, and shown
        warn(f"downstream: {error}")
        return {"failed": {"downstream": str(error)}}
