"""Why the mean of the output embedding moves during a run: sums over its steps, which survive a resume."""

import math
from collections.abc import Mapping
from typing import Any

from coupled_adam.figures import Figures
from coupled_adam.lm.config import Experiment
from coupled_adam.lm.model import LanguageModel
from coupled_adam.lm.optimizers import Optimizers
from coupled_adam.monitor import DriftMonitor

#: Values of optimizer.embedding.name whose steps split by cause.
SPLIT = ("adamw", "coupled_adam")


def watch_drift(
    experiment: Experiment, model: LanguageModel, optimizers: Optimizers, state: Mapping[str, Any] | None
) -> DriftMonitor | None:
    """Sum the drift from the first step on. All ranks must call this.

    Args:
        experiment, model, optimizers: of the run, loaded from its checkpoint.
        state: what the checkpoint's state.json holds; None at the start.

    Returns:
        None if ``evaluation.drift`` is off, the embedding is centered, its optimizer is no Adam, or the checkpoint is
        from before there were such sums: what its steps did is not known any more.
    """
    embedding = experiment.optimizer.embedding
    if not experiment.evaluation.drift or embedding.center or embedding.name not in SPLIT:
        return None
    if state is not None and "drift" not in state:
        return None
    weight = model.get_output_embeddings().weight
    holder = next(o for o in optimizers.all if any(p is weight for group in o.param_groups for p in group["params"]))
    monitor = DriftMonitor(holder, weight)
    if state is not None:
        monitor.load_state_dict(state["drift"])
    return monitor


def drift_figures(monitor: DriftMonitor | None) -> Figures:
    """Return how far each cause has moved the mean along what it is now. All ranks must call this at step 0."""
    if monitor is None:
        return {}
    along = monitor.total.along_mean()
    return {f"drift_{cause}": None if math.isnan(length) else length for cause, length in along.items()}
