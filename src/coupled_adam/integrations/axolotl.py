"""axolotl: a plugin that gives its trainer Coupled Adam.

plugins:
  - coupled_adam.integrations.axolotl.CoupledAdamPlugin
embedding_lr_factor: 10.0  # if the output embedding is to have another learning rate
"""

from typing import Any

from coupled_adam.errors import require_trainer

require_trainer("axolotl", "axolotl")

from axolotl.integrations.base import BasePlugin  # noqa: E402
from pydantic import BaseModel, PositiveFloat  # noqa: E402
from transformers import Trainer  # noqa: E402

from coupled_adam.integrations.transformers import trainer_optimizer  # noqa: E402

__all__ = ["CoupledAdamArgs", "CoupledAdamPlugin"]

#: What axolotl does by param groups of its own, which an optimizer that makes its groups does not see.
IGNORED = ("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio")


class CoupledAdamArgs(BaseModel):
    """The settings that the plugin adds to the configuration."""

    embedding_lr_factor: PositiveFloat | None = None
    """Factor on the learning rate of the output embedding; None for 1."""


class CoupledAdamPlugin(BasePlugin):  # type: ignore[misc]
    """Trains with Coupled Adam, whatever ``optimizer`` says; learning rate, betas, ε and weight decay are axolotl's.

    Name it in the configuration, with ``embedding_lr_factor`` if the output embedding is to have another learning rate.

    Raises:
        ValueError: the configuration has settings that would have no effect.

    Examples:
        ```yaml
        plugins:
          - coupled_adam.integrations.axolotl.CoupledAdamPlugin
        embedding_lr_factor: 10.0
        ```
    """

    def get_input_args(self) -> str:
        """Return the path of the class that declares the settings."""
        return f"{__name__}.{CoupledAdamArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Set the optimizer of the trainer."""
        if ignored := [name for name in IGNORED if cfg.get(name) is not None]:
            raise ValueError(
                f"CoupledAdamPlugin: {', '.join(ignored)} would have no effect; leave it out. To set the learning "
                "rate of the output embedding, use embedding_lr_factor"
            )
        factor = cfg.get("embedding_lr_factor")
        if factor is not None and cfg.get("lr_scheduler") == "one_cycle":
            raise ValueError(
                f"CoupledAdamPlugin: axolotl's lr_scheduler one_cycle sets one learning rate for all parameters, so "
                f"embedding_lr_factor={factor:g} would be lost; choose another, such as cosine or rex"
            )
        chosen: Any = trainer_optimizer(trainer.args, embedding_lr_factor=factor)
        trainer.optimizer_cls_and_kwargs = chosen
