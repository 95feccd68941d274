"""Kernels that make linear attention faster where they run; the PyTorch operator needs none of them."""

from .backends import Backend, choose_backend
from .dispatch import linear_attention

__all__ = ["Backend", "choose_backend", "linear_attention"]
