"""OLMo-core: a registered configuration of the optimizer.

TransformerTrainModuleConfig(optim=CoupledAdamConfig(lr=4e-4, weight_decay=0.1), max_grad_norm=1.0, …)
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from coupled_adam.errors import require_trainer
from coupled_adam.integrations.announce import announce
from coupled_adam.optim import CoupledAdam
from coupled_adam.optim.checks import check_factor

require_trainer("olmo_core", "ai2-olmo-core")

from olmo_core.optim import OptimConfig, OptimGroupOverride  # noqa: E402

__all__ = ["CoupledAdamConfig", "coupled_head"]


def coupled_head(embedding_lr_factor: float | None = None) -> list[OptimGroupOverride]:
    """Make the param group of OLMo-core's output embedding: coupled, without weight decay.

    Args:
        embedding_lr_factor: factor on its learning rate, positive and finite; the schedulers of OLMo-core keep the
            ratio.

    Returns:
        A list for ``group_overrides``, to which other groups can be added.

    Raises:
        ValueError, TypeError: the factor is not a positive finite number.

    Examples:
        ```python
        CoupledAdamConfig(lr=4e-4, group_overrides=coupled_head(10.0))
        ```
    """
    coupled: dict[str, Any] = {"second_moment": "vocabulary", "weight_decay": 0.0}
    if embedding_lr_factor is not None:
        check_factor("embedding_lr_factor", embedding_lr_factor)
        coupled["lr_factor"] = float(embedding_lr_factor)  # CoupledAdam multiplies the configuration's lr by it
    return [OptimGroupOverride(params=["lm_head.w_out.weight"], opts=coupled)]


@OptimConfig.register("coupled_adam")
@dataclass
class CoupledAdamConfig(OptimConfig[CoupledAdam]):  # type: ignore[misc]
    """Configuration of ``coupled_adam.CoupledAdam``, with its arguments. The train module clips (``max_grad_norm``).

    Examples:
        ```python
        optim = CoupledAdamConfig(lr=4e-4, weight_decay=0.1)
        ```
    """

    group_overrides: list[OptimGroupOverride] | None = field(default_factory=coupled_head)
    """Couples the output embedding, without weight decay. If you change it, keep the group of ``coupled_head``."""
    lr: float = 1e-3
    """Learning rate η ≥ 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moments, each in [0, 1)."""
    eps: float = 1e-8
    """ε ≥ 0, added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay λ ≥ 0 of all other parameters."""
    coupling_scale: float = 1.0
    """s > 0, multiplies the coupled second moment."""
    coupling_factor: float = 0.0
    """κ in [0, 1], the share of the squared first moment in the second one."""
    row_exponent: float = 0.0
    """α in [0, 1] of a tempered second moment, as of ``CoupledAdam``."""

    @classmethod
    def optimizer(cls) -> type[CoupledAdam]:
        """Return the class of the optimizer."""
        return CoupledAdam

    def build(self, model: nn.Module, strict: bool = True) -> CoupledAdam:
        """Build the optimizer of this model, and log what it does with which parameter.

        Args:
            model: of OLMo-core.
            strict: whether an override that matches no parameter is an error.

        Returns:
            The optimizer.
        """
        built: CoupledAdam = super().build(model, strict)
        announce(built, "OLMo-core: to max_grad_norm of the train module")
        return built
