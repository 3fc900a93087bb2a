"""The command line: parses, calls one function, prints."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from coupled_adam import __version__, demo
from coupled_adam.errors import InputError
from coupled_adam.lm.train import DivergedError, Interrupted

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

#: What a shell gives to a program that SIGINT ended.
EXIT_INTERRUPTED = 130


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


def main() -> None:
    """Run the command line; a bad input is one line and exit code 2."""
    try:
        app()
    except InputError as error:
        sys.exit(_failed(error, 2))
    except (DivergedError, OSError) as error:
        sys.exit(_failed(error, 1))
    except Interrupted as stopped:
        print(f"{stopped}. The same command goes on from there.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _failed(error: Exception, code: int) -> int:
    print(f"coupled-adam: {error}", file=sys.stderr)
    return code
