"""The optimizers. They need torch alone."""

from coupled_adam.optim.adams import Adams
from coupled_adam.optim.center import center_
from coupled_adam.optim.coupled_adam import CoupledAdam
from coupled_adam.optim.describe import describe
from coupled_adam.optim.to_adamw import adamw_state_dict
from coupled_adam.optim.zero import Adams_ZeRO

__all__ = [
    "Adams",
    "Adams_ZeRO",
    "CoupledAdam",
    "adamw_state_dict",
    "center_",
    "describe",
]
