"""Adam without anisotropic embeddings: the optimizers. Everything else lives in the sub-packages."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coupled_adam.models import name_checkpoint, param_groups
    from coupled_adam.optim import Adams, Adams_ZeRO, CoupledAdam, adamw_state_dict, center_, describe

__version__ = "0.1.0"
__all__ = [
    "Adams",
    "Adams_ZeRO",
    "CoupledAdam",
    "__version__",
    "adamw_state_dict",
    "center_",
    "describe",
    "name_checkpoint",
    "param_groups",
]


def __getattr__(name: str) -> object:
    """Import the optimizers, and with them torch, when one is asked for: the command line starts without."""
    if name in __all__ or name == "optim":
        from coupled_adam import models, optim

        globals().update({public: getattr(room, public) for room in (models, optim) for public in room.__all__})
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
