"""The command line: parses, calls one function, prints."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coupled_adam import __version__, demo, experiments
from coupled_adam.errors import InputError
from coupled_adam.evaluation.auditing import audit_models
from coupled_adam.evaluation.centering import center
from coupled_adam.evaluation.downstream import PAPER_TASKS, PAPER_TASKS_043
from coupled_adam.evaluation.during_training import evaluator
from coupled_adam.evaluation.embedding_files import read_embeddings
from coupled_adam.evaluation.stages import STAGES, Downstream, evaluate, export_run, found_figures, read_benchmarks
from coupled_adam.lm.config import Data, Experiment, load_experiment
from coupled_adam.lm.corpus import corpus_for, prepare
from coupled_adam.lm.estimate import PEAK_FLOPS, UTILISATION, estimate
from coupled_adam.lm.parallel import joined
from coupled_adam.lm.sources import source_of
from coupled_adam.lm.tracking import require_trackers
from coupled_adam.lm.train import DivergedError, Interrupted, Metrics, train
from coupled_adam.report import aggregate, audit_page
from coupled_adam.report.aggregate import Moments, short, spread
from coupled_adam.report.audit_page import write_audit_page
from coupled_adam.report.suite import report
from coupled_adam.reproduce import FIGURES, reproduce

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

#: Columns of a table that goes to a file or a pipe.
WIDE = 130

#: The colours of a verdict.
LEVELS = {"good": "green", "fair": "yellow", "poor": "red"}

#: Names for several tasks: those of the paper, as they are now and as they were in the paper's harness.
TASK_SETS = {"paper": PAPER_TASKS, "paper-0.4.3": PAPER_TASKS_043}

#: What a shell adds to the number of the signal that ended a program.
SIGNALLED = 128


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Adam without anisotropic embeddings: optimizers, experiments, measurements."""


@app.command(name="demo", epilog="Example: coupled-adam demo --text my-notes/ --steps 200 --out runs/notes")
def demo_command(
    text: Annotated[
        Path | None, typer.Option(help="Your own UTF-8 text, a file or a folder of .txt and .md files.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of 2,048 tokens a run.  [default: 300]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the initial weights and the order of the batches.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the results; a second call goes on there.")] = Path("runs/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")] = False,
) -> None:
    """AdamW against Coupled Adam on real text: a table, a report, a few minutes on two cores."""
    results = demo.run_demo(out, text, steps, seed)
    if as_json:
        print(json.dumps(results, ensure_ascii=False))
        return
    names = list(demo.METHODS.values())
    caption = f"paper: {demo.PUBLISHED_MODEL} parameters, {demo.PUBLISHED_TOKENS} tokens of web text"
    table = Table(caption=caption, box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    for heading in [*names, *(f"{name}, paper" for name in names)]:
        table.add_column(heading, justify="right")
    for row in demo.table(results):
        table.add_row(row.label, *row.runs, *row.published)
    Console().print(table)
    print(f"Report: {out / 'report.html'}")


@app.command(name="prepare", epilog="Example: coupled-adam prepare books/ --tokenizer gpt2 --out data/books")
def prepare_command(
    source: Annotated[
        str,
        typer.Argument(
            help="wikipedia-sample; a file or folder of .txt and .md, .parquet or .jsonl; or the name of a data set, "
            "for instance Skylion007/openwebtext."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the corpus. A second call goes on, or reuses it.")],
    tokenizer: Annotated[
        str, typer.Option(help="bpe, trained on the text, or the name or folder of a model of transformers.")
    ] = "bpe",
    vocabulary: Annotated[int, typer.Option(min=257, help="Tokens of bpe.")] = 8192,
    column: Annotated[str, typer.Option(help="Of tables and data sets: where the text is.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Text to token shards, with a validation split by document."""
    corpus = prepare(source_of(source, column), Data(tokenizer=tokenizer, vocabulary=vocabulary), out)
    sizes = {split: corpus.tokens(split) for split in ("train", "validation")}
    if as_json:
        print(json.dumps({"folder": str(out), **corpus.meta}, ensure_ascii=False))
        return
    print(
        f"{out}: {sizes['train']:,} training and {sizes['validation']:,} validation tokens of "
        f"{sum(corpus.meta['documents'].values()):,} documents, vocabulary {corpus.meta['tokenizer_tokens']:,}"
    )


@app.command(name="experiments", epilog="Example: coupled-adam experiments exp35V --gpu A100")
def experiments_command(
    name: Annotated[str | None, typer.Argument(help="Show this one.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    gpu: Annotated[str, typer.Option(help=f"For the hours: {', '.join(PEAK_FLOPS)}.")] = "H100",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the experiments of the paper and their miniatures, or show one: configuration, memory, arithmetic."""
    chosen = [name] if name else experiments.names()
    loaded = {n: experiments.load(n, seed) for n in chosen}
    estimates = {n: estimate(e, gpu) for n, e in loaded.items()}
    if as_json:
        shown = {n: {"experiment": loaded[n].model_dump(), "estimate": asdict(estimates[n])} for n in chosen}
        print(json.dumps(shown[name] if name else shown, ensure_ascii=False))
        return
    if name:
        print(loaded[name].to_toml())
    table = Table(box=box.SIMPLE, caption=f"hours: one {gpu} at {UTILISATION:.0%} of its peak, an assumption")
    for heading in ("experiment", "model", "parameters", "tokens", "steps", "embedding", "core", f"{gpu} hours"):
        table.add_column(heading, no_wrap=True)
    for n, e in loaded.items():
        shape = f"{e.model.family} {e.model.layers}/{e.model.heads}/{e.model.width}"
        sizes = (short(estimates[n].parameters), short(estimates[n].tokens), f"{e.train.steps:,}")
        table.add_row(n, shape, *sizes, _embedding(e), e.optimizer.core.name, _hours(estimates[n].gpu_hours))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    if name:
        found = estimates[name]
        print(f"parameters        {found.parameters:,} ({found.embedding_parameters:,} in the output embedding)")
        print(f"tokens            {found.tokens:,} in {found.steps:,} steps")
        for label, size in (
            ("weights", found.weights_bytes),
            ("gradients", found.gradients_bytes),
            ("optimizer state", found.optimizer_bytes),
            ("activations", found.activation_bytes),
        ):
            print(f"{label:<17} {size / 2**30:,.2f} GiB" + (" for a micro-batch" if label == "activations" else ""))
        print(f"arithmetic        {found.flops:.3g} FLOP")


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _embedding(experiment: Experiment) -> str:
    settings = experiment.optimizer.embedding
    extra = [f"s={settings.coupling_scale:g}"] if settings.coupling_scale != 1 else []
    extra += [f"κ={settings.coupling_factor:g}"] if settings.coupling_factor else []
    extra += [f"lr×{settings.lr_factor:g}"] if settings.lr_factor != 1 else []
    return " ".join([settings.name, *extra])


@app.command(
    name="train", epilog="Example: torchrun --nproc-per-node 2 -m coupled_adam train mini-M-300V train.steps=100"
)
def train_command(
    experiment: Annotated[str, typer.Argument(help="Name of an experiment, or a TOML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    data: Annotated[Path | None, typer.Option(help="A folder that `coupled-adam prepare` made.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.  [default: runs/NAME]")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the last figures as JSON.")] = False,
) -> None:
    """Train one experiment, or go on with it; also under torchrun, on one machine or many."""
    path = Path(experiment)
    if path.suffix == ".toml":
        config = load_experiment(path)
        config = config if seed is None else config.with_values(run__seed=seed)
    else:
        config = experiments.load(experiment, 1 if seed is None else seed)
    config = config.overridden(overrides or [])
    run_dir = out or Path("runs") / config.run.name
    with joined() as world:
        world.from_main(lambda: require_trackers(config.tracking))  # the corpus may take long to prepare
        corpus = world.from_main(lambda: corpus_for(config, data))
        train(config, corpus, run_dir, evaluator(config, corpus, world), world)
        if world.main:
            last = Metrics(run_dir / "metrics.jsonl").read()[-1]
            print(json.dumps(last) if as_json else _figures(run_dir, last))


def _figures(run_dir: Path, line: dict[str, Any]) -> str:
    shown = ("loss", "validation_loss", "isotropy", "mean_shift_ratio", "word_similarity")
    parts = [f"{key.replace('_', ' ')} {line[key]:.3f}" for key in shown if line.get(key) is not None]
    return f"{run_dir}: step {line['step']:,}: {', '.join(parts)}"


@app.command(name="reproduce", epilog="Example: coupled-adam reproduce mini --only scaled --only sgd")
def reproduce_command(
    suite: Annotated[str, typer.Argument(help="mini: the families of the paper's experiments, for two cores.")],
    only: Annotated[
        list[str] | None, typer.Option(help="A family: small, scaled, sgd, llama. May be repeated.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="For instance 1,2,3.  [default: 1,2,3 for small, else 1]")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; a second call goes on.  [runs/SUITE]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train and evaluate what is missing of a whole suite, and report on it."""
    try:
        numbers = [int(seed) for seed in seeds.split(",") if seed.strip()]
    except ValueError:
        raise InputError(f"--seeds {seeds}: write whole numbers with commas between them, for instance 1,2,3") from None
    folder = out or Path("runs") / suite
    results = reproduce(suite, only or [], numbers, folder)
    if as_json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        table = Table(box=box.SIMPLE, caption="mean ± standard deviation over the runs")
        for heading in ("experiment", "runs", *(figure.replace("_", " ") for figure in FIGURES)):
            table.add_column(heading, no_wrap=True)
        for row in results["experiments"]:
            table.add_row(row["name"], str(row["runs"]), *(_spread(row["figures"][figure]) for figure in FIGURES))
        Console(width=None if sys.stdout.isatty() else WIDE).print(table)
        if results["experiments"]:
            print(f"Report: {folder / 'report.html'}")
    for name, reason in results["failed"].items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    if results["failed"]:
        raise typer.Exit(1)


def _spread(moments: dict[str, float | None] | None) -> str:
    return spread(Moments(**moments) if moments else None, "{:.3f}")  # type: ignore[arg-type]


@app.command(
    name="evaluate", epilog="Example: coupled-adam evaluate runs/exp12V-s1 --only validation --only embeddings"
)
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    data: Annotated[Path | None, typer.Option(help="Its corpus, if it is no longer where it was.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"A stage: {', '.join(STAGES)}. May be repeated.")] = None,
    tasks: Annotated[
        str, typer.Option(help=f"Of lm-eval, with commas between; or one of {', '.join(TASK_SETS)}.")
    ] = "paper",
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of a task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of your own task definitions.")] = None,
    benchmarks: Annotated[Path | None, typer.Option(help="Folder of word-similarity benchmarks.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the stages found as JSON.")] = False,
) -> None:
    """Validation loss, embedding quality, export and downstream tasks of a run; what is done is not done again."""
    names = tuple(name.strip() for name in tasks.split(",") if name.strip()) or PAPER_TASKS
    names = tuple(task for name in names for task in TASK_SETS.get(name, (name,)))
    with joined() as world:
        results = evaluate(run, data, only or STAGES, benchmarks, Downstream(names, limit, include_path), world)
        if not world.main:
            return
    failed = results.get("downstream", {}).get("failed", {})
    if as_json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        for label, value in found_figures(results).items():
            if value is not None:
                print(f"{label:<40} {value:.4g}")
        if "export" in results:
            print(f"exported to {results['export']}")
    if failed:
        print(f"coupled-adam: not run: {', '.join(failed)}; the reasons are above", file=sys.stderr)
        raise typer.Exit(1)


@app.command(name="export", epilog="Example: coupled-adam export runs/exp12V-s1 --out exp12V")
def export_command(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    data: Annotated[Path | None, typer.Option(help="Its corpus, if it is no longer where it was.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the model.  [default: RUN/model]")] = None,
) -> None:
    """Write a model that transformers loads without this package: weights, tokenizer, configuration, model card."""
    print(export_run(run, data, out))


@app.command(name="report", epilog="Example: coupled-adam report runs/mini --out report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or folders that hold them.")],
    out: Annotated[Path, typer.Option(help="Folder of aggregate.csv and report.html.")] = Path("report"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """The table of the paper over evaluated runs, and a page with charts beside the published figures."""
    found = report(runs, out)
    if as_json:
        print(json.dumps(aggregate.table(found), ensure_ascii=False))
    else:
        print(f"{len(found)} runs: {out / 'aggregate.csv'}, {out / 'report.html'}")


@app.command(name="audit", epilog="Example: coupled-adam audit gpt2 runs/demo/coupled_adam --html audit.html")
def audit_command(
    models: Annotated[
        list[str],
        typer.Argument(help="Folder or name of a transformers model, .safetensors, .gguf, .npy, .npz, or a run."),
    ],
    benchmarks: Annotated[Path | None, typer.Option(help="Folder of word-similarity benchmarks.")] = None,
    tensor: Annotated[str | None, typer.Option(help="Name of the tensor to measure.")] = None,
    data: Annotated[Path | None, typer.Option(help="Corpus of a run, if it is no longer where it was.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts here.")] = None,
    center_to: Annotated[
        Path | None, typer.Option("--center", help="Write a copy with centred output embedding; predictions stay.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """What the embeddings of any model look like: figures, a verdict in words, several models side by side."""
    if center_to is not None and len(models) > 1:
        raise InputError(f"--center {center_to}: takes one model at a time, not {len(models)}")
    words = read_benchmarks(benchmarks)
    audited = audit_models(models, words, tensor=tensor, data=data)
    if html:
        write_audit_page(html, audited)
    if as_json:
        print(json.dumps([matrix.as_json() for matrix in audited], ensure_ascii=False))
    else:
        table = Table(box=box.SIMPLE)
        table.add_column("", no_wrap=True)
        for matrix in audited:
            table.add_column(matrix.name, justify="right")
        for row in audit_page.rows(audited):
            table.add_row(row.label, *row.runs)
        console = Console(width=None if sys.stdout.isatty() else WIDE)
        console.print(table)
        for matrix in audited:
            console.print(f"[bold]{escape(matrix.name)}[/bold]")
            for finding in matrix.audit.findings:
                console.print(f"  [{LEVELS[finding.level]}]{finding.level}[/]  {escape(finding.text)}")
        if html:
            print(f"Page: {html}")
    if center_to:
        done = center(read_embeddings(models[0], tensor=tensor), center_to)
        provided = f"; {done.condition}" if done.condition else ""
        rounded = f"‖μ‖ was {done.mean_norm:.4g}; rounding moves a row by at most {done.rounding:.2g}"
        print(f"Centred copy: {done.path} ({rounded}){provided}", file=sys.stderr)


def main() -> None:
    """Run the command line; a bad input is one line and exit code 2."""
    try:
        app()
    except (InputError, ImportError) as error:  # an extra that is not installed is named by the latter
        sys.exit(_failed(error, 2))
    except (DivergedError, OSError) as error:
        sys.exit(_failed(error, 1))
    except Interrupted as stopped:
        print(f"{stopped}. The same command goes on from there.", file=sys.stderr)
        sys.exit(SIGNALLED + stopped.signal_number)


def _failed(error: Exception, code: int) -> int:
    print(f"coupled-adam: {error}", file=sys.stderr)
    return code
