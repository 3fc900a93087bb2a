"""Adam without anisotropic embeddings: the optimizers. Everything else lives in the sub-packages."""

from coupled_adam.optim import Adams, Adams_ZeRO, CoupledAdam, adamw_state_dict, center_, describe, param_groups

__version__ = "0.1.0"
__all__ = [
    "Adams",
    "Adams_ZeRO",
    "CoupledAdam",
    "__version__",
    "adamw_state_dict",
    "center_",
    "describe",
    "param_groups",
]
