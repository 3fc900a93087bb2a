"""What models say of their parameters: which is the output embedding, which groups an optimizer takes."""

from coupled_adam.models.groups import param_groups
from coupled_adam.models.naming import name_checkpoint

__all__ = ["name_checkpoint", "param_groups"]
