"""The demo: the same small language model trained with AdamW and with Coupled Adam, measured side by side."""

import functools
import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from coupled_adam import experiments, geometry
from coupled_adam.errors import InputError
from coupled_adam.evaluation.during_training import evaluator
from coupled_adam.evaluation.embeddings import word_similarity_figures
from coupled_adam.evaluation.tokens import sample_tokens
from coupled_adam.files import write_json
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.corpus import Corpus, prepare
from coupled_adam.lm.model import LanguageModel, parameter_count
from coupled_adam.lm.progress import say
from coupled_adam.lm.sources import TextFiles, WikipediaSample
from coupled_adam.lm.train import Metrics, train
from coupled_adam.report import charts
from coupled_adam.report.page import write_page
from coupled_adam.report.table import Row, comparison

#: Value of optimizer.embedding.name, and what people call it.
METHODS = {"adamw": "AdamW", "coupled_adam": "Coupled Adam"}
PUBLISHED_MODEL, PUBLISHED_TOKENS = "125M", "20B"


@dataclass(frozen=True)
class Trained:
    """One of the two runs, finished."""

    model: LanguageModel
    lines: list[dict[str, Any]]
    """The lines of metrics.jsonl that hold an evaluation."""
    word_similarity: list[dict[str, Any]]


def run_demo(out: Path, text: Path | None = None, steps: int | None = None, seed: int = 1) -> dict[str, Any]:
    """Run what is not yet done of the demo in ``out``, write results.json and report.html there, return the results.

    Args:
        out: folder, made if need be. A second call with the same settings goes on where the first one ended.
        text: a UTF-8 file or a folder of such; None for the Wikipedia sample.
        steps: of 2,048 tokens each; None for the default of the experiment.
        seed: of the initial weights and the order of the batches.

    Raises:
        InputError: bad text, ``out`` in use by another process, or holding runs with other settings.
        Interrupted: the user stopped it; all done is saved.
    """
    experiment = experiments.load("demo").with_values(run__seed=seed)
    if steps is not None:
        warmup = min(experiment.schedule.warmup_steps, max(steps // 10, 1))
        experiment = experiment.with_values(train__steps=steps, schedule__warmup_steps=warmup)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            return _run(out, text, experiment)
    except Timeout:
        raise InputError(f"{out}: another process is working there; wait for it, or choose another folder") from None


def _run(out: Path, text: Path | None, experiment: Experiment) -> dict[str, Any]:
    began = time.monotonic()
    source = TextFiles(text) if text else WikipediaSample()
    say(f"Corpus: {source.name}")
    corpus = prepare(source, experiment.data, out / "corpus")
    sizes = f"{corpus.tokens('train'):,} training and {corpus.tokens('validation'):,} validation tokens"
    say(f"  {sizes} in {corpus.folder}")
    runs = {}
    for method in METHODS:
        run = experiment.with_values(run__name=method, optimizer__embedding__name=method)
        runs[method] = _train(run, corpus, out / method)
    results = _results(experiment, corpus, runs)
    write_json(out / "results.json", results)
    _write_report(out / "report.html", experiment, corpus, runs, results)
    say(f"Done in {time.monotonic() - began:.0f} s: {out / 'report.html'}")
    return results


def _train(experiment: Experiment, corpus: Corpus, run_dir: Path) -> Trained:
    model = train(experiment, corpus, run_dir, evaluator(experiment, corpus))
    lines = [line for line in Metrics(run_dir / "metrics.jsonl").read() if "isotropy" in line]
    benchmarks = geometry.published_benchmarks()
    similarity = word_similarity_figures(
        model.get_output_embeddings().weight, functools.cache(corpus.token_of), benchmarks
    )
    return Trained(model, lines, similarity)


def _results(experiment: Experiment, corpus: Corpus, runs: dict[str, Trained]) -> dict[str, Any]:
    published = [experiments.published_result(PUBLISHED_MODEL, PUBLISHED_TOKENS, name) for name in METHODS.values()]
    return {
        "version": version("coupled-adam"),
        "corpus": {key: corpus.meta[key] for key in ("source", "fingerprint", "documents", "characters")}
        | {"tokens": {split: corpus.tokens(split) for split in ("train", "validation")}},
        "experiment": experiment.model_dump(),
        "parameters": parameter_count(runs["adamw"].model),
        "runs": {
            method: {
                "name": METHODS[method],
                "final": run.lines[-1],
                "word_similarity": run.word_similarity,
                "curve": run.lines,
            }
            for method, run in runs.items()
        },
        "published": [json.loads(json.dumps(vars(result))) for result in published],
    }


def table(results: dict[str, Any]) -> list[Row]:
    """The final figures of both runs beside those of the paper."""
    finals = [results["runs"][method]["final"] for method in METHODS]
    return comparison(finals, [experiments.Published(**result) for result in results["published"]])


def _write_report(
    path: Path, experiment: Experiment, corpus: Corpus, runs: dict[str, Trained], results: dict[str, Any]
) -> None:
    def series(key: str) -> list[tuple[str, charts.Points]]:
        return [(METHODS[method], [(line["step"], line[key]) for line in run.lines]) for method, run in runs.items()]

    samples = {
        METHODS[method]: sample_tokens(run.model.get_output_embeddings().weight, corpus.text_of, corpus.unigram_counts)
        for method, run in runs.items()
    }
    adamw, coupled = (run.lines[-1] for run in runs.values())
    write_page(
        path,
        "demo",
        {
            "mean_shift": charts.curves("Mean shift ratio ‖μ‖ʳ", series("mean_shift_ratio"), highest=1),
            "isotropy": charts.curves("Isotropy", series("isotropy"), highest=1.02),
            "loss": charts.curves("Validation loss (nats per token)", series("validation_loss")),
            "embeddings": charts.token_maps(samples),
        },
        headline=(
            f"After {experiment.train.steps:,} steps the mean embedding lies at {adamw['mean_shift_ratio']:.3f} of the "
            f"average norm with AdamW and at {coupled['mean_shift_ratio']:.3f} with Coupled Adam; "
            f"the validation losses are {adamw['validation_loss']:.2f} and {coupled['validation_loss']:.2f}."
        ),
        steps=f"{experiment.train.steps:,}",
        parameters=f"{results['parameters'] / 1e6:.1f}M",
        tokens=f"{experiment.train.steps * experiment.train.batch_tokens / 1e6:.2f}M",
        source=corpus.meta["source"],
        published_model=PUBLISHED_MODEL,
        published_tokens=PUBLISHED_TOKENS,
        names=list(METHODS.values()),
        rows=table(results),
        mapped=f"{len(next(iter(samples.values())).text):,}",
        benchmarks=[
            {
                "name": per_run[0]["benchmark"],
                "figures": ["–" if r["cosine"] is None else f"{r['cosine']:.1f}" for r in per_run],
                "covered": per_run[0]["covered"],
                "pairs": per_run[0]["pairs"],
            }
            for per_run in zip(*(run.word_similarity for run in runs.values()), strict=True)
        ],
        version=results["version"],
    )
