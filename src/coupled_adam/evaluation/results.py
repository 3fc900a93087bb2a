"""What the files of an evaluation hold: read and written here, with a digest, so that damage is named."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from coupled_adam.errors import InputError
from coupled_adam.files import read_sealed, write_sealed
from coupled_adam.lm.metrics_jsonl import Number

#: Of the files. Before they had a format, they had no digest either.
FORMAT = 2

#: What to do about a damaged file.
REMEDY = "delete it, and evaluate the run again"

_more = with_config(ConfigDict(extra="allow"))


@_more
class Inputs(TypedDict):
    """What a stage's figures were made from, above all the hash of the weights."""

    weights: str


@_more
class Validation(TypedDict):
    """validation.json."""

    inputs: Inputs
    step: int
    loss: Number
    perplexity: Number | None
    logit_mean: NotRequired[Number | None]
    logit_std: NotRequired[Number | None]
    logit_max: NotRequired[Number | None]
    log_z_squared: NotRequired[Number | None]


@_more
class Similarity(TypedDict):
    """Word similarity by one benchmark."""

    benchmark: str
    cosine: Number | None
    dot: Number | None
    covered: int
    pairs: int


class Sample(TypedDict):
    """As ``coupled_adam.evaluation.token_sample.TokenSample``."""

    text: list[str]
    count: list[int] | None
    norm: list[Number]
    projection: list[Number]
    along: list[Number]
    across: list[Number]
    second_moment: list[Number] | None


@_more
class Embeddings(TypedDict):
    """embeddings.json."""

    inputs: Inputs
    step: int
    figures: dict[str, Number | None]
    word_similarity: dict[str, list[Similarity]]
    singular_values: list[Number]
    token_sample: NotRequired[Sample]


@_more
class Task(TypedDict):
    """The result of one task."""

    acc: Number | None


@_more
class Settings(TypedDict):
    """What the tasks were run with."""

    model_digest: str
    limit: int | None


@_more
class DownstreamResults(TypedDict):
    """downstream.json."""

    acc: Number | None
    acc_stderr: Number | None
    complete: bool
    settings: Settings
    tasks: dict[str, Task]
    mean_over: NotRequired[list[str]]
    failed: NotRequired[dict[str, str]]
    earlier: NotRequired[list[Task]]


class Documents(TypedDict):
    """What ``coupled_adam.evaluation.by_frequency`` measures of each document, in their order."""

    tokens: list[int]
    loss: list[Number]


class KappaRange(TypedDict):
    """What ``coupled_adam.evaluation.by_frequency`` measures of the rows in a range of κ."""

    rows: Number
    text: Number
    held_out: Number
    predicted: Number
    log_ratio: Number | None


@_more
class Frequency(TypedDict):
    """frequency.json."""

    inputs: Inputs
    step: int
    loss_selection: Number
    loss_report: Number
    bits_per_byte: NotRequired[Number]
    documents: NotRequired[Documents]
    loss_by_decile: list[Number]
    kappa: dict[str, KappaRange]


SCHEMAS: dict[str, Any] = {
    "validation": Validation,
    "embeddings": Embeddings,
    "frequency": Frequency,
    "downstream": DownstreamResults,
}


def read_results(path: Path, stage: str) -> dict[str, Any]:
    """Read what a stage (a key of ``SCHEMAS``) has written.

    Raises:
        InputError: it cannot be read, is damaged, or something else; the message names file and value.
    """
    content: dict[str, Any] = read_sealed(path, SCHEMAS[stage], REMEDY, older=True)
    if content.pop("format", FORMAT) != FORMAT:
        raise InputError(f"{path}: written by another version of this package; {REMEDY}")
    if sample := content.get("token_sample"):
        lengths = {len(values) for values in sample.values() if values is not None}
        if len(lengths) > 1:
            raise InputError(f"{path}: damaged (token_sample: lists of {sorted(lengths)} values); {REMEDY}")
    return content


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """Write the results of a stage."""
    write_sealed(path, {"format": FORMAT, **content})
