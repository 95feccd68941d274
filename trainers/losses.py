"""The alignment losses as pure functions.

Both are relative: the squared error is divided by the teacher's own variance, a constant that the trainers measure
once (`TeacherVariance`), so that 0.1 means "a tenth of the signal is wrong" in every block and every model. The paper
says MSE and no more; the division is ours, so that blocks and token groups of any scale weigh alike.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class TeacherVariance:
    """Variance of a target over all but its channels, averaged over the channels; measured batch by batch.

    Subtracting each channel's mean makes a loss of 1 mean "no better than a constant vector". Means and squared
    deviations of the batches are joined in float64 (Chan, Golub and LeVeque 1979), so that nothing of a batch is kept.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.mean: Tensor | None = None
        self.deviations: Tensor | None = None

    def add(self, target: Tensor) -> None:
        """Add a target `(..., channels)`."""
        rows = target.detach().float().flatten(0, -2)
        variance, mean = (x.cpu().double() for x in torch.var_mean(rows, dim=0, correction=0))
        count, deviations = len(rows), variance * len(rows)
        if self.mean is None or self.deviations is None:
            self.rows, self.mean, self.deviations = count, mean, deviations
            return
        total, difference = self.rows + count, mean - self.mean
        self.deviations += deviations + difference.square() * (self.rows * count / total)
        self.mean += difference * (count / total)
        self.rows = total

    def value(self) -> Tensor:
        """Return the variance so far, a scalar in float32, above zero."""
        assert self.deviations is not None
        return (self.deviations / self.rows).mean().float().clamp(min=1e-12)


def attention_alignment_loss(student: Tensor, teacher: Tensor, variance: Tensor | float) -> Tensor:
    """Return the loss of stage 1: the relative squared error of the attention output of one block.

    Args:
        student (`Tensor`), teacher (`Tensor`): `(batch, tokens, hidden_size)`.
        variance (`Tensor` or `float`): `TeacherVariance` of the block.

    Returns:
        `Tensor`: scalar in float32.

    Example:

    ```python
    student, teacher = torch.randn(2, 2, 197, 64)
    loss = attention_alignment_loss(student, teacher, teacher.var())
    ```
    """
    return F.mse_loss(student.float(), teacher.float()) / variance


def alignment_loss_before_projection(
    student: Tensor, teacher: Tensor, gram: Tensor, variance: Tensor | float
) -> Tensor:
    """Return `attention_alignment_loss`, from the inputs of an output projection W that student and teacher share.

    With d the difference, the squared error of the outputs is |W d|^2 = d G d^T and its gradient 2 d G, where
    G = W^T W: one product, where the projection, its backward pass and the losses in float32 take three times as long.

    Args:
        student (`Tensor`), teacher (`Tensor`): `(batch, tokens, channels)`; a bias cancels out.
        gram (`Tensor`): `(channels, channels)`, W^T W over the number of outputs.
        variance (`Tensor` or `float`): `TeacherVariance` of the block, after the projection.

    Returns:
        `Tensor`: scalar in float32 (float64 for such inputs).
    """
    return _QuadraticForm.apply(student, teacher, gram) / variance


class _QuadraticForm(torch.autograd.Function):
    """Mean over all rows of d G d^T, d = x - y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gram: Tensor) -> Tensor:
        difference = (x - y).flatten(0, -2)
        product = difference @ gram
        ctx.save_for_backward(product)
        ctx.shape = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.dot(difference.flatten().to(dtype), product.flatten().to(dtype)) / len(difference)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (product,) = ctx.saved_tensors
        factor = (2 / len(product) * gradient).to(product.dtype)
        return (product * factor).view(ctx.shape), None, None


def feature_alignment_loss(
    student: Tensor,
    teacher: Tensor,
    token_groups: Mapping[str, slice],
    variances: Mapping[str, Tensor | float],
    weights: Mapping[str, float],
    kind: str = "mse",
) -> dict[str, Tensor]:
    """Return the loss of stage 2: the distance of the student's final features from the teacher's, per token group.

    - `"mse"`: squared error over the teacher's variance in the group.
    - `"cosine"`: `1 - cos` per token plus 0.1 smooth-L1 on features scaled to unit variance (after IronViT, which
      weighs 0.9 and 0.1 on patches).

    Args:
        student (`Tensor`), teacher (`Tensor`): `(batch, tokens, hidden_size)`.
        token_groups (`Mapping[str, slice]`): See `modeling_adala.inspection.towers.token_groups`.
        variances (`Mapping`): `TeacherVariance` per group.
        weights (`Mapping`): Weight per group; the loss is the weighted mean over the groups.

    Returns:
        `dict`: `loss` and one component per group, detached.
    """
    components, total = {}, sum(weights[name] for name in token_groups)
    loss = student.new_zeros((), dtype=torch.float32)
    for name, group in token_groups.items():
        ours, theirs = student[:, group].float(), teacher[:, group].float()
        if kind == "mse":
            error = F.mse_loss(ours, theirs) / variances[name]
        else:
            deviation = torch.as_tensor(variances[name]).sqrt()
            cosine = 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()
            error = cosine + 0.1 * F.smooth_l1_loss(ours / deviation, theirs / deviation)
        loss = loss + weights[name] / total * error
        components[name] = error.detach()
    return {"loss": loss, **components}
