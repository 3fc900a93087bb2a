"""Adam without anisotropic embeddings: the optimizers. Everything else lives in the sub-packages."""

from coupled_adam.optim import Adams, Adams_ZeRO, CoupledAdam, center_, describe, name_checkpoint, param_groups

__version__ = "0.1.0"
__all__ = [
    "Adams",
    "Adams_ZeRO",
    "CoupledAdam",
    "__version__",
    "center_",
    "describe",
    "name_checkpoint",
    "param_groups",
]
