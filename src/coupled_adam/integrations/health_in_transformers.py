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

    The metrics of ``coupled_adam.monitor.health`` and, as ``drift_…``, how far each cause has moved the mean of the
    output embedding (``coupled_adam.monitor.Drift.along_mean``) are logged with ``trainer.log``: before the first step,
    every ``every`` steps, and after the last. A resumed run continues the sums of its checkpoint; without any, they
    start at the first step after resuming.

    All ranks measure together; with FSDP2 the matrices are not gathered. FSDP1 and DeepSpeed ZeRO-3, which flatten
    parameters, raise a ValueError at the start.

    Args:
        trainer: that logs the metrics.
        every: steps between two reports, at least 1.
        isotropy_every: isotropy is measured in every so many reports, as it is slow; 0 for never.
        drift: whether to split the movement of the mean output embedding by cause, in every step.

    Raises:
        ValueError: ``every`` or ``isotropy_every`` is out of range.
        ImportError: transformers is not installed.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> trainer = Trainer(model, TrainingArguments("runs/tuned", use_cpu=True))
        >>> trainer.add_callback(EmbeddingHealth(trainer, every=100))
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
