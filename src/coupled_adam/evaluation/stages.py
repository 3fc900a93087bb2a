"""The stages that follow training: validation, embeddings, export, downstream tasks. Each writes one file.

``evaluation/validation.json``, ``evaluation/embeddings.json``, ``evaluation/downstream.json`` and the folder ``model/``
of a run say what they were made from; a second call computes only what is missing or made from something else.
"""

import functools
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from coupled_adam import geometry
from coupled_adam.errors import InputError
from coupled_adam.evaluation.downstream import PAPER_TASKS, downstream
from coupled_adam.evaluation.embeddings import audit_json
from coupled_adam.evaluation.tokens import sample_tokens
from coupled_adam.evaluation.validation import batches_used, held_out, validation_loss
from coupled_adam.files import write_json
from coupled_adam.lm.export import export, exported_digest, transformers_config, write_model_card
from coupled_adam.lm.model import LanguageModel
from coupled_adam.lm.parallel import World
from coupled_adam.lm.progress import say
from coupled_adam.lm.run import Run, digest, open_run, whole_weights

STAGES = ("validation", "embeddings", "export", "downstream")


@dataclass(frozen=True)
class Downstream:
    """What the stage of that name runs: see :func:`coupled_adam.evaluation.downstream.downstream`."""

    tasks: tuple[str, ...] = PAPER_TASKS
    limit: int | None = None
    include_path: Path | None = None


def evaluate(
    folder: Path,
    data: Path | None = None,
    only: Collection[str] = STAGES,
    benchmarks: Path | None = None,
    tasks: Downstream | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Run what is not yet done of the stages ``only`` for the run in ``folder``, and return what their files hold.

    Args:
        folder: of the run.
        data: of its corpus; None for where it was during training.
        only: a choice of :data:`STAGES`. ``downstream`` exports the model first.
        benchmarks: a folder of word-similarity benchmarks; None for those that come with packages.
        tasks: of the stage ``downstream``.
        world: the processes that share the validation text; all call this, the main one does the rest.

    Returns:
        By stage: the content of its JSON file, or for ``export`` the folder. In the other processes it is empty.

    Raises:
        InputError: not a trained run, no corpus, an unknown stage, or bad benchmarks.
    """
    if unknown := [stage for stage in only if stage not in STAGES]:
        raise InputError(f"{unknown[0]}: no stage of that name; choose from {', '.join(STAGES)}")
    world = world or World()
    run = world.from_main(lambda: open_run(folder, data))
    if "export" in only or "downstream" in only:
        world.from_main(lambda: transformers_config(run.experiment, run.corpus))  # refused before anything is computed
    model = run.model(world)
    weights = whole_weights(model)
    sha256 = world.from_main(lambda: digest(weights))
    results: dict[str, Any] = {}
    if "validation" in only:
        results["validation"] = _validation(run, model, sha256, world)
    if not world.main:
        return {}
    if "embeddings" in only:
        results["embeddings"] = _embeddings(run, weights["head.weight"], sha256, benchmarks)
    if "export" in only or "downstream" in only:
        export(run, weights, sha256, folder / "model")
        results["export"] = str(folder / "model")
    if "downstream" in only:
        try:
            results["downstream"] = _downstream(run, sha256, tasks or Downstream())
        except (InputError, ImportError) as error:  # what the other stages found is kept, and shown
            say(f"downstream: {error}")
            results["downstream"] = {"failed": {"downstream": str(error)}}
    if "export" in results:
        write_model_card(run, folder / "model", card_figures(folder, sha256))
    return results


def export_run(folder: Path, data: Path | None = None, out: Path | None = None) -> Path:
    """Export the run in ``folder`` to ``out`` (its own ``model``, if None), and return that.

    Raises:
        InputError: not a trained run, no corpus, a model that transformers has not, or something else in ``out``.
    """
    run, target = open_run(folder, data), out or folder / "model"
    if target.exists() and exported_digest(target) is None:
        raise InputError(f"{target}: exists, and is no model exported here; choose another folder")
    weights = whole_weights(run.model())
    sha256 = digest(weights)
    export(run, weights, sha256, target)
    write_model_card(run, target, card_figures(folder, sha256))
    return target


def read_stage(folder: Path, stage: str) -> dict[str, Any] | None:
    """The file that a stage has written for the run in ``folder``; None if there is none."""
    path = folder / "evaluation" / f"{stage}.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: damaged ({error}); delete it, and evaluate the run again") from None
    return content


def card_figures(folder: Path, weights: str) -> dict[str, float | None]:
    """What the card of an exported model tells: what the stages' files hold of weights of that digest."""
    files = {stage: read_stage(folder, stage) or {} for stage in ("validation", "embeddings", "downstream")}

    measured = {
        stage: content.get("inputs", {}).get("weights") or content.get("settings", {}).get("model_digest")
        for stage, content in files.items()
    }
    return found_figures({stage: content for stage, content in files.items() if measured[stage] == weights})


def found_figures(results: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures that say most of what :func:`evaluate` returns, by what to call them; None for those it lacks."""
    validation, embeddings, tasks = (results.get(s, {}) for s in ("validation", "embeddings", "downstream"))
    figures = embeddings.get("figures", {})
    return {
        "validation loss (nats per token)": validation.get("loss"),
        "perplexity": validation.get("perplexity"),
        "isotropy of the output embedding": figures.get("isotropy"),
        "mean shift ratio": figures.get("mean_shift_ratio"),
        "word similarity (100·Pearson)": figures.get("word_similarity"),
        accuracy_label(tasks): tasks.get("acc"),
    }


def accuracy_label(downstream: Mapping[str, Any]) -> str:
    """What the mean accuracy in the file of the stage ``downstream`` is the mean of."""
    if is_papers_accuracy(downstream):
        return "mean accuracy of the paper's tasks"
    limit = downstream.get("settings", {}).get("limit")
    tasks = ", ".join(downstream.get("mean_over", []))
    return f"mean accuracy of {tasks}" + (f" ({limit} samples each)" if limit else "")


def is_papers_accuracy(downstream: Mapping[str, Any]) -> bool:
    """Whether the mean accuracy is that of the paper: over its seven tasks, with all of their samples."""
    return bool(downstream.get("complete")) and downstream["settings"]["limit"] is None


def _known(run: Run, stage: str, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """What the stage's file holds, if it was made from ``inputs`` by this version."""
    found = read_stage(run.folder, stage)
    return found if found and found["inputs"] == {**inputs, "version": version("coupled-adam")} else None


def _written(run: Run, stage: str, inputs: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """What the stage's file holds from now on."""
    made = {"inputs": {**inputs, "version": version("coupled-adam")}, "step": run.step, **content}
    write_json(run.folder / "evaluation" / f"{stage}.json", made)
    return made


def _validation(run: Run, model: LanguageModel, weights: str, world: World) -> dict[str, Any]:
    settings = run.experiment.evaluation
    batches, count = held_out(run.experiment, run.corpus), settings.final_batches or settings.batches
    inputs = {"weights": weights, "corpus": run.corpus.fingerprint, "batches": count}
    if known := world.from_main(lambda: _known(run, "validation", inputs)):
        return known
    if world.main:
        say(f"{run.experiment.run.name}: validation")
    loss = validation_loss(model, batches, count, world)
    tokens = batches_used(batches, count) * batches.batch_size * batches.sequence_length
    figures = {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens}
    return world.from_main(lambda: _written(run, "validation", inputs, figures))


def _embeddings(run: Run, embedding: Tensor, weights: str, folder: Path | None) -> dict[str, Any]:
    benchmarks = read_benchmarks(folder)
    inputs = {
        "weights": weights,
        "corpus": run.corpus.fingerprint,
        "benchmarks": hashlib.sha256(repr(benchmarks).encode()).hexdigest(),
    }
    if known := _known(run, "embeddings", inputs):
        return known
    say(f"{run.experiment.run.name}: embeddings")
    counts, moment = run.corpus.unigram_counts, run.second_moment()
    if moment is not None and moment.shape != embedding.shape:
        moment = None  # shared over the vocabulary, it says nothing of the tokens
    try:
        audit = geometry.audit(
            embedding, counts=counts, token_of=functools.cache(run.corpus.token_of), benchmarks=benchmarks
        )
    except ValueError as error:
        raise InputError(f"{run.folder}: {error}") from None
    content = audit_json(audit)
    fit = None if moment is None else geometry.second_moment_frequency_fit(moment, counts)
    content["figures"]["second_moment_frequency_fit"] = None if fit is None or math.isnan(fit) else fit
    content["token_sample"] = sample_tokens(embedding, run.corpus.text_of, counts, moment).as_json()
    return _written(run, "embeddings", inputs, content)


def _downstream(run: Run, weights: str, settings: Downstream) -> dict[str, Any]:
    return downstream(
        run.folder / "model",
        run.folder / "evaluation" / "downstream.json",
        digest=weights,
        tasks=settings.tasks,
        limit=settings.limit,
        include_path=settings.include_path,
    )


def read_benchmarks(folder: Path | None) -> list[geometry.Benchmark]:
    """The word-similarity benchmarks in ``folder``, or those that come with packages. Raises InputError."""
    if folder is None:
        return geometry.published_benchmarks()
    try:
        return geometry.read_benchmarks(folder)
    except ValueError as error:
        raise InputError(str(error)) from None
