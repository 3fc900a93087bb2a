"""The audit of anyone's model: its embeddings read, measured and judged."""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from coupled_adam import geometry
from coupled_adam.audit.advice import Advice, advice
from coupled_adam.audit.centering import Centered, WithoutTop, center, remove_top
from coupled_adam.audit.embedding_files import Embeddings, read_embeddings
from coupled_adam.audit.verdict import Finding, findings, note_on_rows, summary
from coupled_adam.errors import InputError
from coupled_adam.evaluation.embedding_figures import as_json
from coupled_adam.evaluation.token_sample import TokenSample, sample_tokens
from coupled_adam.geometry.measurements import PARTS
from coupled_adam.progress import progress_bar, say

__all__ = ["Audited", "audit_models"]

#: Numbers in a matrix that takes some time to measure.
LARGE = 10_000_000


@dataclass(frozen=True)
class Audited:
    """One embedding matrix of a model."""

    model: str
    """Name of the model."""
    matrix: str
    """``tied``, ``input``, ``output``, or ``embedding`` if that is unknown. With ``input`` alone, a finding says why
    the output embedding was not measured."""
    measured: geometry.Measurements
    """Its metrics."""
    findings: list[Finding]
    """The verdict, most important first."""
    sample: TokenSample
    """Some of its tokens, for plots."""
    advice: Advice
    """What to do about it."""

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        return summary(self.measured)

    @property
    def name(self) -> str:
        """Model and matrix, for a heading."""
        return self.model if self.matrix in ("tied", "embedding") else f"{self.model} ({self.matrix})"

    def as_json(self) -> dict[str, Any]:
        """Return metrics, verdict and advice as plain values for JSON."""
        verdict = [asdict(finding) for finding in self.findings]
        return {
            "model": self.model,
            "matrix": self.matrix,
            "summary": self.summary,
            **as_json(self.measured),
            "findings": verdict,
            "advice": asdict(self.advice),
        }


def audit_models(
    models: Sequence[str],
    benchmarks: Sequence[geometry.Benchmark],
    *,
    tensor: str | None = None,
    data: Path | None = None,
    center_to: Path | None = None,
    without_top_to: Path | None = None,
) -> tuple[list[Audited], Centered | WithoutTop | None]:
    """Audit the embeddings of models: one matrix per model if they are tied or only one exists, else input and output.

    Args:
        models: as for ``coupled_adam.audit.embedding_files.read_embeddings``. Models with the same short name are shown
            under the name that you gave; duplicates are measured once.
        benchmarks: of word similarity, for instance ``coupled_adam.geometry.published_benchmarks()``; used if the model
            has a tokenizer.
        tensor: the name of the tensor to measure instead of the embeddings.
        data: the corpus, for a run of this package; None for where it was during training.
        center_to: where to write a copy with a centered output embedding, or centered word vectors; only with a single
            model.
        without_top_to: where to write a copy of word vectors, or of an array, without their mean and first principal
            components; only with a single one, and not beside ``center_to``.

    Returns:
        The audits, one per matrix, and what was written, or None.

    Raises:
        InputError: as for ``read_embeddings``, ``coupled_adam.audit.centering.center`` and ``remove_top`` there; or a
            matrix is not finite.
    """
    given = list(dict.fromkeys(models))
    for option, place in (("--center", center_to), ("--all-but-the-top", without_top_to)):
        if place is not None and len(given) > 1:
            raise InputError(f"{option} {place}: takes one model at a time, not {len(given)}")
    if center_to is not None and without_top_to is not None:
        raise InputError("--center and --all-but-the-top: choose one; the latter subtracts the mean too")
    audited = dict[str, list[Audited]]()
    written: Centered | WithoutTop | None = None
    for i, model in enumerate(given, start=1):
        if len(given) > 1:
            say(f"[{i}/{len(given)}] {model}")
        found = read_embeddings(model, tensor=tensor, data=data)
        audited[model] = [
            _audited(found, kind, matrix, benchmarks, tensor is None) for kind, matrix in _matrices(found)
        ]
        if center_to is not None:
            written = center(found, center_to)
        elif without_top_to is not None:
            written = remove_top(found, without_top_to)
    names = [matrices[0].model for matrices in audited.values()]
    told_apart = [
        replace(matrix, model=model) if names.count(matrix.model) > 1 else matrix
        for model, matrices in audited.items()
        for matrix in matrices
    ]
    return told_apart, written


def _matrices(found: Embeddings) -> list[tuple[str, Tensor]]:
    if found.output is not None:
        return [("input", found.input), ("output", found.output)]
    return [("input" if found.lacks_output else "tied" if found.tied else "embedding", found.input)]


def _audited(
    found: Embeddings, kind: str, matrix: Tensor, benchmarks: Sequence[geometry.Benchmark], whole: bool
) -> Audited:
    """Measure one matrix; ``whole`` unless it is a tensor that the user chose, whose rows may be no tokens."""
    large, name = matrix.numel() >= LARGE, f"{found.name} ({kind})"
    if large:
        say(f"{name}: measuring {' × '.join(f'{length:,}' for length in matrix.shape)} embeddings")
    counts, notes = found.unigram_counts, list(found.notes)
    if counts is not None and len(counts) != len(matrix):
        counts = None
    token_of = text_of = number = None
    if found.words is not None:
        token_of, text_of = functools.cache(found.words.token_of), found.words.text_of
        tokens = {token_of(word) for benchmark in benchmarks for pair in benchmark.pairs for word in pair[:2]}
        number = max(found.words.tokens, default=-1) + 1
        if max((token for token in tokens if token is not None), default=0) >= len(matrix):
            token_of = text_of = None  # the rows are something else than the tokens of this tokenizer
            notes.append(
                f"Its tokenizer has {number:,} tokens, but the matrix has {len(matrix):,} rows: words were left out."
            )
    try:
        with progress_bar(name, 0, PARTS, large, "part", passing=True) as show:
            statistics = geometry.Statistics(matrix)
            measured = geometry.measure(statistics, counts=counts, token_of=token_of, benchmarks=benchmarks, show=show)
        sample = sample_tokens(statistics, text_of or (lambda token: f"row {token}"), counts)
        del statistics  # and the matrix in float64 with it
        if measured.zero_rows < len(matrix) and (
            note := note_on_rows(matrix.numpy(), measured, number if whole else None)
        ):
            notes.append(note)
    except MemoryError:
        raise InputError(f"{found.name}: not enough memory to measure a matrix of {len(matrix):,} rows") from None
    except ValueError as error:
        raise InputError(f"{found.name}: {error}") from None
    return Audited(found.name, kind, measured, findings(measured, notes), sample, advice(found, kind, measured))
