"""Back-propagating the parts of a loss one by one, as they come, inside a step that knows one loss and one backward.

`Trainer`, DDP, FSDP and gradient scalers all expect a forward pass that returns a loss and a backward pass that leaves
gradients in the parameters, in that order. `early_gradients` computes the gradient of a part at once, which frees
what the part kept for it, and returns a scalar that is a loss like any other to the rest of the world: its backward
pass passes the gradients on, multiplied by the factor that arrives (the loss scale, one over the accumulation steps).
Gradients are synchronized there, in the stock way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .upstream import multiply_all


def early_gradients(
    loss: Tensor, parameters: Sequence[nn.Parameter], scale: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return a scalar loss as one whose gradients are known; its graph is freed here.

    Args:
        loss (`Tensor`): Scalar; no other loss of the step may use these parameters, nor this one others.
        parameters (`Sequence[nn.Parameter]`): What it depends on. Those that it does not use get zeros.
        scale (`Callable`, *optional*): The loss scale, as a function of a tensor (`GradScaler.scale`): float16
            gradients would underflow without. It is divided out again, and the later backward pass multiplies by its
            own. Default: none.
    """
    if not loss.requires_grad:
        return loss.detach()
    seed = torch.ones_like(loss)
    seed = scale(seed) if scale else seed
    with torch.autocast(loss.device.type, enabled=False):  # the backward pass runs in the precision of the forward
        gradients = torch.autograd.grad(loss, parameters, seed, allow_unused=True, materialize_grads=True)
    return _Known.apply(loss.detach(), seed, gradients, *parameters)


class _Known(torch.autograd.Function):
    """Number whose gradients, multiplied by `seed`, are known."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, seed: Tensor, gradients: tuple[Tensor, ...], *parameters: nn.Parameter
    ) -> Tensor:
        ctx.seed, ctx.gradients = seed, gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *multiply_all(gradients, factor / ctx.seed)
