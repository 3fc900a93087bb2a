"""What the shell may complete: names of experiments, families, settings. In less than half a second, without torch."""

from collections.abc import Callable, Iterable
from pathlib import Path

import typer

#: Stages of ``coupled-adam evaluate``, in their order.
STAGES = ("validation", "embeddings", "frequency", "export", "downstream")

#: GPUs that ``coupled-adam experiments`` knows.
GPUS = ("A100", "H100", "H200", "B200", "L40S")

Completer = Callable[[str], list[str]]


def one_of(*choices: str) -> Completer:
    """Complete one of a few words."""
    return lambda incomplete: _beginning(choices, incomplete)


def experiment(incomplete: str) -> list[str]:
    """Complete the name of an experiment; those of grids, of which there are a thousand, once their beginning is."""
    from coupled_adam import experiments

    gridded = set() if incomplete else {name for grid in experiments.grids() for name in grid.experiments}
    return _beginning((name for name in experiments.names() if name not in gridded), incomplete)


def experiment_or_file(incomplete: str) -> list[str]:
    """Complete the name of an experiment, or a TOML file or a directory."""
    folder = Path(incomplete).parent if not incomplete.endswith("/") else Path(incomplete)
    prefix = incomplete[: incomplete.rfind("/") + 1]
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        entries = []
    found = [f"{prefix}{path.name}" for path in entries if path.suffix == ".toml" or path.is_dir()]
    return [*experiment(incomplete), *_beginning((name for name in found if not name.startswith(".")), incomplete)]


def family(incomplete: str) -> list[str]:
    """Complete the name of a family of ``coupled-adam reproduce``."""
    from coupled_adam import experiments

    return _beginning(experiments.families(), incomplete)


def override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete a setting, with the value that it has in the experiment."""
    from coupled_adam import experiments
    from coupled_adam.errors import InputError
    from coupled_adam.lm.config import load_experiment

    name = str(ctx.params.get("experiment"))
    path = Path(name) / "experiment.toml" if Path(name, "experiment.toml").exists() else Path(name)
    try:
        found = load_experiment(path) if path.suffix == ".toml" else experiments.load(name)
    except InputError:
        return []
    return _beginning((f"{key}={value}" for key, value in found.settings().items()), incomplete)


def _beginning(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
