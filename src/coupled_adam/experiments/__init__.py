"""The experiments and the published results, as data.

A suite is a file of ``[defaults]``, named ``[parts]``, and ``[experiments]``, each a list of parts that are laid over
the defaults in their order. ``[grids]`` hold experiments that are products of parts (``grids.expand``), and
``[families]`` what one call trains together: seeds, and experiments by name or by pattern.
"""

import difflib
import re
import tomllib
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from coupled_adam.errors import InputError
from coupled_adam.experiments.grids import Grid, check_parts, expand, matching
from coupled_adam.lm.config import Experiment

__all__ = [
    "Published",
    "PublishedSweep",
    "authors_name",
    "families",
    "load",
    "names",
    "published",
    "published_sweeps",
]

SUITES = ("small", "large", "mini", "oec")

#: A name with the seed of a run at its end, as far as that is one.
WITH_SEED = re.compile(r"(?P<name>.+)-s(?P<seed>-?[0-9][^-]*|)")


@dataclass(frozen=True)
class Published:
    """A row of the tables of arXiv 2502.08441. None where the paper does not give the value."""

    model: str
    """Its size: parameters, as the paper writes them."""
    tokens: str
    """Training tokens, as the paper writes them."""
    method: str
    """What the paper calls the optimizer."""
    loss: float
    """Validation loss, in nats per token."""
    isotropy: float
    """Isotropy, in (0, 1]."""
    mean_shift_ratio: float | None = None
    """‖μ‖ / mean_i ‖e_i‖, in [0, 1]."""
    word_similarity: float | None = None
    """r̄: 100 times the mean correlation with human ratings."""
    downstream_accuracy: float | None = None
    """Mean accuracy over the downstream tasks, in [0, 1]."""


@dataclass(frozen=True)
class PublishedSweep:
    """A sweep over learning rates of arXiv 2601.02031. None where a value is not known at every rate."""

    model: str
    """Its size: parameters, as the paper writes them."""
    method: str
    """What the paper calls the method."""
    lr_sensitivity: float
    """Learning-rate sensitivity, in nats per token."""
    initial_loss: float
    """Loss before the first step, in nats per token."""
    coefficient: float | None = None
    """λ of μ-loss or z-loss."""
    best_loss: float | None = None
    """Lowest loss over the learning rates, in nats per token."""
    losses: list[float] | None = None
    """Final loss per learning rate, in nats per token."""
    norm_of_mean: list[float] | None = None
    """‖μ‖ of the output embedding per learning rate."""
    logit_mean: list[float] | None = None
    """Mean logit per learning rate."""
    logit_max: list[float] | None = None
    """Largest logit per learning rate."""


def names(suite: str | None = None) -> list[str]:
    """List the names of experiments.

    Args:
        suite: ``"small"``, ``"large"``, ``"mini"`` or ``"oec"``; None for all of them.

    Returns:
        Names that ``load`` accepts.

    Examples:
        >>> names("small")[0]
        'exp00A'
    """
    return [name for s in (SUITES if suite is None else (suite,)) for name in _suite(s)["experiments"]]


def authors_name(name: str) -> str:
    """Translate the name of an experiment of the suite ``small`` to that of the paper's authors.

    Args:
        name: of the experiment, without a seed.

    Returns:
        The authors' name, which ``load`` accepts too.

    Examples:
        >>> authors_name("exp15V-as3"), authors_name("exp15A-sgd-200"), authors_name("exp22A")
        ('exp15V-node-125M-200k-AVG-as3', 'exp15A-node-125M-200k-sgd-200', 'exp22A-node-355M-50k-baseline')
    """
    suite = _suite("small")
    size, length, *_ = suite["experiments"][name]
    steps = suite["parts"][length]["train"]["steps"]
    short, _, rest = name.partition("-")
    variant = ["AVG"] if short.endswith("V") else [] if rest else ["baseline"]
    return "-".join([short, "node", size, f"{steps // 1000}k", *variant, *([rest] if rest else [])])


def load(name: str, seed: int | None = None) -> Experiment:
    """Load an experiment by name.

    Args:
        name: one of ``names``, ``"demo"``, or a name of the paper's authors (``exp15V-node-125M-200k-AVG-as3``). It may
            end in a seed, as the names of runs do.
        seed: None for that in the name, or else 1.

    Returns:
        The settings of the run.

    Raises:
        InputError: no experiment has that name (the nearest is named), or its seed is not a number or not ``seed``.

    Examples:
        >>> load("demo").optimizer.core.name
        'adamw'
    """
    ours = {authors_name(short): short for short in names("small")}
    known = {*names(), *ours, "demo"}
    found = WITH_SEED.fullmatch(name)
    if name not in known and found and found["name"] in known:
        if not re.fullmatch(r"0|[1-9][0-9]*", found["seed"]):
            raise InputError(f"{name}: its seed, {found['seed']!r}, is not a whole number; write, for example, -s1")
        if seed is not None and seed != int(found["seed"]):
            raise InputError(f"{name}: its name has seed {found['seed']}, but seed {seed} was requested; leave one out")
        name, seed = found["name"], int(found["seed"])
    if name not in known:
        of_a_kind = list(ours) if "-node" in name else names()
        (near,) = difflib.get_close_matches(found["name"] if found else name, of_a_kind, n=1, cutoff=0.0)
        raise InputError(f"{name}: no experiment of that name; the nearest is {near!r} (coupled-adam experiments)")
    return _load(ours.get(name, name), 1 if seed is None else seed)


def _load(name: str, seed: int) -> Experiment:
    for suite in map(_suite, SUITES):
        if parts := suite["experiments"].get(name):
            tables = deepcopy(suite["defaults"])
            for part in parts:
                _lay_over(tables, suite["parts"][part])
            return Experiment.from_dict({"run": {"name": f"{name}-s{seed}", "seed": seed}, **tables}, name)
    return Experiment.from_toml(_read("demo.toml"), name).with_values(run__seed=seed)


def families(suite: str = "mini") -> dict[str, dict[str, Any]]:
    """List the families of experiments that ``coupled-adam reproduce`` runs.

    Args:
        suite: a suite with families; so far this is only ``"mini"``.

    Returns:
        By the name of the family, a table with the names of its ``experiments`` and its ``seeds``.

    Examples:
        >>> sorted(families("mini"))[:2]
        ['batch', 'core']
    """
    return {
        family: {
            **content,
            "experiments": matching(f"{suite}.toml, family {family}", content["experiments"], names(suite)),
        }
        for family, content in _suite(suite)["families"].items()
    }


def grids() -> list[Grid]:
    """Return the grids of all suites; their experiments are among ``names()`` too."""
    return [grid for suite in SUITES for grid in _suite(suite)["grids"].values()]


def published() -> list[Published]:
    """Load the results of the paper on Coupled Adam, in its order.

    Returns:
        One entry per row of its tables.

    Source: arXiv 2502.08441.

    Examples:
        >>> published()[0].method, published()[0].loss
        ('AdamW', 3.03)
    """
    return [Published(**row) for row in tomllib.loads(_read("published.toml"))["result"]]


def published_sweeps() -> list[PublishedSweep]:
    """Load the sweeps over learning rates of the paper on output embedding centering, by size of the model.

    Returns:
        One entry per model and method; the values of a list belong to the rates of ``published_learning_rates``.

    Source: arXiv 2601.02031.

    Examples:
        >>> published_sweeps()[0].method
        'baseline'
    """
    return [PublishedSweep(**row) for row in tomllib.loads(_read("published.toml"))["centering"]["result"]]


def published_learning_rates() -> list[float]:
    """Return the seven learning rates of those sweeps, ascending."""
    rates: list[float] = tomllib.loads(_read("published.toml"))["centering"]["learning_rates"]
    return rates


def published_second_moment_fit() -> tuple[float, float]:
    """Return the range of R² that the paper gives for Adam's second moment against the token's frequency."""
    low, high = tomllib.loads(_read("published.toml"))["second_moment_frequency_fit"]
    return low, high


def published_result(model: str, tokens: str, method: str) -> Published:
    """Return one row of ``published``."""
    return next(r for r in published() if (r.model, r.tokens, r.method) == (model, tokens, method))


@cache
def _suite(name: str) -> dict[str, Any]:
    suite = tomllib.loads(_read(f"{name}.toml"))
    parts, listed = suite["parts"], suite.setdefault("experiments", {})
    for experiment, named in listed.items():
        check_parts(f"{name}.toml, {experiment}", named, parts)
    tables = suite.get("grids", {})
    suite["grids"] = {key: expand(f"{name}.toml, grid {key}", table, parts) for key, table in tables.items()}
    for key, grid in suite["grids"].items():
        if twice := sorted(listed.keys() & grid.experiments.keys()):
            raise InputError(f"{name}.toml, grid {key}: an experiment {twice[0]} already exists")
        listed |= grid.experiments
    return suite


def _lay_over(tables: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict):
            _lay_over(tables.setdefault(key, {}), value)
        else:
            tables[key] = value


def _read(file: str) -> str:
    return files("coupled_adam.experiments").joinpath(file).read_text(encoding="utf-8")
