"""The check of arguments, and kernels that make linear attention faster where they run; both stay at home."""

from .arguments import checked, checked_bounds
from .backends import Backend, choose_backend
from .dispatch import linear_attention

__all__ = ["Backend", "checked", "checked_bounds", "choose_backend", "linear_attention"]
