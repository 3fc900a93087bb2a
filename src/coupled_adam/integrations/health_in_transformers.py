"""Embedding health in the ``Trainer`` of transformers, and in those of TRL and others that are built on it."""

from typing import Any

from coupled_adam.errors import require
from coupled_adam.integrations.health_callbacks import HealthReport

require("demo", "transformers")

from transformers import TrainerCallback  # noqa: E402

__all__ = ["EmbeddingHealth"]

#: Where a Trainer's checkpoint keeps the sums of the drift: in the field of trainer_state.json for callbacks.
SAVED = "embedding_drift"


class EmbeddingHealth(TrainerCallback):
    """Logs health and drift of the model's embeddings every ``every`` steps, with any optimizer.

        trainer.add_callback(EmbeddingHealth(trainer))

    The figures of ``monitor.health`` and, as ``drift_…``, how far each cause has moved the mean of
    the output embedding (``monitor.Drift.along_mean``), go through ``trainer.log`` to wherever the
    Trainer reports: before the first step, every ``every`` steps, and after the last. A resumed run goes on from the
    sums in its checkpoint; where there are none, they begin with the first step that is seen.

    All ranks measure together; with FSDP2 the matrices are not gathered. FSDP1 and DeepSpeed ZeRO-3, which flatten
    parameters, are a ValueError at the start.

    Args:
        trainer: to whose log the figures go.
        every: steps between two reports.
        isotropy_every: reports of which one has the isotropy; 0 for none.
        drift: whether to sum at every step why the mean of the output embedding moves.

    Raises:
        ValueError: a number of steps out of range.
        ImportError: transformers is not installed.
    """

    def __init__(self, trainer: Any, every: int = 100, isotropy_every: int = 10, drift: bool = True) -> None:
        self.trainer, self.report = trainer, HealthReport(every, isotropy_every, drift)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.report.begin(others["model"], [others["optimizer"]], state.stateful_callbacks.get(SAVED))
        if state.global_step == 0:
            self._log(state, others["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.report.is_due(state.global_step):
            self._log(state, others["model"])
        self._keep(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._keep(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step != self.report.last:
            self._log(state, others["model"])
        self.report.end()

    def _log(self, state: Any, model: Any) -> None:
        # Not into the logs that on_log is given: other callbacks, which report them, come before this one.
        self.trainer.log(self.report.figures(model, state.global_step))

    def _keep(self, state: Any, control: Any) -> None:
        if control.should_save:
            state.stateful_callbacks[SAVED] = self.report.state_dict()
