"""What CoupledAdam and Adams share: the step loop, the state, checkpoints. The maths is in update.py."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from coupled_adam.optim import fused, reductions
from coupled_adam.optim import state as checkpoints
from coupled_adam.optim.reductions import local
from coupled_adam.optim.validation import check_grad, check_group, parameter_name

Group = dict[str, Any]

#: Where torch has a fused AdamW; elsewhere it chooses for itself.
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


class Work(NamedTuple):
    """A parameter that has a gradient, and what its step needs."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    group: Group

    @property
    def coupled(self) -> bool:
        return bool(self.group["second_moment"] == "vocabulary")

    @property
    def plain(self) -> bool:
        """Whether torch's own AdamW does the same: nothing coupled, and moments of the parameter's dtype."""
        return checkpoints.is_plain_adamw(self.param, self.group)


class AdamFamily(Optimizer):
    """Adam and its relatives, along the axes ``second_moment``, ``direction`` and ``decay`` of a param group."""

    grad_norm: Tensor | None = None
    """Global norm of the gradients of the last step, before clipping; None unless ``max_grad_norm`` is set."""

    def add_param_group(self, param_group: Group) -> None:
        """Add a group. Its missing keys take the defaults of the constructor; it is checked like the others."""
        if self.param_groups:
            param_group.setdefault("max_grad_norm", self.param_groups[0]["max_grad_norm"])  # a checkpoint may set it
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self.defaults, type(self).__name__)
            if self.param_groups[-1]["max_grad_norm"] != self.param_groups[0]["max_grad_norm"]:
                raise ValueError("max_grad_norm bounds the norm over all groups; give it once, to the optimizer")
        except (ValueError, TypeError):
            self.param_groups.pop()  # a caller who catches the error keeps a working optimizer
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; gradients are not modified.

        Args:
            closure: recomputes the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._create_missing_state()
        work = self._work()
        squares: dict[Tensor, Tensor] = {}
        scale: float | Tensor = 1.0
        if self.param_groups and self.param_groups[0]["max_grad_norm"] is not None:
            scale = self._clip(work, squares)
        clipped = not (isinstance(scale, float) and scale == 1.0)
        for group in self.param_groups:
            torchs: list[Work] = []
            ours: list[Work] = []
            for item in work:
                if item.group is group:
                    # torch's AdamW takes clipped gradients as copies; our kernel scales large ones as it reads them.
                    by_torch = item.plain and not (clipped and fused.kernel_pays(item.param, item.grad))
                    (torchs if by_torch else ours).append(item)
            if torchs:
                _adamw_(torchs, scale if clipped else None)
            for item in ours:
                self._update_(item, scale, squares.get(item.param))
        return loss

    def _work(self) -> list[Work]:
        work = []
        for group in self.param_groups:
            for i, param in enumerate(group["params"]):
                if param.grad is not None:
                    check_grad(param.grad, parameter_name(group, i), coupled=group["second_moment"] == "vocabulary")
                    grad = param.grad.coalesce().to_dense() if param.grad.is_sparse else param.grad
                    work.append(Work(param, grad, self.state[param], group))
        return work

    def _clip(self, work: Sequence[Work], squares: dict[Tensor, Tensor]) -> float | Tensor:
        """The factor that brings the norm of all gradients to ``max_grad_norm``, as ``clip_grad_norm_`` computes it.

        The pass over a coupled gradient also yields the mean square that its update needs: it goes into ``squares``.
        """
        rest, square_sums = [], []
        for item in work:
            if item.coupled and item.group["coupling_factor"] == 0:
                square = fused.vocabulary_mean_square(item.grad, item.state["exp_avg"], beta1=0.0, coupling_factor=0.0)
                squares[item.param] = square
                square_sums.append(square.sum() * item.grad.shape[0])
            else:
                rest.append(item.grad)
        self.grad_norm = reductions.total_norm(rest, square_sums)
        scale = (self.param_groups[0]["max_grad_norm"] / (self.grad_norm + 1e-6)).clamp(max=1.0)
        for param, square in squares.items():
            squares[param] = square * scale.square()
        # On an accelerator reading the number would wait for it.
        return float(scale) if scale.device.type == "cpu" and not torch.compiler.is_compiling() else scale

    def _update_(self, item: Work, scale: float | Tensor, square: Tensor | None) -> None:
        param, grad, state, group = item
        state["step"] += 1
        step = state["step"].double() if torch.compiler.is_compiling() else state["step"].item()
        beta1, beta2 = group["betas"]
        if group["maximize"]:
            scale = -scale
        if item.coupled and square is None:
            square = fused.vocabulary_mean_square(
                grad, state["exp_avg"], beta1=beta1, coupling_factor=group["coupling_factor"], grad_scale=scale
            )
        weight_decay, spectral = group["weight_decay"], None
        if group["decay"] == "spectral":
            if "u" not in state:
                weight_decay = group.get("scalar_vector_weight_decay", weight_decay)
            elif weight_decay != 0:
                spectral = reductions.power_iteration_(state["u"], param, step)
        fused.update_(
            local(param),
            local(state["exp_avg"]),
            local(state["exp_avg_sq"]),
            local(grad),
            None if square is None else local(square),
            step,
            lr=group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=weight_decay,
            coupling_scale=group["coupling_scale"] if item.coupled else 1.0,
            coupling_factor=group["coupling_factor"],
            direction=group["direction"],
            grad_scale=_beside(scale, grad),
            spectral=spectral,
        )

    def _create_missing_state(self) -> None:
        """For every parameter, with a gradient or not: a distributed checkpoint must be complete on every rank."""
        for group in self.param_groups:
            for i, param in enumerate(group["params"]):
                if not (param.requires_grad or param.grad is not None):
                    continue  # frozen; its state is made when it thaws
                if not self.state[param]:
                    self.state[param] = checkpoints.new_state(param, group)
                if "u" in self.state[param]:
                    self._warn_of_strong_decay(param, group, parameter_name(group, i))

    def _warn_of_strong_decay(self, param: Tensor, group: Group, name: str) -> None:
        """A step takes η·λ·√M of the leading singular value: above 1 it overshoots, above 2 it diverges."""
        lr = group["lr"]
        if torch.compiler.is_compiling() or (isinstance(lr, Tensor) and lr.device.type != "cpu"):
            return
        strength = float(lr) * group["weight_decay"] * math.sqrt(param.shape[-2])
        warned = self.__dict__.setdefault("_warned", set())
        if strength > 1 and name not in warned:
            warned.add(name)
            warnings.warn(
                f"spectral decay of {name}: lr·weight_decay·√M = {strength:.2f}; above 1 it overshoots, above 2 it "
                f"diverges. Keep lr·weight_decay below {1 / math.sqrt(param.shape[-2]):.2g}, or set "
                "param.use_spectral_decay = False",
                UserWarning,
                stacklevel=6,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, of ``torch.optim.AdamW``, or of the authors' reference implementation.

        A full (V, H) second moment of a parameter that is coupled here is folded to its mean over the vocabulary, so a
        running AdamW job can go on with Coupled Adam. Moments keep their precision whatever the parameters' dtype. The
        checkpoint's hyperparameters replace this optimizer's, but which groups are coupled does not change.

        Parameters are matched by name where both sides have names (``param_groups`` gives them), else by position.
        Where the checkpoint has other groups (an AdamW of one group, say), the hyperparameters stay this optimizer's.

        Raises:
            ValueError: the groups or the shapes of the state do not fit; the message names the parameter.
        """
        prepared: dict[str, Any] = {}

        def prepare(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            prepared.update(checkpoints.prepare(state_dict, self.param_groups))
            return prepared

        # As the last of the hooks: it must see what those of other libraries make of the checkpoint.
        handle = self.register_load_state_dict_pre_hook(prepare)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        checkpoints.restore_precision(self, prepared)


def _beside(scale: float | Tensor, x: Tensor) -> float | Tensor:
    """A number on the device of ``x``."""
    return scale.to(x.device) if isinstance(scale, Tensor) else scale


def _fits_fused(item: Work) -> bool:
    """Whether torch's fused kernel may be used: it walks memory, and mixes up elements where the layouts differ."""
    layouts = {x.stride() for x in (item.param, item.grad, item.state["exp_avg"], item.state["exp_avg_sq"])}
    return item.param.device.type in FUSED_DEVICES and len(layouts) == 1


def _adamw_(work: Sequence[Work], scale: float | Tensor | None) -> None:
    """torch's AdamW on parameters of one group, with gradients times ``scale``."""
    group, compiling = work[0].group, torch.compiler.is_compiling()
    beta1, beta2 = group["betas"]
    adamw(
        [item.param for item in work],
        [item.grad if scale is None else item.grad * _beside(scale, item.grad) for item in work],
        [item.state["exp_avg"] for item in work],
        [item.state["exp_avg_sq"] for item in work],
        [],
        [item.state["step"] for item in work],
        foreach=compiling or None,
        capturable=compiling,
        fused=not compiling and all(map(_fits_fused, work)),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=cast(float, group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
