"""The demo: the same small language model trained with AdamW and with Coupled Adam, measured side by side."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import Timeout

from coupled_adam import __version__, experiments
from coupled_adam.errors import InputError
from coupled_adam.evaluation.during_training import evaluator
from coupled_adam.evaluation.stages import evaluate
from coupled_adam.files import (
    check_file_replaceable,
    check_outside_made,
    lock_in,
    make_directory,
    output_path,
    write_json,
)
from coupled_adam.lm.config import OPTIMIZER_LABELS, Experiment
from coupled_adam.lm.corpus import Corpus, open_corpus
from coupled_adam.lm.prepare import prepare, resolved
from coupled_adam.lm.run import check_run_directory, planned_steps, read_environment, read_experiment
from coupled_adam.lm.sources import Source, WikipediaSample, local_source
from coupled_adam.lm.train import train
from coupled_adam.progress import duration, say
from coupled_adam.report.aggregate import Evaluated, read_runs
from coupled_adam.report.demo_page import PUBLISHED_MODEL, PUBLISHED_TOKENS, write_demo_page
from coupled_adam.report.page import check_page

#: Values of optimizer.embedding.name that are compared.
METHODS = ("adamw", "coupled_adam")

#: Steps of the longer demo, which the command line proposes.
LONGER = 300

#: Steps of warm-up at most, however long the demo.
LONGEST_WARMUP = 20

#: Evaluations while a longer demo trains, about.
EVALUATIONS = 12

#: What stands at the top of results.json, and says that it may be replaced.
RESULTS_MARK = '"made_by": "coupled-adam '


def run_demo(out: Path, text: Path | None = None, steps: int | None = None, seed: int = 1) -> dict[str, Any]:
    """Run what is not yet done of the demo in ``out``, write results.json and report.html there, return the results.

    Args:
        out: directory, created if need be. A second call with the same settings resumes what the first one left.
            ``default_directory`` is where the command line puts it.
        text: a UTF-8 file or a directory of such files; None for the Wikipedia sample.
        steps: of 2,048 tokens each; None for those of the experiment: 60.
        seed: for weight initialization and data order.

    Raises:
        InputError: bad text; ``out`` is no directory, in use by another process, or holds a demo with other settings or
            text, or files of the demo's names that were not made by it.
        Interrupted: the user stopped it; all that was done is saved.
    """
    experiment = _experiment(steps, seed)
    source = local_source(text) if text else WikipediaSample()
    check_outside_made(out)
    output_path(out / "corpus", *source.paths)
    source.fingerprint()  # reads the text: what is wrong with it is said before there is a directory
    check_page(out / "report.html")
    check_file_replaceable(out / "results.json", RESULTS_MARK)
    for method in METHODS:
        check_run_directory(out / method, experiment)
    _check_same(out, source, experiment)
    make_directory(out)
    try:
        with lock_in(out):
            return _run(out, source, experiment)
    except Timeout:
        raise InputError(f"{out}: another process is working there; wait for it, or choose another directory") from None


def default_directory(steps: int | None = None) -> Path:
    """Return where the demo of so many steps lies: another length has another place, so that both can be had."""
    short = steps is None or steps == experiments.load("demo").train.steps
    return Path("runs", "demo" if short else f"demo-{steps}")


def _experiment(steps: int | None, seed: int) -> Experiment:
    experiment = experiments.load("demo").with_values(run__seed=seed)
    steps = steps or experiment.train.steps
    return experiment.with_values(
        train__steps=steps,
        schedule__warmup_steps=max(min(LONGEST_WARMUP, steps // 10), 1),
        evaluation__every=max(steps // EVALUATIONS, experiment.evaluation.every),
    )


def _method(experiment: Experiment, method: str) -> Experiment:
    return experiment.with_values(run__name=method, optimizer__embedding__name=method)


def _check_same(out: Path, source: Source, experiment: Experiment) -> None:
    """Raise InputError if ``out`` holds a demo with other settings, or of another text. Nothing is changed."""
    remedy = "choose another directory with --out, or repeat the earlier command to resume"
    for method in METHODS:
        if (out / method / "experiment.toml").exists():
            there = read_experiment(out / method)
            # The tokens and the held-out share are the corpus's.
            wanted = _method(experiment, method).model_copy(update={"data": there.data})
            found = there.differences(wanted)
            # The steps decide other settings too.
            changed = [each for each in found if each.startswith(("run.seed", "train.steps"))] or found
            if len(planned_steps(read_environment(out / method), there)) > 1:
                changed.append(f"{method} was trained longer")
            if changed:
                raise InputError(
                    f"{out}: already contains a demo with different settings ({'; '.join(changed)}); {remedy}"
                )
    if (out / "corpus" / "meta.json").exists():
        corpus = open_corpus(out / "corpus")
        if corpus.meta["settings"]["text"] != source.fingerprint():
            raise InputError(f"{out}: already contains a demo on different text ({corpus.meta['source']}); {remedy}")


def _run(out: Path, source: Source, experiment: Experiment) -> dict[str, Any]:
    began = time.monotonic()
    say(f"Corpus: {source.name}")
    corpus = prepare(source, experiment.data, out / "corpus")
    experiment = resolved(experiment, corpus)
    sizes = f"{corpus.tokens('train'):,} training and {corpus.tokens('validation'):,} validation tokens"
    say(f"  {sizes} in {corpus.directory}")
    for i, method in enumerate(METHODS, start=1):
        say(f"[{i}/{len(METHODS)}] {OPTIMIZER_LABELS[method]}: {experiment.train.steps:,} steps in {out / method}")
        run = _method(experiment, method)
        train(run, corpus, out / method, evaluator(run, corpus))
        evaluate(out / method, corpus.directory, ("validation", "embeddings"))
    runs = {method: read_runs([out / method])[0] for method in METHODS}
    results = _results(experiment, corpus, runs)
    write_json(out / "results.json", results)
    write_demo_page(out / "report.html", list(runs.values()), corpus.meta["source"])
    say(f"Done in {duration(time.monotonic() - began)}: {out / 'report.html'}")
    return results


def _results(experiment: Experiment, corpus: Corpus, runs: dict[str, Evaluated]) -> dict[str, Any]:
    published = [
        experiments.published_result(PUBLISHED_MODEL, PUBLISHED_TOKENS, OPTIMIZER_LABELS[method]) for method in METHODS
    ]
    return {
        "made_by": f"coupled-adam {__version__}",
        "version": __version__,
        "corpus": {key: corpus.meta[key] for key in ("source", "fingerprint", "documents", "characters")}
        | {"tokens": {split: corpus.tokens(split) for split in ("train", "validation")}},
        "experiment": experiment.model_dump(),
        "parameters": runs["adamw"].parameters,
        "runs": {
            method: {
                "name": run.method,
                "figures": run.figures,
                "word_similarity": run.embeddings["word_similarity"]["original"],
                "curve": run.curve,
            }
            for method, run in runs.items()
        },
        "published": [asdict(result) for result in published],
    }
