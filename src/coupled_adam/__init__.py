"""Adam without anisotropic embeddings: the optimizers. Everything else lives in the sub-packages."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coupled_adam.optim import (
        Adams,
        Adams_ZeRO,
        CoupledAdam,
        adamw_state_dict,
        center_,
        describe,
        name_checkpoint,
        param_groups,
    )

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
        import coupled_adam.optim as optim

        globals().update({public: getattr(optim, public) for public in optim.__all__})
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
