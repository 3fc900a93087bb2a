"""The command line: parses, calls one function, prints.

Commands import what they call themselves, so that the help is there at once.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coupled_adam import __version__, completion, progress
from coupled_adam.errors import InputError
from coupled_adam.terminal import Justify, print_error, print_json, print_line, print_styled, print_table

if TYPE_CHECKING:
    from coupled_adam.lm.config import Experiment
    from coupled_adam.lm.estimate import Estimate
    from coupled_adam.report.table import Row

# Help is shown as it is written: brackets in it are no markup.
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _quiet(context: typer.Context, wanted: bool) -> bool:
    wanted |= context.parent is not None and bool(context.parent.params.get("quiet"))
    progress.show_log(wanted)
    if wanted:  # of the libraries that show bars themselves
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    return wanted


#: An option of every command that works for a while, which may also stand before the command.
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=_quiet, help="Hide progress; show only results, warnings and errors."),
]


def _version(wanted: bool) -> None:
    if wanted:
        print_line(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """AdamW for language models that keeps token embeddings centered: optimizers, experiments, measurements."""


@app.command(name="demo", epilog="Example: coupled-adam demo --text my-notes/ --steps 200 --out runs/notes")
def demo_command(
    text: Annotated[
        Path | None, typer.Option(help="Your own UTF-8 text: a file, or a directory of .txt and .md.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps per run, 2,048 tokens each.  [default: 60]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for weight initialization and data order.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output directory; rerun the same command to resume.  [default: runs/demo, or runs/demo-STEPS]"
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")] = False,
) -> None:
    """Compare AdamW with Coupled Adam on real text. Prints a table and writes a report, in about a minute."""
    from coupled_adam.demo import LONGER, default_directory, run_demo
    from coupled_adam.experiments import published_result
    from coupled_adam.figures import figures
    from coupled_adam.report.demo_page import PUBLISHED_MODEL, PUBLISHED_TOKENS, SHOWN
    from coupled_adam.report.study import read_study
    from coupled_adam.report.table import rows

    place = out or default_directory(steps)
    results = run_demo(place, text, steps, seed)
    if as_json:
        print_json(results)
        return
    runs = results["runs"].values()
    published = [published_result(PUBLISHED_MODEL, PUBLISHED_TOKENS, run["name"]) for run in runs]
    names = [run["name"] for run in runs]
    caption = f"paper: {PUBLISHED_MODEL} parameters, {PUBLISHED_TOKENS} tokens of web text"
    shown = rows(figures(SHOWN), [run["figures"] for run in runs], published)
    _print_rows([*names, *(f"{name}, paper" for name in names)], shown, caption)
    print_styled((f"Both had one learning rate for all parameters. {read_study()['sentence']}", ""))
    print_line(f"Report: {place / 'report.html'}")
    if results["experiment"]["train"]["steps"] < LONGER:
        print_line(f"To train longer: the same command with --steps {LONGER}{' and another --out' if out else ''}")


@app.command(name="prepare", epilog="Example: coupled-adam prepare books/ --tokenizer gpt2 --out data/books")
def prepare_command(
    source: Annotated[
        str,
        typer.Argument(
            help="wikipedia-sample or wikipedia-leads; a file or directory of .txt and .md, or of .parquet, .jsonl, "
            ".json, .csv or .tsv, also compressed; or a Hugging Face Hub dataset, for instance "
            "Skylion007/openwebtext or HuggingFaceFW/fineweb:sample-10BT.",
            autocompletion=completion.one_of("wikipedia-sample", "wikipedia-leads"),
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the corpus; rerun the same command to resume.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="bpe (trained on the text); the name or directory of a transformers model; or a corpus directory."
        ),
    ] = "bpe",
    vocab_size: Annotated[int, typer.Option(min=257, help="Vocabulary size of bpe.")] = 8192,
    column: Annotated[str, typer.Option(help="Column that holds the text (tables and datasets).")] = "text",
    sequence_length: Annotated[
        int,
        typer.Option(min=1, help="Tokens per sequence. Both the training and the validation split need at least one."),
    ] = 128,
    held_out: Annotated[
        float | None,
        typer.Option(min=1e-6, max=0.5, help="Share of the text for validation.  [default: 0.05, large tables: 0.005]"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing corpus made from other text or settings.")
    ] = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a description of the corpus as JSON.")] = False,
) -> None:
    """Turn text into token shards. The validation split is by document."""
    from coupled_adam.lm.config import Data
    from coupled_adam.lm.prepare import prepare
    from coupled_adam.lm.sources import source_of

    data = Data(tokenizer=tokenizer, vocab_size=vocab_size, sequence_length=sequence_length, held_out=held_out)
    corpus = prepare(source_of(source, column), data, out, overwrite)
    if as_json:
        print_json({"directory": str(out), **corpus.meta})
        return
    print_line(
        f"{out}: {corpus.tokens('train'):,} training and {corpus.tokens('validation'):,} validation tokens of "
        f"{corpus.documents:,} documents, vocabulary {corpus.meta['tokenizer_tokens']:,}"
    )


@app.command(name="experiments", epilog="Example: coupled-adam experiments exp35V --gpu A100")
def experiments_command(
    name: Annotated[
        str | None, typer.Argument(help="Show this experiment.", autocompletion=completion.experiment)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the run.  [default: that of the name, or 1]")] = None,
    gpu: Annotated[
        str,
        typer.Option(
            help=f"GPU for the estimated hours: {', '.join(completion.GPUS)}.",
            autocompletion=completion.one_of(*completion.GPUS),
        ),
    ] = "H100",
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the experiments as JSON.")] = False,
) -> None:
    """List the papers' experiments and miniatures, or show one. With configuration, memory, FLOPs."""
    from coupled_adam import experiments
    from coupled_adam.lm.estimate import UTILIZATION, estimate
    from coupled_adam.report.aggregate import short

    gridded = {n for grid in experiments.grids() for n in grid.experiments}
    chosen = [name] if name else [n for n in experiments.names() if as_json or n not in gridded]
    loaded = {n: experiments.load(n, seed) for n in chosen}
    estimates = {n: estimate(e, gpu) for n, e in loaded.items()}
    if as_json:
        shown = {n: {"experiment": loaded[n].model_dump(), "estimate": asdict(estimates[n])} for n in chosen}
        print_json(shown[name] if name else shown)
        return
    if name:
        print_line(loaded[name].to_toml())
    # Of all but a few grids it is AdamW, and a terminal is narrow.
    cores = {n: e.optimizer.core.name for n, e in loaded.items()} if name else {}
    headings = (
        "experiment",
        "model",
        "params",
        "tokens",
        "steps",
        "embedding",
        *(["core"] if cores else []),
        f"{gpu} h",
    )
    print_table(
        [(heading, "left") for heading in headings],
        [
            (
                n,
                f"{e.model.family} {e.model.n_layers}/{e.model.n_heads}/{e.model.hidden_size}",
                short(estimates[n].parameters),
                short(estimates[n].tokens),
                f"{e.train.steps:,}",
                e.method,
                *([cores[n]] if cores else []),
                f"{hours:,.0f}" if (hours := estimates[n].gpu_hours) >= 100 else f"{hours:.3g}",
            )
            for n, e in loaded.items()
        ],
        f"{gpu} h: hours on one {gpu} at {UTILIZATION:.0%} of its peak (assumed)",
        optional=("steps", "model", "params", "tokens", "core"),
    )
    if name:
        _print_estimate(estimates[name])
    else:
        _print_grids()


def _print_grids() -> None:
    """One row a grid: its hundreds of experiments differ in what the braces of their name stand for."""
    from coupled_adam import experiments

    print_table(
        [("experiments", "left"), ("number", "right"), ("values", "left")],
        [
            (
                grid.pattern,
                str(len(grid.experiments)),
                "\n".join(f"{axis}: {', '.join(entries)}" for axis, entries in grid.axes.items()),
            )
            for grid in experiments.grids()
        ],
        "show or train one by its name, with a value in place of each pair of braces",
    )


def _print_estimate(found: "Estimate") -> None:
    print_line(f"parameters        {found.parameters:,} ({found.embedding_parameters:,} in the output embedding)")
    print_line(f"tokens            {found.tokens:,} in {found.steps:,} steps")
    for label, size in (
        ("weights", found.weights_bytes),
        ("gradients", found.gradients_bytes),
        ("optimizer state", found.optimizer_bytes),
        ("activations", found.activation_bytes),
    ):
        print_line(f"{label:<17} {size / 2**30:,.2f} GiB" + (" per micro-batch" if label == "activations" else ""))
    print_line(f"compute           {found.flops:.3g} FLOPs")


@app.command(
    name="train", epilog="Example: torchrun --nproc-per-node 2 -m coupled_adam train mini-M-300V train.steps=100"
)
def train_command(
    experiment: Annotated[
        str,
        typer.Argument(
            help="Name of an experiment, ours or the authors'; a TOML file; or the directory of a run, to resume it.",
            autocompletion=completion.experiment_or_file,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="section.key=value …; a larger train.steps trains a finished run longer.",
            autocompletion=completion.override,
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Directory that `coupled-adam prepare` made.  [default: that of the run]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the run.  [default: runs/NAME, or the run given]")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed for weight initialization and data order.")] = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the last metrics as JSON.")] = False,
) -> None:
    """Train one experiment, resume it, or train it longer. Also under torchrun, on one machine or many."""
    from coupled_adam.evaluation.during_training import evaluator
    from coupled_adam.lm.metrics_jsonl import MetricsLog
    from coupled_adam.lm.parallel import init_distributed
    from coupled_adam.lm.prepare import corpus_for, resolved
    from coupled_adam.lm.run import check_run_directory, corpus_of
    from coupled_adam.lm.tracking import require_trackers
    from coupled_adam.lm.train import train

    resumed = Path(experiment) if (Path(experiment) / "experiment.toml").exists() else None
    file = str(resumed / "experiment.toml") if resumed else experiment
    config = _experiment(file, seed).overridden(overrides or [])
    run_dir = out or resumed or Path("runs") / config.run.name
    data = corpus_of(resumed, data) if resumed else data
    with init_distributed() as world:
        # The corpus may take long to prepare.
        world.broadcast_from_main(lambda: require_trackers(config.tracking))
        world.broadcast_from_main(lambda: check_run_directory(run_dir, config))
        corpus = world.broadcast_from_main(lambda: corpus_for(config, data))
        config = resolved(config, corpus)
        train(config, corpus, run_dir, evaluator(config, corpus, world), world, longer=True)
        if world.is_main_process:
            log = MetricsLog(run_dir / "metrics.jsonl")
            last = next(reversed(log.read()), None)
            if last is None:
                raise InputError(f"{log.path}: contains no metrics; the run is trained and can still be evaluated")
            if as_json:
                print_json(last)
            else:
                print_line(_last_line(run_dir, last))


def _experiment(name: str, seed: int | None) -> "Experiment":
    from coupled_adam import experiments
    from coupled_adam.lm.config import load_experiment

    path = Path(name)
    if path.suffix != ".toml":
        try:
            return experiments.load(name, seed)
        except InputError:
            if path.is_dir():
                raise InputError(f"{name}: not a run: it has no experiment.toml") from None
            if len(path.parts) > 1:
                raise InputError(f"{name}: no such directory") from None
            raise
    config = load_experiment(path)
    return config if seed is None else config.with_values(run__seed=seed)


def _last_line(run_dir: Path, line: dict[str, Any]) -> str:
    from coupled_adam.figures import figures

    shown = figures(("loss", "validation_loss", "isotropy", "mean_shift_ratio", "word_similarity"))
    parts = [
        f"{figure.label} {figure.cell(line[figure.name])}" for figure in shown if line.get(figure.name) is not None
    ]
    return f"{run_dir}: step {line['step']:,}: {', '.join(parts)}"


@app.command(name="reproduce", epilog="Example: coupled-adam reproduce mini --only scaled --only sgd")
def reproduce_command(
    suite: Annotated[
        str,
        typer.Argument(
            help="mini: the families of the paper's experiments, for two cores.",
            autocompletion=completion.one_of("mini"),
        ),
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="A family: small, scaled, sgd, llama, long, drift, precision, tied, core, noise, "
            "what-tied, what-untied, health, one-rate, batch, large-batch, steps, rest, rates, words, masked, muon, "
            "decay, warm. May be repeated.",
            autocompletion=completion.family,
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="For example 1,2,3.  [default: those of the family]")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Directory of the runs; rerun to resume.  [default: runs/SUITE]")
    ] = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train and evaluate the remaining runs of a suite. Then write a report."""
    from coupled_adam.figures import figures
    from coupled_adam.reproduce import SHOWN, reproduce

    try:
        numbers = [int(seed) for seed in seeds.split(",") if seed.strip()]
    except ValueError:
        raise InputError(f"--seeds {seeds}: write integers separated by commas, for example 1,2,3") from None
    directory = out or Path("runs") / suite
    results = reproduce(suite, only or [], numbers, directory)
    if as_json:
        print_json(results)
    else:
        print_table(
            [(heading, "left") for heading in ("experiment", "runs", *(figure.label for figure in figures(SHOWN)))],
            [
                (row["name"], str(row["runs"]), *(_spread(name, row["figures"][name]) for name in SHOWN))
                for row in results["experiments"]
            ],
            "mean ± standard deviation over the runs",
        )
        if results["experiments"]:
            print_line(f"Report: {directory / 'report.html'}")
    if results["diverged"]:
        print_error(f"Diverged: {', '.join(results['diverged'])}")
    for name, reason in results["failed"].items():
        print_error(f"{name} failed: {reason}")
    if results["failed"]:
        raise typer.Exit(1)


def _spread(name: str, moments: dict[str, Any] | None) -> str:
    from coupled_adam.figures import FIGURES
    from coupled_adam.report.aggregate import Moments, spread

    return spread(Moments(**moments) if moments else None, FIGURES[name].form)


@app.command(
    name="evaluate", epilog="Example: coupled-adam evaluate runs/exp12V-s1 --only validation --only embeddings"
)
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="Directory of a trained run.")],
    data: Annotated[Path | None, typer.Option(help="Corpus directory, if it has moved since training.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A stage: {', '.join(completion.STAGES)}. May be repeated.",
            autocompletion=completion.one_of(*completion.STAGES),
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="lm-eval tasks, separated by commas; or the paper's tasks: paper (as defined today) or paper-0.4.3 "
            "(as defined in the paper's harness).",
            autocompletion=completion.one_of("paper", "paper-0.4.3"),
        ),
    ] = "paper",
    limit: Annotated[int | None, typer.Option(min=1, help="Samples per task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Directory of your own task definitions.")] = None,
    benchmarks: Annotated[Path | None, typer.Option(help="Directory of word-similarity benchmarks.")] = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the stages' results as JSON.")] = False,
) -> None:
    """Evaluate a run: loss, embeddings, export, downstream tasks. Results are cached."""
    from coupled_adam.evaluation.downstream import PAPER_TASKS, PAPER_TASKS_043
    from coupled_adam.evaluation.stages import STAGES, Downstream, evaluate, summary
    from coupled_adam.lm.parallel import init_distributed

    sets = {"paper": PAPER_TASKS, "paper-0.4.3": PAPER_TASKS_043}
    names = tuple(name.strip() for name in tasks.split(",") if name.strip()) or PAPER_TASKS
    names = tuple(task for name in names for task in sets.get(name, (name,)))
    with init_distributed() as world:
        results = evaluate(run, data, only or STAGES, benchmarks, Downstream(names, limit, include_path), world)
        if not world.is_main_process:
            return
    failed = results.get("downstream", {}).get("failed", {})
    if as_json:
        print_json(results)
    else:
        for label, value in summary(results).items():
            print_line(f"{label:<45} {value}")
        if "export" in results:
            print_line(f"exported to {results['export']}")
    if failed:
        print_error(f"coupled-adam: not run: {', '.join(failed)}; the reasons are above")
        raise typer.Exit(1)


@app.command(name="export", epilog="Example: coupled-adam export runs/exp12V-s1 --out exp12V")
def export_command(
    run: Annotated[Path, typer.Argument(help="Directory of a trained run.")],
    data: Annotated[Path | None, typer.Option(help="Corpus directory, if it has moved since training.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the model.  [default: RUN/model]")] = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the directory as JSON.")] = False,
) -> None:
    """Export a model that transformers loads without this package. Weights, tokenizer, configuration, model card."""
    from coupled_adam.evaluation.stages import export_run

    directory = export_run(run, data, out)
    if as_json:
        print_json({"directory": str(directory)})
    else:
        print_line(directory)


@app.command(name="report", epilog="Example: coupled-adam report runs/mini --out report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or directories that hold them.")],
    out: Annotated[Path, typer.Option(help="Directory of aggregate.csv and report.html.")] = Path("report"),
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Report on evaluated runs: the paper's table and charts. Published results are shown next to ours."""
    from coupled_adam.report.aggregate import table
    from coupled_adam.report.report_page import report

    found = report(runs, out)
    if as_json:
        print_json(table(found))
    else:
        print_line(f"{len(found)} runs: {out / 'aggregate.csv'}, {out / 'report.html'}")


@app.command(name="audit", epilog="Example: coupled-adam audit gpt2 runs/demo/coupled_adam --html audit.html")
def audit_command(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Directory or name of a transformers model, a file of tensors (.safetensors, .gguf, .onnx, .pt, .npy, "
            "…), word or static vectors (word2vec, GloVe, fastText, gensim, spaCy, model2vec), or a run."
        ),
    ],
    benchmarks: Annotated[Path | None, typer.Option(help="Directory of word-similarity benchmarks.")] = None,
    tensor: Annotated[str | None, typer.Option(help="Name of the tensor to measure.")] = None,
    data: Annotated[Path | None, typer.Option(help="Corpus of a run, if it has moved since training.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page with charts to this file.")] = None,
    center_to: Annotated[
        Path | None,
        typer.Option(
            "--center",
            help="Write a copy with a centered output embedding (predictions unchanged), or centered word or static "
            "vectors.",
        ),
    ] = None,
    without_top_to: Annotated[
        Path | None,
        typer.Option(
            "--all-but-the-top",
            help="Write a copy of word or static vectors, or of an array, without mean and first principal components.",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all metrics as JSON.")] = False,
) -> None:
    """Audit the embeddings of any model. Metrics, a verdict in words, several models side by side."""
    from coupled_adam.audit.audit_text import print_audit
    from coupled_adam.audit.centering import Centered
    from coupled_adam.audit.models import audit_models
    from coupled_adam.evaluation.embedding_figures import read_benchmarks

    if html:
        from coupled_adam.report.page import check_page

        check_page(html)  # before it is measured
    audited, written = audit_models(
        models,
        read_benchmarks(benchmarks),
        tensor=tensor,
        data=data,
        center_to=center_to,
        without_top_to=without_top_to,
    )
    if html:
        from coupled_adam.audit.audit_page import write_audit_page

        write_audit_page(html, audited)
    if as_json:
        print_json([matrix.as_json() for matrix in audited])
    else:
        print_audit(audited, html)
    if isinstance(written, Centered):
        provided = f"; {written.condition}" if written.condition else ""
        rounded = f"‖μ‖ was {written.norm_of_mean:.4g}; rounding moves a row by at most {written.rounding:.2g}"
        print_error(f"Centered copy: {written.path} ({rounded}){provided}")
    elif written is not None:
        removed = f"‖μ‖ was {written.norm_of_mean:.4g}; principal components removed: {written.components}"
        print_error(f"All-but-the-Top: {written.path} ({removed}, {written.share:.0%} of the variance)")


def _print_rows(names: Iterable[str], shown: Sequence["Row"], caption: str | None = None) -> None:
    headings: list[tuple[str, Justify]] = [("", "left"), *((name, "right") for name in names)]
    print_table(headings, [(row.label, *row.runs, *row.published) for row in shown], caption)
