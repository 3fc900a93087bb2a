"""The experiments and the published results, as data."""

import tomllib
from dataclasses import dataclass
from importlib.resources import files

from coupled_adam.lm.config import Experiment


@dataclass(frozen=True)
class Published:
    """A row of the tables of arXiv 2502.08441. None where the paper does not give the figure."""

    model: str
    tokens: str
    method: str
    loss: float
    isotropy: float
    mean_shift_ratio: float | None = None
    word_similarity: float | None = None
    downstream_accuracy: float | None = None


def load(name: str) -> Experiment:
    """The experiment of that name that comes with the package."""
    return Experiment.from_toml(_read(f"{name}.toml"), name)


def published() -> list[Published]:
    """The results of the paper, in its order."""
    return [Published(**row) for row in tomllib.loads(_read("published.toml"))["result"]]


def published_result(model: str, tokens: str, method: str) -> Published:
    """One row of :func:`published`."""
    return next(r for r in published() if (r.model, r.tokens, r.method) == (model, tokens, method))


def _read(file: str) -> str:
    return files("coupled_adam.experiments").joinpath(file).read_text(encoding="utf-8")
