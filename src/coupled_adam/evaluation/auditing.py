"""The audit of anyone's model: its embeddings read, measured and judged."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from coupled_adam import geometry
from coupled_adam.errors import InputError
from coupled_adam.evaluation.embedding_files import Embeddings, read_embeddings
from coupled_adam.evaluation.embeddings import audit_json
from coupled_adam.evaluation.tokens import TokenSample, sample_tokens
from coupled_adam.lm.corpus import Corpus
from coupled_adam.lm.progress import say
from coupled_adam.lm.run import open_run


@dataclass(frozen=True)
class Audited:
    """One embedding matrix of a model."""

    model: str
    matrix: str
    """``tied``, ``input``, ``output``, or ``embedding`` where it cannot be told."""
    audit: geometry.Audit
    sample: TokenSample

    @property
    def name(self) -> str:
        """For a heading."""
        return self.model if self.matrix in ("tied", "embedding") else f"{self.model} ({self.matrix})"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"model": self.model, "matrix": self.matrix, **audit_json(self.audit)}


def audit_models(
    models: Sequence[str],
    benchmarks: Sequence[geometry.Benchmark],
    *,
    tensor: str | None = None,
    data: Path | None = None,
) -> list[Audited]:
    """Audit the embeddings of models: one matrix each if they are tied or there is but one, else input and output.

    Args:
        models: as :func:`coupled_adam.evaluation.embedding_files.read_embeddings` takes them. Two of one short name are
            told apart by what was given, and one that is given twice is measured once.
        benchmarks: of word similarity; used where the model has a tokenizer.
        tensor: the name of the tensor to measure instead.
        data: the corpus of one of our runs; None for where it was during training.

    Raises:
        InputError: as ``read_embeddings``; or a matrix that is not finite.
    """
    given = list(dict.fromkeys(models))
    audited = {model: _audit(model, benchmarks, tensor, data) for model in given}
    names = [matrices[0].model for matrices in audited.values()]
    return [
        replace(matrix, model=model) if names.count(matrix.model) > 1 else matrix
        for model, matrices in audited.items()
        for matrix in matrices
    ]


def _audit(
    model: str, benchmarks: Sequence[geometry.Benchmark], tensor: str | None, data: Path | None
) -> list[Audited]:
    found = read_embeddings(model, tensor=tensor, corpus=_corpus(Path(model), data))
    matrices = [("tied" if found.tied else "embedding", found.input)]
    if found.output is not None:
        matrices = [("input", found.input), ("output", found.output)]
    return [_audited(found, kind, matrix, benchmarks) for kind, matrix in matrices]


def _corpus(folder: Path, data: Path | None) -> Corpus | None:
    """Of a run, which has no tokenizer of its own; None for other models, and where it is not to be found."""
    if not (folder / "experiment.toml").exists():
        return None
    try:
        return open_run(folder, data).corpus
    except InputError as error:
        if data:
            raise
        say(f"{error}. Without it nothing is said of words and frequencies")
        return None


def _audited(found: Embeddings, kind: str, matrix: Tensor, benchmarks: Sequence[geometry.Benchmark]) -> Audited:
    counts, token_of, text_of = found.unigram_counts, found.token_of, found.labels
    if counts is not None and len(counts) != len(matrix):
        counts = None
    if token_of is not None:
        token_of = functools.cache(token_of)
        tokens = {token_of(word) for benchmark in benchmarks for pair in benchmark.pairs for word in pair[:2]}
        if max((token for token in tokens if token is not None), default=0) >= len(matrix):
            token_of = text_of = None  # the rows are something else than the tokens of this tokenizer
    try:
        audit = geometry.audit(matrix, counts=counts, token_of=token_of, benchmarks=benchmarks)
    except ValueError as error:
        raise InputError(f"{found.name}: {error}") from None
    return Audited(found.name, kind, audit, sample_tokens(matrix, text_of or (lambda token: f"row {token}"), counts))
