"""The whole step of one parameter in float64, top to bottom: what every implementation here must compute.

Read this first. It is the oracle of the tests; nothing else imports it.
"""

from typing import Any

import torch
from torch import Tensor

DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "second_moment": "elementwise",
    "direction": "ratio",
    "decay": "decoupled",
    "center": False,
    "coupling_scale": 1.0,
    "coupling_factor": 0.0,
    "row_exponent": 0.0,
    "maximize": False,
}


def step(theta: Tensor, g: Tensor, state: dict[str, Any], **changed: Any) -> Tensor:
    """Return θ, of shape (V, H), after a step with gradient g; ``state``, first {}, is updated in place."""
    group = DEFAULTS | changed
    theta, g = theta.double(), g.double() * (-1 if group["maximize"] else 1)
    (beta1, beta2), lr = group["betas"], group["lr"]
    coupled = group["second_moment"] == "vocabulary"
    t = state["t"] = state.get("t", 0) + 1

    m = state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g  # first moment
    square = g**2 + group["coupling_factor"] * m**2
    of_row = square.mean(1, keepdim=True) if coupled else square
    square = square.mean(0, keepdim=True) if coupled else square  # Coupled Adam: one for all rows
    v = state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * square  # second moment
    if coupled and group["row_exponent"]:  # times a power of each row's own, relative to their mean
        r = state["r"] = beta2 * state.get("r", 0) + (1 - beta2) * of_row
        v = v * (r / v.mean()) ** group["row_exponent"]
    m_hat = m / (1 - beta1**t)
    root = (v / (1 - beta2**t) * (group["coupling_scale"] if coupled else 1)).sqrt()
    adam = m_hat / (root + group["eps"]) if group["direction"] == "ratio" else torch.atan2(m_hat, root.expand_as(m_hat))

    shrink = theta
    if group["decay"] == "spectral":  # Adams: √M·σ·u·vᵀ, by one step of the power method from u
        u = state.get("u", torch.ones_like(theta[..., 0]))
        right = torch.nn.functional.normalize(torch.einsum("...mn,...m->...n", theta, u), dim=-1)
        u = state["u"] = torch.nn.functional.normalize(torch.einsum("...mn,...n->...m", theta, right), dim=-1)
        sigma = torch.einsum("...m,...mn,...n->...", u, theta, right)[..., None, None]
        shrink = theta.shape[-2] ** 0.5 * sigma * u[..., None] * right[..., None, :]

    theta = theta - lr * group["weight_decay"] * shrink - lr * adam
    return theta - theta.mean(0, keepdim=True) if group["center"] else theta
