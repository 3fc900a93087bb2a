"""The step that CoupledAdam and Adams share, their state and their checkpoints.

reference.py shows the whole step in one screenful.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from coupled_adam.optim import backends, clipping, reductions
from coupled_adam.optim.center import center_all_
from coupled_adam.optim.checks import (
    DEFAULT_LR,
    Form,
    check_factor,
    check_flags,
    check_grad,
    check_group,
    check_keys,
    check_number,
    check_one_base,
    check_rate,
    check_settings,
    check_state,
    check_still_matrices,
    memory_stamp,
)
from coupled_adam.optim.equations import Number, beside, has_numbers, readable
from coupled_adam.optim.exchange import exchange, finish, scale
from coupled_adam.optim.job import Job, is_one
from coupled_adam.optim.moments import numbers_of_moment
from coupled_adam.optim.reductions import local
from coupled_adam.optim.state import form_of_state, job_of, new_state, not_finite, shared_over
from coupled_adam.optim.state_dict import prepare, restore
from coupled_adam.optim.typed import ParamGroup, State, parameter_name

#: A parameter that a step may update: its group, its index there, itself, and the keys of its state that must change.
Member = tuple[ParamGroup, int, Tensor, list[str]]

#: Steps after which a coupled parameter should have had a gradient.
PATIENCE = 10


class AdamFamily(Optimizer):
    """Adam and its relatives, along the axes ``second_moment``, ``direction`` and ``decay`` of a param group."""

    grad_norm: Tensor | None = None
    """Global norm of the gradients of the last step, before clipping; None unless ``max_grad_norm`` or
    ``error_if_nonfinite`` is set."""

    error_if_nonfinite: bool = False
    """Whether a step raises RuntimeError where that norm is not finite."""

    #: Whether the state is spread over processes that hold whole parameters.
    spread: bool = False

    #: How many matrices with spectral decay each group had when it was added.
    _matrices: tuple[int, ...] = ()

    #: ``torch.amp.GradScaler`` then hands over its scale and whether it has found an infinity, and reads neither.
    _step_supports_amp_scaling = True

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], *, error_if_nonfinite: bool, **flags_of_adamw: object
    ) -> None:
        if isinstance(params, torch.nn.Module):
            name = type(self).__name__
            raise TypeError(f"{name} takes param groups or parameters, not a model: {name}(param_groups(model), lr=…)")
        if not isinstance(error_if_nonfinite, bool):
            raise TypeError(f"Invalid error_if_nonfinite: {error_if_nonfinite!r}; it must be True or False")
        check_flags(flags_of_adamw)
        self.error_if_nonfinite = error_if_nonfinite
        super().__init__(params, defaults)
        if defaults["lr"] is not DEFAULT_LR:
            check_one_base(self.param_groups, defaults["lr"])
        elif bases := [group["lr"] / group["lr_factor"] for group in self.param_groups if "lr_factor" in group]:
            self.defaults["lr"] = bases[-1]  # which schedules read, and groups that are added take
        self._warn_of_a_decay_without_effect()

    def _warn_of_a_decay_without_effect(self) -> None:
        """Warn if a weight decay was given to the constructor, and every group has another."""
        given = self.defaults["weight_decay"]
        argument = inspect.signature(type(self)).parameters.get("weight_decay")  # a subclass may have none
        if (
            argument
            and given != argument.default
            and all(group["weight_decay"] != given for group in self.param_groups)
        ):
            warnings.warn(
                f"weight_decay={given:g} has no effect, because every param group has its own: pass it to "
                f"param_groups(model, weight_decay={given:g})",
                UserWarning,
                stacklevel=4,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group. Missing keys take the defaults of the constructor.

        With ``lr_factor`` but without ``lr``, its learning rate is that multiple of the default.

        Args:
            param_group: as in ``coupled_adam.optim.typed.ParamGroup``; it is not modified.

        Raises:
            ValueError, TypeError: as for the constructor. The optimizer is then unchanged.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a param group is a dict, not {type(param_group).__name__}: {{'params': […], …}}")
        param_group = dict(param_group)  # torch writes into it, and the caller may build another optimizer of it
        if "lr_factor" in param_group and "lr" not in param_group:
            check_number("learning rate (lr)", self.defaults["lr"], tensor=True)
            check_factor("lr_factor", param_group["lr_factor"])
            param_group["lr"] = self.defaults["lr"] * param_group["lr_factor"]
        if self.param_groups:
            param_group.setdefault("max_grad_norm", self.param_groups[0]["max_grad_norm"])  # a checkpoint may set it
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_keys(group, self.defaults)
            check_group(group, type(self).__name__)
            if group["max_grad_norm"] != self.param_groups[0]["max_grad_norm"]:
                raise ValueError("max_grad_norm bounds the norm over all groups; pass it once, to the optimizer")
        except (ValueError, TypeError):
            self.param_groups.pop()  # a caller who catches the error keeps a working optimizer
            raise
        spectral = group["decay"] == "spectral"
        matrices = sum(param.ndim >= 2 for param in group["params"]) if spectral else 0
        self._matrices = (*self._matrices[: len(self.param_groups) - 1], matrices)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy and a pickle keep: all but what torch and its schedulers put beside it."""
        return {**_own_attributes(self), **super().__getstate__()}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; gradients are not modified.

        Args:
            closure: recomputes the loss and returns it.

        Returns:
            What ``closure`` returned; None without one.

        Raises:
            RuntimeError, ValueError, TypeError: a parameter, its gradient, its state or a hyperparameter cannot be
                used, for instance because the parameter was resized, flattened or moved after its state was created; or
                ``error_if_nonfinite`` rejects the norm. Nothing has moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_capture()
        first = not torch.compiler.is_compiling() and not any(self.state.values())
        self._prepare_state(self._check())
        unscale, halt = self._amp_scaling()
        if halt is True or (first and self._only_makes_state()):
            return loss
        bound: float | None = self.param_groups[0]["max_grad_norm"] if self.param_groups else None
        normed = bound is not None or self.error_if_nonfinite
        rescaled = normed or not is_one(unscale)
        jobs = self._jobs(halt if isinstance(halt, Tensor) else None)
        backends.check_fused(jobs)
        jobs, norm = exchange(jobs, held=self._held() if normed else None, rescaled=rescaled)
        factor = self._clip(norm, bound, unscale)
        if self.error_if_nonfinite and not (isinstance(halt, Tensor) and halt > 0):
            self._check_norm(jobs)
        if rescaled:
            scale(jobs, factor)
        move(jobs)
        center_all_([job for job in jobs if job.group["center"] and not job.foreseen])
        self._publish(jobs)
        return loss

    def _clip(self, norm: Tensor | None, bound: float | None, unscale: Number) -> Number:
        """Return what multiplies the gradients, GradScaler's part of it in ``unscale``; note their norm."""
        if norm is None:
            return unscale
        one = is_one(unscale)
        unscale = beside(unscale, norm)
        self.grad_norm = norm if one else norm * unscale
        clip = 1.0 if bound is None else clipping.coefficient(self.grad_norm, bound)
        return clip if one else clip * unscale

    def _check_norm(self, jobs: Sequence[Job]) -> None:
        """Raise RuntimeError if the norm of the gradients is not finite, which every process knows alike."""
        if self.grad_norm is None or math.isfinite(norm := float(self.grad_norm)):
            return
        names = [job.name for job in jobs if not job.grad.isfinite().all()]
        if names:
            cause = f"infinite or NaN in {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
        else:
            cause = "all are finite in this process; some in another process are not, or their squares overflow"
        raise RuntimeError(
            f"the norm of the gradients is {norm} ({cause}). No parameter was updated: skip this batch, or set "
            "optimizer.error_if_nonfinite = False to step anyway"
        )

    def _amp_scaling(self) -> tuple[Number, Tensor | bool]:
        """Return what to multiply gradients by, and whether GradScaler has found an infinity among them.

        Both are plain where reading them is free; the latter is else 0 or 1 on the device.
        """
        scale: Tensor | None = getattr(self, "grad_scale", None)  # None if the gradients are unscaled already
        found: Tensor | None = getattr(self, "found_inf", None)
        unscale: Number = 1.0
        if scale is not None:
            unscale = 1.0 / (float(scale) if scale.device.type == "cpu" else scale.reshape(()))
        if found is None or found.device.type == "cpu":
            return unscale, found is not None and bool(found)
        return unscale, (found != 0).to(torch.float32).reshape(())

    def _target(self, param: Tensor) -> Tensor:
        """Return the tensor that the step updates for a parameter: itself, or its master weights."""
        return param

    def _publish(self, jobs: Sequence[Job]) -> None:
        """Hand out what was updated, where that is not the parameter itself."""

    def _held(self) -> list[Tensor]:
        """List all that a step may update, with a gradient on this rank or not."""
        params = (param for group in self.param_groups for param in group["params"])
        return [self._target(param) for param in params if param.grad is not None or param.requires_grad]

    def _jobs(self, found_inf: Tensor | None) -> list[Job]:
        """List the parameters that have a gradient here, or may have one on a rank that waits for this one's sums."""
        jobs = []
        for number, group in enumerate(self._groups):
            for i, param in enumerate(group["params"]):
                grad, state = param.grad, cast(State, self.state.get(param))
                if grad is not None:
                    grad = grad.coalesce().to_dense() if grad.is_sparse else reductions.placed_like(param, grad)
                    if not torch.compiler.is_compiling():  # which has no such views
                        grad = grad.resolve_neg()  # kernels and _foreach functions take no view of negated numbers
                elif not (param.requires_grad and shared_over(param, state, group)):
                    continue
                job = job_of(param, grad, state, group)
                job.index = number, i
                job.found_inf = None if found_inf is None else found_inf.to(job.param.device)
                jobs.append(job)
        return jobs

    @property
    def _groups(self) -> list[ParamGroup]:
        return cast(list[ParamGroup], self.param_groups)

    def _members(self) -> Iterator[tuple[ParamGroup, int, Tensor]]:
        """Go through the parameters that a step may update; others are frozen, and get their state when they thaw."""
        for group in self._groups:
            for i, param in enumerate(group["params"]):
                if param.requires_grad or param.grad is not None:
                    yield group, i, param

    def _check(self) -> list[Member]:
        """Raise for whatever would fail halfway through the step.

        Returns:
            The members, and which tensors of their state must follow a converted parameter.
        """
        changed = [self._check_numbers(number, group) for number, group in enumerate(self._groups)]
        self._warn_of_a_lost_factor()
        members: list[Member] = []
        stale = any(changed)
        for group, i, param in self._members():
            state = cast(State, self.state.get(param) or {})
            stamp = memory_stamp(param, state)
            if stale or stamp is None or self._checked_memory.get(param) != (id(group), stamp):
                changes = check_state(group, i, state, self._form_of_state(param, group, state) if state else {})
                if state and not changes and stamp is not None:
                    self._checked_memory[param] = (id(group), stamp)
            else:
                changes = []
            check_grad(group, i)
            members.append((group, i, param, changes))
        return members

    @cached_property
    def _checked_memory(self) -> dict[Tensor, object]:
        """Where the tensors of a parameter lay when they were last found to fit together."""
        return {}

    @cached_property
    def _checked_numbers(self) -> dict[int, list[Any]]:
        """The hyperparameters of groups that were last found to be good."""
        return {}

    def _check_numbers(self, number: int, group: ParamGroup) -> bool:
        """Check the hyperparameters that have changed since they were checked last: schedulers change the learning
        rate, and anybody may change anything. Returns whether any other has."""
        check_still_matrices(group, self._matrices[number])
        if torch.compiler.is_compiling():
            return True
        check_rate(group["lr"])
        values = [value for key, value in group.items() if key not in ("params", "param_names", "lr")]
        before = self._checked_numbers.get(number, [])
        if len(before) == len(values) and all(a is b for a, b in zip(before, values, strict=True)):
            return False
        check_settings(group)
        self._checked_numbers[number] = values
        return True

    def _warn_of_a_lost_factor(self) -> None:
        """Warn once if all groups have one learning rate where their factors want them apart."""
        factors = [group.get("lr_factor", 1.0) for group in self.param_groups]
        if len(set(factors)) < 2 or torch.compiler.is_compiling() or "_warned_of_factor" in self.__dict__:
            return
        rates = [group["lr"] for group in self.param_groups]
        if not all(not isinstance(lr, Tensor) or readable(lr) for lr in rates):
            return
        values = {float(lr) for lr in rates}
        if len(values) > 1 or (lr := values.pop()) <= 0:
            return
        self._warned_of_factor = True
        warnings.warn(
            f"the param groups have the learning rate factors {', '.join(f'{x:g}' for x in factors)}, but one learning "
            f"rate, {lr:g}: it was set for all of them, or a checkpoint without factors was loaded. Where you set it, "
            'write group["lr"] = lr * group.get("lr_factor", 1.0); pass a list of rates to OneCycleLR and CyclicLR',
            UserWarning,
            stacklevel=6,
        )

    def _prepare_state(self, members: Iterable[Member]) -> None:
        """Create state for every parameter, with a gradient or not: a distributed checkpoint must be complete."""
        fresh = {param: self._new_state(param, group) for group, _, param, _ in members if not self.state.get(param)}
        self.state.update(fresh)
        for group, i, param, changes in members:
            state = self.state[param]
            if changes:
                form = self._form_of_state(param, group, state)
                state.update({key: state[key].to(form[key][1], form[key][0]) for key in changes})
            if "u" in state:
                self._warn_of_strong_decay(param, group, i)
            if param.grad is None and group["second_moment"] == "vocabulary" and readable(state["step"]):
                self._warn_of_no_gradient(group, i, bool(state["step"] == 0))

    def _form_of_state(self, param: Tensor, group: ParamGroup, state: State) -> Form:
        return form_of_state(param, group, state)

    def _only_makes_state(self) -> bool:
        """Return whether this is the step by which ``torch.distributed.checkpoint`` has state made before it reads or
        loads it: the very first, with learning rates and gradients of 0. It must not count, nor anything move.

        All processes that share something must agree, at the price of one number that they exchange in a first step at
        a learning rate of 0.
        """
        rates = [group["lr"] for group in self.param_groups]
        if any(isinstance(lr, Tensor) and not readable(lr) for lr in rates):
            return False
        params = [param for _, _, param in self._members()]
        if any(lr != 0 for lr in rates) or not all(has_numbers(local(param)) for param in params):
            return False
        moving = any(bool(_numbers_in(param.grad).any()) for param in params if param.grad is not None)
        if over := self._sharing(params):
            flag = local(params[0]).new_full((1,), float(moving), dtype=torch.float32)
            moving = reductions.run_one(reductions.complete(flag, over)).item() > 0
        return not moving

    def _sharing(self, params: Sequence[Tensor]) -> reductions.ProcessGroups:
        """List the process groups that share some of the parameters."""
        return tuple(dict.fromkeys(group for param in params for group in reductions.holders(param)))

    def _check_capture(self) -> None:
        """Raise RuntimeError if a graph is being captured that would count no steps."""
        if self.error_if_nonfinite and (torch.compiler.is_compiling() or _capturing()):
            raise RuntimeError(
                "error_if_nonfinite=True reads the norm of the gradients in every step, which neither torch.compile "
                "nor a CUDA graph can do; set optimizer.error_if_nonfinite = False"
            )
        if torch.compiler.is_compiling() or all(group["capturable"] for group in self.param_groups):
            return
        if _capturing():
            raise RuntimeError("a CUDA graph can capture this step if the optimizer is built with capturable=True")

    def _new_state(self, param: Tensor, group: ParamGroup) -> dict[str, Any]:
        return new_state(param, group)

    def _warn_of_strong_decay(self, param: Tensor, group: ParamGroup, i: int) -> None:
        """Warn where η·λ·√M, the share of the leading singular value that a step takes, is above 1."""
        lr = group["lr"]
        if torch.compiler.is_compiling() or (isinstance(lr, Tensor) and lr.device.type != "cpu"):
            return
        strength = float(lr) * group["weight_decay"] * math.sqrt(param.shape[-2])
        if strength <= 1:
            return
        name, warned = parameter_name(group, i), self.__dict__.setdefault("_warned", set())
        if name not in warned:
            warned.add(name)
            warnings.warn(
                f"spectral decay of {name}: lr·weight_decay·√M = {strength:.2f}; above 1 it overshoots, above 2 it "
                f"diverges. Keep lr·weight_decay below {1 / math.sqrt(param.shape[-2]):.2g}, or set "
                "param.use_spectral_decay = False",
                UserWarning,
                stacklevel=6,
            )

    def _warn_of_no_gradient(self, group: ParamGroup, i: int, never: bool) -> None:
        """Warn once of a coupled parameter that the loss does not seem to see at all."""
        without, name = self.__dict__.setdefault("_without_gradient", {}), parameter_name(group, i)
        without[name] = without.get(name, 0) + 1 if never else 0
        if without[name] == PATIENCE:
            warnings.warn(
                f"coupled {name} has had no gradient in the first {PATIENCE} steps. If the model was resized, tied "
                "or wrapped by FSDP1 after the optimizer was built, this is no longer its embedding: build the "
                "optimizer afterwards",
                UserWarning,
                stacklevel=5,
            )

    def first_moment(self, param: Tensor) -> Tensor:
        """Return the first moment of a parameter as floating-point numbers, however the state stores it.

        Args:
            param: a parameter of this optimizer.

        Returns:
            The first moment, of the shape and placement of ``param``: the stored tensor itself, or numbers decoded from
            8 bits.

        Raises:
            ValueError: it has no state yet.
        """
        if not self.state.get(param):
            raise ValueError(f"the parameter of shape {tuple(param.shape)} has no moments yet: call step() first")
        return numbers_of_moment(self.state[param])

    def load_state_dict(self, state_dict: dict[str, Any], *, resize_vocabulary: bool = False) -> None:
        """Load a checkpoint of this class, of ``torch.optim.AdamW``, or of the authors' reference implementation.

        The (V, H) second moment of a parameter that is coupled here is averaged over the vocabulary, so a running AdamW
        job can switch to Coupled Adam; conversely, a shared second moment of a parameter that is not coupled here is
        copied to every row. Moments keep their precision whatever the dtype of the parameters. The hyperparameters of
        the checkpoint replace those of this optimizer, but which groups are coupled does not change.

        Parameters are matched by name if both sides have names (``param_groups`` provides them), else by position,
        which needs groups of the same sizes in the same order. If the checkpoint has different groups (for instance the
        single group of an AdamW), this optimizer keeps its hyperparameters.

        A warning names parameters whose moments are infinite or NaN.

        Args:
            state_dict: what ``state_dict()`` returned; it is not modified.
            resize_vocabulary: accept a checkpoint of the model with fewer or more tokens. Its parameters may differ in
                the number of rows, by the same number for all. Surplus rows are dropped. New rows get a first moment of
                0; a shared second moment is kept, and in one that is not shared they get the mean of the other rows.

        Raises:
            ValueError: the groups or the shapes of the state do not fit; the message names the parameter.
        """
        prepared: dict[str, Any] = {}
        factors = [group.get("lr_factor", 1.0) for group in self.param_groups]

        def fit(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            prepared.update(prepare(state_dict, self.param_groups, resize=resize_vocabulary))
            return prepared

        # As the last of the hooks: it must see what those of other libraries make of the checkpoint.
        handle = self.register_load_state_dict_pre_hook(fit)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        restore(self, prepared, self._new_state)
        self._warn_of_infinities()
        self._warn_of_other_factors(factors)

    def _warn_of_other_factors(self, before: list[float]) -> None:
        loaded = [group.get("lr_factor", 1.0) for group in self.param_groups]
        if loaded != before:
            warnings.warn(
                f"the checkpoint has the learning rate factors {', '.join(f'{x:g}' for x in loaded)} in its param "
                f"groups, this optimizer had {', '.join(f'{x:g}' for x in before)}: the checkpoint's rates and factors "
                'now apply. To change them, set "lr", "initial_lr" and "lr_factor" of the groups after loading',
                UserWarning,
                stacklevel=3,
            )

    def _warn_of_infinities(self) -> None:
        members = [
            (parameter_name(g, i), self.state.get(p)) for g in self.param_groups for i, p in enumerate(g["params"])
        ]
        found = [f"{key} of {name}" for name, state in members if state for key in not_finite(state)]
        if found:
            warnings.warn(
                "the checkpoint contains infinity, NaN, or negative second moments "
                f"({', '.join(found[:3])}{', …' if len(found) > 3 else ''}): the affected parameters will stop "
                "updating or become NaN. Load an earlier checkpoint",
                UserWarning,
                stacklevel=3,
            )


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Take off the wrappers that Accelerate and Lightning put around an optimizer."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def move(jobs: Sequence[Job]) -> None:
    """Move parameters, those of a group that one backend takes in one call."""
    waiting: dict[tuple[str, int], tuple[backends.Backend, list[Job]]] = {}
    for job in jobs:
        backend = backends.of(job)
        if job.coupled or job.spectral:
            finish(job)
            backend.move([job])
        else:
            waiting.setdefault((backend.__name__, job.index[0]), (backend, []))[1].append(job)
    for backend, alike in waiting.values():
        backend.move(alike)


def _own_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return the attributes that a class of this package, or a class made of one, has given its instance.

    Left out are the hooks and the like of every Optimizer of torch, a ``step`` that a scheduler has put in place of the
    method, and what can be computed anew.
    """
    torchs = {*vars(Optimizer([torch.zeros(1, device="cpu")], {})), "_opt_called", "grad_scale", "found_inf"}
    own = {name: x for name, x in vars(optimizer).items() if name not in torchs}
    of_class = {name: getattr(type(optimizer), name, None) for name in own}
    return {k: x for k, x in own.items() if not (callable(of_class[k]) or isinstance(of_class[k], cached_property))}


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _numbers_in(grad: Tensor) -> Tensor:
    """Return the numbers of a gradient that this process holds, in any order."""
    part = local(grad)
    return part.coalesce().values() if part.is_sparse else part
