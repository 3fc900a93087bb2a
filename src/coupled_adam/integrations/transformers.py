"""The Trainer of transformers, and through it TRL and PEFT.

Trainer(model, args, …, optimizer_cls_and_kwargs=trainer_optimizer(args))
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from coupled_adam.errors import require
from coupled_adam.integrations.announce import announce
from coupled_adam.optim import CoupledAdam, param_groups
from coupled_adam.optim.groups import Coupled, output_embedding

require("demo", "transformers")

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402


def trainer_optimizer(
    args: TrainingArguments,
    coupled: Sequence[Coupled] | None = None,
    optimizer: Callable[..., Optimizer] = CoupledAdam,
    **options: Any,
) -> tuple[type["OptimizerFactory"], dict[str, Any]]:
    """Make what ``Trainer(optimizer_cls_and_kwargs=…)`` takes, from the Trainer's own arguments.

    The learning rate, the betas, ε and the weight decay are those of ``args``, and the Trainer clips
    (``args.max_grad_norm``). A trainer that does not take the argument, as some of TRL, takes it afterwards:

        trainer.optimizer_cls_and_kwargs = trainer_optimizer(trainer.args)

    Args:
        args: of the Trainer; those of TRL too.
        coupled: as of ``coupled_adam.param_groups``; None for the output embedding, or for nothing, with a warning, if
            that is frozen, as with LoRA.
        optimizer: ``coupled_adam.CoupledAdam`` or ``coupled_adam.Adams``.
        options: more arguments of ``optimizer``, and such as replace those of ``args``; ``center=True`` as of
            ``coupled_adam.param_groups``.

    Examples:
        >>> from transformers import TrainingArguments
        >>> args = TrainingArguments("runs/tuned", learning_rate=1e-5, weight_decay=0.1, use_cpu=True)
        >>> factory, kwargs = trainer_optimizer(args)
        >>> kwargs["lr"], kwargs["betas"], kwargs["weight_decay"]
        (1e-05, (0.9, 0.999), 0.1)
    """
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
        "coupled": coupled,
        "trainer_clips": args.max_grad_norm,
        **ours,
        **options,
    }


class OptimizerFactory:
    """Builds the optimizer when the model is there: ``OptimizerFactory()(model, **kwargs)``.

    That is the protocol of transformers; axolotl passes its training arguments as a second positional argument.
    """

    def __call__(
        self,
        model: nn.Module,
        args: object = None,
        *,
        optimizer: Callable[..., Optimizer] = CoupledAdam,
        coupled: Sequence[Coupled] | None = None,
        center: bool = False,
        trainer_clips: float | None = None,
        from_adamw: bool = False,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> Optimizer:
        """Build the optimizer of this model's parameters, and log once what it does with them."""
        if coupled is None and (frozen := _frozen_head(model)):
            warnings.warn(
                f"nothing is coupled, so this is AdamW: the output embedding ({frozen}) is frozen, as with LoRA. To "
                'train and couple it, LoraConfig(modules_to_save=["lm_head"]); to silence this, coupled=[]',
                UserWarning,
                stacklevel=2,
            )
            coupled = []
        groups = param_groups(model, weight_decay=weight_decay, coupled=coupled, center=center)
        with warnings.catch_warnings():
            if coupled is not None and len(coupled) == 0:
                warnings.filterwarnings("ignore", "nothing is coupled")  # as asked for, or said above
            built = optimizer(groups, weight_decay=weight_decay, **options)
        built.register_load_state_dict_pre_hook(_NamesOf(model, from_adamw))
        bound = f"to a global norm of {trainer_clips:g}" if trainer_clips else "none"
        announce(built, f"the Trainer: {bound}")
        return built


def _frozen_head(model: nn.Module) -> str:
    """Name the output embedding's weight if it is frozen; empty if it is trained."""
    head = output_embedding(model)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.requires_grad:
        return ""
    named = model.named_parameters(remove_duplicate=False)
    return next((name for name, p in named if p is weight), type(head).__name__)


def name_checkpoint(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Put the parameters' names into the optimizer's checkpoint of a Trainer that ran its own AdamW.

    Such a checkpoint (``optimizer.pt``) has two groups, the decayed parameters and the others, and no names, without
    which an optimizer with other groups cannot tell whose moments they are.

    Args:
        model: the Trainer's, with the same parameters frozen.
        state_dict: of that optimizer; it is not modified.

    Returns:
        A copy with ``param_names`` in its groups, which ``coupled_adam.CoupledAdam.load_state_dict`` takes.

    Raises:
        ValueError: the groups or shapes are not those that the Trainer makes of this model.
    """
    names, saved = _trainers_groups(model), state_dict["param_groups"]
    sizes, found = ([len(group) for group in names], [len(group["params"]) for group in saved])
    if sizes != found:
        raise ValueError(
            f"no checkpoint of the Trainer's AdamW for this {type(model).__name__}: it has groups of {found} "
            f"parameters, the Trainer makes groups of {sizes} of this model"
        )
    params = dict(model.named_parameters())
    for group, members in zip(saved, names, strict=True):
        for key, name in zip(group["params"], members, strict=True):
            moment = state_dict["state"].get(key, {}).get("exp_avg")
            if moment is not None and moment.shape != params[name].shape:
                raise ValueError(
                    f"no checkpoint of the Trainer's AdamW for this {type(model).__name__}: {name!r} has shape "
                    f"{tuple(params[name].shape)}, the moment in its place {tuple(moment.shape)}"
                )
    groups = [{**group, "param_names": members} for group, members in zip(saved, names, strict=True)]
    return {**state_dict, "param_groups": groups}


def _trainers_groups(model: nn.Module) -> list[list[str]]:
    """The names of the parameters that ``Trainer.create_optimizer`` decays, and of the others."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    return [[name for name in trained if (name in decayed) is wanted] for wanted in (True, False)]


class _NamesOf:
    """Puts names into a checkpoint of the Trainer's AdamW before it is loaded; refuses it where that is not enough."""

    def __init__(self, model: nn.Module, from_adamw: bool) -> None:
        self.model, self.from_adamw = model, from_adamw

    def __call__(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        groups = state_dict["param_groups"]
        trainers = [len(names) for names in _trainers_groups(self.model)]
        if any("param_names" in group for group in groups) or [len(g["params"]) for g in groups] != trainers:
            return None
        if len(groups) != len(optimizer.param_groups) and not self.from_adamw:
            raise ValueError(
                "this is a checkpoint of the Trainer's own AdamW, with a schedule of two param groups: call "
                "coupled_adam.integrations.transformers.resume_from_adamw(trainer) before trainer.train(…)"
            )
        return name_checkpoint(self.model, state_dict)


def resume_from_adamw(trainer: Trainer) -> None:
    """Let a Trainer resume from checkpoints that it wrote with its own AdamW; later ones of its own it resumes too.

        trainer = Trainer(…, optimizer_cls_and_kwargs=trainer_optimizer(args))
        resume_from_adamw(trainer)
        trainer.train(resume_from_checkpoint=True)

    The moments are kept, the second one of a coupled matrix is averaged over the vocabulary, and the learning rate goes
    on where the schedule stood.

    Raises:
        ValueError: the trainer's optimizer is not that of ``trainer_optimizer``.
    """
    chosen: Any = trainer.optimizer_cls_and_kwargs or (None, {})
    factory, kwargs = chosen
    if factory is not OptimizerFactory:
        raise ValueError("set trainer.optimizer_cls_and_kwargs = trainer_optimizer(trainer.args) first")
    chosen = (OptimizerFactory, {**kwargs, "from_adamw": True})
    trainer.optimizer_cls_and_kwargs = chosen
    trainer.add_callback(_ScheduleOfAllGroups())


class _ScheduleOfAllGroups(TrainerCallback):
    """Gives a schedule that was saved with two param groups the number that there are now."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scheduler, groups = kwargs["lr_scheduler"], kwargs["optimizer"].param_groups
        for key in ("base_lrs", "min_lrs", "_last_lr"):
            rates = getattr(scheduler, key, None)
            if not isinstance(rates, list) or len(rates) in (0, len(groups)):
                continue
            if len(set(rates)) > 1:
                raise ValueError(f"the schedule of the checkpoint has different rates for its groups ({key}: {rates})")
            setattr(scheduler, key, rates[:1] * len(groups))
            for group in groups:
                group.update({"base_lrs": {"initial_lr": rates[0]}, "_last_lr": {"lr": rates[0]}}.get(key, {}))
