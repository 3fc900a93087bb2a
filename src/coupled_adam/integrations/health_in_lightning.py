"""Embedding health in the ``Trainer`` of Lightning."""

from typing import Any

from coupled_adam.errors import require_trainer
from coupled_adam.integrations.health_callbacks import HealthReport

require_trainer("lightning", "lightning")

from lightning.pytorch import Callback  # noqa: E402

__all__ = ["EmbeddingHealth"]


class EmbeddingHealth(Callback):  # type: ignore[misc]
    """Logs health and drift of the model's embeddings every ``every`` steps, with any optimizer.

    The metrics of ``coupled_adam.monitor.health`` and, as ``drift_…``, how far each cause has moved the mean of the
    output embedding (``coupled_adam.monitor.Drift.along_mean``) are logged with ``pl_module.log_dict``. They are in
    ``trainer.callback_metrics``, and reach the loggers at steps that are multiples of ``log_every_n_steps`` too. The
    model is the LightningModule, or the outermost module in it with ``get_output_embeddings()``. A resumed run
    continues the sums of its checkpoint.

    All ranks measure together; with ModelParallelStrategy (FSDP2) the matrices are not gathered. FSDPStrategy, which
    flattens parameters, raises a ValueError at the start.

    Args:
        every: steps between two reports, at least 1.
        isotropy_every: isotropy is measured in every so many reports, as it is slow; 0 for never.
        drift: whether to split the movement of the mean output embedding by cause, in every step.

    Raises:
        ValueError: ``every`` or ``isotropy_every`` is out of range.
        ImportError: lightning is not installed.

    Examples:
        >>> import lightning
        >>> options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        >>> trainer = lightning.Trainer(callbacks=[EmbeddingHealth(every=100)], **options)
    """

    def __init__(self, every: int = 100, isotropy_every: int = 10, drift: bool = True) -> None:
        self.report = HealthReport(every, isotropy_every, drift)
        self._saved: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.report.begin(pl_module, trainer.optimizers, self._saved)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.report.is_due(trainer.global_step):  # which stays what it is while batches accumulate
            figures = self.report.figures(pl_module, trainer.global_step)
            pl_module.log_dict(figures, on_step=True, on_epoch=False, rank_zero_only=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.report.end()

    def state_dict(self) -> dict[str, Any]:
        return self.report.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict  # before the optimizers are loaded
