"""The Trainer of transformers, and through it TRL and PEFT.

Trainer(model, args, …, optimizer_cls_and_kwargs=trainer_optimizer(args))
"""

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from coupled_adam.errors import require
from coupled_adam.integrations.announce import announce
from coupled_adam.models import name_checkpoint, param_groups
from coupled_adam.models.groups import Coupled
from coupled_adam.optim import CoupledAdam
from coupled_adam.optim.checks import DEFAULT_LR, check_factor

require("demo", "transformers")

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402

__all__ = ["OptimizerFactory", "resume_from_adamw", "trainer_optimizer"]


def trainer_optimizer(
    args: TrainingArguments,
    coupled: Coupled | Iterable[Coupled] | None = None,
    optimizer: Callable[..., Optimizer] = CoupledAdam,
    *,
    embedding_lr_factor: float | None = None,
    **options: Any,
) -> tuple[type["OptimizerFactory"], dict[str, Any]]:
    """Make the argument ``optimizer_cls_and_kwargs`` of a ``Trainer`` from its training arguments.

    Learning rate, betas, ε and weight decay are those of ``args``, and the Trainer clips (``args.max_grad_norm``). Some
    trainers of TRL do not accept the argument; set it afterwards:

        trainer.optimizer_cls_and_kwargs = trainer_optimizer(trainer.args)

    Args:
        args: the arguments of the Trainer, or of a trainer of TRL.
        coupled: as in ``coupled_adam.param_groups``; None for the output embedding. If there is none, as in classifiers
            and reward models, or if it is frozen, as with LoRA, nothing is coupled, with a warning. Names
            (``coupled="lm_head"``) stay valid when the Trainer wraps or replaces modules.
        optimizer: ``coupled_adam.CoupledAdam`` or ``coupled_adam.Adams``.
        embedding_lr_factor: factor on the learning rate of the coupled matrices, throughout the schedule; positive and
            finite. The Trainer logs the learning rate of the first group, which is the coupled one.
        options: further arguments of ``optimizer``, which override those of ``args``; ``center=True`` as in
            ``coupled_adam.param_groups``.

    Returns:
        The class that builds the optimizer when the model is known, and its keyword arguments.

    Raises:
        ValueError, TypeError: ``embedding_lr_factor`` is not a positive finite number.
        TypeError: ``optimizer`` has no argument of that name.

    Examples:
        >>> from transformers import TrainingArguments
        >>> args = TrainingArguments("runs/tuned", learning_rate=1e-5, use_cpu=True)
        >>> factory, kwargs = trainer_optimizer(args)
        >>> kwargs["lr"], kwargs["betas"], kwargs["weight_decay"]
        (1e-05, (0.9, 0.999), 0.0)
    """
    if embedding_lr_factor is not None:
        check_factor("embedding_lr_factor", embedding_lr_factor)
    _check_names(options, optimizer)
    ours: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.weight_decay,
    }
    if "eps" in inspect.signature(optimizer).parameters:  # Adams has none
        ours["eps"] = args.adam_epsilon
    if options.get("max_grad_norm") is not None and args.max_grad_norm:
        warnings.warn(
            f"gradients are clipped twice: by the Trainer to a norm of {args.max_grad_norm} and by the optimizer to "
            f"{options['max_grad_norm']}. Leave out max_grad_norm here, or set TrainingArguments(max_grad_norm=0)",
            UserWarning,
            stacklevel=2,
        )
    return OptimizerFactory, {
        "optimizer": optimizer,
        "coupled": list(coupled) if isinstance(coupled, Iterator) else coupled,  # an optimizer may be built twice
        "embedding_lr_factor": embedding_lr_factor,
        "trainer_clips": args.max_grad_norm,
        **ours,
        **options,
    }


def _check_names(options: Iterable[str], optimizer: Callable[..., Optimizer]) -> None:
    """Reject what the optimizer does not accept, before a model is trained or loaded for it."""
    accepted = inspect.signature(optimizer).parameters
    if any(each.kind is each.VAR_KEYWORD for each in accepted.values()):
        return
    known = {"args", "coupled", "optimizer", "embedding_lr_factor", "center", *accepted} - {"params"}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"trainer_optimizer() got an unexpected keyword argument {name!r}{meant}")


class OptimizerFactory:
    """Builds the optimizer once the model exists: ``OptimizerFactory()(model, **kwargs)``.

    This is the protocol of transformers; axolotl passes its training arguments as a second positional argument.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 100, bias=False))
        >>> type(OptimizerFactory()(model, coupled="1", lr=1e-3)).__name__
        'CoupledAdam'
    """

    def __call__(
        self,
        model: nn.Module,
        args: object = None,
        *,
        optimizer: Callable[..., Optimizer] = CoupledAdam,
        coupled: Coupled | Iterable[Coupled] | None = None,
        center: bool = False,
        lr: float | Tensor = DEFAULT_LR,
        embedding_lr_factor: float | None = None,
        trainer_clips: float | None = None,
        from_adamw: bool = False,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> Optimizer:
        """Build the optimizer of this model's parameters, and log once what it does with them."""
        groups = param_groups(
            model,
            weight_decay=weight_decay,
            coupled=coupled,
            center=center,
            lr=None if embedding_lr_factor is None else lr,  # so that checkpoints without a factor stay as they are
            embedding_lr_factor=embedding_lr_factor,
        )
        built = optimizer(groups, lr=lr, **options)
        built.register_load_state_dict_pre_hook(_NamesOf(model, from_adamw))
        built.register_step_pre_hook(_AllHeld(model))
        bound = f"to a global norm of {trainer_clips:g}" if trainer_clips else "none"
        announce(built, f"the Trainer: {bound}")
        return built


class _NamesOf:
    """Puts names into a checkpoint of the Trainer's AdamW before it is loaded; refuses it where that is not enough."""

    def __init__(self, model: nn.Module, from_adamw: bool) -> None:
        self.model, self.from_adamw = model, from_adamw

    def __call__(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        groups = state_dict["param_groups"]
        if any("param_names" in group for group in groups):
            return None
        try:
            named = name_checkpoint(self.model, state_dict)
        except ValueError:
            return None  # the optimizer says why it does not fit
        if len(groups) != len(optimizer.param_groups) and not self.from_adamw:
            raise ValueError(
                f"this is a checkpoint of the Trainer's own AdamW, with a schedule of {len(groups)} param groups: call "
                "coupled_adam.integrations.transformers.resume_from_adamw(trainer) before trainer.train(…)"
            )
        return named


class _AllHeld:
    """Warns before the first step of trainable parameters that the optimizer does not hold."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.looked = model, False

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        if self.looked:
            return
        self.looked = True
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = self.model.named_parameters()
        missing = [f"{name} {tuple(p.shape)}" for name, p in named if p.requires_grad and id(p) not in held]
        if missing:
            warnings.warn(
                f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}: not in the optimizer, so not trained. "
                "They were replaced or unfrozen after it was built, for example by resize_token_embeddings: do that "
                "before building it",
                UserWarning,
                stacklevel=2,
            )


def resume_from_adamw(trainer: Trainer) -> None:
    """Let a Trainer resume from checkpoints written with the AdamW of the Trainer, as well as from its own later ones.

    The moments are kept, the second moment of a coupled matrix is averaged over the vocabulary, and the schedule of the
    learning rate continues.

    Args:
        trainer: built with ``optimizer_cls_and_kwargs=trainer_optimizer(args)``; not trained yet.

    Raises:
        ValueError: the optimizer of the trainer is not that of ``trainer_optimizer``.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> args = TrainingArguments("runs/tuned", use_cpu=True)
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer(args))
        >>> resume_from_adamw(trainer)  # then: trainer.train(resume_from_checkpoint=True)
    """
    chosen: Any = trainer.optimizer_cls_and_kwargs or (None, {})
    factory, kwargs = chosen
    if factory is not OptimizerFactory:
        raise ValueError("set trainer.optimizer_cls_and_kwargs = trainer_optimizer(trainer.args) first")
    chosen = (OptimizerFactory, {**kwargs, "from_adamw": True})
    trainer.optimizer_cls_and_kwargs = chosen
    trainer.add_callback(_ScheduleOfAllGroups())


class _ScheduleOfAllGroups(TrainerCallback):
    """Gives a schedule that was saved with one rate for all groups one for each of those that there are now."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scheduler, groups = kwargs["lr_scheduler"], kwargs["optimizer"].param_groups
        factors = [group.get("lr_factor", 1.0) for group in groups]
        for key in ("base_lrs", "min_lrs", "_last_lr"):
            rates = getattr(scheduler, key, None)
            if not isinstance(rates, list) or not rates:
                continue
            if len(set(rates)) > 1:
                if len(rates) == len(groups):
                    continue  # of a run with the factors
                raise ValueError(f"the schedule of the checkpoint has different rates for its groups ({key}: {rates})")
            ours = [rates[0] * (1.0 if key == "min_lrs" else factor) for factor in factors]
            setattr(scheduler, key, ours)
            for group, rate in zip(groups, ours, strict=True):
                group.update({"base_lrs": {"initial_lr": rate}, "_last_lr": {"lr": rate}}.get(key, {}))
