"""Losses of runs document by document, as a CSV file: what a bootstrap over documents needs."""

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coupled_adam.errors import InputError
from coupled_adam.report.aggregate import Evaluated
from coupled_adam.report.paired import Interval, document_bootstrap

#: How the name of the row begins that holds the lengths of a corpus's documents.
TOKENS = "tokens:"


@dataclass(frozen=True)
class DocumentLosses:
    """Mean losses of the documents that a run was measured on."""

    corpus: str
    """Names the documents: runs with one corpus read the same ones."""
    tokens: NDArray[np.int64]
    """(documents,)"""
    losses: NDArray[np.float64]
    """In nats per token, (documents,)."""


def of_runs(runs: Iterable[Evaluated]) -> dict[str, DocumentLosses]:
    """Return the losses of the runs that have them, by the run's name.

    The corpus is named by the text, the size of the vocabulary and how many tokens were measured.

    Raises:
        InputError: two runs on a corpus of one name have documents of other lengths.
    """
    found: dict[str, DocumentLosses] = {}
    lengths: dict[str, list[int]] = {}
    for run in runs:
        if not (documents := run.frequency.get("documents")):
            continue
        data, tokens = run.experiment.data, documents["tokens"]
        corpus = f"{data.source}-{data.vocab_size}-{sum(tokens)}"
        if lengths.setdefault(corpus, tokens) != tokens:
            raise InputError(f"{run.directory}: its documents differ in length from those of other runs on {corpus}")
        found[run.name] = DocumentLosses(corpus, np.array(tokens), np.array(documents["loss"]))
    return found


def formatted(found: Mapping[str, DocumentLosses]) -> str:
    """Format losses as CSV: per run one row with its name, its corpus and the loss of each document in order.

    Before the runs of each corpus stands a row ``tokens:CORPUS`` with the length of each document.
    """
    most = max((len(run.tokens) for run in found.values()), default=0)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "corpus", *(f"document_{i + 1}" for i in range(most))])
    for corpus in dict.fromkeys(run.corpus for run in found.values()):
        of_corpus = {name: run for name, run in found.items() if run.corpus == corpus}
        lengths = next(iter(of_corpus.values())).tokens.tolist()
        for name, values in {TOKENS + corpus: lengths, **{n: r.losses.tolist() for n, r in of_corpus.items()}}.items():
            writer.writerow([name, corpus, *values, *[""] * (most - len(values))])
    return text.getvalue()


def read_documents(path: Path) -> dict[str, DocumentLosses]:
    """Read what ``formatted`` wrote, by the run's name; runs of several such files may stand below one another.

    Raises:
        InputError: the file is damaged: the line is named.
    """
    found: dict[str, DocumentLosses] = {}
    lengths: dict[str, NDArray[np.int64]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for number, line in enumerate(csv.reader(file), start=1):
            if not line or line[:2] == ["name", "corpus"]:
                continue
            name, corpus, *cells = (*line, "") if len(line) == 1 else line
            try:
                values = [float(cell) for cell in itertools.takewhile(bool, cells)]
                if not values or any(cells[len(values) :]):
                    raise ValueError("values are missing")
                if name.startswith(TOKENS):
                    counts = np.array([int(cell) for cell in cells if cell])
                    if (counts < 1).any():
                        raise ValueError("a document without tokens")
                    if len(known := lengths.setdefault(corpus, counts)) != len(counts) or (known != counts).any():
                        raise ValueError("other documents than in an earlier row of the corpus")
                    continue
                if corpus not in lengths:
                    raise ValueError(f"no row {TOKENS}{corpus} comes before it")
                if len(values) != len(lengths[corpus]):
                    raise ValueError(f"{len(values)} documents where the corpus has {len(lengths[corpus])}")
                if name in found:
                    raise ValueError("a second row of that name")
            except ValueError as error:
                raise InputError(f"{path}: line {number}, {name}: {error}; restore the file") from None
            found[name] = DocumentLosses(corpus, lengths[corpus], np.array(values))
    return found


def interval_over_documents(pairs: Sequence[tuple[DocumentLosses, DocumentLosses]]) -> Interval | None:
    """Return the bootstrap interval of the mean loss of the second run of each pair minus the first's.

    Args:
        pairs: two runs of one seed each. None if there is no pair, or not all have read the same documents.
    """
    runs = [run for pair in pairs for run in pair]
    if len({run.corpus for run in runs}) != 1:
        return None
    first, second = (np.stack([pair[i].losses for pair in pairs]) for i in (0, 1))
    return document_bootstrap(first, second, runs[0].tokens)
