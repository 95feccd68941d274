"""Softmax regression on frozen features: the probe of an evaluation, and the start of a new head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def fit_softmax_regression(
    layer: nn.Linear | nn.Conv2d,
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    iterations: int = 100,
    weight_decay: float = 1e-4,
) -> None:
    """Fit a layer to class probabilities, from zero, by L-BFGS.

    The problem is convex, and all rows are seen at once: no learning rate, no order, the same figures every time.

    Args:
        layer (`nn.Linear` or `nn.Conv2d`): Is fitted in place; a convolution has 1x1 kernels.
        features (`Sequence[Tensor]`): Inputs, channels second: `(n, channels, ...)`. In parts, which bound the memory
            of the class scores.
        targets (`Sequence[Tensor]`): Probabilities of the classes, `(n, classes, ...)`; rows of zeros do not count.
        iterations (`int`, *optional*, defaults to 100): L-BFGS iterations at most.
        weight_decay (`float`, *optional*, defaults to 1e-4): Weight of half the squared norm of the weights.
    """
    total = sum(target.sum() for target in targets)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight_decay / 2 * layer.weight.square().sum()
        loss.backward()
        for x, target in zip(features, targets, strict=True):
            part = -(target * layer(x).log_softmax(dim=1)).sum() / total
            part.backward()
            loss = loss + part.detach()
        return loss.detach()

    optimizer.step(closure)
