"""torchtitan: its container of optimizers with ours among them, and a configuration as ``default_adamw`` makes one.

optimizer=coupled_adamw(lr=3e-4)  # in a Trainer.Config
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from coupled_adam.errors import require_trainer
from coupled_adam.integrations.announce import announce
from coupled_adam.optim import Adams, CoupledAdam
from coupled_adam.optim.checks import check_factor

require_trainer("torchtitan", "torchtitan")

from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig  # noqa: E402

__all__ = ["CoupledOptimizers", "coupled_adamw"]

OURS = {"CoupledAdam": CoupledAdam, "Adams": Adams}


class CoupledOptimizers(OptimizersContainer):  # type: ignore[misc]
    """The ``OptimizersContainer`` of torchtitan, which also accepts the optimizer names "CoupledAdam" and "Adams".

    The keys of their param groups (``second_moment``, ``decay``, …) go into ``optimizer_kwargs``. With torchtitan's
    default, ``implementation="fused"``, they choose the fastest kernels that support a parameter (``fused=None``).

    Args:
        config: of torchtitan, for instance that of ``coupled_adamw``.
        model_parts: the modules that this process trains.

    Raises:
        ValueError: ``implementation="fused_opt_states_bf16"``, which these optimizers do not support.

    Examples:
        ```python
        optimizers = CoupledOptimizers(coupled_adamw(lr=3e-4), model_parts=[model])
        ```
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """As for ``OptimizersContainer``."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        if config.implementation == "fused_opt_states_bf16":
            raise ValueError(
                'implementation="fused_opt_states_bf16" supports only Adam and AdamW; put "exp_avg_dtype": '
                'torch.bfloat16 into optimizer_kwargs and use implementation="fused"'
            )
        if config.implementation == "fused":  # for torchtitan the default, for ours a demand that may fail
            groups = [_as_fast_as_can_be(group) for group in config.param_groups]
            config = replace(config, param_groups=groups)  # type: ignore[call-arg]
        super().__init__(config, model_parts=model_parts)
        for optimizer in self.optimizers:
            if isinstance(optimizer, CoupledAdam | Adams):
                announce(optimizer, "torchtitan: to training.max_norm")

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        factory: Callable[..., Optimizer]
        factory = OURS[name] if name in OURS else OptimizersContainer._resolve_optimizer_factory(name)
        return factory


def _as_fast_as_can_be(group: ParamGroupConfig) -> ParamGroupConfig:
    if group.optimizer_name not in OURS:
        return group
    return replace(group, optimizer_kwargs={"fused": None, **group.optimizer_kwargs})


def coupled_adamw(
    lr: float = 8e-4,
    *,
    head: str = r"(^|\.)lm_head\.weight$",
    embedding_lr_factor: float | None = None,
    **kwargs: Any,
) -> "CoupledOptimizers.Config":
    """Make the configuration of torchtitan's ``default_adamw``, with a coupled output embedding without weight decay.

    Args:
        lr: learning rate η ≥ 0 of all parameters.
        head: regular expression for the name of the output embedding. If it matches nothing, torchtitan raises an
            error.
        embedding_lr_factor: factor on the learning rate of the output embedding, positive and finite; the schedulers of
            torchtitan keep the ratio.
        kwargs: further arguments of ``coupled_adam.CoupledAdam`` for all parameters, except ``max_grad_norm``.

    Returns:
        The configuration, for ``optimizer=`` of torchtitan's ``Trainer.Config``.

    Raises:
        ValueError, TypeError: ``embedding_lr_factor`` is not a positive finite number.
        ValueError: ``max_grad_norm`` is given. torchtitan clips (``training.max_norm``), and builds one optimizer per
            model part, each of which would bound only the norm of its part.

    Examples:
        ```python
        optimizer = coupled_adamw(lr=3e-4, embedding_lr_factor=10.0)
        ```
    """
    if kwargs.get("max_grad_norm") is not None:
        raise ValueError("torchtitan clips by itself: set training.max_norm, and leave max_grad_norm out")
    common = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, **kwargs}
    coupled = {**common, "weight_decay": 0.0, "second_moment": "vocabulary"}
    if embedding_lr_factor is not None:
        check_factor("embedding_lr_factor", embedding_lr_factor)
        coupled |= {"lr": lr * embedding_lr_factor, "lr_factor": float(embedding_lr_factor)}
    return CoupledOptimizers.Config(
        param_groups=[
            ParamGroupConfig(pattern=head, optimizer_name="CoupledAdam", optimizer_kwargs=coupled),
            ParamGroupConfig(pattern=r".*", optimizer_name="CoupledAdam", optimizer_kwargs=common),
        ]
    )
