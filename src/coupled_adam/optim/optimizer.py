"""What CoupledAdam and Adams share: the step loop, the state, checkpoints. The maths is in update.py."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from coupled_adam.optim import fused, reductions
from coupled_adam.optim import state as checkpoints
from coupled_adam.optim.reductions import Groups, local
from coupled_adam.optim.update import RankOne
from coupled_adam.optim.validation import check_grad, check_group, parameter_name

Group = dict[str, Any]

#: Where torch has a fused AdamW; elsewhere it chooses for itself.
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(eq=False)
class Work:
    """A parameter that has a gradient, and what its step needs."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    group: Group
    shared: Groups
    """The process groups over which the reductions of this parameter communicate."""
    present: bool = True
    """Whether there is a gradient in this process; where only others have one, ``grad`` is 0."""
    square: Tensor | None = None
    """The step's contribution to a shared second moment, once it is known."""
    spectral: RankOne | None = None
    """What spectral decay takes off, once it is known."""

    @property
    def steps(self) -> float | Tensor:
        """The number of steps taken."""
        step: Tensor = self.state["step"]
        return step.double() if torch.compiler.is_compiling() else step.item()

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
        work, scale = self._reduce_ahead(self._work())
        clipped = not (isinstance(scale, float) and scale == 1.0)
        for group in self.param_groups:
            torchs: list[Work] = []
            ours: list[Work] = []
            for item in work:
                if item.group is group:
                    # torch's AdamW takes clipped gradients as copies; our kernel scales large ones as it reads them.
                    by_torch = item.plain and not (clipped and fused.kernel_pays(local(item.param), local(item.grad)))
                    (torchs if by_torch else ours).append(item)
            if torchs:
                _adamw_(torchs, scale if clipped else None)
            for item in ours:
                _update_(item, scale)
        self._publish(work)
        return loss

    def _updated(self, param: Tensor) -> Tensor:
        """What the step updates for a parameter of this optimizer."""
        return param

    def _publish(self, work: Sequence[Work]) -> None:
        """Hand out what was updated, where that is not the parameter itself."""

    def _work(self) -> list[Work]:
        work = []
        for group in self.param_groups:
            for i, param in enumerate(group["params"]):
                grad = param.grad
                if grad is None and not param.requires_grad:
                    continue
                state = self.state[param]
                shared = shared_over(param, state, group)
                if grad is not None:
                    check_grad(grad, parameter_name(group, i), coupled=group["second_moment"] == "vocabulary")
                    grad = grad.coalesce().to_dense() if grad.is_sparse else reductions.placed_like(param, grad)
                    work.append(Work(param, grad, state, group, shared))
                elif shared:
                    # Other processes may have a gradient, and wait for this one's part of their sums.
                    work.append(Work(param, torch.zeros_like(param), state, group, shared, present=False))
        return work

    def _reduce_ahead(self, work: list[Work]) -> tuple[list[Work], float | Tensor]:
        """Make the reductions that communicate, all at once, and those that clipping needs.

        Returns:
            The work without parameters of which no process has a gradient, and the factor of the gradients that brings
            their norm to ``max_grad_norm``, as ``clip_grad_norm_`` computes it.
        """
        bound = self.param_groups[0]["max_grad_norm"] if self.param_groups else None
        shared = [item for item in work if item.shared]
        coupled = [item for item in (shared if bound is None else work) if item.coupled]
        # With κ the mean square is one of clipped gradients, which are not known yet.
        early = [item for item in coupled if bound is None or item.group["coupling_factor"] == 0]
        sums = {item.param: _sum_squares(item, 1.0) for item in early}
        spectral = [item for item in shared if _is_spectral(item.state, item.group)]
        norms = {} if bound is None else self._partial_norms(work, sums)
        here = norms.pop((), torch.zeros(()))
        squares, iterations, counts, totals = reductions.run(
            [reductions.vocabulary_mean(sums[item.param], item.param) for item in early],
            [reductions.power_iteration(item.state["u"], item.param, item.steps) for item in spectral],
            [reductions.complete(_flag(item), item.shared) for item in shared],
            [reductions.complete(norm.square(), over) for over, norm in norms.items()],
        )
        absent = {item.param for item, n in zip(shared, counts, strict=True) if not item.present and n.item() == 0}
        for item, square in zip(early, squares, strict=True):
            item.square = square
        for item, (triple, u) in zip(spectral, iterations, strict=True):
            if item.param not in absent:
                item.spectral = triple
                local(item.state["u"]).copy_(u)
        work = [item for item in work if item.param not in absent]
        if bound is None:
            return work, 1.0
        self.grad_norm = reductions.norm([here], totals, device=(totals or [here])[0].device)
        clip = (bound / (self.grad_norm + 1e-6)).clamp(max=1.0)
        for item in early:
            item.square = cast(Tensor, item.square) * clip.to(item.grad.device).square()
        # On an accelerator reading the number would wait for it.
        scale = float(clip) if clip.device.type == "cpu" and not torch.compiler.is_compiling() else clip
        late = [item for item in shared if item.coupled and item.square is None]
        (squares,) = reductions.run(
            [reductions.vocabulary_mean(_sum_squares(item, scale), item.param) for item in late]
        )
        for item, square in zip(late, squares, strict=True):
            item.square = square
        return work, scale

    def _partial_norms(self, work: Sequence[Work], sums: dict[Tensor, Tensor]) -> dict[Groups, Tensor]:
        """For every set of processes that share parameters, the norm of this process's part of their gradients.

        Every process has the same keys, whichever gradients it has. ``sums`` are sums of squares that are known.
        """
        grads = {item.param: item.grad for item in work}
        sets: dict[Groups, list[Tensor]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None or param.requires_grad:
                    updated = self._updated(param)
                    sets.setdefault(reductions.holders(updated), []).append(updated)
        return {
            over: reductions.norm(
                [local(grads[p]) for p in params if p in grads and p not in sums],
                [sums[p].sum() for p in params if p in sums],
                device=local(params[0]).device,
            )
            for over, params in sets.items()
        }

    def _create_missing_state(self) -> None:
        """For every parameter, with a gradient or not: a distributed checkpoint must be complete on every rank."""
        for group in self.param_groups:
            for i, param in enumerate(group["params"]):
                if not (param.requires_grad or param.grad is not None):
                    continue  # frozen; its state is made when it thaws
                if not self.state[param]:
                    self.state[param] = self._new_state(param, group)
                if "u" in self.state[param]:
                    self._warn_of_strong_decay(param, group, parameter_name(group, i))

    def _new_state(self, param: Tensor, group: Group) -> dict[str, Any]:
        return checkpoints.new_state(param, group)

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
        checkpoints.restore(self, prepared, self._new_state)


def _is_spectral(state: dict[str, Any], group: Group) -> bool:
    """Whether this parameter's step takes off its leading singular triple."""
    return "u" in state and group["weight_decay"] != 0


def shared_over(param: Tensor, state: dict[str, Any], group: Group) -> Groups:
    """The process groups over which the reductions of a parameter communicate."""
    if _is_spectral(state, group):
        return reductions.holders(param)
    return reductions.holders(param, 0) if group["second_moment"] == "vocabulary" else ()


def _flag(item: Work) -> Tensor:
    """What a process adds to the number of those that have a gradient."""
    return local(item.param).new_full((1,), float(item.present), dtype=torch.float32)


def _sum_squares(item: Work, scale: float | Tensor) -> Tensor:
    """This process's part of the sum over the vocabulary of g² + κ·m², g being the gradient times ``scale``."""
    group = item.group
    return fused.sum_squares(
        local(item.grad),
        local(item.state["exp_avg"]),
        beta1=group["betas"][0],
        coupling_factor=group["coupling_factor"],
        grad_scale=_beside(-scale if group["maximize"] else scale, item.grad),
    )


def _update_(item: Work, scale: float | Tensor) -> None:
    """One step of one parameter, with its gradient times ``scale``."""
    param, grad, state, group = item.param, item.grad, item.state, item.group
    if item.coupled and item.square is None:
        ((item.square,),) = reductions.run([reductions.vocabulary_mean(_sum_squares(item, scale), param)])
    weight_decay = group["weight_decay"]
    if group["decay"] == "spectral":
        if "u" not in state:
            weight_decay = group.get("scalar_vector_weight_decay", weight_decay)
        elif weight_decay != 0 and item.spectral is None:
            (((item.spectral, u),),) = reductions.run([reductions.power_iteration(state["u"], param, item.steps)])
            local(state["u"]).copy_(u)
    state["step"] += 1
    fused.update_(
        local(param),
        local(state["exp_avg"]),
        local(state["exp_avg_sq"]),
        local(grad),
        item.square,
        item.steps,
        lr=group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        weight_decay=weight_decay,
        coupling_scale=group["coupling_scale"] if item.coupled else 1.0,
        coupling_factor=group["coupling_factor"],
        direction=group["direction"],
        grad_scale=_beside(-scale if group["maximize"] else scale, grad),
        spectral=item.spectral,
    )


def _beside(scale: float | Tensor, x: Tensor) -> float | Tensor:
    """A number on the device of ``x``."""
    return scale.to(x.device) if isinstance(scale, Tensor) else scale


def _fits_fused(item: Work) -> bool:
    """Whether torch's fused kernel may be used: it walks memory, and mixes up elements where the layouts differ."""
    tensors = (item.param, item.grad, item.state["exp_avg"], item.state["exp_avg_sq"])
    layouts = {local(x).stride() for x in tensors}
    return item.param.device.type in FUSED_DEVICES and len(layouts) == 1


def _adamw_(work: Sequence[Work], scale: float | Tensor | None) -> None:
    """torch's AdamW on parameters of one group, with gradients times ``scale``."""
    group, compiling = work[0].group, torch.compiler.is_compiling()
    beta1, beta2 = group["betas"]
    adamw(
        [local(item.param) for item in work],
        [local(item.grad) if scale is None else local(item.grad) * _beside(scale, item.grad) for item in work],
        [local(item.state["exp_avg"]) for item in work],
        [local(item.state["exp_avg_sq"]) for item in work],
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
