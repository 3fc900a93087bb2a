"""The command line: parses, calls one function, prints."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coupled_adam import __version__, demo, experiments, progress
from coupled_adam.audit.audit_page import audit_rows, write_audit_page
from coupled_adam.audit.models import audit_models
from coupled_adam.errors import InputError
from coupled_adam.evaluation.downstream import PAPER_TASKS, PAPER_TASKS_043
from coupled_adam.evaluation.during_training import evaluator
from coupled_adam.evaluation.stages import STAGES, Downstream, evaluate, export_run, read_benchmarks, summary
from coupled_adam.experiments import published_result
from coupled_adam.figures import FIGURES, figures
from coupled_adam.lm.config import Data, Experiment, load_experiment
from coupled_adam.lm.estimate import PEAK_FLOPS, UTILIZATION, Estimate, estimate
from coupled_adam.lm.metrics_jsonl import MetricsLog
from coupled_adam.lm.parallel import init_distributed
from coupled_adam.lm.prepare import corpus_for, prepare
from coupled_adam.lm.run import check_run_directory
from coupled_adam.lm.sources import source_of
from coupled_adam.lm.tracking import require_trackers
from coupled_adam.lm.train import DivergedError, Interrupted, train
from coupled_adam.report import aggregate
from coupled_adam.report.aggregate import Moments, short, spread
from coupled_adam.report.demo_page import PUBLISHED_MODEL, PUBLISHED_TOKENS, SHOWN
from coupled_adam.report.page import check_page
from coupled_adam.report.report_page import report
from coupled_adam.report.table import Row, rows
from coupled_adam.reproduce import SHOWN as AVERAGED
from coupled_adam.reproduce import reproduce

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

#: Columns of a table that goes to a file or a pipe.
WIDE = 130

#: The colors of a verdict.
LEVELS = {"good": "green", "fair": "yellow", "poor": "red"}

#: Names for several tasks: those of the paper, as they are now and as they were in the paper's harness.
TASK_SETS = {"paper": PAPER_TASKS, "paper-0.4.3": PAPER_TASKS_043}

#: What a shell adds to the number of the signal that ended a program.
SIGNALED = 128


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """AdamW for language models that keeps token embeddings centered: optimizers, experiments, measurements."""
    progress.show_log()


@app.command(name="demo", epilog="Example: coupled-adam demo --text my-notes/ --steps 200 --out runs/notes")
def demo_command(
    text: Annotated[
        Path | None, typer.Option(help="Your own UTF-8 text: a file, or a directory of .txt and .md.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps per run, 2,048 tokens each.  [default: 300]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for weight initialization and data order.")] = 1,
    out: Annotated[Path, typer.Option(help="Output directory; rerun the same command to resume.")] = Path("runs/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")] = False,
) -> None:
    """Compare AdamW with Coupled Adam on real text: a table and a report, in a few minutes on two cores."""
    results = demo.run_demo(out, text, steps, seed)
    if as_json:
        print(json.dumps(results, ensure_ascii=False))
        return
    runs = results["runs"].values()
    published = [published_result(PUBLISHED_MODEL, PUBLISHED_TOKENS, run["name"]) for run in runs]
    names = [run["name"] for run in runs]
    caption = f"paper: {PUBLISHED_MODEL} parameters, {PUBLISHED_TOKENS} tokens of web text"
    shown = rows(figures(SHOWN), [run["figures"] for run in runs], published)
    _print_table([*names, *(f"{name}, paper" for name in names)], shown, caption)
    print(f"Report: {out / 'report.html'}")


@app.command(name="prepare", epilog="Example: coupled-adam prepare books/ --tokenizer gpt2 --out data/books")
def prepare_command(
    source: Annotated[
        str,
        typer.Argument(
            help="wikipedia-sample or wikipedia-leads; a file or directory of .txt and .md, .parquet or .jsonl; or the "
            "name of a dataset, for instance Skylion007/openwebtext."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the corpus; rerun the same command to resume.")],
    tokenizer: Annotated[
        str, typer.Option(help="bpe, trained on the text, or the name or directory of a transformers model.")
    ] = "bpe",
    vocab_size: Annotated[int, typer.Option(min=257, help="Vocabulary size of bpe.")] = 8192,
    column: Annotated[str, typer.Option(help="Column that holds the text (tables and datasets).")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Turn text into token shards, with a validation split by document."""
    corpus = prepare(source_of(source, column), Data(tokenizer=tokenizer, vocab_size=vocab_size), out)
    sizes = {split: corpus.tokens(split) for split in ("train", "validation")}
    if as_json:
        print(json.dumps({"directory": str(out), **corpus.meta}, ensure_ascii=False))
        return
    print(
        f"{out}: {sizes['train']:,} training and {sizes['validation']:,} validation tokens of "
        f"{sum(corpus.meta['documents'].values()):,} documents, vocabulary {corpus.meta['tokenizer_tokens']:,}"
    )


@app.command(name="experiments", epilog="Example: coupled-adam experiments exp35V --gpu A100")
def experiments_command(
    name: Annotated[str | None, typer.Argument(help="Show this experiment.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 1,
    gpu: Annotated[str, typer.Option(help=f"GPU for the hours: {', '.join(PEAK_FLOPS)}.")] = "H100",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the papers' experiments and their miniatures, or show one: configuration, memory, FLOPs."""
    gridded = {n for grid in experiments.grids() for n in grid.experiments}
    chosen = [name] if name else [n for n in experiments.names() if as_json or n not in gridded]
    loaded = {n: experiments.load(n, seed) for n in chosen}
    estimates = {n: estimate(e, gpu) for n, e in loaded.items()}
    if as_json:
        shown = {n: {"experiment": loaded[n].model_dump(), "estimate": asdict(estimates[n])} for n in chosen}
        print(json.dumps(shown[name] if name else shown, ensure_ascii=False))
        return
    if name:
        print(loaded[name].to_toml())
    table = Table(box=box.SIMPLE, caption=f"hours: one {gpu} at {UTILIZATION:.0%} of its peak, an assumption")
    for heading in ("experiment", "model", "parameters", "tokens", "steps", "embedding", "core", f"{gpu} hours"):
        table.add_column(heading, no_wrap=True)
    for n, e in loaded.items():
        shape = f"{e.model.family} {e.model.n_layers}/{e.model.n_heads}/{e.model.hidden_size}"
        sizes = (short(estimates[n].parameters), short(estimates[n].tokens), f"{e.train.steps:,}")
        hours = estimates[n].gpu_hours
        optimizers = (e.method, e.optimizer.core.name)
        table.add_row(n, shape, *sizes, *optimizers, f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}")
    _console().print(table)
    if name:
        _print_estimate(estimates[name])
    else:
        _print_grids()


def _print_grids() -> None:
    """One row a grid: its hundreds of experiments differ in what the braces of their name stand for."""
    table = Table(box=box.SIMPLE, caption="each can be shown and trained by name, with a value for every brace")
    for heading, wraps in (("experiments", False), ("number", False), ("values", True)):
        table.add_column(heading, no_wrap=not wraps)
    for grid in experiments.grids():
        values = "\n".join(f"{axis}: {', '.join(entries)}" for axis, entries in grid.axes.items())
        table.add_row(grid.pattern, str(len(grid.experiments)), values)
    _console().print(table)


def _print_estimate(found: Estimate) -> None:
    print(f"parameters        {found.parameters:,} ({found.embedding_parameters:,} in the output embedding)")
    print(f"tokens            {found.tokens:,} in {found.steps:,} steps")
    for label, size in (
        ("weights", found.weights_bytes),
        ("gradients", found.gradients_bytes),
        ("optimizer state", found.optimizer_bytes),
        ("activations", found.activation_bytes),
    ):
        print(f"{label:<17} {size / 2**30:,.2f} GiB" + (" for a micro-batch" if label == "activations" else ""))
    print(f"compute           {found.flops:.3g} FLOPs")


@app.command(
    name="train", epilog="Example: torchrun --nproc-per-node 2 -m coupled_adam train mini-M-300V train.steps=100"
)
def train_command(
    experiment: Annotated[str, typer.Argument(help="Name of an experiment, or a TOML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    data: Annotated[Path | None, typer.Option(help="Directory that `coupled-adam prepare` made.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the run.  [default: runs/NAME]")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed for weight initialization and data order.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the last metrics as JSON.")] = False,
) -> None:
    """Train one experiment, or resume it; also under torchrun, on one machine or many."""
    config = _experiment(experiment, seed).overridden(overrides or [])
    run_dir = out or Path("runs") / config.run.name
    with init_distributed() as world:
        # The corpus may take long to prepare.
        world.broadcast_from_main(lambda: require_trackers(config.tracking))
        world.broadcast_from_main(lambda: check_run_directory(run_dir, config))
        corpus = world.broadcast_from_main(lambda: corpus_for(config, data))
        train(config, corpus, run_dir, evaluator(config, corpus, world), world)
        if world.is_main_process:
            log = MetricsLog(run_dir / "metrics.jsonl")
            last = next(reversed(log.read()), None)
            if last is None:
                raise InputError(f"{log.path}: holds no metrics; the run is trained, and can be evaluated")
            print(json.dumps(last) if as_json else _last_line(run_dir, last))


def _experiment(name: str, seed: int | None) -> Experiment:
    path = Path(name)
    if path.suffix != ".toml":
        return experiments.load(name, 1 if seed is None else seed)
    config = load_experiment(path)
    return config if seed is None else config.with_values(run__seed=seed)


def _last_line(run_dir: Path, line: dict[str, Any]) -> str:
    shown = figures(("loss", "validation_loss", "isotropy", "mean_shift_ratio", "word_similarity"))
    parts = [
        f"{figure.label} {figure.cell(line[figure.name])}" for figure in shown if line.get(figure.name) is not None
    ]
    return f"{run_dir}: step {line['step']:,}: {', '.join(parts)}"


@app.command(name="reproduce", epilog="Example: coupled-adam reproduce mini --only scaled --only sgd")
def reproduce_command(
    suite: Annotated[str, typer.Argument(help="mini: the families of the paper's experiments, for two cores.")],
    only: Annotated[
        list[str] | None, typer.Option(help=f"A family: {', '.join(experiments.families())}. May be repeated.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="For instance 1,2,3.  [default: those of the family]")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Directory of the runs; rerun to resume.  [default: runs/SUITE]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train and evaluate what is missing of a suite, and report on it."""
    try:
        numbers = [int(seed) for seed in seeds.split(",") if seed.strip()]
    except ValueError:
        raise InputError(f"--seeds {seeds}: write whole numbers with commas between them, for instance 1,2,3") from None
    directory = out or Path("runs") / suite
    results = reproduce(suite, only or [], numbers, directory)
    if as_json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        table = Table(box=box.SIMPLE, caption="mean ± standard deviation over the runs")
        for heading in ("experiment", "runs", *(figure.label for figure in figures(AVERAGED))):
            table.add_column(heading, no_wrap=True)
        for row in results["experiments"]:
            table.add_row(row["name"], str(row["runs"]), *(_spread(name, row["figures"][name]) for name in AVERAGED))
        _console().print(table)
        if results["experiments"]:
            print(f"Report: {directory / 'report.html'}")
    if results["diverged"]:
        print(f"Diverged: {', '.join(results['diverged'])}", file=sys.stderr)
    for name, reason in results["failed"].items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    if results["failed"]:
        raise typer.Exit(1)


def _spread(name: str, moments: dict[str, Any] | None) -> str:
    return spread(Moments(**moments) if moments else None, FIGURES[name].form)


@app.command(
    name="evaluate", epilog="Example: coupled-adam evaluate runs/exp12V-s1 --only validation --only embeddings"
)
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="Directory of a trained run.")],
    data: Annotated[Path | None, typer.Option(help="Corpus directory, if it has moved since training.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"A stage: {', '.join(STAGES)}. May be repeated.")] = None,
    tasks: Annotated[
        str, typer.Option(help=f"lm-eval tasks, separated by commas; or one of {', '.join(TASK_SETS)}.")
    ] = "paper",
    limit: Annotated[int | None, typer.Option(min=1, help="Samples per task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Directory of your own task definitions.")] = None,
    benchmarks: Annotated[Path | None, typer.Option(help="Directory of word-similarity benchmarks.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the stages' results as JSON.")] = False,
) -> None:
    """Evaluate a run: validation loss, embedding quality, export and downstream tasks. Results are cached."""
    names = tuple(name.strip() for name in tasks.split(",") if name.strip()) or PAPER_TASKS
    names = tuple(task for name in names for task in TASK_SETS.get(name, (name,)))
    with init_distributed() as world:
        results = evaluate(run, data, only or STAGES, benchmarks, Downstream(names, limit, include_path), world)
        if not world.is_main_process:
            return
    failed = results.get("downstream", {}).get("failed", {})
    if as_json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        for label, value in summary(results).items():
            print(f"{label:<45} {value}")
        if "export" in results:
            print(f"exported to {results['export']}")
    if failed:
        print(f"coupled-adam: not run: {', '.join(failed)}; the reasons are above", file=sys.stderr)
        raise typer.Exit(1)


@app.command(name="export", epilog="Example: coupled-adam export runs/exp12V-s1 --out exp12V")
def export_command(
    run: Annotated[Path, typer.Argument(help="Directory of a trained run.")],
    data: Annotated[Path | None, typer.Option(help="Corpus directory, if it has moved since training.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the model.  [default: RUN/model]")] = None,
) -> None:
    """Export a model that transformers loads without this package: weights, tokenizer, configuration, model card."""
    print(export_run(run, data, out))


@app.command(name="report", epilog="Example: coupled-adam report runs/mini --out report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or directories that hold them.")],
    out: Annotated[Path, typer.Option(help="Directory of aggregate.csv and report.html.")] = Path("report"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Report on evaluated runs: the paper's table, and a page with charts beside the published figures."""
    found = report(runs, out)
    if as_json:
        print(json.dumps(aggregate.table(found), ensure_ascii=False))
    else:
        print(f"{len(found)} runs: {out / 'aggregate.csv'}, {out / 'report.html'}")


@app.command(name="audit", epilog="Example: coupled-adam audit gpt2 runs/demo/coupled_adam --html audit.html")
def audit_command(
    models: Annotated[
        list[str],
        typer.Argument(help="Directory or name of a transformers model, .safetensors, .gguf, .npy, .npz, or a run."),
    ],
    benchmarks: Annotated[Path | None, typer.Option(help="Directory of word-similarity benchmarks.")] = None,
    tensor: Annotated[str | None, typer.Option(help="Name of the tensor to measure.")] = None,
    data: Annotated[Path | None, typer.Option(help="Corpus of a run, if it has moved since training.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts here.")] = None,
    center_to: Annotated[
        Path | None,
        typer.Option("--center", help="Write a copy with a centered output embedding (predictions unchanged)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Audit the embeddings of any model: figures, a verdict in words, several models side by side."""
    if html:
        check_page(html)  # before it is measured
    audited, centered = audit_models(models, read_benchmarks(benchmarks), tensor=tensor, data=data, center_to=center_to)
    if html:
        write_audit_page(html, audited)
    if as_json:
        print(json.dumps([matrix.as_json() for matrix in audited], ensure_ascii=False))
    else:
        _print_table([matrix.name for matrix in audited], audit_rows(audited))
        console = _console()
        for matrix in audited:
            console.print(f"[bold]{escape(matrix.name)}[/bold]")
            for finding in matrix.findings:
                console.print(f"  [{LEVELS[finding.level]}]{finding.level}[/]  {escape(finding.text)}")
        if html:
            print(f"Page: {html}")
    if centered:
        provided = f"; {centered.condition}" if centered.condition else ""
        rounded = f"‖μ‖ was {centered.norm_of_mean:.4g}; rounding moves a row by at most {centered.rounding:.2g}"
        print(f"Centered copy: {centered.path} ({rounded}){provided}", file=sys.stderr)


def _print_table(headings: Iterable[str], shown: Sequence[Row], caption: str | None = None) -> None:
    table = Table(caption=caption, box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in shown:
        table.add_row(row.label, *row.runs, *row.published)
    _console().print(table)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDE)


def main() -> None:
    """Run the command line; a bad input is one line and exit status 2."""
    try:
        app()
    except (InputError, ImportError) as error:  # an extra that is not installed is named by the latter
        sys.exit(_failed(error, 2))
    except (DivergedError, OSError) as error:
        sys.exit(_failed(error, 1))
    except Interrupted as stopped:
        print(f"{stopped}. Rerun the same command to resume.", file=sys.stderr)
        sys.exit(SIGNALED + stopped.signal_number)


def _failed(error: Exception, code: int) -> int:
    print(f"coupled-adam: {error}", file=sys.stderr)
    return code
