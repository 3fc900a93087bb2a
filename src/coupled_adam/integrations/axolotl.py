"""axolotl: a plugin that gives its trainer Coupled Adam.

plugins:
  - coupled_adam.integrations.axolotl.CoupledAdamPlugin
"""

from typing import Any

from coupled_adam.errors import require_trainer

require_trainer("axolotl", "axolotl")

from axolotl.integrations.base import BasePlugin  # noqa: E402
from transformers import Trainer  # noqa: E402

from coupled_adam.integrations.transformers import trainer_optimizer  # noqa: E402

#: What axolotl does by param groups of its own, which an optimizer that makes its groups does not see.
IGNORED = ("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio")


class CoupledAdamPlugin(BasePlugin):  # type: ignore[misc]
    """Trains with Coupled Adam, whatever ``optimizer`` says; learning rate, betas, ε and weight decay are axolotl's.

    Raises:
        ValueError: the configuration has settings that would have no effect.
    """

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Give the trainer the optimizer."""
        if ignored := [name for name in IGNORED if cfg.get(name) is not None]:
            raise ValueError(f"CoupledAdamPlugin: {', '.join(ignored)} would have no effect; leave it out")
        chosen: Any = trainer_optimizer(trainer.args)
        trainer.optimizer_cls_and_kwargs = chosen
