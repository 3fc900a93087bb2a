"""The optimizers. They need torch alone."""

from coupled_adam.optim.adams import Adams
from coupled_adam.optim.coupled_adam import CoupledAdam
from coupled_adam.optim.groups import param_groups

__all__ = ["Adams", "CoupledAdam", "param_groups"]
