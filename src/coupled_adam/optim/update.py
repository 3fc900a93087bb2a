"""The maths of one step. Pure and local: sees the shard that this process holds and never communicates."""

from torch import Tensor


def update_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    square: Tensor,
    step: float,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    coupling_scale: float,
) -> None:
    """One step of Adam with decoupled weight decay. Modifies ``param``, ``exp_avg`` and ``exp_avg_sq`` in place.

    ``square`` is this step's contribution to the second moment, from :mod:`coupled_adam.optim.reductions`. It and
    ``exp_avg_sq`` have the shape of ``param``, or (1, H) where the rows of a (V, H) parameter share their second moment
    (Coupled Adam, arXiv 2502.08441, eq. 8; the mean over the vocabulary of a linear recursion is that recursion of the
    mean, so the vector is all the state there is). The moments are float32, or float64 for float64 parameters, and so
    is all arithmetic; ``param`` and ``grad`` may be narrower. ``step`` counts from 1.
    """
    exp_avg.lerp_(grad.to(exp_avg.dtype), 1 - beta1)  # m ← β1·m + (1 − β1)·g
    exp_avg_sq.lerp_(square, 1 - beta2)  # v ← β2·v + (1 − β2)·square
    m_hat = exp_avg / (1 - beta1**step)  # m̂ = m / (1 − β1^t)
    v_hat = exp_avg_sq * (coupling_scale / (1 - beta2**step))  # ν̂ = s·v / (1 − β2^t)
    decayed = param.to(exp_avg.dtype) * (1 - lr * weight_decay)  # θ·(1 − η·λ)
    param.copy_(decayed - lr * m_hat / (v_hat.sqrt() + eps))  # θ ← θ·(1 − η·λ) − η·m̂ / (√ν̂ + ε)
