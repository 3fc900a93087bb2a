"""What the callbacks ``EmbeddingHealth`` of all trainers share: when to measure, and what."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from coupled_adam.models.output_heads import embedding_of
from coupled_adam.monitor import DriftMonitor, health
from coupled_adam.progress import warn

__all__ = ["HealthReport"]

#: What stands before the name of every figure.
PREFIX = "embedding/"


class HealthReport:
    """Measures the embeddings of a model every so many steps, for callbacks of any trainer. All ranks must call it.

    Args:
        every: steps between two reports, at least 1.
        isotropy_every: isotropy, which takes twice as long as all other metrics, is measured in every so many reports;
            0 for never.
        drift: whether to split the movement of the mean output embedding by cause, in every step. If the steps of the
            optimizer cannot be split, there is one warning, and the other metrics are reported.

    Raises:
        ValueError: ``every`` or ``isotropy_every`` is out of range.

    Examples:
        >>> report = HealthReport(every=100)
        >>> report.is_due(100), report.is_due(150)
        (True, False)
    """

    def __init__(self, every: int = 100, isotropy_every: int = 10, drift: bool = True) -> None:
        if every < 1 or isotropy_every < 0:
            raise ValueError(f"every={every} must be at least 1 and isotropy_every={isotropy_every} at least 0")
        self.every, self.isotropy_every, self.drift = every, isotropy_every, drift
        self.last = -1
        """The step of the last report."""
        self._reports, self._sums = 0, dict[str, list[float]]()
        self._monitor: DriftMonitor | None = None

    def begin(self, model: nn.Module, optimizers: Iterable[Optimizer], state: dict[str, Any] | None = None) -> None:
        """Start to watch the optimizer of the output embedding.

        Args:
            model: a model with ``get_output_embeddings()``, also inside a wrapper.
            optimizers: of which one holds the output embedding.
            state: what ``state_dict`` returned, when a run is resumed.

        Raises:
            ValueError: the model has no ``get_output_embeddings()``, or it returns None.
        """
        self.end()
        self._sums = {}
        if not self.drift:
            return
        weight = _output_embedding(model)
        try:
            self._monitor = DriftMonitor(_holder(optimizers, weight), weight)
        except (TypeError, ValueError) as error:
            warn(f"the drift of the mean embedding is not reported: {error}")
            return
        if state:
            self._monitor.load_state_dict(state)
        else:
            _ = self._monitor.total  # all ranks are here

    def end(self) -> None:
        """Stop watching. The sums so far can still be saved."""
        if self._monitor is not None:
            self._sums = self._monitor.state_dict()
            self._monitor.remove()
            self._monitor = None

    def is_due(self, step: int) -> bool:
        """Return whether a report is due after ``step`` steps, at most once per step."""
        return step % self.every == 0 and step != self.last

    def figures(self, model: nn.Module, step: int) -> dict[str, float]:
        """Measure after ``step`` steps; return the metrics by name, with the prefix ``embedding/``. All ranks must
        call it."""
        self.last = step
        measured = health(model, isotropy=bool(self.isotropy_every) and self._reports % self.isotropy_every == 0)
        self._reports += 1
        if self._monitor is not None:
            measured |= {f"drift_{cause}": along for cause, along in self._monitor.total.along_mean().items()}
        return {PREFIX + name: figure for name, figure in measured.items()}

    def state_dict(self) -> dict[str, list[float]]:
        """Return the sums of the drift as plain numbers, for a checkpoint; empty if there are none."""
        return self._sums if self._monitor is None else self._monitor.state_dict()


def _output_embedding(model: nn.Module) -> Tensor:
    weight = embedding_of(model)
    if weight is None:
        raise ValueError(
            f"{type(model).__name__} does not say what its output embedding is (get_output_embeddings() is missing, "
            "or returns None or several); EmbeddingHealth needs a language model with one"
        )
    return weight


def _holder(optimizers: Iterable[Optimizer], weight: Tensor) -> Optimizer:
    for optimizer in optimizers:
        if any(param is weight for group in optimizer.param_groups for param in group["params"]):
            return optimizer
    raise ValueError("no optimizer holds the output embedding (frozen?)")
