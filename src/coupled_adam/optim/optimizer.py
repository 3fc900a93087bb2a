"""The step that CoupledAdam and Adams share, their state and their checkpoints.

The equations are in equations.py; update.py shows them at work on plain tensors.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from coupled_adam.optim import clipping, dispatch, reductions, triton_launch, update
from coupled_adam.optim.center import center_all_, keep_column_sums, move_centered_
from coupled_adam.optim.checks import check_grad, check_group, check_state, check_still_matrices, parameter_name
from coupled_adam.optim.equations import Number
from coupled_adam.optim.exchange import Known, ParamGroup, Work, advance, clipped, exchange, halt_beside, shared_over
from coupled_adam.optim.reductions import local
from coupled_adam.optim.state import new_state, numbers_of_moment, prepare, restore


class AdamFamily(Optimizer):
    """Adam and its relatives, along the axes ``second_moment``, ``direction`` and ``decay`` of a param group."""

    grad_norm: Tensor | None = None
    """Global norm of the gradients of the last step, before clipping; None unless ``max_grad_norm`` is set."""

    #: How many matrices with spectral decay each group had when it was added.
    _matrices: tuple[int, ...] = ()

    #: ``torch.amp.GradScaler`` then hands over its scale and whether it has found an infinity, and reads neither.
    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if isinstance(params, torch.nn.Module):
            name = type(self).__name__
            raise TypeError(f"{name} takes param groups or parameters, not a model: {name}(param_groups(model), lr=…)")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group. Its missing keys take the defaults of the constructor; it is checked like the others."""
        if self.param_groups:
            param_group.setdefault("max_grad_norm", self.param_groups[0]["max_grad_norm"])  # a checkpoint may set it
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, self.defaults, type(self).__name__)
            if group["max_grad_norm"] != self.param_groups[0]["max_grad_norm"]:
                raise ValueError("max_grad_norm bounds the norm over all groups; give it once, to the optimizer")
        except (ValueError, TypeError):
            self.param_groups.pop()  # a caller who catches the error keeps a working optimizer
            raise
        spectral = group["decay"] == "spectral"
        matrices = sum(param.ndim >= 2 for param in group["params"]) if spectral else 0
        self._matrices = (*self._matrices[: len(self.param_groups) - 1], matrices)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy and a pickle keep."""
        return {**super().__getstate__(), "_matrices": self._matrices}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; gradients are not modified.

        Args:
            closure: recomputes the loss, which is returned.

        Raises:
            RuntimeError: a parameter was resized or flattened after its state was made, or has a gradient that cannot
                be used. Nothing has moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_capture()
        self._create_missing_state()
        unscale, halt = self._amp_scaling()
        if halt is True:
            return loss
        bound: float | None = self.param_groups[0]["max_grad_norm"] if self.param_groups else None
        rescaled = bound is not None or not dispatch.is_one(unscale)
        known = exchange(self._collect(halt), held=None if bound is None else self._held(), rescaled=rescaled)
        factor = self._clip(known, bound, unscale)
        if rescaled:
            known = clipped(known, factor)
        _move(known, factor)
        center_all_([(x.param, x.halt) for x in known.work if x.group["center"] and not x.foreseen])
        self._publish(known.work)
        return loss

    def _clip(self, known: Known, bound: float | None, unscale: Number) -> Number:
        """Return what multiplies the gradients, GradScaler's part of it in ``unscale``; note their norm."""
        if bound is None or known.norm is None:
            return unscale
        if dispatch.is_one(unscale):
            self.grad_norm = known.norm
            return clipping.coefficient(known.norm, bound)
        unscale = dispatch.beside(unscale, known.norm)
        self.grad_norm = known.norm * unscale
        return clipping.coefficient(self.grad_norm, bound) * unscale

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

    def _publish(self, work: Sequence[Work]) -> None:
        """Hand out what was updated, where that is not the parameter itself."""

    def _held(self) -> list[Tensor]:
        """List all that a step may update, with a gradient on this rank or not."""
        params = (param for group in self.param_groups for param in group["params"])
        return [self._target(param) for param in params if param.grad is not None or param.requires_grad]

    def _collect(self, halt: Tensor | bool) -> list[Work]:
        """List the parameters that have a gradient here, or may have one on a rank that waits for this one's sums."""
        work = []
        for number, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                grad = param.grad
                if grad is None and not param.requires_grad:
                    continue
                state = self.state[param]
                shared, here = shared_over(param, state, group), halt_beside(param, halt)
                if grad is not None:
                    check_grad(group, i)
                    grad = grad.coalesce().to_dense() if grad.is_sparse else reductions.placed_like(param, grad)
                    work.append(Work(param, grad, state, group, number, shared, halt=here))
                elif shared:
                    zero = torch.zeros_like(param)
                    work.append(Work(param, zero, state, group, number, shared, present=False, halt=here))
        return work

    def _create_missing_state(self) -> None:
        """Create state for every parameter, with a gradient or not: a distributed checkpoint must be complete."""
        for number, group in enumerate(self.param_groups):
            check_still_matrices(group, self._matrices[number])
            for i, param in enumerate(group["params"]):
                if not (param.requires_grad or param.grad is not None):
                    continue  # frozen; its state is made when it thaws
                check_state(group, i, self.state[param])
                if not self.state[param]:
                    self.state[param] = self._new_state(param, group)
                if "u" in self.state[param]:
                    self._warn_of_strong_decay(param, group, i)

    def _check_capture(self) -> None:
        """Raise RuntimeError if a graph is being captured that would count no steps."""
        if torch.compiler.is_compiling() or all(group["capturable"] for group in self.param_groups):
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
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

    def first_moment(self, param: Tensor) -> Tensor:
        """Return the first moment of a parameter as floating-point numbers, in whatever form the state keeps it.

        Raises:
            ValueError: it has no state yet.
        """
        if not self.state.get(param):
            raise ValueError(f"the parameter of shape {tuple(param.shape)} has no moments yet: call step() first")
        return numbers_of_moment(self.state[param])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, of ``torch.optim.AdamW``, or of the authors' reference implementation.

        A full (V, H) second moment of a parameter that is coupled here is folded to its mean over the vocabulary, so a
        running AdamW job can switch to Coupled Adam. Moments keep their precision whatever the parameters' dtype. The
        checkpoint's hyperparameters replace this optimizer's, but which groups are coupled does not change.

        Parameters are matched by name where both sides have names (``param_groups`` gives them), else by position,
        which needs groups of the same sizes, in the same order. Where the checkpoint has other groups (an AdamW of one
        group, say), the hyperparameters stay this optimizer's.

        Raises:
            ValueError: the groups or the shapes of the state do not fit; the message names the parameter.
        """
        prepared: dict[str, Any] = {}

        def fit(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            prepared.update(prepare(state_dict, self.param_groups))
            return prepared

        # As the last of the hooks: it must see what those of other libraries make of the checkpoint.
        handle = self.register_load_state_dict_pre_hook(fit)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        restore(self, prepared, self._new_state)


def _move(known: Known, clip: Number) -> None:
    """Move all parameters: group by group those that torch's AdamW takes, in one call, and then the others."""
    for _, items in itertools.groupby(known.work, key=lambda item: item.number):
        _move_group(list(items), known, clip)


def _move_group(items: Sequence[Work], known: Known, clip: Number) -> None:
    group, halt = items[0].group, items[0].halt
    torchs: list[Work] = []
    together: dict[Any, list[Work]] = {}
    alone: list[Work] = []
    for item in items:
        if item.coupled or item.spectral:
            alone.append(item)
        elif dispatch.takes_torchs_adamw(*item.tensors, group, clip, item.halt):
            torchs.append(item)
        elif dispatch.moves_together(*item.tensors, group["direction"]):
            together.setdefault(_likeness(item), []).append(item)
        else:
            alone.append(item)
    if torchs:
        steps = [item.state["step"] for item in torchs]
        params, grads, exp_avgs, exp_avg_sqs = _columns(torchs)
        dispatch.adamw_(params, grads, exp_avgs, exp_avg_sqs, steps, group, clip, halt)
    for alike in together.values():
        _move_together(alike, clip)
    for item in alone:
        _move_one(item, known, clip)


def _columns(items: Sequence[Work]) -> list[list[Tensor]]:
    """List parameters, gradients, first and second moments of this process."""
    return [list(column) for column in zip(*(item.tensors for item in items), strict=True)]


def _likeness(item: Work) -> tuple[Any, ...]:
    """Return what parameters of a group must have in common to be moved by one launch, and should to be moved fast."""
    step: Tensor = item.state["step"]
    even = item.tensors[0].numel() % triton_launch.EVEN == 0
    return (*((x.dtype, x.device) for x in item.tensors), step.item() if step.device.type == "cpu" else None, even)


def _move_together(items: Sequence[Work], clip: Number) -> None:
    step = items[0].steps + 1
    if isinstance(step, Tensor):
        step = torch.stack([item.state["step"] for item in items]).to(step.dtype) + 1
    params, grads, exp_avgs, exp_avg_sqs = _columns(items)
    c, direction = items[0].coefficients(step, clip), items[0].group["direction"]
    triton_launch.move_many_(params, exp_avgs, exp_avg_sqs, grads, c, direction, step, items[0].halt)
    advance(items)


def _move_one(item: Work, known: Known, clip: Number) -> None:
    mean = known.mean(item, clip) if item.coupled else None
    spectral = known.triple(item) if item.spectral else None
    step, direction = item.steps + 1, item.group["direction"]
    c = item.coefficients(step, clip)
    if mean is None:
        param, grad, exp_avg, exp_avg_sq = item.tensors
        dispatch.move_elements_(param, exp_avg, exp_avg_sq, grad, c, direction, step, spectral, item.halt)
    else:
        param, grad = local(item.param), local(item.grad)
        root = dispatch.root_of_rows_(local(item.state["exp_avg_sq"]), mean[:1], c, item.halt)
        if not item.foreseen:
            dispatch.move_rows_(param, item.moment, grad, root, c, direction, step, spectral, item.halt)
        else:
            exp_avg = local(item.state["exp_avg"])
            after = update.mean_moved(mean[1:], root, c, direction)
            after = after if item.halt is None else torch.where(item.halt > 0, 0, after)
            sums = move_centered_(param, exp_avg, grad, root, c, direction, step, after, item.halt)
            keep_column_sums(item.param, item.state["exp_avg"], sums)
    advance([item])
