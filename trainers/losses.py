"""The alignment losses as pure functions: tensors in, named components out.

Both are relative: the squared error is divided by the teacher's own variance, a constant that the trainers measure
once (`teacher_variance`), so that 0.1 means "a tenth of the signal is wrong" in every block and every model. The paper
says MSE and no more; the division is ours, so that blocks and token groups weigh alike whatever their scale.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def teacher_variance(target: Tensor) -> Tensor:
    """Variance of a target over everything but its channels, averaged over the channels.

    Subtracting each channel's mean makes a loss of 1 mean "no better than a constant vector".

    Args:
        target (`Tensor`): `(..., channels)`.

    Returns:
        `Tensor`: scalar in float32 and above zero.
    """
    rows = target.detach().float().flatten(0, -2)
    return rows.var(dim=0, correction=0).mean().clamp(min=1e-12)


def attention_alignment_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], variances: Sequence[Tensor | float]
) -> dict[str, Tensor]:
    """Stage 1: relative squared error of every block's attention output, summed over the blocks.

    Blocks share no parameters here, so the sum trains each as if it were alone.

    Args:
        students (`Sequence[Tensor]`): One `(batch, tokens, hidden_size)` per linear block.
        teachers (`Sequence[Tensor]`): The same of the softmax teacher.
        variances (`Sequence`): `teacher_variance` per block.

    Returns:
        `dict`: `loss`, and the tensor `blocks` with one relative error per block, detached.
    """
    errors = torch.stack(
        [
            F.mse_loss(student.float(), teacher.float()) / variance
            for student, teacher, variance in zip(students, teachers, variances, strict=True)
        ]
    )
    return {"loss": errors.sum(), "blocks": errors.detach()}


def feature_alignment_loss(
    student: Tensor,
    teacher: Tensor,
    token_groups: Mapping[str, slice],
    variances: Mapping[str, Tensor | float],
    weights: Mapping[str, float],
    kind: str = "mse",
) -> dict[str, Tensor]:
    """Stage 2: how far the student's final features are from the teacher's, per token group.

    - `"mse"`: squared error over the teacher's variance in the group.
    - `"cosine"`: `1 - cos` per token plus 0.1 smooth-L1 on features scaled to unit variance (after IronViT, which
      weighs 0.9 and 0.1 on patches).

    Args:
        student (`Tensor`), teacher (`Tensor`): `(batch, tokens, hidden_size)`.
        token_groups (`Mapping[str, slice]`): See `modeling_adala.families.token_groups`.
        variances (`Mapping`): `teacher_variance` per group.
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
