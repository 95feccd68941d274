"""Back-propagating the parts of a loss one by one, as they come, inside a step that knows one loss and one backward.

`Trainer`, DDP, FSDP and gradient scalers all expect a forward pass that returns a loss and a backward pass that leaves
gradients in the parameters, in that order. `EarlyGradients` computes the gradient of each part at once, which frees
what the part kept for it, and puts all of them behind one scalar: to the rest of the world that scalar is a loss like
any other, and its backward pass hands the gradients on, multiplied by the factor that arrives (the loss scale, one
over the accumulation steps). Gradients are synchronized there, once, in the stock way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .upstream import multiply_all


class EarlyGradients:
    """Sum of losses, each with parameters of its own.

    Args:
        scale (`Callable`, *optional*): The loss scale, as a function of a tensor (`GradScaler.scale`): float16
            gradients would underflow without. It is divided out again, and `backward` of the sum multiplies by its
            own. Default: none.
    """

    def __init__(self, scale: Callable[[Tensor], Tensor] | None = None):
        self.scale = scale
        self.total: Tensor | None = None
        self.parameters: list[nn.Parameter] = []
        self.gradients: list[Tensor] = []

    def add(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Add a scalar, whose graph is freed here. No later loss may use these parameters, nor this one others."""
        value = loss.detach()
        self.total = value if self.total is None else self.total + value
        if not loss.requires_grad:
            return
        seed = torch.ones_like(loss)
        with torch.autocast(loss.device.type, enabled=False):  # the backward pass runs in the precision of the forward
            gradients = torch.autograd.grad(
                loss, parameters, self.scale(seed) if self.scale else seed, allow_unused=True, materialize_grads=True
            )
        self.parameters += parameters
        self.gradients += gradients

    def loss(self) -> Tensor:
        """Return the sum as a scalar, with a gradient with respect to all the parameters."""
        assert self.total is not None
        seed = torch.ones_like(self.total)
        seed = self.scale(seed) if self.scale else seed
        return _Known.apply(self.total, seed, self.gradients, *self.parameters)


class _Known(torch.autograd.Function):
    """Number whose gradients, multiplied by `seed`, are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, seed: Tensor, gradients: list[Tensor], *parameters: nn.Parameter) -> Tensor:
        ctx.seed, ctx.gradients = seed, gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple:
        gradients, ctx.gradients = ctx.gradients, None
        if not gradients:
            return None, None, None
        return None, None, None, *multiply_all(gradients, factor / ctx.seed)
